"""The main job: one model, a ragged batch of prompts, no cache and two caches, and the same text from all of them.

`run` streams the texts side by side, then shows what each cache cost, then draws the block tables of the first two
requests, A and B: apart in their logical view, sharing one physical pool. Without a cache it is chapter 2's loop
(model/recompute.py), with a cache chapter 10's engine.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from statistics import fmean
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from minipaged.cdiv import cdiv
from minipaged.engine.cache_config import CACHES
from minipaged.engine.detokenizer import IncrementalDetokenizer
from minipaged.engine.llm import LLM
from minipaged.engine.sequence import SamplingParams
from minipaged.model.load import Model, default_device, load_model
from minipaged.model.recompute import next_logits
from minipaged.viz.snapshot import Snapshot
from minipaged.viz.terminal import draw

PROMPTS = (
    "Photosynthesis is the process by which",
    "Once upon a time, in a village by the sea,",
    "Here is a list of the planets of the solar system:",
    "An operating system gives every process an address space of its own. It divides memory into pages of equal size, "
    "and a page table says where each page lies. The main advantage of paging is that",
)
REFRESHES_PER_SECOND = 8
TOKENS, INTERPRETED_TOKENS = 24, 4  # for each prompt, where the caller does not say
MEBIBYTE = 1 << 20

NewTokens = Iterator[tuple[int, str, int]]  # number of the prompt, new text, new token


@dataclass
class Run:
    """What one cache did with all the prompts."""

    cache: str
    name: str  # the cache, and its backend where it was asked for
    texts: list[str] = field(default_factory=lambda: [""] * len(PROMPTS))
    token_ids: list[list[int]] = field(default_factory=lambda: [[] for _ in PROMPTS])
    first_token_seconds: list[float] = field(default_factory=list)  # of each prompt
    seconds: float = 0.0
    reserved_bytes: int = 0  # at the moment when most was reserved
    used_bytes: int = 0  # at that same moment
    snapshot: Snapshot | None = None  # the last moment at which A and B both held memory

    def record(self, tokens: NewTokens) -> None:
        start = time.perf_counter()
        for prompt, text, token_id in tokens:
            if not self.token_ids[prompt]:
                self.first_token_seconds.append(time.perf_counter() - start)
            self.texts[prompt] += text
            self.token_ids[prompt].append(token_id)
        self.seconds = time.perf_counter() - start

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.token_ids)) / self.seconds if self.seconds else 0.0


def run(
    console: Console, model: str, max_tokens: int | None, block_size: int, max_model_len: int | None, backend: str
) -> bool:
    """Run the demonstration; `backend` is that of the paged cache.

    Returns whether all caches, and every prompt by itself, gave the same tokens.
    """
    with console.status(f"loading {model}"):
        loaded = load_model(model, device=default_device())
    context = loaded.transformer.config.max_position
    max_model_len = max_model_len or min(2048, context)
    # A contiguous cache has to reserve max_model_len slots a request, written or not: the pool holds as many.
    num_blocks = len(PROMPTS) * cdiv(max_model_len, block_size)
    sizes: dict[str, Any] = {"block_size": block_size, "num_blocks": num_blocks, "max_model_len": max_model_len}
    backends = {"contiguous": "auto", "paged": backend}
    engines = {cache: LLM(loaded, cache=cache, backend=backends[cache], **sizes) for cache in CACHES}
    interpreted = backend == "triton" and engines["paged"].runner.device.type == "cpu"
    if max_tokens is None:
        max_tokens = INTERPRETED_TOKENS if interpreted else TOKENS
    for llm, prompt in product(engines.values(), PROMPTS):  # what can never run is refused before anything is drawn
        llm.scheduler.check(len(loaded.tokenizer.encode(prompt)), max_tokens)
    params = SamplingParams(max_tokens=max_tokens)
    if interpreted:
        console.print("Triton's interpreter runs the kernels on the CPU, program by program: this takes minutes.")
    console.print(
        f"[bold]{len(PROMPTS)} prompts, one ragged batch, up to {max_tokens} greedy tokens each, three caches[/bold]\n"
    )
    if not interpreted:
        with console.status("warming up"):  # what is compiled once, and read for the first time, is in no figure below
            for cache in CACHES:
                once = LLM(loaded, cache=cache, backend=backends[cache], **sizes)
                once.generate(PROMPTS[-1], SamplingParams(max_tokens=min(2, max_tokens)), progress=False)
    names = {"paged": "paged, Triton"} if backend == "triton" else {}
    runs = [Run(cache, names.get(cache, cache)) for cache in ("recompute", *CACHES)]
    how: dict[str, Any] = {"refresh_per_second": REFRESHES_PER_SECOND, "vertical_overflow": "crop"}
    with Live(console=console, get_renderable=lambda: _side_by_side(runs), **how):
        for this in runs:
            if this.cache in CACHES:
                this.record(_with_cache(engines[this.cache], this, params))
            else:
                this.record(_without_cache(loaded, params, max_model_len))
    if not console.is_terminal:
        console.print()  # in a pipe, the table above ends without a line break

    with console.status("each prompt once more, alone, through the paged cache"):
        answers = [engines["paged"].generate(prompt, params, progress=False)[0] for prompt in PROMPTS]
    alone = [answer.outputs[0].token_ids for answer in answers]
    first = runs[0].token_ids
    equal = all(this.token_ids == first for this in runs) and alone == first
    console.print(_verdict(runs, alone, equal))
    console.print(_costs(runs, loaded, max_model_len, block_size))
    if runs[-1].snapshot:
        console.print()
        console.print(
            "[bold]The paged cache, with all requests on their way.[/bold] Each sees its own tokens "
            "from logical block 0 on; in the one pool, their blocks lie as they came."
        )
        console.print(draw(runs[-1].snapshot, width=console.width))
    return equal


def _without_cache(model: Model, params: SamplingParams, max_model_len: int) -> NewTokens:
    """The likeliest next token of every text that has not ended, again and again; all tokens are computed each time."""
    texts = [model.tokenizer.encode(prompt) for prompt in PROMPTS]
    given = [
        IncrementalDetokenizer(params, model.tokenizer, min(params.max_tokens, max_model_len - len(text)))
        for text in texts
    ]
    while unfinished := [i for i in range(len(texts)) if given[i].finish_reason is None]:
        logits = next_logits(model.transformer, [texts[i] for i in unfinished])  # [len(unfinished), vocab_size]
        for i, token_id in zip(unfinished, logits.max(-1).indices.tolist(), strict=True):
            texts[i].append(token_id)
            given[i].push(token_id)
            yield i, given[i].pieces[-1].text, token_id


def _with_cache(llm: LLM, this: Run, params: SamplingParams) -> NewTokens:
    """The engine's tokens; and what its memory holds meanwhile, into `this`."""
    bytes_per_token, blocks = llm.runner.bytes_per_token, llm.blocks
    first_id: int | None = None
    for new in llm.stream(list(PROMPTS), params):
        assert new.token_id is not None, "no request is aborted here"
        first_id = int(new.request_id) if first_id is None else first_id
        yield int(new.request_id) - first_id, new.text, new.token_id
        reserved = blocks.num_used * blocks.block_size * bytes_per_token
        if reserved >= this.reserved_bytes:
            this.reserved_bytes = reserved
            this.used_bytes = blocks.num_stored_tokens * bytes_per_token
        if this.cache == "paged":
            this.snapshot = _snapshot(llm, first_id, this) or this.snapshot


