"""A trace, step by step, in a terminal: each event as a sentence, and the drawing after each step."""

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from minipaged.memory.trace import Trace
from minipaged.viz.replay import at_step, steps
from minipaged.viz.snapshot import Snapshot
from minipaged.viz.terminal import draw
from minipaged.viz.words import in_words


def show(trace: Trace, console: Console, every_event: bool = True, step: int | None = None) -> None:
    """Print the steps of a trace; every_event=False leaves the sentences out, step=N shows that step alone.

    Raises ValueError where the trace has no such step, or at an event that contradicts the state.
    """
    for snapshot in steps(trace) if step is None else [at_step(trace, step)]:
        show_step(snapshot, console, every_event)


def show_step(snapshot: Snapshot, console: Console, every_event: bool = True) -> None:
    """Print what happened in one step, and the state after it."""
    console.print(Text(f"Step {snapshot.step}", style="bold"))
    for event in snapshot.events if every_event else ():
        console.print(Padding(Text(in_words(event)), (0, 0, 0, 2), expand=False))
    console.print()
    console.print(draw(snapshot))
    console.print()
