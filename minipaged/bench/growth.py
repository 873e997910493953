"""How cost grows: time per token with the context, time per step with the batch, memory with the tokens.

    recompute     time per token rises with the context, since all of it is computed again
    contiguous    flat, and each request's memory is taken whole at its start
    paged         flat, and memory follows the tokens, block by block

Each line is fitted by a straight one; its slope is what the course says in words.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from minipaged.bench.timing import Settings, in_turn, numbers_table, save, this_machine

CONTEXTS = (64, 128, 256, 512, 1024)  # tokens already there when the timed ones are written
BATCHES = (1, 2, 4, 8, 16, 32, 64)
MAX_MODEL_LEN = 2048
NEW = 12  # tokens that are timed at each point, after one that is not; the median counts
CACHES = ("contiguous", "paged")
TITLES = {  # of each line: its table's, and what its slope is by
    "token": ("Milliseconds per token against tokens of context (1 sequence)", "token of context"),
    "step": ("Milliseconds per step against sequences (128 tokens of context)", "sequence"),
    "memory": ("Slots reserved against tokens held", "token"),
}


def run(console: Console, out: Path | None, settings: Settings) -> None:
    """Measure the three lines on SmolLM2, print each when it is there, and write every point to a JSON file at once."""
    from minipaged.model.load import load_model

    model = load_model("smollm2-135m")
    found: dict[str, Any] = {"machine": this_machine(), "token": {}, "step": {}, "memory": {}}
    console.print(found["machine"]["processor"], highlight=False)

    def add(line: str, cache: str, point: list[float]) -> None:
        found[line].setdefault(cache, []).append(point)
        save(out, found)

    def measure(line: str, sequences: int, context: int, x: int, runs: dict[str, Callable[[], object]]) -> None:
        llms = {cache: _decoding(model, cache, sequences, context) for cache in CACHES}
        runs |= {cache: llm.step for cache, llm in llms.items()}
        for cache, seconds in in_turn(runs, NEW, f"{sequences} sequences, {context} tokens of context").items():
            add(line, cache, [x, median(seconds)])
        for cache, llm in llms.items():
            assert len(llm.scheduler.running) == sequences, "a step was timed in which not all sequences took part"
            if line == "step":
                add("memory", cache, [llm.blocks.num_stored_tokens, llm.blocks.num_used * llm.blocks.block_size])

    for context in CONTEXTS:
        measure(
            "token", 1, context, context, {"recompute": _recompute(model, context)} if context < CONTEXTS[-1] else {}
        )
    console.print(_table("token", found["token"]))
    for sequences in BATCHES:
        measure("step", sequences, 128, sequences, {})
    console.print(_table("step", found["step"]))
    console.print(_table("memory", found["memory"]))


def _table(line: str, lines: dict[str, list[list[float]]]) -> Table:
    title, of = TITLES[line]
    longest = max(lines.values(), key=len)
    table = numbers_table(title, "cache", *(f"{point[0]:,}" for point in longest), f"slope, a {of}")
    unit = 1.0 if line == "memory" else 1e3
    for cache, points in lines.items():
        x, y = np.array(points).T
        slope = float(np.polyfit(x, y * unit, 1)[0])
        cells = [f"{value * unit:,.0f}" if line == "memory" else f"{value * unit:.1f}" for value in y]
        cells += [""] * (len(longest) - len(cells))
        table.add_row(cache, *cells, f"{slope:.4f}")
    return table


def _recompute(model: Any, context: int) -> Callable[[], object]:
    """One sequence without a cache: each call computes all of its tokens again, and one more."""
    from minipaged.model.recompute import generate

    steps = generate(model.transformer, [[100] * context], 2 + NEW)
    next(steps)  # behind the first token, as many are there as in `_decoding`
    return lambda: next(steps)


def _decoding(model: Any, cache: str, batch: int, context: int) -> Any:
    """An engine all of whose sequences decode."""
    from minipaged import LLM, SamplingParams

    slots: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN, "num_blocks": batch * MAX_MODEL_LEN // 16}
    llm = LLM(model, cache=cache, max_num_seqs=batch, enable_prefix_caching=False, **slots)
    # No sequence ends: the first ones write on while the last prompts are computed.
    params = SamplingParams(max_tokens=MAX_MODEL_LEN - context, ignore_eos=True)
    requests = [llm.add_request({"prompt_token_ids": [100 + i] * context}, params) for i in range(batch)]
    while not all(request.seqs[0].outputs for request in requests):
        llm.step()
    return llm
