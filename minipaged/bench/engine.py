"""`minipaged bench engine`: what the scheduler costs, by itself and as a share of a step of a real model.

Linear in the batch and flat in the pool is what iteration-level scheduling needs: the scheduler runs before every
token of every sequence. Times are medians over the steps of one run.
"""

import json
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from minipaged.engine.scheduler import Scheduler
from minipaged.engine.sequence import SamplingParams, Sequence, Token
from minipaged.memory.block_manager import BlockManager

BATCHES = (8, 16, 32, 64, 128, 256)
POOLS = (4_000, 16_000, 64_000, 256_000)  # blocks
STEPS = 300
PROMPT = 64  # tokens


def decode_seconds(batch: int, num_blocks: int, caching: bool = True) -> float:
    """Median seconds of `schedule` and `update_from_output` in a step in which `batch` sequences decode."""
    blocks = BlockManager(num_blocks, 16, enable_prefix_caching=caching)
    scheduler = Scheduler(blocks, 4096, batch, batch + 8192)
    params = SamplingParams(max_tokens=STEPS + 1)
    scheduler.add(Sequence(str(i), 0, [i] * PROMPT, params) for i in range(batch))
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        output = scheduler.schedule()
        scheduler.update_from_output(output)
        seconds.append(time.perf_counter() - start)
        for seq in output.sampled:
            seq.outputs.append(Token(1, None, 0.0))
    return median(seconds)


def share_of_a_step(console: Console, batch: int = 32, new_tokens: int = 64) -> None:
    """The real model: how much of a step's time is the scheduler's."""
    from minipaged import LLM
    from minipaged.model import fetch

    if not fetch.is_fetched():
        console.print("SmolLM2 is not here, so its step is not timed: run `minipaged fetch`")
        return
    llm = LLM("smollm2-135m", num_blocks=1024, max_num_seqs=batch)
    prompts = [{"prompt_token_ids": [100 + i] * (16 + 7 * i % 64)} for i in range(batch)]
    llm.generate(prompts, SamplingParams(max_tokens=new_tokens, ignore_eos=True), progress=False)  # type: ignore[arg-type]
    found = llm.metrics()
    each = found.step_seconds / found.num_steps
    console.print(
        f"SmolLM2-135M, float32, {batch} sequences: {each * 1e3:.1f} ms a step, of which the scheduler and its "
        f"bookkeeping take {found.scheduler_seconds / found.num_steps * 1e3:.2f} ms, {found.scheduler_share:.2%}"
    )


def run(console: Console, json_path: Path | None = None) -> None:
    """Time the scheduler alone, print the table, and then a step of SmolLM2 where it is on this machine."""
    table = Table(title="One decode step of the scheduler, microseconds", title_justify="left")
    table.add_column("sequences", justify="right")
    for num_blocks in POOLS:
        table.add_column(f"{num_blocks:,} blocks", justify="right")
    table.add_column("a sequence", justify="right")
    grid = {(batch, num_blocks): decode_seconds(batch, num_blocks) for batch in BATCHES for num_blocks in POOLS}
    for batch in BATCHES:
        row = [grid[batch, num_blocks] * 1e6 for num_blocks in POOLS]
        table.add_row(str(batch), *(f"{value:.0f}" for value in row), f"{median(row) / batch:.2f}")
    console.print(table)
    flat = max(grid[b, POOLS[-1]] / grid[b, POOLS[0]] for b in BATCHES)
    growth = [grid[b, POOLS[0]] / grid[a, POOLS[0]] for a, b in pairwise(BATCHES)]
    console.print(f"64 times the pool costs at most {flat:.2f} times as much.")
    console.print(f"Twice the batch costs {min(growth):.2f} to {max(growth):.2f} times as much.")
    if json_path is not None:
        rows = [{"sequences": b, "blocks": n, "seconds": seconds} for (b, n), seconds in grid.items()]
        json_path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    share_of_a_step(console)
