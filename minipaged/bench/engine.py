"""`minipaged bench engine`: what the scheduler costs, by itself and as a share of a step of a real model.

Linear in the batch and flat in the pool is what iteration-level scheduling needs: the scheduler runs before every
token of every sequence.
"""

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from minipaged.bench.timing import Settings, in_turn, numbers_table, save
from minipaged.engine.scheduler import Scheduler
from minipaged.engine.sequence import SamplingParams, Sequence, Token
from minipaged.memory.block_manager import BlockManager
from minipaged.processor import processor

BATCHES = (8, 16, 32, 64, 128, 256)
POOLS = (4_000, 16_000, 64_000, 256_000)  # blocks
STEPS = 30  # that are timed, a round; with five of them all sequences fit into the smallest pool
PROMPT = 64  # tokens


def decode_step(batch: int, num_blocks: int, max_tokens: int) -> Callable[[], float]:
    """A scheduler with `batch` sequences that decode. Each call is a step: the seconds of `schedule` and
    `update_from_output`."""
    scheduler = Scheduler(BlockManager(num_blocks, 16, enable_prefix_caching=True), 4096, batch, batch + 8192)
    params = SamplingParams(max_tokens=max_tokens)
    scheduler.add(Sequence(str(i), 0, [i] * PROMPT, params) for i in range(batch))

    def step() -> float:
        start = time.perf_counter()
        output = scheduler.schedule()
        scheduler.update_from_output(output)
        seconds = time.perf_counter() - start
        for seq in output.sampled:
            seq.outputs.append(Token(1, None, 0.0))
        return seconds

    while scheduler.waiting or not all(seq.outputs for seq in scheduler.running):
        step()
    return step


def share_of_a_step(console: Console, batch: int = 32, new_tokens: int = 64) -> None:
    """The real model: how much of a step's time is the scheduler's."""
    from minipaged import LLM
    from minipaged.model import fetch

    if not fetch.is_fetched():
        console.print("SmolLM2 is not here, so its step is not timed: run `minipaged fetch`")
        return
    llm = LLM("smollm2-135m", num_blocks=1024, max_num_seqs=batch)
    prompts: list[Any] = [{"prompt_token_ids": [100 + i] * (16 + 7 * i % 64)} for i in range(batch)]
    llm.generate(prompts, SamplingParams(max_tokens=new_tokens, ignore_eos=True))
    found = llm.metrics()
    each = found.step_seconds / found.num_steps
    console.print(
        f"SmolLM2-135M, float32, {batch} sequences: {each * 1e3:.1f} ms a step, of which the scheduler and its "
        f"bookkeeping take {found.scheduler_seconds / found.num_steps * 1e3:.2f} ms, {found.scheduler_share:.2%}"
    )


def run(console: Console, out: Path | None, settings: Settings) -> None:
    """Time the scheduler alone, print the table, and then a step of SmolLM2 where it is on this machine."""
    rounds, cases = STEPS * settings.rounds, {f"{b} {n}": (b, n) for b in BATCHES for n in POOLS}
    steps = {name: decode_step(*case, max_tokens=rounds + 3) for name, case in cases.items()}
    found = {cases[name]: seconds for name, seconds in in_turn(steps, rounds, "steps of the scheduler").items()}
    grid = {case: median(seconds) for case, seconds in found.items()}
    pools = [f"{num_blocks:,} blocks" for num_blocks in POOLS]
    title = "One decode step of the scheduler, microseconds: the median, and the best"
    table = numbers_table(title, "sequences", *pools, "a sequence", words=0)
    for batch in BATCHES:
        row = [f"{1e6 * grid[batch, n]:.0f} ({1e6 * min(found[batch, n]):.0f})" for n in POOLS]
        table.add_row(str(batch), *row, f"{1e6 * median(grid[batch, n] for n in POOLS) / batch:.2f}")
    console.print(processor(), highlight=False)
    console.print(table)
    flat = max(grid[b, POOLS[-1]] / grid[b, POOLS[0]] for b in BATCHES)
    growth = [grid[b, POOLS[0]] / grid[a, POOLS[0]] for a, b in pairwise(BATCHES)]
    console.print(f"64 times the pool costs at most {flat:.2f} times as much.")
    console.print(f"Twice the batch costs {min(growth):.2f} to {max(growth):.2f} times as much.")
    save(out, [{"sequences": b, "blocks": n, "seconds": seconds} for (b, n), seconds in grid.items()])
    share_of_a_step(console)
