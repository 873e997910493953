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

# Exercise ch10_scheduler, about 60 minutes. Write what raises
# NotImplementedError, in this order, and run `minipaged check 10` after each step:
#
#   1. Scheduler.check
#   2. Scheduler.add
#   3. Scheduler.finish
#   4. Scheduler.reset
#   5. Scheduler.schedule
#   6. Scheduler.update_from_output
#   7. Scheduler._make_room
#   8. Scheduler._preempt
#   9. Scheduler._admit
#   10. Scheduler._enter
#
# What is given may be changed too. Any way that keeps the docstrings' promises is right.
# A call that raises changes nothing. Bad input is a ValueError whose message has the numbers, in any words;
# where two errors are due, either is right.
#
# A step: schedule(), the copies of blocks and the forward pass, update_from_output(output), one token appended to
# the outputs of each sequence in output.sampled, finish(seq) for those that end. num_computed of a scheduled
# sequence moves in update_from_output, which calls cache_computed; schedule sets it where a sequence enters
# (what is found) or is preempted (0, unless it is swapped). The BlockManager's methods advance the trace by
# themselves, and the engine counts its steps: the scheduler records no event.
# Delete a private method that your way does not need.
#
# Given: BlockManager, in minipaged/memory/block_manager.py.
#
#   reset() -> None
#       Empty pools and no tables: after an exception in a step, the contents of the blocks are undefined.
#   num_slots -> int
#       Tokens that the whole pool can hold.
#   blocks_for(num_tokens: int) -> int
#       How many blocks hold this many tokens of one sequence.
#   can_ever_fit(num_tokens: int) -> bool
#       Whether the empty pool could hold a sequence of this length.
#   get_computed_blocks(tokens: Sequence[int], cache_salt: str | None=None) -> list[int]
#       The blocks of the longest cached prefix of these tokens (`PrefixCache.match`). Changes nothing.
#   prefix_of(seq_id: str, num_tokens: int) -> list[int]
#       The full blocks that hold the first `num_tokens` tokens of a sequence; none where some were freed.
#   block_keys(tokens: Sequence[int], cache_salt: str | None=None) -> list[bytes]
#       The keys of the full blocks of these tokens; none where nothing is cached.
#   fork(parent: str, child: str) -> None
#       A second sequence with the same tokens, in the same blocks.
#   allocate_slots(seq_id: str, num_tokens: int, prefix: Sequence[int]=(), reserve: int=0) -> Copies | None
#       Slots for the first `num_tokens` tokens of a sequence. One without a table gets one, which begins with
#       the full blocks of `prefix`. None if fewer than `reserve` blocks would stay free.
#   free(seq_id: str) -> None
#       Release the blocks of a sequence, on the device or on the host. Does nothing if it has none.
#   is_swapped(seq_id: str) -> bool
#   swap_out(seq_id: str) -> Copies | None
#       Move a sequence to the host; None also if there is no host pool. The copies are (device, host).
#   swap_in(seq_id: str, num_tokens: int, prefix: Sequence[int]=(), reserve: int=0) -> Copies | None
#       Bring a sequence back, if there is room for `num_tokens` tokens. The copies are (host, device).
#       prefix: blocks in use on the device that hold its first tokens. They are named, and not copied.
#
# Given: Sequence, in minipaged/engine/sequence.py.
#
#   request_id: str
#   index: int  # which of the request's samples
#   prompt_token_ids: list[int]
#   params: SamplingParams
#   cache_salt: str | None = None  # sequences of unequal salts share no block
#   outputs: list[Token]  # state
#   num_computed: int = 0  # derived
#   seq_id: str  # request_id.index: names its block table and its events
#   num_uncomputed_tokens -> int
#       Tokens whose K and V are not in the cache yet: 1 in decode, more in prefill.
#   tokens(start: int, end: int) -> list[int]
#       Tokens at positions start to end - 1, prompt and output as one.
#
# Given: SchedulerOutput, in minipaged/engine/scheduler_output.py.
#
#   swap_out: Copies  # (device block, host block)
#   swap_in: Copies  # (host block, device block)
#   copies: Copies  # (device block, device block): copy-on-write
#   num_scheduled_tokens: dict[Sequence, int]  # from the sequence's num_computed on
#   total_num_scheduled_tokens: int = 0
#   sampled: dict[Sequence, int]  # whose next token is due -> its row of the logits
#   preempted: dict[Sequence, str]  # how: "recompute" or "swap"
#   max_num_batched_tokens: int = 0  # tokens that the step may compute
#   budget -> int
#       Tokens that the step has room for still.
#   schedule(seq: Sequence, leave: int=0) -> None
#       Compute the tokens of a sequence but the last `leave` ones, as many as the budget allows. If they
#       reach its end, its next token is due.
#
# Given, in minipaged/engine/scheduler_output.py:
#
#   cache_computed(blocks: BlockManager, output: SchedulerOutput) -> None
#       The step has run: K and V of its tokens are in the cache, and blocks that they filled can be found.
#
# Made from minipaged/engine/scheduler.py by minipaged/course/generate.py.

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
        raise NotImplementedError("ch10: Scheduler.check")

    def add(self, seqs: Iterable[Sequence]) -> None:
        """Queue new sequences; the samples of one request stand together."""
        raise NotImplementedError("ch10: Scheduler.add")

    def finish(self, seq: Sequence) -> None:
        """Remove a sequence from its queue, and free its blocks, wherever they lie."""
        raise NotImplementedError("ch10: Scheduler.finish")

    def reset(self, seqs: Iterable[Sequence]) -> None:
        """Empty the pool and the queues. Then these sequences wait, in this order, with no token computed."""
        raise NotImplementedError("ch10: Scheduler.reset")

    # ---- one step ------------------------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput:
        """Choose the tokens of the next step and allocate their slots. Empty only if nothing is unfinished."""
        raise NotImplementedError("ch10: Scheduler.schedule")

    def update_from_output(self, output: SchedulerOutput) -> None:
        """The step has run. Samples whose prompt is computed now fork, and are sampled from the same logits."""
        raise NotImplementedError("ch10: Scheduler.update_from_output")

    def _make_room(self, output: SchedulerOutput) -> None:
        """The slots that each running sequence needs, first to last. If blocks run out, preempt the last."""
        raise NotImplementedError("ch10: Scheduler._make_room")

    def _preempt(self, seq: Sequence, output: SchedulerOutput) -> None:
        """Free the device blocks of a sequence: its K and V move to the host, or are computed again later."""
        raise NotImplementedError("ch10: Scheduler._preempt")

    # ---- waiting sequences enter ---------------------------------------------------------------------------------

    def _admit(self, output: SchedulerOutput) -> None:
        """Admit waiting sequences, in their order. Samples that will fork keep their places, and a slot each."""
        raise NotImplementedError("ch10: Scheduler._admit")

    @staticmethod
    def _has_prompt_of(seq: Sequence, other: Sequence) -> bool:
        """Whether `seq` computes, or has just computed, the prompt from which `other` will fork."""
        return seq.request_id == other.request_id and not seq.outputs and not other.outputs

    def _enter(self, seq: Sequence, computing: set[bytes], output: SchedulerOutput) -> bool:
        """Give a waiting sequence its blocks. False if too few are free, or its next key is among `computing`."""
        raise NotImplementedError("ch10: Scheduler._enter")

    def _keys(self, seq: Sequence) -> list[bytes]:
        """The keys of a sequence's full blocks that are not computed yet."""
        first = seq.num_computed // self.blocks.block_size
        if not self.blocks.enable_prefix_caching or first >= len(seq) // self.blocks.block_size:
            return []
        return self.blocks.block_keys(seq.tokens(0, len(seq)), seq.cache_salt)[first:]
