"""`minipaged bench attention`: what paging costs the attention of a decode step.

One layer of SmolLM2's shape (9 heads on 3 KV heads of 64), 32 sequences with contexts of 128 to 2,048 tokens in blocks
of 16 that lie anywhere in the pool. All answer the same batch, and each answer is first compared with float64. They are
measured in turn, in an order that changes, so that a noisy moment does not hit one alone, and none always follows the
same other one. The best of the runs says what the code can do, the median and the range how quiet the machine was.

Idle threads sleep at once here (`minipaged/cli/bench.py` asks for it before torch is imported): else those of a peer's
last product would take a core from whatever is measured next.

Three pools: one without a free block; one of which three quarters are free; and one where all sequences share their
first 1,024 tokens, so that contiguous memory holds (and reads) 32 copies of them.
"""

import json
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from minipaged.attention.compiled import paged_attention
from minipaged.bench.attention_peers import Batch, Run, bandwidth_floor, flex, gathered, one_by_one, padded
from minipaged.cdiv import cdiv
from minipaged.processor import processor

NUM_SEQS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 9, 3, 64, 16
SHORTEST, LONGEST = 128, 2048  # tokens
SHARED_TOKENS = 1024
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}
OURS, PADDED, ONE_BY_ONE, FLOOR = "minipaged", "contiguous, padded", "contiguous, each", "bandwidth floor"
FLEX = "flex_attention"
TARGETS = {PADDED: 0.6, ONE_BY_ONE: 0.8}  # at most this share of their time, in the first pool
POOLS = ("no block free", "three quarters free", "shared prefix")


