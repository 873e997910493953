"""Chapter 11, experiments (a) and (b). What the slots of the pool hold, and how many requests they let run at once.

Figure 2 and Figure 13 of the paper. The lengths of a trace decide both, through the policy and the buddy allocator;
the cost model decides only how fast a queue builds up at a given rate.
"""

from collections.abc import Callable, Generator, Sequence
from statistics import fmean
from typing import Any

from minipaged.simulator import paper
from minipaged.simulator.report import Bars, Report, row
from minipaged.simulator.servers import SERVERS, Server
from minipaged.simulator.simulate import Totals, simulate
from minipaged.simulator.workloads import stream

Job = tuple[Callable[..., Any], tuple[Any, ...]]
# Yields its jobs, once, is sent what they return, in their order, and returns its report.
Experiment = Generator[list[Job], list[Any], Report]
Case = tuple[Any, ...]  # arguments of a job, all but the seed, which is the last one

LABELS = {"max": "Orca (Max)", "pow2": "Orca (Pow2)", "oracle": "Orca (Oracle)", "paged": "paged (ours)"}

FULL_RATE = 10.0  # requests a second, over three times what any of the servers can do: the queue is never empty
FULL_SECONDS = (100.0, 400.0)  # from when we look, and until when
RATE_SECONDS = {"sharegpt": (200.0, 600.0), "alpaca": (50.0, 150.0)}


def jobs_of(function: Callable[..., Any], cases: Sequence[Case], seeds: Sequence[int]) -> list[Job]:
    """The function for each case and each seed."""
    return [(function, (*case, seed)) for case in cases for seed in seeds]


def by_case(cases: Sequence[Case], results: list[Any]) -> dict[Case, list[Any]]:
    """What the jobs of each case returned: a result a seed."""
    size = len(results) // len(cases)
    return {case: results[i * size : (i + 1) * size] for i, case in enumerate(cases)}


PARTS = {"reserved": "reserved", "internal fragmentation": "internal", "external and others": "external"}


def memory_use(seeds: Sequence[int]) -> Experiment:
    """(a) The share of the KV memory that holds tokens, with a queue that is never empty."""
    cases = [("sharegpt", FULL_RATE, server, FULL_SECONDS) for server in SERVERS]
    results = by_case(cases, (yield jobs_of(measure, cases, seeds)))
    shares = {case[2]: [totals.shares for totals in each] for case, each in results.items()}

    def of(server: str, part: str) -> list[float]:
        return [getattr(bar, part) for bar in shares[server]]

    rows = [row(f"{LABELS[s]}: holds tokens", "%", of(s, "held"), paper.MEMORY_HELD[s], 3.0) for s in SERVERS]
    for server, bar in paper.MEMORY.items():
        rows += [
            row(f"{LABELS[server]}: {name}", "%", of(server, part), getattr(bar, part), 3.0)
            for name, part in PARTS.items()
        ]
    parts = {"holds a token": "held", **PARTS}
    series = {name: [fmean(of(server, part)) for server in SERVERS] for name, part in parts.items()}
    marks: dict[str, list[float | None]] = {"holds a token": [paper.MEMORY_HELD[s] for s in SERVERS]}
    chart = Bars("Where the KV memory is", "% of slots", [LABELS[s] for s in SERVERS], series, marks, stacked=True)
    setting = f"OPT-13B, 15,728 slots, ShareGPT lengths, a queue that is never empty; seconds {_span(FULL_SECONDS)}."
    return Report("a", "Share of KV memory that holds tokens", "Figure 2", setting, rows, [chart])


def batch_sizes(seeds: Sequence[int]) -> Experiment:
    """(b) Mean number of requests that run at once, at the paper's rates."""
    cases = [(t, paper.BATCH_RATES[t], server, RATE_SECONDS[t]) for t in paper.BATCH for server in SERVERS]
    results = by_case(cases, (yield jobs_of(measure, cases, seeds)))
    batches = {(case[0], case[2]): [totals.batch for totals in each] for case, each in results.items()}
    rows = [
        row(f"{trace}, {LABELS[server]}", "", values, paper.BATCH[trace][server], 0.10)
        for (trace, server), values in batches.items()
    ]
    charts = []
    for trace, printed in paper.BATCH.items():
        title = f"Requests in a batch: {trace}, {paper.BATCH_RATES[trace]:g} requests/s"
        ours, theirs = [fmean(batches[trace, s]) for s in SERVERS], [printed[s] for s in SERVERS]
        charts.append(Bars(title, "requests", [LABELS[s] for s in SERVERS], {"ours": ours, "paper": theirs}))
    spans = ", ".join(f"{trace} {_span(span)}" for trace, span in RATE_SECONDS.items())
    setting = f"OPT-13B, 15,728 slots, A100 of 40 GB; seconds: {spans}."
    return Report("b", "Mean number of requests in a batch", "Figure 13", setting, rows, charts)


def measure(trace: str, rate: float, server: str, seconds: tuple[float, float], seed: int) -> Totals:
    """A server under a load, looked at between two moments."""
    end = seconds[1]
    requests = stream(trace, rate, int(2 * rate * end) + 100, seed)
    return simulate(requests, Server(server), window=seconds, until=end, account_every=4).totals


def _span(seconds: tuple[float, float]) -> str:
    return f"{seconds[0]:g} to {seconds[1]:g}"
