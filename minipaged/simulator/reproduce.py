"""Chapter 11. All experiments, in several processes at once, and the files that they leave.

    minipaged reproduce            a to h
    minipaged reproduce a b        these two
    minipaged reproduce scale      10^3 to 10^5 requests in one run

An experiment is a function of seeds and of `run`, which takes jobs (a function and its arguments) and gives back what
they return. So an experiment does not know how many processes there are, and a test runs it in one.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from minipaged.simulator.blocks import block_sizes, recovery, table_bytes
from minipaged.simulator.figures import draw
from minipaged.simulator.latency import sustained_rates
from minipaged.simulator.memory_use import Job, Run, batch_sizes, memory_use
from minipaged.simulator.report import Report, to_csv, to_json, to_markdown
from minipaged.simulator.scale import scale
from minipaged.simulator.sharing import memory_saved, shared_prefix

Experiment = Callable[[Sequence[int], Run], Report]

EXPERIMENTS: dict[str, Experiment] = {
    "a": memory_use,
    "b": batch_sizes,
    "c": sustained_rates,
    "d": memory_saved,
    "e": shared_prefix,
    "f": block_sizes,
    "g": recovery,
    "h": table_bytes,
    "scale": scale,
}
ALL = tuple("abcdefgh")


def chosen(names: Sequence[str]) -> list[str]:
    """The experiments of these names, once each; all but scale where there are none. Raises ValueError."""
    for name in names:
        if name not in EXPERIMENTS:
            raise ValueError(f"unknown experiment {name!r}: it is one of {', '.join(EXPERIMENTS)}")
    return list(dict.fromkeys(names)) or list(ALL)


def reproduce(
    names: Sequence[str],
    seeds: Sequence[int],
    on_report: Callable[[Report], None],
    on_jobs: Callable[[str, int, int], None],
    num_processes: int | None = None,
) -> None:
    """Run experiments one after another, the jobs of each in several processes.

    on_report: told of each experiment when it is finished. on_jobs(name, done, total): how far it is.
    """
    with ProcessPoolExecutor(num_processes or os.cpu_count()) as pool:

        def run(name: str, jobs: list[Job]) -> list[Any]:
            waiting = [pool.submit(function, *arguments) for function, arguments in jobs]
            on_jobs(name, 0, len(jobs))
            results = []
            for future in waiting:
                results.append(future.result())
                on_jobs(name, len(results), len(jobs))
            return results

        for name in names:
            on_report(EXPERIMENTS[name](seeds, partial(run, name)))


def write(report: Report, seeds: Sequence[int], folder: Path, figures: bool = True) -> list[Path]:
    """NAME.json, NAME.csv, NAME.txt (a Markdown table) and NAME.svg in the folder. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"json": to_json(report, seeds), "csv": to_csv(report), "txt": to_markdown(report)}
    paths = [folder / f"{report.name}.{kind}" for kind in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        path.write_text(text, encoding="utf-8")
    if figures:
        paths.append(folder / f"{report.name}.svg")
        draw(report, paths[-1])
    return paths
