"""Chapter 10. Who computes what in the next step: first come first served, decided anew at every step.

    waiting   [ E F ]           hold no block of the device; whoever was preempted stands before whoever is new
    running   [ A B C D ]       hold blocks; the latest is preempted first when the pool runs out

A step has a budget of tokens. First every sequence that decodes gets its one token, so that no long prompt makes
others stutter. What is left of the budget goes to prompts, in chunks, in the order of arrival. Then waiting requests
enter, as long as places, budget and blocks last. A finished sequence leaves at once and a waiting one takes its place
(iteration-level scheduling: Yu et al., "Orca", OSDI 2022, section 3).

All blocks of a prompt are taken when it enters, so only decoding can run short. Then the latest request gives way:
it drops its blocks and computes them again later, or they move to the host's memory and come back (recompute and
swap: the PagedAttention paper, section 4.5). The samples of one request do all this together.

Plain Python, and no tensor: the simulator of chapter 11 runs this very class. What it decides is one `SchedulerOutput`,
and that is all that the model is told.
"""

# Exercise ch10_scheduler, about 60 minutes. Write what raises
# NotImplementedError, in this order, and run `minipaged check 10` after each step:
#
#   1. Scheduler.check
#   2. Scheduler.add
#   3. Scheduler.has_unfinished
#   4. Scheduler.finish
#   5. Scheduler.abort
#   6. Scheduler.remove
#   7. Scheduler.drop
#   8. Scheduler.fork
#   9. Scheduler.schedule
#   10. Scheduler.computed
#   11. Scheduler.start_over
#   12. Scheduler._make_room
#   13. Scheduler._take
#   14. Scheduler._admit
#   15. Scheduler._is_being_computed
#   16. Scheduler._preempt
#   17. Scheduler._forget
#
# What is given may be changed too. Any way that keeps the docstrings' promises is right.
# Made from minipaged/engine/scheduler.py by minipaged/course/generate.py.

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Literal

from minipaged.engine.sequence import FinishReason, Sequence, SequenceGroup
from minipaged.memory.block_manager import Copies, Memory
from minipaged.memory.trace import Trace

Preemption = Literal["recompute", "swap"]


@dataclass(slots=True)
class Work:
    """Compute `count` tokens of a sequence, from position `start`. Reaching its end, choose its next token."""

    group: SequenceGroup
    seq: Sequence
    start: int
    count: int
    reaches_end: bool


@dataclass
class SchedulerOutput:
    """One step: whose tokens are computed, and which blocks are copied before that, in the order of the fields."""

    swap_out: Copies = field(default_factory=list)  # (device block, host block)
    swap_in: Copies = field(default_factory=list)  # (host block, device block)
    copies: Copies = field(default_factory=list)  # (device block, device block): copy-on-write
    work: list[Work] = field(default_factory=list)


