"""Chapter 10. What is asked, what is answered, and one sequence in between. Plain Python.

    tokens    [ p p p p p p o o o ]       prompt, then output
                        ^ num_computed    K and V of the tokens before this point are in the cache

A step computes tokens from `num_computed` on. When it reaches the end, the last token's logits give the next token.
Prefill, a chunk of it, decode, and starting over after preemption are this one sentence with other numbers.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop. Names and meanings are vLLM's.

    n: samples of the same prompt. temperature: 0 takes the likeliest token. top_p: keep the likeliest tokens that make
    up this much probability. top_k: keep this many, -1 for all. max_tokens: new tokens at most. stop: end before any of
    these strings. ignore_eos: do not stop at the model's end-of-text token. seed: the same text in any batch.
    Raises ValueError naming the first field that is out of range.
    """

    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = -1
    max_tokens: int = 64
    stop: str | Items[str] | None = None
    ignore_eos: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 1 and self.top_k != -1:
            raise ValueError(f"top_k must be at least 1, or -1 for all tokens, got {self.top_k}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.n > 1 and self.temperature == 0.0:
            raise ValueError(f"n = {self.n} samples at temperature 0 would all be the same: give a temperature above 0")
        if "" in self.stop_strings:
            raise ValueError("a stop string must not be empty: every text contains it")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


@dataclass
class CompletionOutput:
    """One sample. finish_reason: "stop" (end of text, or a stop string), "length", "abort", or None while it runs."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None


@dataclass
class RequestOutput:
    """The answer to one prompt: `n` samples."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]

    @property
    def finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)


@dataclass(eq=False)  # a sequence is itself, whatever its tokens
class Sequence:
    """One sample on its way. Invariant: 0 <= num_computed < len(self): the last token is always still to come."""

    seq_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    output: CompletionOutput
    num_computed: int = 0
    num_streamed: int = 0  # characters of the output's text that its caller has been given
    generator: Any = None  # the random numbers of this sample alone (sampling.py)

    def __len__(self) -> int:
        return len(self.prompt_token_ids) + len(self.output.token_ids)

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens at positions start to end - 1, prompt and output as one."""
        num_prompt = len(self.prompt_token_ids)
        if start >= num_prompt:  # the common case, a decode: do not touch the prompt
            return self.output.token_ids[start - num_prompt : end - num_prompt]
        return (self.prompt_token_ids + self.output.token_ids)[start:end]
