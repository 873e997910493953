"""Chapter 11. What a simulation costs: seconds and memory, from 10^3 to 10^5 requests in one run.

    minipaged reproduce scale

Both should be linear in the number of requests: no list of requests is made, a prompt's text is shared by all of its
length, and what stays of a finished request is one number. Each run is a process of its own, so that its memory is its
own too.
"""

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from minipaged.simulator.memory_use import Experiment
from minipaged.simulator.report import Lines, Report, Row
from minipaged.simulator.servers import Server
from minipaged.simulator.simulate import simulate
from minipaged.simulator.workloads import stream

SIZES = (10**3, 10**4, 10**5)
RATE = 30.0  # Alpaca requests a second, as in Figure 13


def scale(seeds: Sequence[int]) -> Experiment:
    """(scale) Processor seconds and megabytes, by the number of requests."""
    results = yield [(in_a_process, (size, seeds[0])) for size in SIZES]
    rows = []
    for size, (seconds, megabytes, answered) in zip(SIZES, results, strict=True):
        rows.append(Row(f"{size:,} requests: processor", "s", seconds))
        rows.append(Row(f"{size:,} requests: for each", "ms", 1e3 * seconds / size))
        rows.append(Row(f"{size:,} requests: memory that they added", "MB", megabytes))
        rows.append(Row(f"{size:,} requests: answered", "", answered))
    points = [(float(size), seconds) for size, (seconds, _, _) in zip(SIZES, results, strict=True)]
    chart = Lines("Processor seconds of a simulation", "requests", "s", {"paged server, Alpaca": points}, True, True)
    setting = "Alpaca at 30 requests/s, the paged server, one run on one core."
    return Report("scale", "What a simulation costs", "none", setting, rows, [chart])


def in_a_process(num_requests: int, seed: int) -> tuple[float, float, int]:
    """(processor seconds, MB that the run added, requests answered)."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=begin) as pool:
        return pool.submit(one_run, num_requests, seed).result()


def one_run(num_requests: int, seed: int) -> tuple[float, float, int]:
    simulate(stream("alpaca", RATE, 200, seed), Server("paged"))  # what a first run builds is not counted
    before, start = _forget_peak(), time.process_time()
    result = simulate(stream("alpaca", RATE, num_requests, seed), Server("paged"))
    seconds = time.process_time() - start
    return seconds, _peak_megabytes() - before, len(result.latencies)


def begin() -> None:
    """A worker leaves Ctrl-C to its parent, which ends it; should the parent be killed, it ends itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.disable()  # a simulation leaves no cycles: what is finished is freed by its count of references


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    parent.join()
    os._exit(1)


def _forget_peak() -> float:
    """Megabytes in use now. Linux can measure the peak anew from here; elsewhere it stays as high as it was."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM, the peak of the resident set
    return _peak_megabytes()


def _peak_megabytes() -> float:
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6
    try:
        import resource
    except ImportError:  # Windows has no such count
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)  # bytes there, KiB elsewhere
