"""Chapter 10, first form. Who computes what in the next step: first come first served, decided anew at every step.

    waiting   [ E F ]           hold no memory
    running   [ A B C D ]       hold blocks; the latest is preempted first when the pool runs out

Every step takes the tokens that are not computed yet, of every running sequence, within a budget of tokens. A finished
sequence leaves at once and a waiting one takes its place (iteration-level scheduling: Yu et al., "Orca", OSDI 2022,
section 3). A preempted sequence gives back its blocks and computes them again later (recompute: the PagedAttention
paper, section 4.5). Plain Python, and no tensor: a simulator can run this very class.
"""

from collections import deque
from dataclasses import dataclass
from typing import Protocol

from minipaged.engine.sequence import FinishReason, Sequence


class Memory(Protocol):
    """What the scheduler asks of memory: see `minipaged.memory.block_manager`."""

    keeps_tokens: bool

    @property
    def num_slots(self) -> int: ...
    def fits(self, num_tokens: int) -> bool: ...
    def can_append(self, seq_id: str, num_new_tokens: int) -> bool: ...
    def append(self, seq_id: str, num_new_tokens: int) -> list[tuple[int, int]]: ...
    def free(self, seq_id: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Work:
    """Compute `count` tokens of a sequence, from position `start`. Reaching its end, sample its next token."""

    seq: Sequence
    start: int
    count: int

    @property
    def reaches_end(self) -> bool:
        return self.start + self.count == len(self.seq)


class Scheduler:
    """Invariants: a sequence is in `running`, in `waiting`, or finished; one that waits holds no memory; and a
    sequence that came earlier is never preempted for one that came later.

    So the earliest sequence always proceeds: it fits the pool alone (`add` saw to it), and all others give way to it.
    """

    def __init__(self, memory: Memory, max_model_len: int, max_num_seqs: int = 64, max_num_batched_tokens: int = 2048):
        if max_num_seqs < 1 or max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_seqs must be at least 1 and max_num_batched_tokens as many: a token for each sequence; "
                f"got {max_num_seqs} and {max_num_batched_tokens}"
            )
        self.memory = memory
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def check(self, prompt_len: int, max_tokens: int) -> None:
        """Raises ValueError, with the numbers, for a request that could never run."""
        if prompt_len < 1:
            raise ValueError("the prompt is empty: there is no token to start from")
        if prompt_len >= self.max_model_len:
            raise ValueError(
                f"the prompt has {prompt_len} tokens, and the context holds {self.max_model_len}: "
                f"a prompt may have {self.max_model_len - 1}, so that one can follow"
            )
        # The last token that is generated is never stored: nothing comes after it.
        longest = min(prompt_len + max_tokens, self.max_model_len) - 1
        if not self.memory.fits(longest):
            raise ValueError(
                f"the request may reach {longest} stored tokens ({prompt_len} of prompt, {max_tokens} new), "
                f"and the whole pool has {self.memory.num_slots} slots: give it more blocks, or ask for fewer tokens"
            )

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence. Raises ValueError where it could never run; no other sequence is touched then."""
        self.check(len(seq.prompt_token_ids), seq.params.max_tokens)
        self.waiting.append(seq)

    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self) -> list[Work]:
        """Choose the tokens of the next step and make room for them. Empty only where nothing is unfinished."""
        work: list[Work] = []
        budget = self.max_num_batched_tokens
        candidates, self.running = deque(self.running), []
        while candidates:
            seq = candidates.popleft()
            needed = self._uncomputed(seq, budget)
            while not self.memory.can_append(seq.seq_id, needed):
                victim = candidates.pop() if candidates else seq
                self._preempt(victim)
                if victim is seq:
                    break
            else:
                work.append(self._take(seq, needed))
                budget -= needed
        # Whoever was preempted above stands at the head of the queue, and holds up all behind it. It cannot come back
        # in this step: without its blocks there was too little room for another, which has them now.
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            if not self.memory.can_append(seq.seq_id, len(seq)):  # room for all of its tokens, before its first chunk
                break
            self.waiting.popleft()
            needed = self._uncomputed(seq, budget)
            work.append(self._take(seq, needed))
            budget -= needed
        return work

    def computed(self, work: list[Work]) -> None:
        """The step has run: what it computed is in the cache, if there is one."""
        for item in work:
            item.seq.num_computed = item.start + item.count if self.memory.keeps_tokens else 0

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """Take a sequence out, wherever it stands, and give back its memory. Finishing it twice does nothing."""
        if seq in self.running:
            self.running.remove(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
        else:
            return
        self.memory.free(seq.seq_id)
        seq.output.finish_reason = reason

    def _uncomputed(self, seq: Sequence, budget: int) -> int:
        remaining = len(seq) - seq.num_computed
        return min(remaining, budget) if self.memory.keeps_tokens else remaining

    def _take(self, seq: Sequence, count: int) -> Work:
        copies = self.memory.append(seq.seq_id, count)
        assert not copies, "no two sequences share a block yet, so none is copied"
        self.running.append(seq)
        return Work(seq, seq.num_computed, count)

    def _preempt(self, seq: Sequence) -> None:
        self.memory.free(seq.seq_id)
        seq.num_computed = 0
        self.waiting.appendleft(seq)
        self.num_preemptions += 1
