"""Chapter 10. `LLM`: prompts in, texts out, over any of the three caches.

while anything is unfinished:
    work   = scheduler.schedule()          who computes what (plain Python)
    logits = model(step(work), cache)      one ragged batch, prompts and single tokens mixed
    tokens = sample(logits)                for every sequence whose end was reached
"""

import operator
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import TypedDict

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from minipaged.engine.sampling import generator, sample
from minipaged.engine.scheduler import Scheduler, Work
from minipaged.engine.sequence import CompletionOutput, FinishReason, RequestOutput, SamplingParams, Sequence
from minipaged.kvcache import ContiguousCache, PagedCache, RecomputeCache
from minipaged.memory.block_manager import BlockManager, NoMemory, SlabManager
from minipaged.model.contract import KVCache, Scheduled, make_step
from minipaged.model.load import Model, default_device, load_model
from minipaged.model.tokenizer import TextStream

DEFAULT_POOL_BYTES = 1 << 30  # K and V of all layers; the system commits a page of it when it is first written
CACHES = ("recompute", "contiguous", "paged")
BACKENDS = ("auto", "torch", "triton")


class TokenPrompt(TypedDict):
    prompt_token_ids: list[int]


Prompt = str | TokenPrompt


@dataclass(frozen=True, slots=True)
class StreamOutput:
    """One new token of one sample. `text` is what it adds: nothing, while a character or a stop string may follow."""

    request_id: str
    index: int
    text: str
    token_id: int
    finish_reason: FinishReason | None


