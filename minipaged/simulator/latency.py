"""Chapter 11, experiment (c). How many requests a second a server sustains before its queue grows without end.

Figure 12 of the paper: normalised latency (seconds a token, end to end, mean over requests) against the request rate.
A curve is flat until the server is full, and then rises for as long as the trace lasts. Where it rises is what the
server sustains. The paper's traces last an hour. On shorter ones the rise is gentle, and where to read it is a matter
of taste. So we measure it from the other side: the requests a second that a server finishes when its queue is never
empty. At any lower rate the queue ends, at any higher rate it grows.
"""

from collections.abc import Sequence
from itertools import count

from minipaged.simulator import paper
from minipaged.simulator.memory_use import LABELS, Experiment, Job, by_case, jobs_of, measure
from minipaged.simulator.report import Lines, Report, row
from minipaged.simulator.servers import SERVERS, Server
from minipaged.simulator.simulate import simulate
from minipaged.simulator.workloads import stream

FULL_RATE = {"sharegpt": 10.0, "alpaca": 150.0}  # requests a second, over twice what any server can do
FULL_SECONDS = {"sharegpt": (100.0, 400.0), "alpaca": (20.0, 60.0)}  # from when we look, and until when

FIRST = {"sharegpt": 0.5, "alpaca": 3.0}  # requests a second
FACTOR = 1.3  # from one rate to the next
SECONDS = {"sharegpt": 300.0, "alpaca": 60.0}  # of arrivals; all that came is served
HIGHEST = 0.3  # seconds a token: where a curve ends

Curve = list[tuple[float, float]]


def sustained_rates(seeds: Sequence[int]) -> Experiment:
    """(c) Requests finished a second with a full queue, and curves of latency against rate, of the first seed."""
    cases = [(trace, server) for trace in FIRST for server in SERVERS]
    curves_first: list[Job] = [(curve, (*case, seeds[0])) for case in reversed(cases)]  # the longest jobs of all
    full = [(trace, FULL_RATE[trace], server, FULL_SECONDS[trace]) for trace, server in cases]
    results = yield curves_first + jobs_of(measure, full, seeds)
    curves: dict[tuple[str, str], Curve] = dict(zip(reversed(cases), results, strict=False))
    found = by_case(cases, results[len(cases) :])
    rates = {case: [totals.throughput for totals in each] for case, each in found.items()}
    rows = [row(f"{trace}, {LABELS[server]}", "requests/s", rates[trace, server]) for trace, server in cases]
    factors: list[tuple[str, str, paper.Value]] = [
        ("sharegpt", "oracle", paper.RATE_OVER_ORACLE),
        ("sharegpt", "max", paper.RATE_OVER_MAX),
        ("alpaca", "oracle", paper.RATE_OVER_ORACLE_ALPACA),
    ]
    for trace, server, printed in factors:
        pairs = zip(rates[trace, "paged"], rates[trace, server], strict=True)
        rows.append(row(f"{trace}: paged over {LABELS[server]}", "x", [a / b for a, b in pairs], printed, 0.30))
    charts = []
    for trace in FIRST:
        series = {LABELS[server]: curves[trace, server] for server in SERVERS}
        title = f"Normalised latency: {trace}"
        charts.append(Lines(title, "requests/s", "seconds a token", series, y_max=HIGHEST))
    setting = "OPT-13B on an A100 of 40 GB; requests finished a second with a queue that is never empty."
    lasts = " and ".join(f"{trace} {seconds:g} s" for trace, seconds in SECONDS.items())
    notes = [f"Curves: one seed; requests come for so long: {lasts}."]
    return Report("c", "Request rate that is sustained", "Sections 6.2 and 6.3", setting, rows, charts, notes)


def curve(trace: str, server: str, seed: int) -> Curve:
    """Latency at rising rates, until it leaves the axis. The same requests each time, at other moments."""
    points: Curve = []
    for number in count():
        rate = FIRST[trace] * FACTOR**number
        requests = stream(trace, rate, int(rate * SECONDS[trace]), seed)
        points.append((rate, simulate(requests, Server(server), account_every=0).latency))
        if points[-1][1] > HIGHEST:
            break
    return points
