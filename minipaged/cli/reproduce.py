"""The paper's figures on the command line."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def reproduce(
    experiments: Annotated[
        list[str] | None, typer.Argument(metavar="[a b c d e f g h scale]", help="which ones (default: a to h)")
    ] = None,
    seed: Annotated[int, typer.Option(help="the first seed; the others follow it")] = 0,
    seeds: Annotated[int, typer.Option(help="how many seeds: a figure is their mean, and its spread is theirs")] = 5,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="leave JSON, CSV, Markdown and SVG files there")
    ] = None,
    figures: Annotated[bool, typer.Option("--figures/--no-figures", help="SVG files, where there is --out")] = True,
    processes: Annotated[int | None, typer.Option(help="how many at once (default: one for each core)")] = None,
) -> None:
    """The figures of the PagedAttention paper again, from our own scheduler and allocators: 1.5 minutes on 2 cores.

    Example: minipaged reproduce a b --seeds 2 --no-figures
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from minipaged.simulator import reproduce as simulator
    from minipaged.simulator.figures import check_matplotlib
    from minipaged.simulator.report import Report, to_table

    names = simulator.chosen(experiments or [])
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    if processes is not None and processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    if out is not None and figures:
        check_matplotlib()
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is refused before two minutes have passed
    console, chosen_seeds = Console(), range(seed, seed + seeds)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bars = {name: progress.add_task(f"experiment {name}", total=None, start=False) for name in names}

        def on_jobs(name: str, done: int, total: int) -> None:
            progress.start_task(bars[name])
            progress.update(bars[name], completed=done, total=total)

        def on_report(report: Report) -> None:
            console.print(to_table(report))
            for note in report.notes:
                console.print(note)
            if out is not None:
                paths = simulator.write(report, chosen_seeds, out, figures)
                console.print(f"written: {', '.join(map(str, paths))}", soft_wrap=True, highlight=False)
            console.print()

        simulator.reproduce(names, chosen_seeds, on_report, on_jobs, processes)
