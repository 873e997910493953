"""Chapter 10. The scheduler: chooses the tokens of the next step, first come first served.

    waiting   [ E F ]           hold no blocks of the device; preempted sequences come before new ones
    running   [ A B C D ]       hold blocks of the device; the last is preempted first when the pool runs out

A step has a budget of tokens. Sequences in decode come first, one token each, so that a long prompt does not delay
them. The rest of the budget goes to prompts, in chunks, in order of arrival. Then waiting sequences enter, while
`max_num_seqs`, the budget and the free blocks allow, unless one was preempted in this step. A finished sequence leaves
at once, and a waiting one can enter (iteration-level scheduling: Yu et al., "Orca", OSDI 2022, section 3).

All blocks of a prompt are allocated when it enters (with a sliding window: those of each chunk). When blocks run out,
the last sequence is preempted: it moves to the host's memory if there is room, or its blocks are freed and computed
again later (swapping and recomputation: the PagedAttention paper, section 4.5).

The samples of a request are sequences with one prompt. The first computes it; the others then fork its block table.
One that enters later, or again, begins with the prompt's full blocks in the table of a running sample.
Plain Python, and no tensor: the simulator of chapter 11 runs this very class.
"""

from collections import Counter, deque
from collections.abc import Iterable

from minipaged.engine.scheduler_output import SchedulerOutput, cache_computed
from minipaged.engine.sequence import Sequence
from minipaged.memory.block_manager import BlockManager


