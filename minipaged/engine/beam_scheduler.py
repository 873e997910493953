"""Chapter 9. The beams of many searches in one pool: which are computed in a step, and which share their blocks.

    step 1   prompt -> A B C            the three likeliest first tokens
    step 2   A -> A1 A2    B -> B1      the three likeliest of all continuations: C is freed, A forks

A fork copies a block table, not K and V, and a beam that is dropped gives its blocks back. So the beams share their
common past, however it branched. The scheduler of chapter 10 knows no beams (as vLLM's does not since RFC 6226).
Plain Python, and no tensor. The caller says how each search continues: from logits (beam_search.py), or by a formula
(the simulator of chapter 11).
"""

import math
import sys
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from minipaged.engine.arguments import flag, number, whole
from minipaged.engine.scheduler_output import SchedulerOutput, cache_computed
from minipaged.engine.sequence import CompletionOutput, Sequence, Token, stop_tokens
from minipaged.memory.block_manager import BlockManager

if TYPE_CHECKING:
    from minipaged.model.tokenizer import TextTokenizer

LARGEST_EXPONENT = math.log(sys.float_info.max)


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
    stop_token_ids: Items[int] | None = None

    def __post_init__(self) -> None:
        given = vars(self)  # frozen for its users; here each field gets its plain Python form
        for name in ("beam_width", "max_tokens"):
            given[name] = whole(name, given[name], least=1)
        given["length_penalty"] = number("length_penalty", self.length_penalty)
        given["ignore_eos"] = flag("ignore_eos", self.ignore_eos)
        given["stop_token_ids"] = stop_tokens(self.stop_token_ids)
        if not abs(self.length_penalty) * math.log(self.max_tokens) < LARGEST_EXPONENT:
            power = f"{self.max_tokens} ** {self.length_penalty}"
            raise ValueError(f"length_penalty must leave max_tokens ** length_penalty finite, got {power}")
        if not isinstance(self.early_stopping, bool | str) or self.early_stopping not in (True, False, "never"):
            raise ValueError(f"early_stopping must be True, False or 'never', got {self.early_stopping!r}")


class Choice(NamedTuple):
    """A beam of the next step: which beam it continues, and with which token."""

    parent: int
    token: int


@dataclass(eq=False)
class Search:
    """One prompt's search. Invariant: `cumulative[i]` is the sum of log-probabilities of `beams[i]`, best first."""

    params: BeamSearchParams
    beams: list[Sequence]  # one, that has the prompt, at the start
    end_tokens: frozenset[int] = frozenset()
    room: int = 0  # tokens that the context has for the answer
    cumulative: list[float] = field(default_factory=lambda: [0.0])
    hypotheses: list[tuple[float, CompletionOutput]] = field(default_factory=list)  # texts that have ended, best first
    error: str | None = None  # why this search failed
    num_forks: int = 0

    def __post_init__(self) -> None:
        self.prompt_token_ids = self.beams[0].prompt_token_ids
        self.max_tokens = min(self.params.max_tokens, self.room)

    def outputs(self, tokenizer: "TextTokenizer") -> list[CompletionOutput]:
        """The hypotheses as an answer, best first. The text of a stop token is no part of it."""
        stops = self.params.stop_token_ids or ()
        if self.error is not None:
            return [CompletionOutput(0, finish_reason="error", error=self.error)]
        for rank, (_, output) in enumerate(self.hypotheses):
            kept = [token for token in output.token_ids if token not in stops]
            output.index, output.text = rank, tokenizer.decode_behind(self.prompt_token_ids, kept)
        return [output for _, output in self.hypotheses]


