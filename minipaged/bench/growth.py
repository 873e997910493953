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

CONTEXTS = (64, 128, 256, 512, 1024)  # tokens already there when the timed ones are written
BATCHES = (1, 2, 4, 8, 16, 32, 64)
MAX_MODEL_LEN = 2048
NEW = 12  # tokens that are timed at each point; the median counts


def growth(console: Console, out: Path | None) -> None:
    """Measure the three lines on SmolLM2, print them, and write them to a JSON file."""
    from minipaged.model.load import load_model

    model = load_model("smollm2-135m")
    found: dict[str, Any] = {"machine": this_machine(), "token": {}, "step": {}, "memory": {}}
    with console.status("measuring") as status:
        for cache in ("recompute", "contiguous", "paged"):
            contexts = CONTEXTS[:-1] if cache == "recompute" else CONTEXTS
            for context in contexts:
                status.update(f"time per token: {cache}, {context} tokens of context")
                seconds, _, _ = _decode(model, cache, 1, context)
                found["token"].setdefault(cache, []).append([context, seconds])
        for cache in ("contiguous", "paged"):
            for batch in BATCHES:
                status.update(f"time per step: {cache}, {batch} sequences")
                seconds, tokens, slots = _decode(model, cache, batch, 128)
                found["step"].setdefault(cache, []).append([batch, seconds])
                found["memory"].setdefault(cache, []).append([tokens, slots])
    for name, title, of in (
        ("token", "Milliseconds per token against tokens of context (1 sequence)", "token of context"),
        ("step", "Milliseconds per step against sequences (128 tokens of context)", "sequence"),
        ("memory", "Slots reserved against tokens held", "token"),
    ):
        table = Table(title=title, title_justify="left")
        table.add_column("cache")
        longest = max(found[name].values(), key=len)
        for point in longest:
            table.add_column(f"{point[0]:,}", justify="right")
        table.add_column(f"slope, a {of}", justify="right")
        unit = 1.0 if name == "memory" else 1e3
        for cache, points in found[name].items():
            x, y = np.array(points).T
            slope = float(np.polyfit(x, y * unit, 1)[0])
            cells = [f"{value * unit:,.0f}" if name == "memory" else f"{value * unit:.1f}" for value in y]
            cells += [""] * (len(longest) - len(cells))
            table.add_row(cache, *cells, f"{slope:.4f}")
        console.print(table)
    if out is not None:
        out.write_text(json.dumps(found, indent=1))


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
    # Nobody ends: the first sequences write on while the last prompts are computed.
    params = SamplingParams(max_tokens=MAX_MODEL_LEN - context, ignore_eos=True)
    answers = [llm.add_request({"prompt_token_ids": [100 + i] * context}, params) for i in range(batch)]
    while not all(answer.outputs[0].token_ids for answer in answers):
        llm.step()
    seconds, tokens, slots = [], 0, 0
    for _ in range(NEW):
        tokens, slots = llm.memory.num_tokens, llm.memory.num_slots_reserved
        start = time.perf_counter()
        llm.step()
        seconds.append(time.perf_counter() - start)
    assert not answers[0].finished, "a step was timed in which not all sequences took part"
    for answer in answers:
        llm.abort(answer.request_id)
    return float(np.median(seconds)), tokens, slots
