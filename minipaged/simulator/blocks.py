"""Chapter 11, experiments (f), (g) and (h). How large should a block be?

    small     a table with many entries, and many small transfers when a request is swapped
    large     the last block of every request is half empty

Figures 18 and 19 of the paper, and what block tables cost beside the pool, which it does not print.
"""

from collections.abc import Sequence
from statistics import fmean

from minipaged.cdiv import cdiv
from minipaged.memory.kv_cache_size import (
    ENTRY_BYTES,
    LLAMA_3_8B,
    LLAMA_3_8B_POOL_BYTES,
    OPT_13B,
    OPT_13B_POOL_BYTES,
    block_table_cost,
)
from minipaged.memory.page_table import AddressLayout
from minipaged.simulator import paper
from minipaged.simulator.cost import CostModel
from minipaged.simulator.memory_use import Experiment, by_case, jobs_of
from minipaged.simulator.report import Lines, Report, Row, row
from minipaged.simulator.servers import Server
from minipaged.simulator.simulate import simulate
from minipaged.simulator.workloads import stream

BLOCK_SIZES = tuple(1 << k for k in range(9))  # 1 to 256 tokens
# Of arrivals; all that came is served. ShareGPT's rate is the one at which the server is just full: on a longer trace
# its queue grows on, and the spread over seeds with it (standard deviations of blocks of 16: 0.007 s a token for
# 100 s of arrivals, 0.024 for 200).
SECONDS = {"sharegpt": 100.0, "alpaca": 30.0}
SERVED_SIZES = BLOCK_SIZES[::2]  # of the servers that are compared in (g)
MOVED = 256  # tokens that are swapped or recomputed, as a microbenchmark: one block of the largest size


def block_sizes(seeds: Sequence[int]) -> Experiment:
    """(f) Latency at the rates of Figure 13, for blocks of 1 to 256 tokens."""
    cases = [(trace, size, "recompute") for trace in SECONDS for size in BLOCK_SIZES]
    values = by_case(cases, (yield jobs_of(latency, cases, seeds)))
    rows = [row(f"{trace}, blocks of {size}", "s/token", each) for (trace, size, _), each in values.items()]
    series = {t: [(float(s), fmean(values[t, s, "recompute"])) for s in BLOCK_SIZES] for t in SECONDS}
    chart = Lines("Latency by block size", "tokens in a block", "seconds a token", series, log_x=True, log_y=True)
    setting = "OPT-13B, ShareGPT at 2 requests/s for 100 s, Alpaca at 30 requests/s for 30 s."
    notes = ["The paper prints no numbers: 16 to 128 are best for ShareGPT, 16 and 32 for Alpaca (section 7.2)."]
    return Report("f", "Block size and latency", "Figure 18 (b)", setting, rows, [chart], notes)


def recovery(seeds: Sequence[int]) -> Experiment:
    """(g) Swap or recompute: the seconds of one sequence, and the latency of a server that is short of memory."""
    cases = [("sharegpt", size, mode) for mode in ("recompute", "swap") for size in SERVED_SIZES]
    values = by_case(cases, (yield jobs_of(latency, cases, seeds)))
    rows, out_and_in, recompute = [], [], []
    for size in BLOCK_SIZES:
        cost = CostModel(block_size=size)
        out_and_in.append((float(size), 2e3 * cost.swap(MOVED // size)))
        recompute.append((float(size), 1e3 * cost.recompute(MOVED)))
        rows.append(Row(f"{MOVED} tokens out and in, blocks of {size}", "ms", out_and_in[-1][1]))
    rows.append(Row(f"{MOVED} tokens computed again", "ms", recompute[-1][1]))
    rows += [row(f"server, {mode}, blocks of {size}", "s/token", each) for (_, size, mode), each in values.items()]
    ends = {m: [(float(s), fmean(values["sharegpt", s, m])) for s in SERVED_SIZES] for m in ("swap", "recompute")}
    back, x = {"swap out and in": out_and_in, "recompute": recompute}, "tokens in a block"
    charts = [
        Lines(f"To bring back {MOVED} tokens", x, "ms", back, log_x=True),
        Lines("ShareGPT, 2 requests/s", x, "seconds a token", ends, log_x=True),
    ]
    setting = "OPT-13B, A100 of 40 GB, PCIe 4.0 x16, 4 GiB of host memory; ShareGPT at 2 requests/s for 100 s."
    notes = ["The paper prints no numbers: swap is worse for small blocks, both are alike from 16 to 64 (section 7.3)."]
    return Report("g", "Swap and recompute", "Figure 19", setting, rows, charts, notes)


def latency(trace: str, block_size: int, preemption: str, seed: int) -> float:
    """Normalised latency of the paged server at the rate of Figure 13."""
    rate = paper.BATCH_RATES[trace]
    requests = stream(trace, rate, int(rate * SECONDS[trace]), seed)
    server = Server("paged", block_size=block_size, preemption=preemption)  # type: ignore[arg-type]
    return simulate(requests, server, account_every=0).latency


def table_bytes(seeds: Sequence[int]) -> Experiment:
    """(h) Bytes of block tables beside the bytes of the pool: one level, and two. Arithmetic; no seed matters."""
    yield []
    rows = []
    curves = {}
    for shape, pool in ((OPT_13B, OPT_13B_POOL_BYTES), (LLAMA_3_8B, LLAMA_3_8B_POOL_BYTES)):
        curve = []
        for size in BLOCK_SIZES:
            cost = block_table_cost(shape, pool, size)
            curve.append((float(size), 1e6 * cost.all_bytes / pool))
            if size in (1, 16, 256):
                rows.append(Row(f"{shape.name}, blocks of {size}: all tables", "bytes", cost.all_bytes))
                rows.append(Row(f"{shape.name}, blocks of {size}: of the pool", "millionths", curve[-1][1]))
        curves[shape.name] = curve
    # A sequence of 500 tokens, the mean that (a) finds in a running request, in blocks of 16: 32 pages of 128.
    num_pages = cdiv(500, 16)
    for name, bits in (("one level", (7,)), ("two levels", (3, 4)), ("three levels", (3, 2, 2))):
        layout = AddressLayout(bits, 4, ENTRY_BYTES)
        rows.append(Row(f"500 tokens of 2,048, {name}", "bytes", layout.dense_bytes(num_pages)))
    chart = Lines("Block tables beside the pool", "tokens in a block", "millionths of the pool", curves, True, True)
    setting = "A full pool, nothing shared, entries of 4 bytes. The paper prints no numbers."
    return Report("h", "Bytes of block tables", "none", setting, rows, [chart])
