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
        if prompt_len < 1:
            raise ValueError("the prompt is empty: there is no token to start from")
        if prompt_len >= self.max_model_len:
            raise ValueError(
                f"the prompt has {prompt_len} tokens, and the context holds {self.max_model_len}: "
                f"a prompt may have {self.max_model_len - 1}, so that one can follow"
            )
        if num_seqs > self.max_num_seqs:
            raise ValueError(
                f"the request has {num_seqs} sequences, and at most {self.max_num_seqs} may run (max_num_seqs)"
            )
        # The last token that is generated is never stored: nothing comes after it.
        longest = min(prompt_len + max_tokens, self.max_model_len) - 1
        if not self.memory.fits(prompt_len, longest, num_seqs):
            each = f"each of {num_seqs} sequences" if num_seqs > 1 else "the request"
            raise ValueError(
                f"{each} may reach {longest} stored tokens ({prompt_len} of prompt, {max_tokens} new), "
                f"and the whole pool has {self.memory.num_slots} slots: give it more blocks, or ask for fewer tokens"
            )

    def add(self, group: SequenceGroup) -> None:
        """Queue a new request. Raises ValueError where it could never run, or has the id of another one."""
        first = group.seqs[0]
        self.check(len(first.prompt_token_ids), first.params.max_tokens, group.num_places)
        if group.request_id in self.groups:
            raise ValueError(f"request {group.request_id!r} is there already")
        self.groups[group.request_id] = group
        self.waiting.append(group)

    def has_unfinished(self) -> bool:
        return bool(self.groups)

    def finish(self, group: SequenceGroup, seq: Sequence, reason: FinishReason) -> None:
        """Take one sequence out, and give back its memory; with its last sequence the request is gone."""
        seq.output.finish_reason = reason
        if self.trace is not None:
            self.trace.record("finish", seq=seq.seq_id, reason=reason)
        self.drop(group, seq)
        if not group.seqs and not group.unborn:
            self.remove(group)

    def abort(self, request_id: str) -> bool:
        """Take a request out, wherever it stands. Returns False, and does nothing, if there is none."""
        if (group := self.groups.get(request_id)) is None:
            return False
        for seq in [*group.unborn, *group.seqs]:
            self.finish(group, seq, "abort")
        return True

    def remove(self, group: SequenceGroup) -> None:
        """Forget a request, with what it still holds."""
        del self.groups[group.request_id]
        for seq in [*group.seqs]:
            self.drop(group, seq)
        (self.running if group in self.running else self.waiting).remove(group)

    def drop(self, group: SequenceGroup, seq: Sequence) -> None:
        """A sequence leaves its group and gives back its memory, unanswered: a beam that dies."""
        (group.seqs if seq in group.seqs else group.unborn).remove(seq)
        self.memory.free(seq.seq_id)

    def fork(self, group: SequenceGroup, parent: Sequence, child: Sequence) -> None:
        """`child` joins the group with all that `parent` has computed, in the same blocks."""
        self.memory.fork(parent.seq_id, child.seq_id)
        child.num_computed = parent.num_computed
        group.seqs.append(child)

    # ---- one step ----------------------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput:
        """Choose the tokens of the next step and make room for them. No work only where nothing is unfinished."""
        if self.trace is not None:
            self.trace.step += 1
        output = SchedulerOutput()
        num_running = len(self.running)
        self._make_room(output)
        nobody_gave_way = len(self.running) == num_running
        budget = self.max_num_batched_tokens
        for decoding in (True, False):
            for group in [g for g in self.running if g.is_decoding == decoding]:
                budget -= self._take(group, budget, output)
        # Whoever gave way stands first now. It does not come back in the step in which there was too little room.
        while nobody_gave_way and self.waiting and budget > 0 and self._admit(self.waiting[0], output):
            self.running.append(self.waiting.popleft())
            budget -= self._take(self.running[-1], budget, output)
        if self.trace is not None and output.work:
            self.trace.record("schedule", seqs={item.seq.seq_id: item.count for item in output.work})
        return output

    def computed(self, output: SchedulerOutput) -> list[tuple[int, SequenceGroup, Sequence]]:
        """The step has run: what it computed is in the cache, if there is one.

        Returns who may choose a next token, each with the row of its logits: there is one row for each piece of work
        that reached an end, in order.
        """
        ready: list[tuple[int, SequenceGroup, Sequence]] = []
        row = 0
        for item in output.work:
            group, seq, start, end = item.group, item.seq, item.start, item.start + item.count
            seq.num_computed = end if self.memory.keeps_tokens else 0
            if self.memory.finds_prefixes and end // self.memory.block_size > start // self.memory.block_size:
                self.memory.insert(seq.seq_id, seq.tokens(0, end), seq.cache_salt)
            if item.reaches_end:
                ready.append((row, group, seq))
            if group.unborn and seq is group.seqs[0] and end >= len(seq.prompt_token_ids):
                born, group.unborn = group.unborn, []
                for child in born:
                    self.fork(group, seq, child)
                    if not child.output.token_ids:  # its first token is chosen from the prompt's last logits, too
                        ready.append((row, group, child))
            row += item.reaches_end
        return ready

    def start_over(self) -> None:
        """A step failed half-way, and nobody knows what the blocks hold. All are given back, and every request
        waits to compute its tokens again. No token is lost."""
        for group in self.groups.values():
            self._forget(group)
        self.running, self.waiting = [], deque(self.groups.values())
        self.memory.recover()

    # ---- the parts of a step -----------------------------------------------------------------------------------

    def _make_room(self, output: SchedulerOutput) -> None:
        """Room for the new token of every running sequence, the earliest first. The latest gives way."""
        candidates, self.running = deque(self.running), []
        while candidates:
            group = candidates.popleft()
            lengths = self._lengths(group)
            while self.memory.blocks_to_grow(lengths) > self.memory.num_free:
                victim = candidates.pop() if candidates else group
                self._preempt(victim, output)
                if victim is group:
                    break
            else:
                output.copies += self.memory.grow(lengths)
                self.running.append(group)

    def _take(self, group: SequenceGroup, budget: int, output: SchedulerOutput) -> int:
        """Put tokens of a group into the step, within the budget. Returns how many.

        The beams of a search choose together, so they reach their ends in one step: as long as they cannot all do so,
        each leaves its last token.
        """
        if not self.memory.keeps_tokens:  # nothing is kept, so nothing can be put off
            output.work += [Work(group, seq, 0, len(seq), True) for seq in group.seqs]
            return sum(len(seq) for seq in group.seqs)
        hold = 0
        if group.beam_width and sum(seq.num_missing for seq in group.seqs) > budget:
            hold = 1
        left = budget
        for seq in group.seqs:
            count = min(seq.num_missing - hold, left)
            if group.unborn:  # they fork at the end of the prompt, so their parent must come by there
                count = min(count, len(seq.prompt_token_ids) - seq.num_computed)
            if count > 0:
                output.work.append(Work(group, seq, seq.num_computed, count, count == seq.num_missing))
                left -= count
        return budget - left

    def _admit(self, group: SequenceGroup, output: SchedulerOutput) -> bool:
        """Let a waiting request enter, or come back, if there is place and room for all of its tokens."""
        if sum(each.num_places for each in self.running) + group.num_places > self.max_num_seqs:
            return False
        room = self.memory.num_free - (self.watermark_blocks if self.running else 0)
        lengths = self._lengths(group)
        if group.is_swapped:
            if self.memory.blocks_to_swap_in(lengths) > room:
                return False
            output.swap_in += self.memory.swap_in(lengths)
            output.copies += self.memory.grow(lengths)
            group.is_swapped = False
            return True
        first, prompt_len = group.seqs[0], len(group.seqs[0].prompt_token_ids)
        found = self.memory.find(first.tokens(0, lengths[first.seq_id]), first.cache_salt)
        everyone = [len(seq) for seq in (*group.seqs, *group.unborn) if seq is first or seq.output.token_ids]
        if self.memory.blocks_to_begin(found, everyone, prompt_len) > room:
            return False
        first.num_computed = len(found) * self.memory.block_size
        if self.memory.finds_prefixes and self._is_being_computed(first):
            return False
        self.memory.begin(first.seq_id, found, lengths[first.seq_id])
        self.num_looked_up += lengths[first.seq_id]
        self.num_found += first.num_computed
        return True

    def _is_being_computed(self, seq: Sequence) -> bool:
        """Whether a running sequence is about to fill the first block that was not found: then it is found soon."""
        end = seq.num_computed + self.memory.block_size
        if end >= len(seq):  # the last token is computed in any case
            return False
        tokens = seq.tokens(0, end)
        return any(
            other.num_computed < end <= len(other)
            and other.cache_salt == seq.cache_salt
            and other.tokens(0, end) == tokens
            for group in self.running
            for other in group.seqs[:1]
        )

    def _preempt(self, group: SequenceGroup, output: SchedulerOutput) -> None:
        """A running request gives back all blocks of the device, and waits before everybody who came later."""
        seq_ids = [seq.seq_id for seq in group.seqs]
        swap = self.preemption == "swap" and self.memory.can_swap_out(seq_ids)
        mode: Preemption = "swap" if swap else "recompute"
        if self.trace is not None:
            for seq_id in seq_ids:
                self.trace.record("preempt", seq=seq_id, mode=mode)
        if swap:
            output.swap_out += self.memory.swap_out(seq_ids)
            group.is_swapped = True
        else:
            self._forget(group)
        self.preemptions[mode] += 1
        self.waiting.appendleft(group)

    def _forget(self, group: SequenceGroup) -> None:
        """Give back all blocks of a request, here or on the host. It computes its tokens anew, the prompt once: who
        forked forks again, and as the first goes one without a token of its own, if there is one."""
        members = sorted([*group.seqs, *group.unborn], key=lambda seq: len(seq.output.token_ids) > 0)
        for seq in members:
            self.memory.free(seq.seq_id)
            seq.num_computed = 0
        group.seqs, group.unborn, group.is_swapped = members[:1], members[1:], False

    @staticmethod
    def _lengths(group: SequenceGroup) -> dict[str, int]:
        """Up to where the tables of its sequences must have room. Before they fork, that is the prompt."""
        if group.unborn:
            return {group.seqs[0].seq_id: len(group.seqs[0].prompt_token_ids)}
        return {seq.seq_id: len(seq) for seq in group.seqs}
