"""The view in a terminal: what each sequence sees, beside the one pool that they share.

    LOGICAL: what each sequence sees         PHYSICAL: 3 of 8 blocks in use, 5 free
    A: 6 tokens                               0 A   │Four │score│and  │seven│ x1
     0 │Four │score│and  │seven│ → 0  4/4     1 B   │It   │was  │the  │·    │ x1
     1 │years│ago  │·    │·    │ → 2  2/4     2 A   │years│ago  │·    │·    │ x1
    B: 3 tokens                               3     │ free
     0 │It   │was  │the  │·    │ → 1  3/4     4     │ free

Letters carry the meaning and colour repeats it, so that the view can be read in a pipe and by any eyes.
Many blocks are drawn as a map, one sign a block.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from minipaged.memory.trace import Trace
from minipaged.viz.colours import colours, sign
from minipaged.viz.replay import at_step, steps
from minipaged.viz.snapshot import Snapshot
from minipaged.viz.terminal_rows import Rows
from minipaged.viz.words import in_words, visible

TWO_COLUMNS_FROM = 68  # characters of width: below, the physical view stands under the logical one
GAP = 3  # characters between the columns
ROWS_UP_TO = 40  # blocks in use: with more of them, the pool is drawn as a map

_IN_ASCII = str.maketrans("│→█░·…⏎⇥␣", "|>#-.~/>_")


def show(trace: Trace, console: Console, step: int | None = None) -> None:
    """Print each step of a trace, or that one alone: its events as sentences, and the drawing of the state after it.

    Raises ValueError where the trace has no such step, or at an event that contradicts the state.
    """
    for snapshot in steps(trace) if step is None else [at_step(trace, step)]:
        console.print(Text(f"Step {snapshot.step}", style="bold"))
        for event in snapshot.events:
            console.print(Padding(Text(in_words(event)), (0, 0, 0, 2), expand=False))
        console.print()
        console.print(draw(snapshot))
        console.print()


def draw(snapshot: Snapshot, width: int | None = None) -> "Drawing":
    """The snapshot for `console.print`, never wider than `width` characters (None: the console's width)."""
    if width is not None and width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    return Drawing(snapshot, width)


class Drawing:
    """A rich renderable: a list of lines, as wide as there is room for."""

    def __init__(self, snapshot: Snapshot, width: int | None = None):
        self.snapshot = snapshot
        self.width = width

    def lines(self, width: int) -> list[Text]:
        """The lines of the drawing for a given width."""
        if len(self.snapshot.by_block()) + len(self.snapshot.by_host_block()) > ROWS_UP_TO:
            return _map(self.snapshot, width)
        if width < TWO_COLUMNS_FROM:
            rows = Rows(self.snapshot, width)
            return [*rows.logical(), Text(), *rows.physical()]
        column = (width - GAP) // 2
        rows = Rows(self.snapshot, column)
        return _beside(rows.logical(), rows.physical(), column)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(self.width or options.max_width, options.max_width)
        for line in self.lines(width):
            if options.ascii_only:
                line.plain = line.plain.translate(_IN_ASCII).encode("ascii", "replace").decode("ascii")
            line.rstrip()
            line.truncate(width, overflow="crop")
            line.no_wrap, line.overflow = True, "crop"
            yield line


def _beside(left: list[Text], right: list[Text], column: int) -> list[Text]:
    lines = []
    for number in range(max(len(left), len(right))):
        line = left[number] if number < len(left) else Text()
        line.truncate(column, overflow="ellipsis", pad=True)
        line = Text().append_text(line).append(" " * GAP)
        lines.append(line.append_text(right[number]) if number < len(right) else line)
    return lines


def _map(snapshot: Snapshot, width: int) -> list[Text]:
    """Block tables as lists of numbers, and the pool as one sign a block: its owner's letter, or how it has none."""
    shades, labels, blocks = colours(snapshot), snapshot.labels, snapshot.by_block()
    lines = [Text("LOGICAL: the block table of each sequence", style="bold")]
    for seq in snapshot.sequences:
        name = labels[seq] if seq == labels[seq] else f"{labels[seq]} = {visible(seq)}"
        line = Text(name, style="bold").append(f": {snapshot.num_tokens.get(seq, 0)} tokens →", style="not bold")
        for logical in range(snapshot.num_logical(seq)):
            line.append(f" {snapshot.place(seq, logical)}", style="not bold")
        lines += line.wrap(Console(width=width), width)
    in_use = len(blocks) + len(snapshot.taken)
    title = f"PHYSICAL: {in_use} of {snapshot.num_blocks} in use, {snapshot.num_free} free"
    lines += [Text(), Text(title, style="bold")]
    number_width = len(str(snapshot.num_blocks - 1))
    per_row = max(1, min(64, width - number_width - 1))
    for start in range(0, snapshot.num_blocks, per_row):
        row = range(start, min(start + per_row, snapshot.num_blocks))
        if not any(block in blocks for block in row):
            continue
        line = Text(f"{start:>{number_width}} ")
        for block in row:
            letter, shade = sign(blocks.get(block), labels, shades)
            line.append(letter if len(letter) == 1 else "?", style=f"#111111 on {shade}" if shade else "dim")
        lines.append(line)
    legend = (
        "a letter: its owner, ?: one of two letters, +: shared, #: no owner but kept, ·: free; free rows are left out"
    )
    lines += Text(legend, style="dim").wrap(Console(width=width), width)
    if snapshot.num_host_blocks:
        lines.append(Text(f"HOST: {len(snapshot.by_host_block())} of {snapshot.num_host_blocks} blocks in use"))
    return lines


@contextmanager
def progress_bar(wanted: bool | None, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of tokens, where there is a terminal or it is wanted; yields a function of the number of new tokens."""
    console = Console(stderr=True)
    hidden = not (console.is_terminal if wanted is None else wanted)
    columns = TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=total)
        yield lambda number: bar.advance(task, number)