class Scheduler:
    """Invariants: a request is in `running`, in `waiting`, or gone; one that waits holds no block of the device; and
    one that came earlier never gives way to one that came later.

    So the earliest always proceeds: it fits the pool alone (`add` saw to it), and all others give way to it.
    """

    def __init__(
        self,
        memory: Memory,
        max_model_len: int,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        *,
        preemption: Preemption = "recompute",
        watermark: float = 0.01,
        trace: Trace | None = None,
    ):
        """watermark: the share of the pool that stays free when a request enters, for those already there to grow
        into. Raises ValueError where the numbers do not go together."""
        if max_num_seqs < 1 or max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_seqs must be at least 1 and max_num_batched_tokens as many: a token for each sequence; "
                f"got {max_num_seqs} and {max_num_batched_tokens}"
            )
        if preemption not in ("recompute", "swap"):
            raise ValueError(f"preemption must be 'recompute' or 'swap', got {preemption!r}")
        if not 0.0 <= watermark < 1.0:
            raise ValueError(f"watermark is a share of the pool, in [0, 1), got {watermark}")
        self.memory = memory
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.preemption = preemption
        self.trace = trace
        self.watermark_blocks = int(watermark * memory.num_slots / memory.block_size) if memory.block_size else 0
        self.waiting: deque[SequenceGroup] = deque()
        self.running: list[SequenceGroup] = []
        self.groups: dict[str, SequenceGroup] = {}  # every unfinished request, in the order of arrival
        self.preemptions = Counter[str](recompute=0, swap=0)
        self.num_looked_up = self.num_found = 0  # tokens of requests that entered, and of those the ones found

    # ---- requests come and go ----------------------------------------------------------------------------------

    def check(self, prompt_len: int, max_tokens: int, num_seqs: int = 1) -> None:
        """Raises ValueError, with the numbers, for a request that could never run."""
        raise NotImplementedError("ch10: Scheduler.check")

    def add(self, group: SequenceGroup) -> None:
        """Queue a new request. Raises ValueError where it could never run, or has the id of another one."""
        raise NotImplementedError("ch10: Scheduler.add")

    def has_unfinished(self) -> bool:
        raise NotImplementedError("ch10: Scheduler.has_unfinished")

    def finish(self, group: SequenceGroup, seq: Sequence, reason: FinishReason) -> None:
        """Take one sequence out, and give back its memory; with its last sequence the request is gone."""
        raise NotImplementedError("ch10: Scheduler.finish")

    def abort(self, request_id: str) -> bool:
        """Take a request out, wherever it stands. Returns False, and does nothing, if there is none."""
        raise NotImplementedError("ch10: Scheduler.abort")

    def remove(self, group: SequenceGroup) -> None:
        """Forget a request, with what it still holds."""
        raise NotImplementedError("ch10: Scheduler.remove")

    def drop(self, group: SequenceGroup, seq: Sequence) -> None:
        """A sequence leaves its group and gives back its memory, unanswered: a beam that dies."""
        raise NotImplementedError("ch10: Scheduler.drop")

    def fork(self, group: SequenceGroup, parent: Sequence, child: Sequence) -> None:
        """`child` joins the group with all that `parent` has computed, in the same blocks."""
        raise NotImplementedError("ch10: Scheduler.fork")

    # ---- one step ----------------------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput:
        """Choose the tokens of the next step and make room for them. No work only where nothing is unfinished."""
        raise NotImplementedError("ch10: Scheduler.schedule")

    def computed(self, output: SchedulerOutput) -> list[tuple[int, SequenceGroup, Sequence]]:
        """The step has run: what it computed is in the cache, if there is one.

        Returns who may choose a next token, each with the row of its logits: there is one row for each piece of work
        that reached an end, in order.
        """
        raise NotImplementedError("ch10: Scheduler.computed")

    def start_over(self) -> None:
        """A step failed half-way, and nobody knows what the blocks hold. All are given back, and every request
        waits to compute its tokens again. No token is lost."""
        raise NotImplementedError("ch10: Scheduler.start_over")

    # ---- the parts of a step -----------------------------------------------------------------------------------

    def _make_room(self, output: SchedulerOutput) -> None:
        """Room for the new token of every running sequence, the earliest first. The latest gives way."""
        raise NotImplementedError("ch10: Scheduler._make_room")

    def _take(self, group: SequenceGroup, budget: int, output: SchedulerOutput) -> int:
        """Put tokens of a group into the step, within the budget. Returns how many.

        The beams of a search choose together, so they reach their ends in one step: as long as they cannot all do so,
        each leaves its last token.
        """
        raise NotImplementedError("ch10: Scheduler._take")

    def _admit(self, group: SequenceGroup, output: SchedulerOutput) -> bool:
        """Let a waiting request enter, or come back, if there is place and room for all of its tokens."""
        raise NotImplementedError("ch10: Scheduler._admit")

    def _is_being_computed(self, seq: Sequence) -> bool:
        """Whether a running sequence is about to fill the first block that was not found: then it is found soon."""
        raise NotImplementedError("ch10: Scheduler._is_being_computed")

    def _preempt(self, group: SequenceGroup, output: SchedulerOutput) -> None:
        """A running request gives back all blocks of the device, and waits before everybody who came later."""
        raise NotImplementedError("ch10: Scheduler._preempt")

    def _forget(self, group: SequenceGroup) -> None:
        """Give back all blocks of a request, here or on the host. It computes its tokens anew, the prompt once: who
        forked forks again, and as the first goes one without a token of its own, if there is one."""
        raise NotImplementedError("ch10: Scheduler._forget")

    @staticmethod
    def _lengths(group: SequenceGroup) -> dict[str, int]:
        """Up to where the tables of its sequences must have room. Before they fork, that is the prompt."""
        if group.unborn:
            return {group.seqs[0].seq_id: len(group.seqs[0].prompt_token_ids)}
        return {seq.seq_id: len(seq) for seq in group.seqs}