class BeamScheduler:
    """Steps many searches together. Invariant: the searches of `running` hold blocks, those of `waiting` none; the last
    is preempted first, and the first always proceeds, since it fits the pool alone (`check`)."""

    def __init__(self, blocks: BlockManager, max_num_seqs: int, max_num_batched_tokens: int):
        self.blocks, self.max_num_seqs, self.max_num_batched_tokens = blocks, max_num_seqs, max_num_batched_tokens
        self.num_blocks = blocks.num_free  # what the engine's requests hold stays theirs
        self.waiting: deque[Search] = deque()
        self.running: list[Search] = []
        self.num_preempted = 0

    def check(self, search: Search) -> None:
        """Raises ValueError, with the numbers, for a search that could never run here."""
        width, size = search.params.beam_width, self.blocks.block_size
        if width > self.max_num_seqs:
            raise ValueError(f"beam_width is {width}, and at most {self.max_num_seqs} sequences may run (max_num_seqs)")
        longest = len(search.prompt_token_ids) + search.max_tokens - 1  # the last token that is chosen is never stored
        needed = width * self.blocks.blocks_for(longest)
        if needed > self.num_blocks:
            raise ValueError(
                f"{width} beams of up to {longest} stored tokens may take {needed} blocks of {size} tokens, and "
                f"{self.num_blocks} are free: give the pool more blocks, or ask for fewer beams or tokens"
            )

    def schedule(self) -> SchedulerOutput:
        """The tokens of the next step: of every beam of every search that runs, within the budget."""
        output = SchedulerOutput(max_num_batched_tokens=self.max_num_batched_tokens)
        place = 0
        while place < len(self.running):  # slots for the newest token of each beam, first to last
            if self._grow(self.running[place], output):
                place += 1
            else:
                self._preempt(self.running.pop(), output)
        while self.waiting and not output.preempted and self._has_slots(self.waiting[0]):
            if not self._grow(self.waiting[0], output):
                self._release(self.waiting[0])
                break
            self.running.append(self.waiting.popleft())
        for search in self.running:
            # The beams of a search choose together: unless all can reach their ends, each leaves its last token.
            leave = sum(beam.num_uncomputed_tokens for beam in search.beams) > output.budget
            for beam in search.beams:
                output.schedule(beam, leave=int(leave))
        return output

    def update_from_output(self, output: SchedulerOutput) -> list[Search]:
        """The step has run. Returns the searches that choose now: all of their beams were sampled."""
        cache_computed(self.blocks, output)
        return [search for search in self.running if all(beam in output.sampled for beam in search.beams)]

    def advance(self, search: Search, choices: list[Choice]) -> None:
        """Fork, extend and free the beams of a search as it has chosen; without a choice it is over."""
        parents, search.beams, taken = search.beams, [], set[int]()
        for parent, _ in choices:
            beam = parents[parent]
            if parent in taken:  # its first continuation goes on in the parent's own table
                search.num_forks += 1
                beam = beam.fork(search.num_forks)
                self.blocks.fork(parents[parent].seq_id, beam.seq_id)
            taken.add(parent)
            search.beams.append(beam)
        for beam, (_, token) in zip(search.beams, choices, strict=True):
            beam.outputs.append(Token(token, None, 0.0))
        for i, beam in enumerate(parents):
            if i not in taken:
                self.blocks.free(beam.seq_id)
        if not search.beams:
            self.running.remove(search)

    def _has_slots(self, search: Search) -> bool:
        return sum(each.params.beam_width for each in [*self.running, search]) <= self.max_num_seqs

    def _grow(self, search: Search, output: SchedulerOutput) -> bool:
        """Slots for all tokens of all beams. False if blocks run out; what was allocated until then is kept."""
        for beam in search.beams:
            prefix: list[int] = []
            if not self.blocks.num_tokens(beam.seq_id):
                prefix = self.blocks.get_computed_blocks(beam.tokens(0, len(beam)), beam.cache_salt)
                beam.num_computed = len(prefix) * self.blocks.block_size
            copies = self.blocks.allocate_slots(beam.seq_id, len(beam), prefix)
            if copies is None:
                return False
            output.copies += copies
        return True

    def _preempt(self, search: Search, output: SchedulerOutput) -> None:
        self._release(search)
        output.preempted.update(dict.fromkeys(search.beams, "recompute"))
        self.num_preempted += 1
        self.waiting.appendleft(search)

    def _release(self, search: Search) -> None:
        for beam in search.beams:
            self.blocks.free(beam.seq_id)
            beam.num_computed = 0
