"""The rows of the terminal view, for a column of a given width: one row a logical block, one row a physical block.

     logical row:    number, slots, where it lies, fill          0 │Four │score│and  │seven│ → 5 4/4
     physical row:   number, owners, slots, references           5 AB  │Four │score│and  │seven│ x2

Slots hold a word each while at least 3 characters fit; else a block is one box with its words, or a bar of its fill.
"""

from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from minipaged.cdiv import cdiv
from minipaged.viz.colours import SHARED, colours
from minipaged.viz.snapshot import Owner, Snapshot
from minipaged.viz.words import joined, visible

FREE_ROWS_UP_TO = 16  # blocks in the pool: in a larger one, free blocks are counted and not listed
SLOT_WIDTHS = (3, 12)  # characters for one token, least and most
BOX_WIDTH = 64  # characters for one block that is not split into slots, at most
BAR_WIDTH = 24  # the same where it holds no words
OWNERS_UP_TO = 9  # characters for the letters of a block's owners


class Rows:
    """Both views as lists of lines, each at most `width` characters wide where `width` leaves room for the numbers."""

    def __init__(self, snapshot: Snapshot, width: int):
        self.snapshot, self.labels, self.colours = snapshot, snapshot.labels, colours(snapshot)
        self.blocks, self.host_blocks = snapshot.by_block(), snapshot.by_host_block()
        self.number_width = max(2, len(str(snapshot.num_blocks - 1)), len(f"h{max(self.host_blocks, default=0)}"))
        letters = [self._letters(owners, block in snapshot.cached) for block, owners in self.blocks.items()]
        letters += [self._letters(owners) for owners in self.host_blocks.values()]
        self.owners_width = min(max([3, *map(len, letters)]), OWNERS_UP_TO)
        self.fill_width = len(f"{snapshot.block_size}/{snapshot.block_size}")
        self._share_out(width)

    def _share_out(self, width: int) -> None:
        """What is left of the width, beside numbers and letters, goes to the slots."""
        after_logical = 3 + self.number_width + 1 + self.fill_width
        after_physical = self.owners_width + 1 + 3
        room = width - self.number_width - 1 - max(after_logical, after_physical)
        words = [*self.snapshot.texts.values(), *self.snapshot.cached_texts.values()]
        longest = max((cell_len(visible(word)) for texts in words for word in texts), default=0)
        least, most = SLOT_WIDTHS
        fits = (room - 1) // self.snapshot.block_size - 1
        self.slot_width = min(max(longest, least), most, fits)
        self.in_slots = fits >= least
        self.box_width = max(1, min(room - 2, BOX_WIDTH if longest else BAR_WIDTH))

    def logical(self) -> list[Text]:
        """Each sequence: its logical blocks, and beside them its block table."""
        lines = [Text("LOGICAL: what each sequence sees", style="bold")]
        after = 3 + self.number_width + 1 + self.fill_width
        lines.append(
            self._heading("logical block", "→ physical, fill", self.number_width + 1 + self._slots_width() + after)
        )
        for seq in self.snapshot.sequences:
            label, num_tokens = self.labels[seq], self.snapshot.num_tokens.get(seq, 0)
            name = label if seq == label else f"{label} = {visible(seq)}"
            line = Text(f"{name}", style="bold")
            lines.append(line.append(f": {num_tokens} token{'s' * (num_tokens != 1)}", style="not bold"))
            lines += [self._logical_row(seq, logical) for logical in range(self.snapshot.num_logical(seq))]
        if not self.snapshot.sequences:
            lines.append(Text("no sequence holds a block", style="dim"))
        return lines

    def physical(self) -> list[Text]:
        """The pool, the copies just made, the host pool, and what the signs mean."""
        snapshot = self.snapshot
        in_use = len(self.blocks) + len(snapshot.taken)
        title = f"PHYSICAL: {in_use} of {snapshot.num_blocks} in use, {snapshot.num_free} free"
        lines = [Text(title, style="bold")]
        before = self.number_width + 1 + self.owners_width + 1
        lines.append(self._heading("block, owners", "tables", before + self._slots_width() + 3))
        shown = sorted({*self.blocks, *snapshot.taken})
        for block in range(snapshot.num_blocks) if snapshot.num_blocks <= FREE_ROWS_UP_TO else shown:
            if block in snapshot.taken:
                row = Text(f"{block:>{self.number_width}} {'':{self.owners_width}} │ {snapshot.taken[block]}")
            elif block in self.blocks:
                cached, words = block in snapshot.cached, snapshot.block_words(block)
                row = self._physical_row(str(block), self.blocks[block], snapshot.block_fill(block), words, cached)
            else:
                row = Text(f"{block:>{self.number_width}} {'':{self.owners_width}} │ free", style="dim")
            lines.append(row)
        lines += [Text(f"copied: block {source} → block {target}", style="bold") for source, target in snapshot.copies]
        if any(len(owners) > 1 for owners in self.blocks.values()):
            lines.append(Text("x2: two block tables name it", style="dim"))
        if snapshot.cached:
            lines.append(Text("#: kept, can be found by its tokens", style="dim"))
        if snapshot.num_host_blocks:
            lines += [Text(), *self._host()]
        return lines

    def _host(self) -> list[Text]:
        used, size = len(self.host_blocks), self.snapshot.num_host_blocks
        lines = [Text(f"HOST: {used} of {size} in use, {size - used} free", style="bold")]
        for block, owners in self.host_blocks.items():
            words = self.snapshot.words(owners[0].seq, owners[0].logical)
            lines.append(self._physical_row(f"h{block}", owners, owners[0].fill, words))
        return lines

    def _logical_row(self, seq: str, logical: int) -> Text:
        fill = self.snapshot.fill(seq, logical)
        row = Text(f"{logical:>{self.number_width}} ")
        row.append_text(self._slots(self.snapshot.words(seq, logical), fill, self.colours[seq]))
        where = self.snapshot.place(seq, logical)
        return row.append(f" → {where:<{self.number_width}} {fill}/{self.snapshot.block_size}")

    def _physical_row(
        self, number: str, owners: Sequence[Owner], fill: int, words: Sequence[str], cached: bool = False
    ) -> Text:
        shades = {self.colours[owner.seq] for owner in owners}
        colour = shades.pop() if len(shades) == 1 else SHARED if shades else None
        row = Text(f"{number:>{self.number_width}} ")
        row.append(fit(self._letters(owners, cached), self.owners_width) + " ", style="bold")
        return row.append_text(self._slots(words, fill, colour)).append(f" x{len(owners)}")

    def _letters(self, owners: Sequence[Owner], cached: bool = False) -> str:
        labels = [self.labels[owner.seq] for owner in owners]
        return ("" if all(len(label) == 1 for label in labels) else ",").join(labels) + "#" * cached

    def _slots_width(self) -> int:
        return 1 + self.snapshot.block_size * (self.slot_width + 1) if self.in_slots else self.box_width + 2

    @staticmethod
    def _heading(left: str, right: str, width: int) -> Text:
        return Text(f"{left}{right:>{max(len(right) + 1, width - len(left))}}", style="dim")

    def _slots(self, words: Sequence[str], fill: int, colour: str | None) -> Text:
        """The slots of one block, the filled ones first; colour None: it has no owner."""
        size, shown = self.snapshot.block_size, [visible(word) for word in words]
        on_colour = f"#111111 on {colour}" if colour else "dim"
        if not self.in_slots:
            if any(shown):
                return Text("│").append(fit(joined(words), self.box_width), style=on_colour).append("│")
            bar = cdiv(fill * self.box_width, size)
            row = Text("│").append("█" * bar, style=colour or "dim")
            return row.append("░" * (self.box_width - bar), style="dim").append("│")
        row = Text("│")
        for offset in range(size):
            word = shown[offset] if offset < len(shown) else ""
            if offset >= fill:
                row.append(fit("·", self.slot_width), style="dim")
            elif word:
                row.append(fit(word, self.slot_width), style=on_colour)
            else:
                row.append("█" * self.slot_width, style=colour or "dim")
            row.append("│")
        return row


def fit(text: str, width: int) -> str:
    """Text cut or padded to exactly `width` characters of a terminal; what is cut off shows as an ellipsis."""
    if cell_len(text) > width:
        text = set_cell_size(text, width - 1).rstrip() + "…"
    return set_cell_size(text, width)
