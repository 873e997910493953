"""The picture of a book page, as SVG: logical blocks, block table, physical blocks, from left to right.

    A  6 tokens                                physical filled           owners  references
    0 [Four|score|and |seven]                  [  5   |  4  ] ---------> 5 [Four|score|and|seven]  [A][B]      2
    1 [years|ago |    |     ]                  [  1   |  2  ] ---\\       ...

Nothing in it is fetched or run: no script, no font, no link. The same state is in <desc> as sentences, since a screen
reader reads a picture (role="img") through its title and description.
"""

from collections.abc import Sequence

from minipaged.viz import svg_parts as parts
from minipaged.viz.colours import PALETTE, colours
from minipaged.viz.snapshot import Owner, Snapshot
from minipaged.viz.svg_map import to_map
from minipaged.viz.svg_parts import MARGIN
from minipaged.viz.words import columns, joined, visible

ROWS_UP_TO = 64  # blocks in use: more of them are drawn as a map
FREE_ROWS_UP_TO = 24  # blocks in the pool: in a larger one, free blocks are counted and not drawn
SLOTS_UP_TO = 8  # tokens a block: a larger one is drawn as one box with its words or its fill
SLOT_WIDTHS = (26, 78)  # pixels for one token, least and most
BOX_WIDTH = 240  # pixels of a block that is drawn as one box
HEADED = 124  # pixels: a block is at least as wide as the heading above its column
ROW, HEADING = 32, 30  # pixels
CELL, LINKS = 62, 100  # pixels: a cell of the block table, the space for the curves
OWNERS_UP_TO = 6  # chips at one block


def to_svg(snapshot: Snapshot) -> str:
    """The snapshot as one SVG element, valid XML on its own and inside HTML."""
    if len(snapshot.by_block()) + len(snapshot.by_host_block()) > ROWS_UP_TO:
        return to_map(snapshot)
    return _Page(snapshot).svg()