class Scheduler:
    """Invariants: only running sequences hold blocks of the device, and a sequence is never preempted for one that
    entered later.

    So the first of `running` always proceeds: it fits the pool alone (`check`), and all others can be preempted for it.
    """

    def __init__(
        self,
        blocks: BlockManager,
        max_model_len: int,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        *,
        watermark: float = 0.01,
    ):
        """watermark: the share of the pool that stays free for running sequences when one enters. Raises ValueError."""
        if max_num_seqs < 1 or max_num_batched_tokens < max_num_seqs:
            raise ValueError(f"max_num_seqs must be from 1 to {max_num_batched_tokens=}, got {max_num_seqs}")
        if not 0.0 <= watermark < 1.0:
            raise ValueError(f"watermark is a share of the pool, in [0, 1), got {watermark}")
        self.blocks, self.max_model_len = blocks, max_model_len
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        # Tokens that get slots before they are computed: all. With a sliding window, which gives blocks back: a step's.
        self._ahead = max_num_batched_tokens if blocks.sliding_window else 1 << 62
        self.watermark_blocks = int(watermark * blocks.num_blocks)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.counts: Counter[str] = Counter()  # preemptions: recompute, swap; tokens: looked_up, found

    # ---- sequences come and go -----------------------------------------------------------------------------------

    def check(self, prompt_len: int, max_tokens: int) -> None:
        """Raises ValueError, with the numbers, for a sequence that could never run."""
        if not 1 <= prompt_len < self.max_model_len:
            raise ValueError(
                f"the prompt {f'has {prompt_len} tokens' if prompt_len else 'is empty'}, and the context holds "
                f"{self.max_model_len}: a prompt may have 1 to {self.max_model_len - 1}, so that one can follow"
            )
        # The last token that is generated is never stored: nothing comes after it.
        longest = min(prompt_len + max_tokens, self.max_model_len) - 1
        if not self.blocks.can_ever_fit(longest):
            raise ValueError(
                f"the request may reach {longest} stored tokens ({prompt_len} of prompt, {max_tokens} new), "
                f"and the whole pool has {self.blocks.num_slots} slots: give it more blocks, or ask for fewer tokens"
            )

    def add(self, seqs: Iterable[Sequence]) -> None:
        """Queue new sequences; the samples of one request stand together."""
        self.waiting.extend(seqs)

    def finish(self, seq: Sequence) -> None:
        """Remove a sequence from its queue, and free its blocks, wherever they lie."""
        self.blocks.free(seq.seq_id)
        (self.running if seq in self.running else self.waiting).remove(seq)

    def reset(self, seqs: Iterable[Sequence]) -> None:
        """Empty the pool and the queues. Then these sequences wait, in this order, with no token computed."""
        self.blocks.reset()
        self.running, self.waiting = [], deque(seqs)
        for seq in self.waiting:
            seq.num_computed = 0

    # ---- one step ------------------------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput:
        """Choose the tokens of the next step and allocate their slots. Empty only if nothing is unfinished."""
        output = SchedulerOutput(max_num_batched_tokens=self.max_num_batched_tokens)
        self._make_room(output)
        for seq in sorted(self.running, key=lambda seq: seq.num_uncomputed_tokens > 1):  # decodes first
            output.schedule(seq)
        if self.waiting and output.budget and not output.preempted and len(self.running) < self.max_num_seqs:
            self._admit(output)
        return output

    def update_from_output(self, output: SchedulerOutput) -> None:
        """The step has run. Samples whose prompt is computed now fork, and are sampled from the same logits."""
        cache_computed(self.blocks, output)
        for seq, row in list(output.sampled.items()):
            if seq.params.n == 1 or seq.outputs:
                continue
            samples = [other for other in self.waiting if self._has_prompt_of(seq, other)]
            for sample in samples[: self.max_num_seqs - len(self.running)]:
                self.waiting.remove(sample)
                self.blocks.fork(seq.seq_id, sample.seq_id)
                sample.num_computed = seq.num_computed
                self.running.insert(self.running.index(seq) + sample.index - seq.index, sample)
                output.sampled[sample] = row

    def _make_room(self, output: SchedulerOutput) -> None:
        """The slots that each running sequence needs, first to last. If blocks run out, preempt the last."""
        num_grown = 0
        while num_grown < len(self.running):
            seq = self.running[num_grown]
            copies = self.blocks.allocate_slots(seq.seq_id, min(len(seq), seq.num_computed + self._ahead))
            if copies is None:
                self._preempt(self.running.pop(), output)
            else:
                output.copies += copies
                num_grown += 1

    def _preempt(self, seq: Sequence, output: SchedulerOutput) -> None:
        """Free the device blocks of a sequence: its K and V move to the host, or are computed again later."""
        copies = self.blocks.swap_out(seq.seq_id)
        if copies is None:
            self.blocks.free(seq.seq_id)
            seq.num_computed = 0
        output.swap_out += copies or []
        output.preempted[seq] = mode = "recompute" if copies is None else "swap"
        self.counts[mode] += 1
        self.waiting.appendleft(seq)

    # ---- waiting sequences enter ---------------------------------------------------------------------------------

    def _admit(self, output: SchedulerOutput) -> None:
        """Admit waiting sequences, in their order. Samples that will fork keep their places, and a slot each."""
        computing = {key for seq in self.running for key in self._keys(seq)}
        delayed: list[Sequence] = []
        while self.waiting and len(self.running) + len(delayed) < self.max_num_seqs:
            seq = self.waiting[0]
            if seq.params.n > 1 and any(self._has_prompt_of(other, seq) for other in self.running):
                delayed.append(self.waiting.popleft())
            elif output.budget and self._enter(seq, computing, output):
                self.running.append(self.waiting.popleft())
                output.schedule(seq)
            else:
                break
        self.waiting.extendleft(reversed(delayed))

    @staticmethod
    def _has_prompt_of(seq: Sequence, other: Sequence) -> bool:
        """Whether `seq` computes, or has just computed, the prompt from which `other` will fork."""
        return seq.request_id == other.request_id and not seq.outputs and not other.outputs

    def _enter(self, seq: Sequence, computing: set[bytes], output: SchedulerOutput) -> bool:
        """Give a waiting sequence its blocks. False if too few are free, or its next key is among `computing`."""
        reserve, block_size = self.watermark_blocks if self.running else 0, self.blocks.block_size
        shared: list[int] = []
        samples = [other for other in self.running if seq.request_id == other.request_id] if seq.params.n > 1 else []
        if sample := max(samples, key=lambda other: other.num_computed, default=None):
            shared = self.blocks.prefix_of(sample.seq_id, min(len(seq.prompt_token_ids), len(seq) - 1))
            if sample.num_computed < len(shared) * block_size:  # it still computes the prompt
                return False
        if self.blocks.is_swapped(seq.seq_id):
            shared = shared[: self.blocks.num_tokens(seq.seq_id) // block_size]  # its table may be shorter
            num_computed = max(seq.num_computed, len(shared) * block_size)
            num_slots = min(len(seq), num_computed + self._ahead)
            copies = self.blocks.swap_in(seq.seq_id, num_slots, shared, reserve)
            if copies is None:
                return False
            seq.num_computed = num_computed
            output.swap_in += copies
            output.copies += self.blocks.allocate_slots(seq.seq_id, num_slots) or []
            return True
        cached = self.blocks.get_computed_blocks(seq.tokens(0, len(seq)), seq.cache_salt)
        prefix = max(cached, shared, key=len)
        seq.num_computed = len(prefix) * block_size
        keys = self._keys(seq)
        if keys and keys[0] in computing and seq.num_computed + block_size < len(seq):
            return False  # it is found in the next step; but the last token is computed in any case
        num_slots = min(len(seq), seq.num_computed + self._ahead)
        if self.blocks.allocate_slots(seq.seq_id, num_slots, prefix, reserve) is None:
            return False
        computing.update(keys)
        self.counts.update(looked_up=len(seq), found=len(cached) * block_size)
        return True

    def _keys(self, seq: Sequence) -> list[bytes]:
        """The keys of a sequence's full blocks that are not computed yet."""
        first = seq.num_computed // self.blocks.block_size
        if not self.blocks.enable_prefix_caching or first >= len(seq) // self.blocks.block_size:
            return []
        return self.blocks.block_keys(seq.tokens(0, len(seq)), seq.cache_salt)[first:]
