"""Chapter 9. Beam search: keep the few likeliest texts, and let them fork and die.

    step 1   prompt -> A B C            the three likeliest first tokens
    step 2   A -> A1 A2    B -> B1      the three likeliest of all continuations: C dies, A forks

With a cache of blocks, a fork copies a block table, not K and V, and a death gives blocks back. So the beams share
their common past, however it branched. This module chooses; the scheduler forks and drops (scheduler.py).

The rules are those of transformers' beam search with its default arguments (checked against it by the suite). A text's
score is the sum of its tokens' log-probabilities, divided by (number of new tokens) ** length_penalty. Of the
2 * beam_width likeliest continuations, those among the first beam_width that end a text are kept as hypotheses; the
first beam_width that do not are the next beams.
Sources: the PagedAttention paper, sections 4.4 and 6.3; Wu et al., "Google's Neural Machine Translation System" (2016),
section 7, for the length penalty's purpose (theirs has another form).
"""

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from minipaged.engine.sequence import FinishReason


@dataclass(frozen=True)
class BeamSearchParams:
    """beam_width: beams, and hypotheses in the answer. max_tokens: new tokens at most. length_penalty: 0 compares sums
    of log-probabilities, 1 their means, more prefers longer texts. early_stopping: True ends with the first beam_width
    hypotheses; False when no beam could become better than the worst of them at its present length; "never" when none
    could at any length. Names and meanings are transformers'. Raises ValueError for what is out of range."""

    beam_width: int = 4
    max_tokens: int = 64
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    ignore_eos: bool = False
    stop_token_ids: Items[int] = ()

    def __post_init__(self) -> None:
        if self.beam_width < 1:
            raise ValueError(f"beam_width must be at least 1, got {self.beam_width}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty must be a finite number, got {self.length_penalty}")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"early_stopping must be True, False or 'never', got {self.early_stopping!r}")


class Hypothesis(NamedTuple):
    """A text that has ended."""

    score: float
    cumulative_logprob: float
    token_ids: list[int]
    finish_reason: FinishReason


class Choice(NamedTuple):
    """A beam of the next step: which beam it continues, with which token."""

    parent: int
    token: int


@dataclass
class BeamSearch:
    """One search. Invariant: `cumulative[i]` is the sum of log-probabilities of beam i, the best beam first."""

    params: BeamSearchParams
    end_tokens: frozenset[int]
    max_tokens: int  # the context may end before params.max_tokens
    cumulative: list[float] = field(default_factory=lambda: [0.0])
    hypotheses: list[Hypothesis] = field(default_factory=list)  # the best first, at most beam_width
    num_forks: int = 0

    def advance(self, logits: Tensor, token_ids: Items[list[int]]) -> list[Choice]:
        """One step. logits [num_beams, vocab_size] and the new tokens so far, a row for each beam.

        Returns the beams of the next step, the best first; none where the search is over.
        """
        width, num_new = self.params.beam_width, len(token_ids[0]) + 1
        logprobs = logits.double().cpu().log_softmax(-1)  # [num_beams, vocab_size]
        total = logprobs + torch.tensor(self.cumulative, dtype=torch.float64)[:, None]
        vocab_size = total.shape[1]
        num_candidates = min(max(2, 1 + len(self.end_tokens)) * width, total.numel())
        sums, places = total.flatten().topk(num_candidates)  # of all continuations of all beams

        beams: list[Choice] = []
        cumulative: list[float] = []
        for rank, (score, place) in enumerate(zip(sums.tolist(), places.tolist(), strict=True)):
            parent, token = divmod(place, vocab_size)
            if token in self.end_tokens or num_new == self.max_tokens:
                if rank < width:
                    reason: FinishReason = "stop" if token in self.end_tokens else "length"
                    self._keep(score, num_new, [*token_ids[parent], token], reason)
            elif len(beams) < width:
                beams.append(Choice(parent, token))
                cumulative.append(score)
        self.cumulative = cumulative
        return [] if self._is_over(num_new) else beams

    def _keep(self, total: float, num_new: int, token_ids: list[int], reason: FinishReason) -> None:
        self.hypotheses.append(Hypothesis(total / num_new**self.params.length_penalty, total, token_ids, reason))
        self.hypotheses.sort(key=lambda hypothesis: -hypothesis.score)
        del self.hypotheses[self.params.beam_width :]

    def _is_over(self, num_new: int) -> bool:
        if not self.cumulative:
            return True
        if len(self.hypotheses) < self.params.beam_width:
            return False
        if self.params.early_stopping is True:
            return True
        penalty = self.params.length_penalty
        # A sum only falls with each token. Its mean may rise, the most if all further tokens were certain.
        length = self.max_tokens if self.params.early_stopping == "never" and penalty > 0 else num_new
        return self.cumulative[0] / length**penalty <= self.hypotheses[-1].score