class LLM:
    """A model, a cache and a scheduler. The arguments and methods carry vLLM's names.

    model: "smollm2-135m", "tiny", a GGUF file, a folder with safetensors, or what `load_model` returned (so that
    several engines share one copy of the weights). cache: "recompute", "contiguous" or "paged". num_blocks: size of the
    pool; by default at most what 1 GiB holds, the same for every cache. max_model_len: tokens of context at most, by
    default the model's own. backend of the paged cache: "torch", "triton" (on a CPU with Triton's interpreter, which is
    slow), or "auto": Triton on a CUDA device, else torch. dtype and device: of weights and cache; by default float32,
    and "cuda" where there is such a device. A loaded model has its own, and another is refused.
    Raises ValueError for an argument that does not fit.
    """

    def __init__(
        self,
        model: str | Path | Model = "smollm2-135m",
        *,
        cache: str = "paged",
        block_size: int = 16,
        num_blocks: int | None = None,
        backend: str = "auto",
        dtype: str | None = None,
        device: str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        seed: int = 0,
    ):
        if cache not in CACHES:
            raise ValueError(f"cache must be one of {', '.join(CACHES)}, got {cache!r}")
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        if backend == "triton" and cache != "paged":
            raise ValueError(f"backend 'triton' is of the paged cache, and cache is {cache!r}")
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        if num_blocks is not None and num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        if not isinstance(model, Model):
            model = load_model(model, dtype or "float32", seed, device or default_device())
        self.transformer, self.tokenizer = model
        self.config, self.seed = self.transformer.config, seed
        weights = self.transformer.embed_tokens.weight
        self.device, self.dtype = weights.device, weights.dtype
        for name, wanted, has in (("dtype", dtype, str(self.dtype)[6:]), ("device", device, str(self.device))):
            if wanted is not None and wanted not in (has, has.partition(":")[0]):
                raise ValueError(f"{name} {wanted!r} was asked for, and the loaded model has {has!r}")

        if max_model_len is None:
            max_model_len = self.config.max_position
        if not 2 <= max_model_len <= self.config.max_position:
            raise ValueError(f"max_model_len must be 2 to {self.config.max_position}, got {max_model_len}")
        self.bytes_per_token = self.config.kv_bytes_per_token(self.dtype)
        if num_blocks is None:
            most = max_num_seqs * -(-max_model_len // block_size)  # more could never be in use at once
            num_blocks = max(1, min(most, DEFAULT_POOL_BYTES // (self.bytes_per_token * block_size)))

        self.memory: BlockManager | NoMemory
        self.cache: KVCache
        # The tensors first: a pool that no memory holds is refused before anybody counts its blocks.
        if cache == "paged":
            if backend == "auto":
                backend = "triton" if self.device.type == "cuda" and find_spec("triton") else "torch"
            with self._refusing(num_blocks * block_size):
                self.cache = PagedCache(self.config, num_blocks, block_size, self.dtype, self.device, backend)
            self.memory = BlockManager(num_blocks, block_size)
        elif cache == "contiguous":
            num_slabs = num_blocks * block_size // max_model_len
            if num_slabs < 1:
                raise ValueError(
                    f"the pool of {num_blocks} * {block_size} = {num_blocks * block_size} slots holds no slab of "
                    f"max_model_len = {max_model_len}: give it more blocks, or a smaller max_model_len"
                )
            with self._refusing(num_blocks * block_size):
                self.cache = ContiguousCache(self.config, num_slabs, max_model_len, self.dtype, self.device)
            self.memory = SlabManager(num_slabs, max_model_len)
        else:
            self.memory = NoMemory()
            self.cache = RecomputeCache()
        self.scheduler = Scheduler(self.memory, max_model_len, max_num_seqs, max_num_batched_tokens)
        self._request_ids = count()
        self._streams: dict[str, TextStream] = {}
        self._boxes: dict[str, deque[StreamOutput]] = {}  # request -> tokens that its caller has not taken yet

    # ---- what a user calls -------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | list[Prompt] | list[str],
        sampling_params: SamplingParams | None = None,
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Answer every prompt, in the order given. progress: a bar on the terminal (by default where there is one).

        Raises ValueError, before anything runs, for a prompt that can never run. An exception or Ctrl-C in the middle
        gives back all memory of these prompts.
        """
        requests = self._requests(prompts, sampling_params or SamplingParams())
        outputs = [output for output, _ in requests]
        total = sum(seq.params.max_tokens for _, seqs in requests for seq in seqs)
        with closing(self._run(requests)) as run, _progress(progress, total) as one_more:
            for _ in run:
                one_more()
        return outputs

    def stream(
        self, prompts: Prompt | list[Prompt] | list[str], sampling_params: SamplingParams | None = None
    ) -> Iterator[StreamOutput]:
        """Answer every prompt and yield each token when it is there. Prompts are checked at the call, not at the first
        token. Request ids count up in the order of the prompts. Leaving the loop early gives back all memory."""
        return self._run(self._requests(prompts, sampling_params or SamplingParams()))

    def _step(self) -> list[StreamOutput]:
        """One iteration: schedule, run the model once, sample. Empty where nothing is unfinished."""
        work = self.scheduler.schedule()
        if not work:
            return []
        logits = self._forward(work)
        self.scheduler.computed(work)
        done = [item.seq for item in work if item.reaches_end]
        return [self._accept(seq, token) for seq, token in zip(done, sample(logits, done), strict=True)]

    # ---- one step ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _forward(self, work: list[Work]) -> torch.Tensor:
        """Logits of the last token of every sequence whose end this step reaches: [those sequences, vocab_size]."""
        batch = [
            Scheduled(
                item.seq.tokens(item.start, item.start + item.count), item.start, self.memory.blocks(item.seq.seq_id)
            )
            for item in work
        ]
        step = make_step(batch, self.memory.block_size, self.device)
        # Triton launches on the current device, which need not be ours.
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            hidden = self.transformer(step, self.cache)  # [num_tokens, hidden_size]
        ends = [i for i, item in enumerate(work) if item.reaches_end]
        last = step.query_start_loc[1:][ends].long() - 1
        return self.transformer.logits(hidden[last])

    def _accept(self, seq: Sequence, token: int) -> StreamOutput:
        """Append a token to its sequence, with its text, and finish the sequence where it ends."""
        output, params = seq.output, seq.params
        output.token_ids.append(token)
        ends_text = token in self.tokenizer.eos_token_ids and not params.ignore_eos
        output.text += self._streams[seq.seq_id].push(token)
        reason: FinishReason | None = None
        if ends_text:
            reason = "stop"
        elif len(output.token_ids) >= params.max_tokens or len(seq) >= self.scheduler.max_model_len:
            reason = "length"
        if reason:  # no token follows: a character that is still unfinished is given out as it is
            output.text += self._streams[seq.seq_id].finish()
        stopped_at = min((at for s in params.stop_strings if (at := output.text.find(s)) >= 0), default=None)
        if stopped_at is not None:
            output.text = output.text[:stopped_at]
            reason = "stop"
        if reason:
            self._finish(seq, reason)
        # The end of the text may be the beginning of a stop string, which is no part of the answer: hold it back.
        held_back = 0 if reason else max((len(s) - 1 for s in params.stop_strings), default=0)
        new_text = output.text[seq.num_streamed : max(seq.num_streamed, len(output.text) - held_back)]
        seq.num_streamed += len(new_text)
        return StreamOutput(seq.seq_id.rpartition(".")[0], output.index, new_text, token, reason)

    def _finish(self, seq: Sequence, reason: FinishReason) -> None:
        self.scheduler.finish(seq, reason)
        self._streams.pop(seq.seq_id, None)

    @contextmanager
    def _refusing(self, num_slots: int) -> Iterator[None]:
        """torch's word for too large a pool, in ours: ValueError with the numbers."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:  # OutOfMemoryError of CUDA is a RuntimeError
            raise ValueError(
                f"a pool of {num_slots:,} slots of {self.bytes_per_token:,} bytes each is more than device "
                f"'{self.device}' has: give it fewer blocks"
            ) from error

    # ---- requests ----------------------------------------------------------------------------------------------

    def _run(self, requests: list[tuple[RequestOutput, list[Sequence]]]) -> Generator[StreamOutput]:
        """Queue the requests and step until they are finished. Several of these may be under way at once, taking turns:
        whoever steps computes for all, and puts what is not its own into the others' boxes."""
        mine = [output.request_id for output, _ in requests]
        try:
            for output, seqs in requests:
                self._boxes[output.request_id] = deque()
                for seq in seqs:
                    self.scheduler.add(seq)
                    self._streams[seq.seq_id] = self.tokenizer.stream()
            while True:
                # Looked at before the boxes are emptied: while we yield, others may step, and fill one that was empty.
                finished = all(output.finished for output, _ in requests)
                for request_id in mine:
                    while box := self._boxes[request_id]:
                        yield box.popleft()
                if finished:
                    break
                for new in self._step():
                    self._boxes[new.request_id].append(new)
        finally:
            for output, seqs in requests:
                self._boxes.pop(output.request_id, None)
                for seq in seqs:
                    self._finish(seq, "abort")  # does nothing to one that has finished

    def _requests(
        self, prompts: Prompt | list[Prompt] | list[str], params: SamplingParams
    ) -> list[tuple[RequestOutput, list[Sequence]]]:
        """Make sequences of the prompts. Nothing is queued yet: either all are accepted or none."""
        items: Iterable[Prompt] = [prompts] if isinstance(prompts, str | dict) else prompts
        requests = []
        for number, prompt in enumerate(items):
            try:
                token_ids = self._encode(prompt)
                self.scheduler.check(len(token_ids), params.max_tokens)
            except ValueError as error:
                raise ValueError(f"prompt {number}: {error}") from error
            request_id = str(next(self._request_ids))
            # Without a seed of its own, a request draws from the engine's seed and its number.
            seed = params.seed if params.seed is not None else self.seed + 7919 * (int(request_id) + 1)
            outputs = [CompletionOutput(i) for i in range(params.n)]
            seqs = [
                Sequence(
                    seq_id=f"{request_id}.{output.index}",
                    prompt_token_ids=token_ids,
                    params=params,
                    output=output,
                    generator=generator(seed, output.index),
                )
                for output in outputs
            ]
            text = prompt if isinstance(prompt, str) else None
            requests.append((RequestOutput(request_id, text, token_ids, outputs), seqs))
        return requests

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if not isinstance(prompt, dict) or "prompt_token_ids" not in prompt:
            raise ValueError(f"a prompt is a string or {{'prompt_token_ids': [...]}}, got {prompt!r}")
        try:
            token_ids = [operator.index(token) for token in prompt["prompt_token_ids"]]
        except TypeError as error:
            raise ValueError(f"prompt_token_ids must be whole numbers: {error}") from error
        for token in token_ids:
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(
                    f"token {token!r} does not exist: the vocabulary has 0 to {self.config.vocab_size - 1}"
                )
        return token_ids


@contextmanager
def _progress(wanted: bool | None, total: int) -> Iterator[Callable[[], None]]:
    """A bar of tokens on the terminal, where there is one or it is wanted; yields what to call at each token."""
    console = Console(stderr=True)
    if not (console.is_terminal if wanted is None else wanted):
        yield lambda: None
        return
    columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)
