"""Chapter 10. `LLM`: prompts in, texts out. The engine below does the work."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from minipaged.engine.arguments import flag, items, number, text, whole
from minipaged.engine.beam_scheduler import BeamSearchParams
from minipaged.engine.beam_search import beam_search
from minipaged.engine.cache_config import check_cache, make_cache_config
from minipaged.engine.llm_engine import LLMEngine
from minipaged.engine.prompt import Prompt, Prompts, read_prompt
from minipaged.engine.runner import Runner
from minipaged.engine.scheduler import Scheduler
from minipaged.engine.sequence import Request, RequestOutput, SamplingParams, Sequence, StreamOutput
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.trace import Trace
from minipaged.model.load import Model, default_device, load_model
from minipaged.model.tokenizer import Message
from minipaged.viz.terminal import progress_bar


class LLM(LLMEngine):
    """An engine that is built from a model's name and takes prompts. The arguments and methods carry vLLM's names.

    model: a name, file or folder as `load_model` takes, or what it returned (several engines then share the weights).
    cache: "paged", or "contiguous": blocks as long as the longest request. num_blocks: size of the pool; by default at
    most what 1 GiB holds, the same for both caches. max_model_len: tokens of context at most, by default the model's.
    backend of the paged cache: "torch", "triton" (on a CPU with Triton's interpreter, which is slow), or "auto": Triton
    on a CUDA device, else torch. dtype and device: as of `load_model`; the device by default "cuda" where there is one.

    enable_prefix_caching: full blocks of the paged cache are found by their tokens. preemption: of the last sequence
    when the pool runs out: "recompute" or, with the paged cache, "swap" to num_host_blocks blocks of the host's memory
    (by default as many as the pool has). watermark: the share of the pool that stays free when a sequence enters.
    trace: True keeps every change of ownership in `llm.trace`; a path also saves it there at the end of each
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
        preemption: str = "recompute",
        num_host_blocks: int | None = None,
        watermark: float = 0.01,
        trace: bool | str | Path = False,
        seed: int = 0,
        tensor_parallel_size: int = 1,
        distributed_timeout: float = 60.0,
    ):
        seed, watermark = whole("seed", seed), number("watermark", watermark)
        max_num_seqs = whole("max_num_seqs", max_num_seqs)
        max_num_batched_tokens = whole("max_num_batched_tokens", max_num_batched_tokens)
        tensor_parallel_size = whole("tensor_parallel_size", tensor_parallel_size, least=1)
        dtype = dtype if dtype is None else text("dtype", dtype)
        device = device if device is None else str(device)  # a torch.device has its name
        trace = trace if isinstance(trace, str | Path) else flag("trace", trace)
        check_cache(cache)
        if trace and cache != "paged":
            raise ValueError(f"a trace shows the blocks of the paged cache, and cache is {cache!r}")
        sharded = None
        if tensor_parallel_size != 1:
            from minipaged.distributed.runner import ParallelRunner, ShardedModel

            sharded = ShardedModel(model, tensor_parallel_size, dtype, seed, device, distributed_timeout)
            model = sharded.model
        elif not isinstance(model, Model):
            device = device or default_device()
        transformer, tokenizer = load_model(model, dtype, seed, device)
        self.config, self.seed = sharded.loaded.config if sharded else transformer.config, seed
        cache_config = make_cache_config(
            transformer,
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
        sizes = cache_config.num_blocks, cache_config.block_size
        self._trace_path = Path(trace) if isinstance(trace, str | Path) else None
        # The tensors first: a pool that no memory holds is refused before its blocks are counted.
        runner = ParallelRunner(sharded, cache_config) if sharded else Runner(transformer, cache_config)
        blocks = BlockManager(
            *sizes,
            num_host_blocks=cache_config.num_host_blocks,
            enable_prefix_caching=cache_config.enable_prefix_caching,
            sliding_window=self.config.widest_window if cache_config.cache == "paged" else None,
            trace=Trace(*sizes, cache_config.num_host_blocks) if trace else None,
        )
        limits = cache_config.max_model_len, max_num_seqs, max_num_batched_tokens
        super().__init__(Scheduler(blocks, *limits, watermark=watermark), runner, tokenizer)
        self._request_ids = count()  # threads may ask at once: each gets a number of its own
        runner.start()  # the last thing: where an argument was wrong, no process was started

    def close(self) -> None:
        """End the other ranks, where there are any. It cannot generate any more then; without other ranks it can."""
        self.runner.close()

    # ---- many prompts at once ----------------------------------------------------------------------------------

    def generate(
        self, prompts: Prompts, sampling_params: SamplingParams | None = None, *, progress: bool | None = None
    ) -> list[RequestOutput]:
        """Answer every prompt, in the order given. progress: a bar on the terminal (by default where there is one).

        Raises ValueError, before anything runs, for a prompt that can never run. An exception or Ctrl-C in the middle
        ends these requests and frees their blocks.
        """
        requests = self._make_requests(prompts, sampling_params)
        seqs = {seq for request in requests for seq in request.seqs}
        with self._running(requests), progress_bar(progress, sum(seq.params.max_tokens for seq in seqs)) as advance:
            while not all(request.finished for request in requests):
                advance(sum(seq in seqs for seq in self.step()))
        return [request.output() for request in requests]

    def stream(self, prompts: Prompts, sampling_params: SamplingParams | None = None) -> Iterator[StreamOutput]:
        """Answer every prompt and yield each token when it is there. Prompts are checked at the call. Request ids count
        up in the order of the prompts. Several streams may take turns. Leaving the loop early ends these requests."""
        return self._stream(self._make_requests(prompts, sampling_params))

    def _stream(self, requests: list[Request]) -> Iterator[StreamOutput]:
        num_read = {seq: 0 for request in requests for seq in request.seqs}
        with self._running(requests):
            finished = False
            while not finished:
                self.step()
                finished = all(request.finished for request in requests)  # first: others may step while we yield
                for seq in num_read:
                    for piece in seq.pieces(num_read[seq]):
                        num_read[seq] += 1
                        yield piece

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: SamplingParams | None = None,
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or several, in the model's own format. A message is {"role": "system" | "user" |
        "assistant", "content": text}. Raises ValueError as `generate`, and where the model has no chat format."""
        given = items("messages", messages)
        if not given:
            raise ValueError("messages is empty: a conversation has at least one message")
        conversations = [given] if isinstance(given[0], dict) else given
        prompts: list[Prompt] = [self.tokenizer.chat_prompt(each) for each in conversations]  # type: ignore[arg-type]
        return self.generate(prompts, sampling_params, progress=progress)

    def beam_search(
        self, prompts: Prompts, params: BeamSearchParams | None = None, *, progress: bool | None = None
    ) -> list[RequestOutput]:
        """The likeliest texts of every prompt, best first, each with its score (beam_search.py). Raises ValueError as
        `generate`. Other requests wait meanwhile, and keep their blocks."""
        params = BeamSearchParams() if params is None else params
        if not isinstance(params, BeamSearchParams):
            raise ValueError(f"params must be BeamSearchParams, got {params!r}")
        requests = self._make_requests(prompts, SamplingParams(max_tokens=params.max_tokens))
        try:
            with progress_bar(progress, params.max_tokens * len(requests)) as advance:
                return beam_search(self, requests, params, lambda: advance(1))
        finally:
            self._save_trace()

    # ---- one request -------------------------------------------------------------------------------------------

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None) -> Request:
        """Queue one prompt; `step` until it is `finished`, and read its `output()` at any time. Raises ValueError,
        changing nothing, where it can never run."""
        [request] = self._make_requests([prompt], params)
        self.add(request)
        return request

    @contextmanager
    def _running(self, requests: list[Request]) -> Iterator[None]:
        """Queue requests, and abort those that are unfinished when the block is left, however it is left."""
        try:
            for request in requests:
                self.add(request)
            yield
        finally:
            self.abort(*(request.request_id for request in requests if request.request_id in self.requests))
            self._save_trace()

    def _save_trace(self) -> None:
        if self.trace is not None and self._trace_path is not None:
            self.trace.save(self._trace_path)

    def _make_requests(self, prompts: Prompts, params: SamplingParams | None) -> list[Request]:
        """Requests that are not queued yet: either all prompts are accepted or none."""
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params must be SamplingParams, got {params!r}")
        checked = []
        for i, prompt in enumerate([prompts] if isinstance(prompts, str | dict) else items("prompts", prompts)):
            try:
                token_ids, cache_salt = read_prompt(prompt, self.tokenizer, self.config.vocab_size)
                self.scheduler.check(len(token_ids), params.max_tokens)
            except ValueError as error:
                raise ValueError(f"prompt {i}: {error}") from error
            prompt_text = prompt.get("prompt") if isinstance(prompt, dict) else str(prompt)
            checked.append((prompt_text, token_ids, cache_salt))
        requests = []
        for prompt_text, token_ids, cache_salt in checked:
            request_id = next(self._request_ids)
            # Without a seed of its own, a request draws from the engine's seed and its number.
            seed = params.seed if params.seed is not None else self.seed + 7919 * (request_id + 1)
            seqs = [Sequence(str(request_id), index, token_ids, params, seed, cache_salt) for index in range(params.n)]
            requests.append(Request(str(request_id), prompt_text, seqs, time.perf_counter()))
        return requests