class _Page:
    """Lays the rows out from the top, and then draws the curves between them."""

    def __init__(self, snapshot: Snapshot):
        self.snapshot, self.labels, self.colours = snapshot, snapshot.labels, colours(snapshot)
        self.place = {seq: place for place, seq in enumerate(self.labels)}
        texts = [*snapshot.texts.values(), *snapshot.cached_texts.values()]
        longest = max((columns(visible(word)) for words in texts for word in words), default=0)
        self.in_slots = snapshot.block_size <= SLOTS_UP_TO
        least, most = SLOT_WIDTHS
        self.slot = max(min(max(longest * parts.CHAR_WIDTH + 16, least), most), HEADED / snapshot.block_size)
        self.block_width = self.slot * snapshot.block_size if self.in_slots else BOX_WIDTH
        self.number = 30 + parts.CHAR_WIDTH * len(str(snapshot.num_blocks - 1))  # a dot, and a block's number
        self.table_x = MARGIN + self.number + self.block_width + 16
        self.pool_x = self.table_x + 2 * CELL + LINKS
        self.owners_x = self.pool_x + self.number + self.block_width + 12
        blocks, hosts = snapshot.by_block(), snapshot.by_host_block()
        most_owners = max([2, *(len(owners) for owners in (*blocks.values(), *hosts.values()))])
        self.right_x = self.owners_x + (min(most_owners, OWNERS_UP_TO) + 1) * (parts.CHIP + 4) + 80
        self.width = self.right_x + (54 if snapshot.copies else 0) + MARGIN
        self.changed = {event[key] for event in snapshot.events for key in ("block", "target") if key in event}
        self.drawn: list[str] = []
        self.links: list[tuple[str, str, float]] = []  # sequence, place, middle of its row

    def svg(self) -> str:
        self.drawn, top = parts.heading(self.snapshot, self.width)
        left = self._sequences(top)
        middles, right = self._pool(top)
        self.drawn += self._curves(middles)
        return parts.page(self.snapshot, self.width, max(left, right) + MARGIN, self.drawn)

    def _sequences(self, y: float) -> float:
        """The left half: each sequence with its logical blocks and its block table. Returns the y below it."""
        self.drawn.append(parts.words(MARGIN, y + 14, "Logical blocks", "mp-strong"))
        self.drawn.append(parts.words(self.table_x, y + 14, "Block table", "mp-strong"))
        y += HEADING
        for seq in self.snapshot.sequences:
            self.drawn.append(parts.chip(MARGIN, y, self.labels[seq], self.colours[seq]))
            name = "" if seq == self.labels[seq] else f"{visible(seq)}, "
            held = self.snapshot.num_tokens.get(seq, 0)
            text = f"{name}{held} token{'s' * (held != 1)}"
            self.drawn.append(parts.words(MARGIN + parts.CHIP + 8, y + 15, text, room=self.block_width))
            for x, heading in ((self.table_x, "physical"), (self.table_x + CELL, "filled")):
                self.drawn.append(parts.words(x + CELL / 2, y + 15, heading, "mp-soft", "middle"))
            y += parts.CHIP + 8
            for logical in range(self.snapshot.num_logical(seq)):
                self._logical_row(seq, logical, y)
                y += ROW
            y += 14
        if not self.snapshot.sequences:
            self.drawn.append(parts.words(MARGIN, y + 15, "no sequence holds a block", "mp-soft"))
            y += ROW
        return y

    def _logical_row(self, seq: str, logical: int, y: float) -> None:
        fill, place = self.snapshot.fill(seq, logical), self.snapshot.place(seq, logical)
        self.drawn.append(parts.words(MARGIN + self.number - 12, y + 16, str(logical), "mp-soft", "end"))
        self.drawn += self._block(MARGIN + self.number, y, fill, self.snapshot.words(seq, logical), [self.colours[seq]])
        for x, text in ((self.table_x, place), (self.table_x + CELL, f"{fill}/{self.snapshot.block_size}")):
            self.drawn.append(parts.box(x, y, CELL, parts.SLOT_HEIGHT, "mp-empty", 0))
            self.drawn.append(parts.words(x + CELL / 2, y + 16, text, "", "middle", room=CELL))
        self.links.append((seq, place, y + parts.SLOT_HEIGHT / 2))

    def _pool(self, y: float) -> tuple[dict[str, float], float]:
        """The right half: the pool, and under it the host pool. Returns the middle of each row, and the y below."""
        snapshot, blocks, middles = self.snapshot, self.snapshot.by_block(), dict[str, float]()
        count = f"{len(blocks)} of {snapshot.num_blocks} in use, {snapshot.num_free} free"
        y = self._pool_heading(y, "Physical blocks", count)
        for block in range(snapshot.num_blocks) if snapshot.num_blocks <= FREE_ROWS_UP_TO else blocks:
            middles[str(block)] = y + parts.SLOT_HEIGHT / 2
            if block in blocks:
                owners, cached = blocks[block], block in snapshot.cached
                self._pool_row(str(block), y, owners, snapshot.block_fill(block), snapshot.block_words(block), cached)
            else:
                x = self.pool_x + self.number
                self.drawn.append(parts.words(x - 10, y + 16, str(block), "mp-soft", "end"))
                self.drawn.append(parts.box(x, y, self.block_width, parts.SLOT_HEIGHT, "mp-free"))
                self.drawn.append(parts.words(x + 10, y + 16, "free", "mp-soft"))
            if block in self.changed:
                self.drawn.append(
                    parts.box(
                        self.pool_x + self.number - 3, y - 3, self.block_width + 6, parts.SLOT_HEIGHT + 6, "mp-new"
                    )
                )
            y += ROW
        if snapshot.num_free and snapshot.num_blocks > FREE_ROWS_UP_TO:
            text = f"and {snapshot.num_free} free blocks"
            self.drawn.append(parts.words(self.pool_x + self.number, y + 16, text, "mp-soft"))
            y += ROW
        if snapshot.cached:
            self.drawn.append(parts.words(self.pool_x + self.number, y + 12, "#: kept, found by its tokens", "mp-soft"))
            y += ROW
        if snapshot.num_host_blocks:
            hosts = snapshot.by_host_block()
            y = self._pool_heading(y + 10, "Host pool", f"{len(hosts)} of {snapshot.num_host_blocks} in use")
            for block, owners in hosts.items():
                middles[f"h{block}"] = y + parts.SLOT_HEIGHT / 2
                words = snapshot.words(owners[0].seq, owners[0].logical)
                self._pool_row(f"h{block}", y, owners, owners[0].fill, words)
                y += ROW
        return middles, y

    def _pool_heading(self, y: float, name: str, count: str) -> float:
        x = self.pool_x + self.number
        self.drawn.append(parts.words(x, y + 14, name, "mp-strong"))
        self.drawn.append(parts.words(self.owners_x, y + 14, "owners", "mp-soft"))
        self.drawn.append(parts.words(self.right_x - 6, y + 14, "references", "mp-soft", "end"))
        self.drawn.append(parts.words(x, y + HEADING + 15, count, "mp-soft"))
        return y + HEADING + parts.CHIP + 8

    def _pool_row(
        self, name: str, y: float, owners: Sequence[Owner], fill: int, words: Sequence[str], cached: bool = False
    ) -> None:
        x, seqs = self.pool_x + self.number, [owner.seq for owner in owners]
        shades = [self.colours[seq] for seq in seqs[:OWNERS_UP_TO]]
        self.drawn.append(parts.words(x - 10, y + 16, name, "mp-strong", "end"))
        self.drawn += self._block(x, y, fill, words, shades)
        chips: list[tuple[str, str | None]] = [(self.labels[seq], self.colours[seq]) for seq in seqs[:OWNERS_UP_TO]]
        chips += [("…", None)] * (len(seqs) > OWNERS_UP_TO) + [("#", None)] * cached
        for place, (letter, shade) in enumerate(chips):
            self.drawn.append(parts.chip(self.owners_x + place * (parts.CHIP + 4), y + 2, letter, shade))
        self.drawn.append(parts.words(self.right_x - 36, y + 16, f"{len(owners)}", "mp-strong", "end"))

    def _block(self, x: float, y: float, fill: int, words: Sequence[str], shades: Sequence[str]) -> list[str]:
        """One block: its filled slots in the colours of its owners, with their words."""
        size, height = self.snapshot.block_size, parts.SLOT_HEIGHT
        shown = [visible(word) for word in words]
        drawn = [parts.box(x, y, self.block_width, height, "mp-empty", 0)]
        ink, width = "mp-on" if shades else "", self.block_width * fill / size
        if fill:
            drawn.append(parts.filled(x, y, width, height, shades))
        if not self.in_slots:
            drawn.append(parts.words(x + 6, y + 15, joined(words), ink, room=width - 10))
        for offset in range(size) if self.in_slots else ():
            left = x + offset * self.slot
            if offset < min(fill, len(shown)):
                drawn.append(parts.words(left + self.slot / 2, y + 15, shown[offset], ink, "middle", self.slot - 4))
            drawn.append(parts.box(left, y, self.slot, height, "mp-edge", 0))
        return [*drawn, parts.box(x, y, self.block_width, height, "mp-edge", 0)]

    def _curves(self, middles: dict[str, float]) -> list[str]:
        start, end = self.table_x + 2 * CELL, self.pool_x + 4
        drawn = [
            parts.link((start, y), (end, middles[place]), self.place[seq] % len(PALETTE))
            for seq, place, y in self.links
            if place in middles
        ]
        for source, target in self.snapshot.copies:
            if str(source) in middles and str(target) in middles:
                y1, y2 = middles[str(source)], middles[str(target)]
                drawn.append(parts.copy_arrow(self.right_x, y1, y2, 40))
        return drawn
