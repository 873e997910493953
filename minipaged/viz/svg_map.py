"""The SVG of a large pool: one small square a block, with its owner's letter, and each block table as its numbers.

A  1100 tokens   [  0][  1][  2] ...          the block table: the physical block of each logical block
pool         0   [A][A][A][+][B][.] ...       +: shared, #: no owner but kept, empty: free
"""

from minipaged.cdiv import cdiv
from minipaged.viz import svg_parts as parts
from minipaged.viz.colours import colours, sign
from minipaged.viz.snapshot import Snapshot
from minipaged.viz.svg_parts import MARGIN
from minipaged.viz.words import visible

TABLE_ROW, TABLE_CELL = 18, 46  # entries of a block table in one row, and pixels of one
POOL_ROW, POOL_CELL = 32, 24  # blocks of the pool in one row, and pixels of one
ROW, LEFT = 24, MARGIN + 60  # pixels
WIDTH = LEFT + POOL_ROW * POOL_CELL + MARGIN + 60


def to_map(snapshot: Snapshot) -> str:
    """The snapshot as one SVG element whose height grows by a row for each 32 blocks."""
    shades, labels = colours(snapshot), snapshot.labels
    drawn, y = parts.heading(snapshot, WIDTH)
    drawn.append(parts.words(MARGIN, y + 14, "Block tables", "mp-strong"))
    y += 28
    for seq in snapshot.sequences:
        held, name = snapshot.num_tokens.get(seq, 0), "" if seq == labels[seq] else f"{visible(seq)}, "
        drawn.append(parts.chip(MARGIN, y, labels[seq], shades[seq]))
        drawn.append(parts.words(MARGIN + parts.CHIP + 8, y + 15, f"{name}{held} tokens", room=WIDTH - 80))
        y += ROW
        for logical in range(snapshot.num_logical(seq)):
            row, column = divmod(logical, TABLE_ROW)
            x = LEFT - 30 + column * TABLE_CELL
            drawn.append(parts.box(x, y + row * ROW, TABLE_CELL, ROW, "mp-empty", 0))
            place = snapshot.place(seq, logical)
            drawn.append(parts.words(x + TABLE_CELL / 2, y + row * ROW + 16, place, "", "middle", TABLE_CELL))
        y += cdiv(snapshot.num_logical(seq), TABLE_ROW) * ROW + 10
    blocks = snapshot.by_block()
    count = f"Physical blocks: {len(blocks)} of {snapshot.num_blocks} in use, {snapshot.num_free} free"
    drawn.append(parts.words(MARGIN, y + 14, count, "mp-strong"))
    y += 28
    for start in range(0, snapshot.num_blocks, POOL_ROW):
        row_of_blocks = range(start, min(start + POOL_ROW, snapshot.num_blocks))
        if not any(block in blocks for block in row_of_blocks):
            continue
        drawn.append(parts.words(LEFT - 10, y + 16, str(start), "mp-soft", "end"))
        for column, block in enumerate(row_of_blocks):
            x, (letter, shade) = LEFT + column * POOL_CELL, sign(blocks.get(block), labels, shades)
            if block in blocks:
                drawn.append(parts.filled(x, y, POOL_CELL, ROW, [shade] if shade else []))
                drawn.append(parts.words(x + POOL_CELL / 2, y + 16, letter, "mp-on" if shade else "", "middle"))
            drawn.append(parts.box(x, y, POOL_CELL, ROW, "mp-edge", 0))
        y += ROW
    legend = "a letter: its owner, +: shared, #: no owner but kept, empty: free; rows with no block in use are left out"
    drawn.append(parts.words(MARGIN, y + 20, legend, "mp-soft"))
    if snapshot.num_host_blocks:
        hosts = f"Host pool: {len(snapshot.by_host_block())} of {snapshot.num_host_blocks} in use (h0, h1, ...)"
        y += ROW
        drawn.append(parts.words(MARGIN, y + 20, hosts, "mp-strong"))
    return parts.page(snapshot, WIDTH, y + 20 + MARGIN, drawn)
