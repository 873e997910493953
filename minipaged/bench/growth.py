"""How cost grows: time per token with the context, time per step with the batch, memory with the tokens.

    recompute     time per token rises with the context, since all of it is computed again
    contiguous    flat, and each request's memory is taken whole at its start
    paged         flat, and memory follows the tokens, block by block

Each line is fitted by a straight one; its slope is what the course says in words.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from minipaged.bench.compare import this_machine
from minipaged.processor import processor

CONTEXTS = (64, 128, 256, 512, 1024)  # tokens already there when the timed ones are written
BATCHES = (1, 2, 4, 8, 16, 32, 64)
MAX_MODEL_LEN = 2048
NEW = 12  # tokens that are timed at each point; the median counts
CACHES = ("contiguous", "paged")
TITLES = {  # of each line: its table's, and what its slope is by
    "token": ("Milliseconds per token against tokens of context (1 sequence)", "token of context"),
    "step": ("Milliseconds per step against sequences (128 tokens of context)", "sequence"),
    "memory": ("Slots reserved against tokens held", "token"),
}


def growth(console: Console, out: Path | None) -> None:
    """Measure the three lines on SmolLM2, print each when it is there, and write every point to a JSON file at once."""
    from minipaged.model.load import load_model

    model = load_model("smollm2-135m")
    found: dict[str, Any] = {"machine": this_machine(), "token": {}, "step": {}, "memory": {}}
    console.print(processor(), highlight=False)

    def add(line: str, cache: str, point: list[float]) -> None:
        found[line].setdefault(cache, []).append(point)
        if out is not None:
            out.write_text(json.dumps(found, indent=1))

    with console.status("measuring") as status:
        for cache in ("recompute", *CACHES):
            contexts = CONTEXTS[:-1] if cache == "recompute" else CONTEXTS
            for context in contexts:
                status.update(f"time per token: {cache}, {context} tokens of context")
                seconds = _recompute(model, context) if cache == "recompute" else _decode(model, cache, 1, context)[0]
                add("token", cache, [context, seconds])
        console.print(_table("token", found["token"]))
        for cache in CACHES:
            for batch in BATCHES:
                status.update(f"time per step: {cache}, {batch} sequences")
                seconds, tokens, slots = _decode(model, cache, batch, 128)
                add("step", cache, [batch, seconds])
                add("memory", cache, [tokens, slots])
        console.print(_table("step", found["step"]))
        console.print(_table("memory", found["memory"]))


def _table(line: str, lines: dict[str, list[list[float]]]) -> Table:
    title, of = TITLES[line]
    table = Table(title=title, title_justify="left")
    table.add_column("cache")
    longest = max(lines.values(), key=len)
    for point in longest:
        table.add_column(f"{point[0]:,}", justify="right")
    table.add_column(f"slope, a {of}", justify="right")
    unit = 1.0 if line == "memory" else 1e3
    for cache, points in lines.items():
        x, y = np.array(points).T
        slope = float(np.polyfit(x, y * unit, 1)[0])
        cells = [f"{value * unit:,.0f}" if line == "memory" else f"{value * unit:.1f}" for value in y]
        cells += [""] * (len(longest) - len(cells))
        table.add_row(cache, *cells, f"{slope:.4f}")
    return table


def _recompute(model: Any, context: int) -> float:
    """Median seconds of a token of one sequence without a cache."""
    from minipaged.model.recompute import generate

    steps, seconds = generate(model.transformer, [[100] * context], 1 + NEW), []
    next(steps)  # behind the first token, as many are there as in `_decode`
    for _ in range(NEW):
        start = time.perf_counter()
        next(steps)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def _decode(model: Any, cache: str, batch: int, context: int) -> tuple[float, int, int]:
    """Median seconds of a decode step, and the tokens that are held and the slots that are reserved before the last."""
    from minipaged import LLM, SamplingParams

    llm = LLM(
        model,
        cache=cache,
        max_model_len=MAX_MODEL_LEN,
        num_blocks=batch * MAX_MODEL_LEN // 16,
        max_num_seqs=batch,
        enable_prefix_caching=False,
    )
    # No sequence ends: the first ones write on while the last prompts are computed.
    params = SamplingParams(max_tokens=MAX_MODEL_LEN - context, ignore_eos=True)
    requests = [llm.add_request({"prompt_token_ids": [100 + i] * context}, params) for i in range(batch)]
    while not all(request.seqs[0].outputs for request in requests):
        llm.step()
    seconds, tokens, slots = [], 0, 0
    for _ in range(NEW):
        tokens, slots = llm.blocks.num_stored_tokens, llm.blocks.num_used * llm.blocks.block_size
        start = time.perf_counter()
        llm.step()
        seconds.append(time.perf_counter() - start)
    assert not requests[0].finished, "a step was timed in which not all sequences took part"
    llm.abort(*(request.request_id for request in requests))
    return float(np.median(seconds)), tokens, slots
