"""Chapter 11, experiments (d) and (e). What sharing saves: samples of one prompt, beams, and a common prefix.

Figures 15 and 16 of the paper. Which blocks are shared is decided by the block manager alone: full blocks of a prompt,
the last one until a token is written into it (copy-on-write), and whatever beams have in common.
"""

from collections.abc import Sequence
from statistics import fmean

from minipaged.simulator import paper
from minipaged.simulator.lengths import Lengths
from minipaged.simulator.memory_use import Experiment, by_case, jobs_of
from minipaged.simulator.report import Bars, Report, row
from minipaged.simulator.servers import Server
from minipaged.simulator.simulate import simulate
from minipaged.simulator.workloads import stream

WIDTHS = (2, 4, 6)  # sequences of a request
# Sequences a second, over all requests: a load at which the pool is neither empty nor full.
SEQUENCE_RATE = {"alpaca": 12.0, "sharegpt": 1.2}
SECONDS = {"alpaca": (10.0, 60.0), "sharegpt": (60.0, 260.0)}

# The paper's translation sentences come from WMT16 English to German; it prints no lengths. We take 28 tokens in and 38
# out: news sentences of about 21 words, and German with an English vocabulary needs more tokens. An assumption.
SENTENCES = Lengths(prompt_mean=28.0, output_mean=38.0)
PREFIX_RATE = 200.0  # requests a second, more than any server can do
PREFIX_SECONDS = (20.0, 50.0)


def memory_saved(seeds: Sequence[int]) -> Experiment:
    """(d) Blocks that sharing saves, over the blocks that there would be without it."""
    printed: dict[tuple[str, str], dict[int, paper.Value]] = {
        ("alpaca", "parallel"): {**paper.SAVED_PARALLEL},
        ("alpaca", "beam"): {**paper.SAVED_BEAM},
        ("sharegpt", "parallel"): dict.fromkeys(WIDTHS, paper.SAVED_PARALLEL_SHAREGPT),
        ("sharegpt", "beam"): dict.fromkeys(WIDTHS, paper.SAVED_BEAM_SHAREGPT),
    }
    cases = [(trace, mode, width) for trace, mode in printed for width in WIDTHS]
    results = by_case(cases, (yield jobs_of(saved, cases, seeds)))
    rows, means = [], {key: list[float]() for key in printed}
    for (trace, mode, width), each in results.items():
        values = [100 * value for value in each]
        means[trace, mode].append(fmean(values))
        name = f"{trace}, {'beam width' if mode == 'beam' else 'samples'} {width}"
        value = printed[trace, mode][width]
        near = 0.30 * (value if isinstance(value, float) else value[0])
        rows.append(row(name, "%", values, value, near))
    charts = []
    for mode, theirs in (("parallel", paper.SAVED_PARALLEL), ("beam", paper.SAVED_BEAM)):
        title = "Memory saved: " + ("parallel sampling" if mode == "parallel" else "beam search") + ", Alpaca"
        series = {"ours": means["alpaca", mode], "paper": [*theirs.values()]}
        groups = [f"{width} samples" if mode == "parallel" else f"width {width}" for width in WIDTHS]
        charts.append(Bars(title, "% of blocks", groups, series))
    setting = "OPT-13B, blocks of 16; near: within 30 % of the paper's value. ShareGPT: the paper prints a range."
    return Report("d", "Memory saved by sharing", "Figure 15 and section 6.3", setting, rows, charts)


def saved(trace: str, mode: str, width: int, seed: int) -> float:
    """Share of blocks saved, time-weighted."""
    start, end = SECONDS[trace]
    n, beam_width = (1, width) if mode == "beam" else (width, 0)
    rate = SEQUENCE_RATE[trace] / width
    requests = stream(trace, rate, int(2 * rate * end) + 20, seed, n=n, beam_width=beam_width)
    result = simulate(
        requests, Server("paged"), window=(start, end), until=end, account_every=0, count_blocks=True, seed=seed
    )
    return result.totals.saved


def shared_prefix(seeds: Sequence[int]) -> Experiment:
    """(e) Requests a second with a prefix that all share, against a server that stores it once for each."""
    cases = [(prefix, server) for prefix in paper.PREFIX_FACTOR for server in ("oracle", "paged")]
    rates = by_case(cases, (yield jobs_of(prefix_throughput, cases, seeds)))
    rows = []
    for prefix, printed in paper.PREFIX_FACTOR.items():
        pairs = zip(rates[prefix, "paged"], rates[prefix, "oracle"], strict=True)
        rows.append(row(f"prefix of {prefix}: paged over Orca (Oracle)", "x", [a / b for a, b in pairs], printed, 0.3))
    for (prefix, server), values in rates.items():
        rows.append(row(f"prefix of {prefix}: {server}", "requests/s", values))
    series = {
        name: [fmean(rates[prefix, server]) for prefix in paper.PREFIX_FACTOR]
        for name, server in (("Orca (Oracle)", "oracle"), ("paged, prefix cache", "paged"))
    }
    groups = [f"{prefix} tokens" for prefix in paper.PREFIX_FACTOR]
    chart = Bars("Throughput with a shared prefix", "requests/s", groups, series)
    setting = "13B on an A100 of 40 GB, sentences of 28 tokens in and 38 out (assumed), a queue that is never empty."
    return Report("e", "Shared prefix", "Section 6.4", setting, rows, [chart])


def prefix_throughput(prefix_len: int, server: str, seed: int) -> float:
    start, end = PREFIX_SECONDS
    requests = stream(SENTENCES, PREFIX_RATE, int(2 * PREFIX_RATE * end), seed, prefix_len=prefix_len)
    made = Server(server, prefix_caching=server == "paged")
    return simulate(requests, made, window=(start, end), until=end, account_every=0).totals.throughput