def _snapshot(llm: LLM, first_id: int, this: Run) -> Snapshot | None:
    """The block tables of A and B, with their words, and the blocks of all others beside them."""
    tables, num_tokens, texts = {}, {}, {}
    for i, prompt in enumerate(PROMPTS):
        blocks = llm.blocks.blocks(f"{first_id + i}.0")
        tokens = llm.tokenizer.encode(prompt) + this.token_ids[i]
        if not blocks:
            return None
        name = chr(ord("A") + i)
        tables[name] = blocks
        num_tokens[name] = llm.blocks.num_tokens(f"{first_id + i}.0")
        texts[name] = llm.tokenizer.pieces(tokens[: num_tokens[name]])
    return Snapshot(llm.blocks.num_blocks, llm.blocks.block_size, tables, num_tokens, texts)


def _side_by_side(runs: list[Run]) -> Table:
    table = Table(expand=True, show_lines=True)
    for this in runs:
        table.add_column("no cache (recompute)" if this.cache == "recompute" else f"{this.name} cache", ratio=1)
    for i, prompt in enumerate(PROMPTS):
        beginning = prompt if len(prompt) <= 60 else "... " + prompt[-56:].partition(" ")[2]
        table.add_row(*(Text.assemble((beginning, "dim"), (this.texts[i], "bold")) for this in runs))
    return table


def _verdict(runs: list[Run], alone: list[list[int]], equal: bool) -> Text:
    tokens = sum(map(len, runs[0].token_ids))
    if equal:
        return Text(
            f"All {tokens} tokens are equal: across the {len(runs)} caches, and with each prompt alone (paged).",
            "bold green",
        )
    lines = []
    for name, theirs in [*((this.cache, this.token_ids) for this in runs[1:]), ("alone", alone)]:
        for i, (ours, other) in enumerate(zip(runs[0].token_ids, theirs, strict=True)):
            if ours != other:
                at = next((k for k, (a, b) in enumerate(zip(ours, other, strict=False)) if a != b), len(ours))
                lines.append(
                    f"prompt {i}: {name} differs from recompute at new token {at}: {other[at:]}, not {ours[at:]}"
                )
    return Text("The tokens differ.\n" + "\n".join(lines), "bold red")


def _costs(runs: list[Run], loaded: Model, max_model_len: int, block_size: int) -> Group:
    table = Table(title="What each cache cost", title_justify="left")
    table.add_column("cache")
    for heading in ("first token", "tokens/s", "K/V reserved", "K/V used", "used"):
        table.add_column(heading, justify="right")
    for this in runs:
        share = f"{this.used_bytes / this.reserved_bytes:.1%}" if this.reserved_bytes else "-"
        table.add_row(
            this.name,
            f"{fmean(this.first_token_seconds):.2f} s",
            f"{this.tokens_per_second:.1f}",
            f"{this.reserved_bytes / MEBIBYTE:.1f} MiB",
            f"{this.used_bytes / MEBIBYTE:.1f} MiB",
            share,
        )
    per_token = loaded.transformer.config.kv_bytes_per_token(next(loaded.transformer.parameters()).dtype)
    note = (
        f"One token holds {per_token:,} bytes of K and V. The contiguous cache reserves {max_model_len:,} slots "
        f"a request, the paged one blocks of {block_size} as they are filled."
    )
    return Group(Text(""), table, Text(note, "dim"))
