"""Chapter 10. `LLM`: prompts in, texts out, over any of the three caches. The engine below does the work."""

import operator
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import NotRequired, TypedDict

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from minipaged.engine.beam import BeamSearchParams
from minipaged.engine.llm_engine import LLMEngine, StreamOutput
from minipaged.engine.metrics import Metrics
from minipaged.engine.runner import Runner
from minipaged.engine.scheduler import Preemption, Scheduler
from minipaged.engine.sequence import RequestOutput, SamplingParams
from minipaged.engine.settings import CACHES, cache_settings
from minipaged.memory.trace import Trace
from minipaged.model.load import Model, default_device, load_model
from minipaged.model.tokenizer import Message

__all__ = ["CACHES", "LLM", "StreamOutput"]


class TokenPrompt(TypedDict):
    """A prompt as tokens. cache_salt: prompts of unequal salts never share a block (one for each tenant, say)."""

    prompt_token_ids: list[int]
    cache_salt: NotRequired[str]


Prompt = str | TokenPrompt
Prompts = Prompt | list[Prompt] | list[str]
Params = SamplingParams | BeamSearchParams


class LLM:
    """A model, a cache and a scheduler. The arguments and methods carry vLLM's names.

    model: "smollm2-135m", "tiny", a GGUF file, a folder with safetensors, or what `load_model` returned (so that
    several engines share one copy of the weights). cache: "recompute", "contiguous" or "paged". num_blocks: size of the
    pool; by default at most what 1 GiB holds, the same for every cache. max_model_len: tokens of context at most, by
    default the model's own. backend of the paged cache: "torch", "triton" (on a CPU with Triton's interpreter, which is
    slow), or "auto": Triton on a CUDA device, else torch. dtype and device: of weights and cache; by default float32,
    and "cuda" where there is such a device. dtype "auto" is float32 or bfloat16, whichever is the faster here. A loaded
    model has its own, and another is refused.

    enable_prefix_caching: full blocks of the paged cache stay findable by their tokens. preemption: what happens to the
    latest request when the pool runs out: "recompute" or, with the paged cache, "swap" to num_host_blocks blocks of the
    host's memory (by default as many as the pool has). watermark: the share of the pool that stays free when a request
    enters. trace: True keeps every change of ownership in `llm.trace`; a path also saves it there at the end of each
    `generate`, `stream` and `beam_search`. Raises ValueError for an argument that does not fit.

    tensor_parallel_size: ranks that the model's heads are divided over (chapter 13), each a process with a device of
    its own, or a share of the CPU's cores. This process is rank 0 and starts the others, or torchrun did. They end with
    `close`, or with this object. distributed_timeout: seconds that a rank may let the others wait in a step.
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
        enable_prefix_caching: bool = True,
        preemption: Preemption = "recompute",
        num_host_blocks: int | None = None,
        watermark: float = 0.01,
        trace: bool | str | Path = False,
        seed: int = 0,
        tensor_parallel_size: int = 1,
        distributed_timeout: float = 60.0,
    ):
        if trace and cache != "paged":
            raise ValueError(f"a trace shows the blocks of the paged cache, and cache is {cache!r}")
        parts = None
        if tensor_parallel_size != 1:
            # One floor up, and imported by those who ask for it alone.
            from minipaged.distributed.runner import ParallelRunner, Parts

            parts = Parts(model, tensor_parallel_size, dtype, seed, device, distributed_timeout)
            model = parts.model
        elif not isinstance(model, Model):
            model = load_model(model, dtype or "float32", seed, device or default_device())
        transformer, self.tokenizer = model
        self.config, self.seed = parts.loaded.config if parts else transformer.config, seed
        weights = transformer.embed_tokens.weight
        dtype = None if dtype == "auto" else dtype
        for name, wanted, has in (("dtype", dtype, str(weights.dtype)[6:]), ("device", device, str(weights.device))):
            if wanted is not None and wanted not in (has, has.partition(":")[0]):
                raise ValueError(f"{name} {wanted!r} was asked for, and the loaded model has {has!r}")
        settings = cache_settings(
            transformer.config,
            weights,
            cache=cache,
            backend=backend,
            block_size=block_size,
            num_blocks=num_blocks,
            num_host_blocks=num_host_blocks,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            enable_prefix_caching=enable_prefix_caching,
            preemption=preemption,
        )
        self.trace = Trace(settings.num_blocks, block_size, settings.num_host_blocks) if trace else None
        self._trace_path = Path(trace) if isinstance(trace, str | Path) else None
        runner = ParallelRunner(parts, settings, self.trace) if parts else Runner(transformer, settings, self.trace)
        self.cache, self.memory = runner.cache, runner.memory
        self.device, self.dtype, self.bytes_per_token = runner.device, runner.dtype, runner.bytes_per_token
        self.scheduler = Scheduler(
            self.memory,
            settings.max_model_len,
            max_num_seqs,
            max_num_batched_tokens,
            preemption=preemption,
            watermark=watermark,
            trace=self.trace,
        )
        self.engine = LLMEngine(runner, self.scheduler, self.tokenizer, self.trace)
        self._request_ids = count()
        self._boxes: dict[str, deque[StreamOutput]] = {}  # request -> tokens that its caller has not taken yet
        runner.start()  # the last thing: where an argument was wrong, no process was started

    def close(self) -> None:
        """End the other ranks, where there are any. It cannot generate any more then; without other ranks it can."""
        self.engine.runner.close()

    # ---- many prompts at once ----------------------------------------------------------------------------------

    def generate(
        self, prompts: Prompts, sampling_params: SamplingParams | None = None, *, progress: bool | None = None
    ) -> list[RequestOutput]:
        """Answer every prompt, in the order given. progress: a bar on the terminal (by default where there is one).

        Raises ValueError, before anything runs, for a prompt that can never run. An exception or Ctrl-C in the middle
        gives back all memory of these prompts.
        """
        return self._finish(prompts, sampling_params or SamplingParams(), progress)

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: SamplingParams | None = None,
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or several, in the model's own format.

        A message is {"role": "system" | "user" | "assistant", "content": text}. Raises ValueError as `generate` does,
        and where the model has no chat format.
        """
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        prompts = [self.tokenizer.apply_chat_template(conversation) for conversation in conversations]  # type: ignore[arg-type]
        return self.generate(prompts, sampling_params, progress=progress)

    def beam_search(
        self, prompts: Prompts, params: BeamSearchParams | None = None, *, progress: bool | None = None
    ) -> list[RequestOutput]:
        """The likeliest texts of every prompt, best first, each with its score. Raises ValueError as `generate`."""
        return self._finish(prompts, params or BeamSearchParams(), progress)

    def stream(self, prompts: Prompts, sampling_params: SamplingParams | None = None) -> Iterator[StreamOutput]:
        """Answer every prompt and yield each token when it is there. Prompts are checked at the call, not at the first
        token. Request ids count up in the order of the prompts. Leaving the loop early gives back all memory."""
        return self._run(self._checked(prompts, sampling_params or SamplingParams()), [])

    # ---- one request, one step ---------------------------------------------------------------------------------

    def add_request(self, prompt: Prompt, params: Params | None = None) -> RequestOutput:
        """Queue one prompt. Its answer grows with each `step`. Raises ValueError where it can never run."""
        return self._add(*self._checked([prompt], params or SamplingParams())[0])

    def step(self) -> list[StreamOutput]:
        """One iteration over everything that is unfinished: the tokens that it gave."""
        return self._delivered(self.engine.step())

    def abort(self, request_id: str) -> None:
        """Stop a request, wherever it stands, and give back its memory. Its text so far remains.

        Raises ValueError where there is no such unfinished request.
        """
        self._delivered(self.engine.abort(request_id))

    def metrics(self) -> Metrics:
        """What the engine did so far, and how it stands now."""
        return self.engine.metrics()

    # ---- requests ----------------------------------------------------------------------------------------------

    def _finish(self, prompts: Prompts, params: Params, progress: bool | None) -> list[RequestOutput]:
        checked = self._checked(prompts, params)
        total = sum(params.max_tokens * getattr(params, "n", 1) for _ in checked)
        answers: list[RequestOutput] = []
        with closing(self._run(checked, answers)) as run, _progress(progress, total) as one_more:
            for _ in run:
                one_more()
        return answers

    def _run(self, checked: list["_Checked"], answers: list[RequestOutput]) -> Generator[StreamOutput]:
        """Queue the requests and step until they are finished. Several of these may be under way at once, taking turns:
        whoever steps computes for all, and puts what is not its own into the others' boxes."""
        try:
            for item in checked:
                answer = self._add(*item)
                self._boxes[answer.request_id] = deque()
                answers.append(answer)
            while True:
                # Looked at before the boxes are emptied: while we yield, others may step, and fill one that was empty.
                finished = all(answer.finished for answer in answers)
                for answer in answers:
                    while box := self._boxes[answer.request_id]:
                        yield box.popleft()
                if finished:
                    break
                self.step()
        finally:
            for answer in answers:
                self._boxes.pop(answer.request_id, None)
                if not answer.finished:
                    self.engine.abort(answer.request_id)
            if self.trace is not None and self._trace_path is not None:
                self.trace.save(self._trace_path)

    def _delivered(self, new: list[StreamOutput]) -> list[StreamOutput]:
        for item in new:
            if (box := self._boxes.get(item.request_id)) is not None:
                box.append(item)
        return new

    def _add(self, number: int, prompt: Prompt, token_ids: list[int], params: Params) -> RequestOutput:
        seed = getattr(params, "seed", None)
        return self.engine.add_request(
            str(number),
            token_ids,
            params,
            # Without a seed of its own, a request draws from the engine's seed and its number.
            seed=seed if seed is not None else self.seed + 7919 * (number + 1),
            prompt=prompt if isinstance(prompt, str) else None,
            cache_salt=None if isinstance(prompt, str) else prompt.get("cache_salt"),
        )

    def _checked(self, prompts: Prompts, params: Params) -> list["_Checked"]:
        """Prompts with their tokens. Nothing is queued yet: either all are accepted or none."""
        items: Iterable[Prompt] = [prompts] if isinstance(prompts, str | dict) else prompts
        num_seqs = params.n if isinstance(params, SamplingParams) else params.beam_width
        if not self.memory.shares_blocks:
            num_seqs = 1  # each sample is a request of its own
        checked = []
        for number, prompt in enumerate(items):
            try:
                token_ids = self._encode(prompt)
                self.scheduler.check(len(token_ids), params.max_tokens, num_seqs)
            except ValueError as error:
                raise ValueError(f"prompt {number}: {error}") from error
            checked.append((prompt, token_ids))
        return [(next(self._request_ids), prompt, token_ids, params) for prompt, token_ids in checked]

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


_Checked = tuple[int, Prompt, list[int], Params]  # the first is the request's number


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
