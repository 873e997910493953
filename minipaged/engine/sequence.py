"""Chapter 10. What is asked, what is answered, and one sequence in between. Plain Python.

    tokens    [ p p p p p p o o o ]       prompt, then output
                        ^ num_computed    K and V of the tokens before this point are in the cache

A step computes tokens from `num_computed` on. When it reaches the end, the last token's logits give the next token.
Prefill, a chunk of it, decode, a prefix found in the cache, and starting over after preemption are this one sentence
with other numbers.

A request with several samples is a group. Its prompt is computed once, by its first sequence; then the others fork.

    group   seqs [ s0 ]            unborn [ s1 s2 ]       the prompt is on its way
            seqs [ s0 s1 s2 ]      unborn [ ]             it is there: three tables name its blocks
            seqs [ s0 s2 ]                                s1 has finished
"""

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop. Names and meanings are vLLM's.

    n: samples of the same prompt. temperature: 0 takes the likeliest token. top_p: keep the likeliest tokens that make
    up this much probability. top_k: keep this many, -1 for all. min_p: keep tokens at least this times as likely as the
    likeliest. repetition_penalty: above 1, tokens that are in the prompt or the output become less likely.
    max_tokens: new tokens at most. stop: end before any of these strings. stop_token_ids: end with any of these tokens.
    ignore_eos: do not stop at the model's end-of-text token. seed: the same text in any batch. logprobs: keep the
    logarithm of the probability of each token, and of this many likeliest ones beside it.
    Raises ValueError naming the first field that is out of range.
    """

    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 64
    stop: str | Items[str] | None = None
    stop_token_ids: Items[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 1 and self.top_k != -1:
            raise ValueError(f"top_k must be at least 1, or -1 for all tokens, got {self.top_k}")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be above 0 (1 changes nothing), got {self.repetition_penalty}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.n > 1 and self.temperature == 0.0:
            raise ValueError(f"n = {self.n} samples at temperature 0 would all be the same: give a temperature above 0")
        if "" in self.stop_strings:
            raise ValueError("a stop string must not be empty: every text contains it")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs must be 0 or more, got {self.logprobs}")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


@dataclass
class CompletionOutput:
    """One sample, or one hypothesis of a beam search.

    finish_reason: "stop" (end of text, a stop token or a stop string), "length", "abort", or None while it runs.
    logprobs, where asked for: for each token, {token id: natural logarithm of its probability}; cumulative_logprob is
    the sum over the tokens. score, of a beam search alone: see beam.py.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[dict[int, float]] | None = None
    cumulative_logprob: float | None = None
    score: float | None = None


@dataclass
class RequestOutput:
    """The answer to one prompt: `n` samples, or the hypotheses of a beam search, best first."""

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
    cache_salt: str | None = None  # sequences of unequal salts share no block
    seed: int = 0  # with the sample's index and the token's position, it decides every draw (sampling.py)
    num_computed: int = 0
    writer: Any = None  # what turns its tokens into text (text.py); the scheduler knows nothing of it

    def __len__(self) -> int:
        return len(self.prompt_token_ids) + len(self.output.token_ids)

    @property
    def num_missing(self) -> int:
        """Tokens that are there, and not computed yet. At least 1."""
        return len(self.prompt_token_ids) + len(self.output.token_ids) - self.num_computed

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens at positions start to end - 1, prompt and output as one."""
        num_prompt = len(self.prompt_token_ids)
        if start >= num_prompt:  # the common case, a decode: do not touch the prompt
            return self.output.token_ids[start - num_prompt : end - num_prompt]
        if end <= num_prompt:
            return self.prompt_token_ids[start:end]
        return (self.prompt_token_ids + self.output.token_ids)[start:end]


@dataclass(eq=False)
class SequenceGroup:
    """All sequences of one request: they are admitted, preempted, swapped and resumed together.

    Invariant: `seqs` and `unborn` are unfinished. The unborn have no table yet; they fork from the first of `seqs` when
    it has computed the prompt.
    """

    request_id: str
    seqs: list[Sequence]
    unborn: list[Sequence] = field(default_factory=list)  # may have tokens, of a time before a preemption
    beam_width: int = 0  # above 0, `seqs` are the beams of a search: they choose their next tokens together
    search: Any = None  # the state of that search (beam.py); the scheduler knows nothing of it
    is_swapped: bool = False

    @property
    def num_places(self) -> int:
        """How many sequences it may grow to."""
        return max(len(self.seqs) + len(self.unborn), self.beam_width)

    @property
    def is_decoding(self) -> bool:
        """Whether each of its sequences wants exactly one token."""
        return all(seq.num_missing == 1 for seq in self.seqs)
