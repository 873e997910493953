"""`minipaged bench attention`: what paging costs the attention of a decode step.

One layer of SmolLM2's shape (9 heads on 3 KV heads of 64), 32 sequences with contexts of 128 to 2,048 tokens in blocks
of 16 that lie anywhere in the pool. All answer the same batch, and each answer is first compared with float64.

Three pools: one without a free block; one of which three quarters are free; and one where all sequences share their
first 1,024 tokens, so that contiguous memory holds (and reads) 32 copies of them.
"""

from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from minipaged.attention.compiled import paged_attention
from minipaged.bench.attention_peers import Batch, Run, bandwidth_floor, flex, gathered, one_by_one, padded
from minipaged.bench.timing import SPREAD, Settings, in_turn, numbers_table, save, spread, this_machine
from minipaged.cdiv import cdiv

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
    wide = {name: getattr(batch, name).double() for name in ("query", "key_cache", "value_cache")}
    return one_by_one(replace(batch, **wide))()


def measure(dtype: torch.dtype, pool: str, rounds: int, console: Console) -> dict[str, Any]:
    """Milliseconds of one table. Raises RuntimeError where an answer is not near the one of float64."""
    batch, name = make_batch(dtype, pool), str(dtype).removeprefix("torch.")
    makers = {OURS: ours, PADDED: padded, ONE_BY_ONE: one_by_one, "gathered": gathered}
    runs: dict[str, Run] = {peer: maker(batch) for peer, maker in makers.items()}
    if pool == POOLS[0]:  # it compiles for a minute
        try:
            runs[FLEX] = flex(batch)
        except Exception as reason:  # no compiler, another torch: a peer that does not run ends no bench
            console.print(f"flex_attention does not run here: {str(reason).splitlines()[0]}", style="yellow")
    right = truth(batch)
    errors = {peer: float((run().double() - right).abs().max()) for peer, run in runs.items()}
    for peer, error in errors.items():
        if not error <= TOLERANCE[dtype]:
            raise RuntimeError(f"{peer} is off by {error:.2g} in {dtype}, more than {TOLERANCE[dtype]:g}")
    # flex_attention's compiled code brings threads of its own, which stay awake for a while: it takes no turns.
    apart = {peer: runs.pop(peer) for peer in (FLEX,) if peer in runs}
    what = f"{name}, {pool}"
    seconds = in_turn({**runs, FLOOR: bandwidth_floor(batch)}, rounds, what) | in_turn(apart, rounds, what)
    times = {peer: [1e3 * each for each in found] for peer, found in seconds.items()}
    best, medians = ({peer: pick(found) for peer, found in times.items()} for pick in (min, median))
    table = numbers_table(what, "ms", *SPREAD, "minipaged takes", "by medians", "error")
    for peer, found in times.items():
        ratios = [f"{figure[OURS] / figure[peer]:.2f} x" if peer != OURS else "" for figure in (best, medians)]
        table.add_row(peer, *spread(found), *ratios, f"{errors[peer]:.0e}" if peer in errors else "")
    console.print(table)
    console.print(f"{100 * best[FLOOR] / best[OURS]:.0f} % of the bandwidth floor\n")
    return {"dtype": name, "pool": pool, "ms": times, "errors": errors, "best": best, "medians": medians}


def run(console: Console, out: Path | None, settings: Settings) -> None:
    """Time every form and its peers, and print the tables."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), **this_machine()}
    rounds = 3 * settings.rounds
    console.print(machine["processor"])
    console.print(f"torch {machine['torch']}, {machine['threads']} threads, {rounds} runs in turn\n")
    with torch.inference_mode():
        dtypes = (torch.float32, torch.bfloat16)
        tables = [measure(dtype, pool, rounds, console) for dtype in dtypes for pool in POOLS]
    for found in tables:
        for peer, most in TARGETS.items() if found["pool"] == POOLS[0] else ():
            ratio, by_medians = (found[figure][OURS] / found[figure][peer] for figure in ("best", "medians"))
            verdict = "met" if ratio <= most else "NOT met"
            said = (
                f"{found['dtype']}: at most {most} x {peer}: {ratio:.2f} x ({by_medians:.2f} x by medians), {verdict}"
            )
            console.print(said)
    save(out, {"machine": machine, "tables": tables})
