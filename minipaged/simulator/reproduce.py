"""Chapter 11. All experiments, in several processes at once, and the files that they leave.

    minipaged reproduce            a to h
    minipaged reproduce a b        these two
    minipaged reproduce scale      10^3 to 10^5 requests in one run

An experiment is a generator: it yields its jobs (a function and its arguments), is sent what they return, and returns
its report. So it does not know how many processes there are, and a test runs it in one. The jobs of all experiments
stand in one queue, so no core waits for the last job of one before the next begins, and a job that two of them ask
for is run once.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from minipaged.simulator.blocks import block_sizes, recovery, table_bytes
from minipaged.simulator.figures import draw
from minipaged.simulator.latency import sustained_rates
from minipaged.simulator.memory_use import Experiment, Job, batch_sizes, memory_use
from minipaged.simulator.report import Report, to_csv, to_json, to_markdown
from minipaged.simulator.scale import begin, scale
from minipaged.simulator.sharing import memory_saved, shared_prefix

EXPERIMENTS: dict[str, Callable[[Sequence[int]], Experiment]] = {
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
    """Run experiments, their jobs in several processes. Reports come in the order of the names.

    on_report: told of each experiment when it is finished. on_jobs(name, done, total): how far it is.
    """
    with _workers(num_processes or os.cpu_count() or 1) as pool:
        futures: dict[Job, Future[Any]] = {}
        started: list[tuple[str, Experiment, list[Job]]] = []
        for name in names:
            experiment = EXPERIMENTS[name](seeds)
            jobs = next(experiment)
            started.append((name, experiment, jobs))
            for function, arguments in jobs:
                if (function, arguments) not in futures:
                    futures[function, arguments] = pool.submit(function, *arguments)
        for name, experiment, jobs in started:
            on_jobs(name, 0, len(jobs))
            results = []
            for job in jobs:
                results.append(futures[job].result())
                on_jobs(name, len(results), len(jobs))
            on_report(report_of(experiment, results))


def report_of(experiment: Experiment, results: list[Any]) -> Report:
    """The end of an experiment that has yielded its jobs."""
    try:
        experiment.send(results)
    except StopIteration as end:
        report: Report = end.value
        return report
    raise AssertionError("an experiment yields its jobs once")


def write(report: Report, seeds: Sequence[int], folder: Path, figures: bool = True) -> list[Path]:
    """NAME.json, NAME.csv, NAME.txt (a Markdown table) and NAME.svg in the folder. Returns their paths.

    All are written beside the folder's files first and moved in at the end: an interrupt leaves no half of a file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"json": to_json(report, seeds), "csv": to_csv(report), "txt": to_markdown(report)}
    with TemporaryDirectory(dir=folder, prefix=".unfinished") as unfinished:
        paths = [Path(unfinished) / f"{report.name}.{kind}" for kind in texts]
        for path, text in zip(paths, texts.values(), strict=True):
            path.write_text(text, encoding="utf-8")
        if figures:
            paths.append(Path(unfinished) / f"{report.name}.svg")
            draw(report, paths[-1])
        return [path.replace(folder / path.name) for path in paths]


@contextmanager
def _workers(number: int) -> Iterator[ProcessPoolExecutor]:
    """Processes for jobs. None of them outlives the block, however it ends."""
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(number, initializer=begin)
    try:
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()  # in the middle of a job whose result is not needed any more
        raise
    finally:
        pool.shutdown(cancel_futures=True)