def make_batch(dtype: torch.dtype, pool: str) -> Batch:
    generator = torch.Generator().manual_seed(0)
    seq_lens = torch.randint(SHORTEST, LONGEST + 1, (NUM_SEQS,), generator=generator)
    shared = 0
    if pool == "shared prefix":
        shared = SHARED_TOKENS // BLOCK_SIZE  # blocks
        seq_lens = seq_lens.clamp(min=SHARED_TOKENS)
    counts = torch.tensor([cdiv(seq_len, BLOCK_SIZE) for seq_len in seq_lens.tolist()])
    in_use = shared + int((counts - shared).sum())
    num_blocks = 4 * in_use if pool == "three quarters free" else in_use
    order = torch.randperm(num_blocks, generator=generator)
    tables = torch.full((NUM_SEQS, int(counts.max())), -1)
    taken = shared
    for row, count in zip(tables, counts.tolist(), strict=True):
        row[:shared] = order[:shared]
        row[shared:count] = order[taken : taken + count - shared]
        taken += count - shared
    shape = (num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    return Batch(
        query=torch.randn(NUM_SEQS, NUM_HEADS, HEAD_DIM, generator=generator).to(dtype),
        key_cache=torch.randn(shape, generator=generator).to(dtype),
        value_cache=torch.randn(shape, generator=generator).to(dtype),
        block_tables=tables.to(torch.int32),
        seq_lens=seq_lens.to(torch.int32),
        query_start_loc=torch.arange(NUM_SEQS + 1, dtype=torch.int32),
    )


def ours(batch: Batch) -> Run:
    """As the engine runs it: the numbers in the tables are checked once a step, before the first of its layers."""
    tables = (batch.block_tables, batch.seq_lens, batch.query_start_loc)
    return lambda: paged_attention(
        batch.query, batch.key_cache, batch.value_cache, *tables, scale=batch.scale, check=False
    )


def truth(batch: Batch) -> torch.Tensor:
    """The answer in float64, on contiguous memory."""
    wide = Batch(
        batch.query.double(),
        batch.key_cache.double(),
        batch.value_cache.double(),
        batch.block_tables,
        batch.seq_lens,
        batch.query_start_loc,
    )
    return one_by_one(wide)()


def median_times(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every run, all in turn, after one round that does not count.

    Each round has another order: each run changes the caches and the clock of the processor for the next one.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, rng = list(runs), random.Random(0)
    for repeat in range(repeats + 1):
        rng.shuffle(order)
        for name in order:
            start = time.perf_counter()
            runs[name]()
            if repeat:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def measure(dtype: torch.dtype, pool: str, repeats: int, with_flex: bool, console: Console) -> dict[str, object]:
    """Times of one table. Raises RuntimeError where an answer is not near the one of float64."""
    batch = make_batch(dtype, pool)
    makers = {OURS: ours, PADDED: padded, ONE_BY_ONE: one_by_one, "gathered": gathered}
    runs: dict[str, Run] = {name: maker(batch) for name, maker in makers.items()}
    if with_flex:
        try:
            runs[FLEX] = flex(batch)
        except Exception as reason:  # no compiler, another torch: a peer that does not run ends no bench
            console.print(f"flex_attention does not run here: {str(reason).splitlines()[0]}", style="yellow")
    right = truth(batch)
    errors = {name: float((run().double() - right).abs().max()) for name, run in runs.items()}
    for name, error in errors.items():
        if not error <= TOLERANCE[dtype]:
            raise RuntimeError(f"{name} is off by {error:.2g} in {dtype}, more than {TOLERANCE[dtype]:g}")
    # flex_attention's compiled code brings threads of its own, which stay awake for a while: it takes no turns.
    apart = {name: run for name, run in runs.items() if name == FLEX}
    in_turn = {name: run for name, run in runs.items() if name != FLEX}
    times = median_times({**in_turn, FLOOR: bandwidth_floor(batch)}, repeats)
    times |= median_times(apart, repeats)
    name = str(dtype).removeprefix("torch.")
    best = {run: min(values) for run, values in times.items()}
    medians = {run: statistics.median(values) for run, values in times.items()}
    columns = ("", "ms, best", "median", "worst", "minipaged takes", "by medians", "error")
    table = Table(*columns, title=f"{name}, {pool}", title_justify="left")
    for run, values in times.items():
        ratios = [f"{figure[OURS] / figure[run]:.2f} x" if run != OURS else "" for figure in (best, medians)]
        off = f"{errors[run]:.0e}" if run in errors else ""
        table.add_row(run, f"{best[run]:.2f}", f"{medians[run]:.2f}", f"{max(values):.2f}", *ratios, off)
    console.print(table)
    console.print(f"{100 * best[FLOOR] / best[OURS]:.0f} % of the bandwidth floor\n")
    return {"dtype": name, "pool": pool, "ms": times, "errors": errors, "best": best, "medians": medians}


def run(console: Console, json_path: Path | None, runs: int, threads: int | None, flex: bool = True) -> None:
    """Time every form and its peers, and print the tables. flex: flex_attention too, which compiles for a minute."""
    if runs < 5:
        raise ValueError(f"rounds must be at least 5, got {runs}")
    if threads is not None:
        torch.set_num_threads(threads)
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": processor()}
    console.print(machine["processor"])
    console.print(f"torch {machine['torch']}, {machine['threads']} threads, {runs} runs in turn\n")
    tables = []
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            for pool in POOLS:
                with_flex = pool == POOLS[0] and flex
                tables.append(measure(dtype, pool, runs, with_flex, console))
    for found in tables:
        if found["pool"] == POOLS[0]:
            best, medians = found["best"], found["medians"]
            assert isinstance(best, dict) and isinstance(medians, dict)
            for peer, most in TARGETS.items():
                ratio = best[OURS] / best[peer]
                verdict = "met" if ratio <= most else "NOT met"
                console.print(
                    f"{found['dtype']}: at most {most} x {peer}: {ratio:.2f} x ({medians[OURS] / medians[peer]:.2f} x "
                    f"by medians), {verdict}"
                )
    if json_path is not None:
        json_path.write_text(json.dumps({"machine": machine, "tables": tables}, indent=1) + "\n", encoding="utf-8")
