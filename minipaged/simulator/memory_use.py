"""Chapter 11, experiments (a) and (b). What the slots of the pool hold, and how many requests they let run at once.

Figure 2 and Figure 13 of the paper. The lengths of a trace decide both, through the policy and the buddy allocator;
the cost model decides only how fast a queue builds up at a given rate.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any

from minipaged.simulator import paper
from minipaged.simulator.report import Bars, Report, row
from minipaged.simulator.servers import SERVERS, Server
from minipaged.simulator.simulate import Totals, simulate
from minipaged.simulator.workloads import stream

Job = tuple[Callable[..., Any], tuple[Any, ...]]
# Yields its jobs, once, is sent what they return, in their order, and returns its report.
Experiment = Generator[list[Job], list[Any], Report]

LABELS = {"max": "Orca (Max)", "pow2": "Orca (Pow2)", "oracle": "Orca (Oracle)", "paged": "paged (ours)"}

FULL_RATE = 10.0  # requests a second, over three times what any of the servers can do: the queue is never empty
FULL_SECONDS = (100.0, 400.0)  # from when we look, and until when
RATE_SECONDS = {"sharegpt": (200.0, 600.0), "alpaca": (50.0, 150.0)}


def memory_use(seeds: Sequence[int]) -> Experiment:
    """(a) The share of the KV memory that holds tokens, with a queue that is never empty."""
    jobs: list[Job] = [
        (measure, ("sharegpt", FULL_RATE, server, seed, FULL_SECONDS)) for server in SERVERS for seed in seeds
    ]
    results = yield jobs
    by_server = {s: results[i * len(seeds) : (i + 1) * len(seeds)] for i, s in enumerate(SERVERS)}
    rows = [
        row(f"{LABELS[s]}: holds tokens", "%", [totals.shares.held for totals in each], paper.MEMORY_HELD[s], 3.0)
        for s, each in by_server.items()
    ]
    for server, bar in paper.MEMORY.items():
        shares = [totals.shares for totals in by_server[server]]
        parts = [
            ("reserved", bar.reserved, [s.reserved for s in shares]),
            ("internal fragmentation", bar.internal, [s.internal for s in shares]),
            ("external and others", bar.external, [s.external for s in shares]),
        ]
        rows += [row(f"{LABELS[server]}: {name}", "%", vs, p, 3.0) for name, p, vs in parts]
    means = {server: _mean([t.shares for t in each]) for server, each in by_server.items()}
    series = {
        "holds a token": [means[s].held for s in SERVERS],
        "reserved": [means[s].reserved for s in SERVERS],
        "internal fragmentation": [means[s].internal for s in SERVERS],
        "external and others": [means[s].external for s in SERVERS],
    }
    marks: dict[str, list[float | None]] = {"holds a token": [paper.MEMORY_HELD[s] for s in SERVERS]}
    chart = Bars("Where the KV memory is", "% of slots", [LABELS[s] for s in SERVERS], series, marks, stacked=True)
    setting = f"OPT-13B, 15,728 slots, ShareGPT lengths, a queue that is never empty; seconds {_span(FULL_SECONDS)}."
    return Report("a", "Share of KV memory that holds tokens", "Figure 2", setting, rows, [chart])


def batch_sizes(seeds: Sequence[int]) -> Experiment:
    """(b) Mean number of requests that run at once, at the paper's rates."""
    cases = [(trace, server) for trace in paper.BATCH for server in SERVERS]
    jobs: list[Job] = [
        (measure, (trace, paper.BATCH_RATES[trace], server, seed, RATE_SECONDS[trace]))
        for trace, server in cases
        for seed in seeds
    ]
    results = yield jobs
    rows, charts = [], []
    means: dict[tuple[str, str], float] = {}
    for place, (trace, server) in enumerate(cases):
        batches = [totals.batch for totals in results[place * len(seeds) : (place + 1) * len(seeds)]]
        means[trace, server] = sum(batches) / len(batches)
        rows.append(row(f"{trace}, {LABELS[server]}", "", batches, paper.BATCH[trace][server], 0.10))
    for trace, values in paper.BATCH.items():
        title = f"Requests in a batch: {trace}, {paper.BATCH_RATES[trace]:g} requests/s"
        ours, theirs = [means[trace, s] for s in SERVERS], [values[s] for s in SERVERS]
        charts.append(Bars(title, "requests", [LABELS[s] for s in SERVERS], {"ours": ours, "paper": theirs}))
    spans = ", ".join(f"{trace} {_span(span)}" for trace, span in RATE_SECONDS.items())
    setting = f"OPT-13B, 15,728 slots, A100 of 40 GB; seconds: {spans}."
    return Report("b", "Mean number of requests in a batch", "Figure 13", setting, rows, charts)


def measure(trace: str, rate: float, server: str, seed: int, seconds: tuple[float, float]) -> Totals:
    """A server under a load, looked at between two moments."""
    end = seconds[1]
    requests = stream(trace, rate, int(2 * rate * end) + 100, seed)
    return simulate(requests, Server(server), window=seconds, until=end, account_every=4).totals


def _mean(shares: list[paper.Bar]) -> paper.Bar:
    return paper.Bar(*(sum(parts) / len(shares) for parts in zip(*shares, strict=True)))


def _span(seconds: tuple[float, float]) -> str:
    return f"{seconds[0]:g} to {seconds[1]:g}"
