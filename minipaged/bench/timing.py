"""How every benchmark times: what is compared takes turns, round after round, and is shown as best, median and worst.

So a noisy moment hits all alike. Each round has another order, since a run changes the caches and the clock of the
processor for the next. The best round says what the code can do, median and worst say how quiet the machine was. The
processor stands beside the figures, with its wide instructions: another one gives others.
"""

import gc
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from minipaged.processor import processor

SPREAD = ("best", "median", "worst")


class Settings(NamedTuple):
    """What `minipaged bench` was told. A part uses what has a meaning for it."""

    rounds: int = 5
    threads: int | None = None
    scale: float = 1.0
    systems: Sequence[str] = ()  # none: all that there are


def turns(names: Iterable[str], rounds: int, what: str = "") -> Iterator[tuple[int, str]]:
    """(round, name): every name once a round, with a progress bar. Round 0 warms up, and does not count."""
    order, rng = list(names), random.Random(0)
    with bar(what, len(order) * (rounds + 1)) as advance:
        for number in range(rounds + 1):
            rng.shuffle(order)
            for name in order:
                yield number, name
                advance()


def in_turn(runs: Mapping[str, Callable[[], object]], rounds: int, what: str = "") -> dict[str, list[float]]:
    """Seconds of every run in each round. A run that returns a float has timed itself, without what it set up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    try:
        for number, name in turns(runs, rounds, what):
            start = time.perf_counter()
            found = runs[name]()
            spent = found if isinstance(found, float) else time.perf_counter() - start
            if number:
                seconds[name].append(spent)
    finally:
        gc.enable()
    return seconds


def spread(values: Sequence[float], digits: int = 2) -> list[str]:
    """Cells under SPREAD."""
    return [f"{value:,.{digits}f}" for value in (min(values), median(values), max(values))]


def numbers_table(title: str, *columns: str, words: int = 1) -> Table:
    """A table whose first `words` columns are words; the others are numbers, and stand at the right."""
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < words else "right")
    return table


def this_machine() -> dict[str, Any]:
    """What a file of figures says of where they were taken."""
    return {
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "cores": os.cpu_count(),
        "processor": processor(),
    }


def save(path: Path | None, found: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on a terminal, drawn between two turns alone: a thread that draws would take a core."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    how: dict[str, Any] = {"transient": True, "auto_refresh": False, "disable": not console.is_terminal}
    with Progress(*columns, console=console, **how) as progress:
        task = progress.add_task(what, total=total)

        def advance() -> None:
            progress.update(task, advance=1, refresh=True)

        yield advance
