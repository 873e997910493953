"""Chapter 10. Parameters and outputs of a request, and its sequences. Plain Python.

    tokens    [ p p p p p p o o o ]       prompt, then output
                        ^ num_computed    K and V of the tokens before this point are in the cache

A step computes tokens from `num_computed` on. When it reaches the end, the last token's logits give the next token.
Prefill, a chunk of it, decode, a cached prefix, and recomputation after preemption are this one sentence with other
numbers. A request for `n` samples is `n` sequences.

*State* is what was asked for and what was generated: it changes by one append or one assignment. *Derived* fields
follow from the state, and are computed again after a call that was interrupted (llm_engine.py).
"""

import math
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from minipaged.engine.arguments import flag, items, number, text, whole

if TYPE_CHECKING:
    from minipaged.engine.detokenizer import IncrementalDetokenizer

MAX_SAMPLES = 16_384  # of one request

FinishReason = Literal["stop", "length", "abort", "error"]


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
    stop_token_ids: Items[int] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        given = vars(self)  # frozen for its users; here each field gets its plain Python form
        for name in ("n", "top_k", "max_tokens"):
            given[name] = whole(name, given[name])
        for name in ("seed", "logprobs"):
            given[name] = None if given[name] is None else whole(name, given[name])
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            given[name] = number(name, given[name])
        given["ignore_eos"] = flag("ignore_eos", self.ignore_eos)
        given["stop"] = tuple(text("stop", each) for each in items("stop", self.stop_strings))
        given["stop_token_ids"] = stop_tokens(self.stop_token_ids)
        for name, fits, takes in (
            ("n", 1 <= self.n <= MAX_SAMPLES, f"1 to {MAX_SAMPLES:,}"),
            ("temperature", 0.0 <= self.temperature < math.inf, "0 or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "in (0, 1]"),
            ("top_k", self.top_k >= 1 or self.top_k == -1, "at least 1, or -1 for all tokens"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "in [0, 1]"),
            ("repetition_penalty", 0.0 < self.repetition_penalty < math.inf, "above 0 (1 changes nothing)"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("n", self.n == 1 or self.temperature > 0.0, "1 unless samples can differ: give a temperature above 0"),
            ("stop", "" not in self.stop_strings, "made of strings that are not empty"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "0 or more"),
        ):
            if not fits:
                raise ValueError(f"{name} must be {takes}, got {getattr(self, name)!r}")

    @property
    def stop_strings(self) -> Items[str]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else self.stop


def stop_tokens(value: Items[int] | None) -> tuple[int, ...]:
    """Stop tokens as they are kept. Raises ValueError for what is no whole number."""
    return tuple(whole("stop_token_ids", token) for token in items("stop_token_ids", () if value is None else value))


@dataclass
class CompletionOutput:
    """One sample, or one hypothesis of a beam search.

    finish_reason: "stop" (end of text, a stop token or a stop string), "length", "abort", "error" (it alone failed, and
    `error` says why), or None while it runs.
    logprobs, where asked for: for each token, {token id: natural logarithm of its probability}; cumulative_logprob is
    the sum over the tokens. score, of a beam search alone: see beam_search.py.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[dict[int, float]] | None = None
    cumulative_logprob: float | None = None
    score: float | None = None
    error: str | None = None


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


class Token(NamedTuple):
    """One generated token: all that a step adds to a sequence, in one append."""

    token_id: int
    logprobs: dict[int, float] | None  # where asked for: token id -> natural logarithm of its probability
    time: float  # seconds, of time.perf_counter


@dataclass(frozen=True, slots=True)
class StreamOutput:
    """One new token of one sample. `text` is what it adds: nothing, while a character or a stop string may follow. A
    sample that is aborted, or fails, ends with one whose token_id is None."""

    request_id: str
    index: int
    text: str
    token_id: int | None
    finish_reason: FinishReason | None


@dataclass(eq=False, slots=True)  # a sequence is itself, whatever its tokens
class Sequence:
    """One sample of a request. The scheduler runs, preempts and resumes each sequence by itself.

    Invariant while it is unfinished: 0 <= num_computed < len(self). The last token is always still to be computed.
    """

    request_id: str
    index: int  # which of the request's samples
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int = 0  # with `index` and the token's position, it decides every draw (sampling.py)
    cache_salt: str | None = None  # sequences of unequal salts share no block
    outputs: list[Token] = field(default_factory=list)  # state
    aborted: bool = False  # state
    error: str | None = None  # state: why this sequence failed
    num_computed: int = 0  # derived
    detokenizer: "IncrementalDetokenizer | None" = None  # derived: text, and where it ends; the scheduler ignores it
    seq_id: str = field(init=False)  # request_id.index: names its block table and its events

    def __post_init__(self) -> None:
        self.seq_id = f"{self.request_id}.{self.index}"

    def __len__(self) -> int:
        return len(self.prompt_token_ids) + len(self.outputs)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens whose K and V are not in the cache yet: 1 in decode, more in prefill."""
        return len(self.prompt_token_ids) + len(self.outputs) - self.num_computed

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.detokenizer.finish_reason if self.detokenizer else None

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens at positions start to end - 1, prompt and output as one."""
        num_prompt = len(self.prompt_token_ids)
        outputs = self.outputs[max(0, start - num_prompt) : max(0, end - num_prompt)]
        return self.prompt_token_ids[start:end] + [token.token_id for token in outputs]

    def fork(self, index: int) -> "Sequence":
        """Another sample with the same tokens, as far computed."""
        return replace(self, index=index, outputs=list(self.outputs), detokenizer=None)

    def pieces(self, start: int) -> Iterator[StreamOutput]:
        """The sequence's output from piece `start` on. A reader that counts its pieces gets each exactly once."""
        given = self.detokenizer.pieces if self.detokenizer else []
        for i in range(start, len(given)):
            token_id = self.outputs[i].token_id if i < len(self.outputs) else None
            yield StreamOutput(self.request_id, self.index, given[i].text, token_id, given[i].finish_reason)

    def completion(self) -> CompletionOutput:
        """The sample so far."""
        text = self.detokenizer.text if self.detokenizer else ""
        token_ids = [token.token_id for token in self.outputs]
        output = CompletionOutput(self.index, text, token_ids, self.finish_reason, error=self.error)
        if self.params.logprobs is not None:
            output.logprobs = [token.logprobs or {} for token in self.outputs]
            if self.outputs:
                chosen = zip(output.logprobs, token_ids, strict=True)
                output.cumulative_logprob = sum(logprobs[token] for logprobs, token in chosen)
        return output


@dataclass(eq=False, slots=True)
class Request:
    """One prompt and its samples."""

    request_id: str
    prompt: str | None
    seqs: list[Sequence]
    arrival_time: float

    @property
    def finished(self) -> bool:
        return all(seq.finish_reason for seq in self.seqs)

    def output(self) -> RequestOutput:
        """The answer so far, made from the state."""
        outputs = [seq.completion() for seq in self.seqs]
        return RequestOutput(self.request_id, self.prompt, self.seqs[0].prompt_token_ids, outputs)
