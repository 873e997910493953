"""Chapter 10. One step as the scheduler decides it. The runner turns it into one forward pass (model/batch.py)."""

from dataclasses import dataclass, field

from minipaged.engine.sequence import Sequence
from minipaged.memory.block_manager import BlockManager, Copies


@dataclass
class SchedulerOutput:
    """One step: block copies, in the order of the fields, and then the tokens that are computed."""

    swap_out: Copies = field(default_factory=list)  # (device block, host block)
    swap_in: Copies = field(default_factory=list)  # (host block, device block)
    copies: Copies = field(default_factory=list)  # (device block, device block): copy-on-write
    num_scheduled_tokens: dict[Sequence, int] = field(default_factory=dict)  # from the sequence's num_computed on
    total_num_scheduled_tokens: int = 0
    sampled: dict[Sequence, int] = field(default_factory=dict)  # whose next token is due -> its row of the logits
    preempted: dict[Sequence, str] = field(default_factory=dict)  # how: "recompute" or "swap"
    max_num_batched_tokens: int = 0  # tokens that the step may compute

    @property
    def budget(self) -> int:
        """Tokens that the step has room for still."""
        return self.max_num_batched_tokens - self.total_num_scheduled_tokens

    def schedule(self, seq: Sequence, leave: int = 0) -> None:
        """Compute the tokens of a sequence but the last `leave` ones, as many as the budget allows. If they reach its
        end, its next token is due."""
        count = min(seq.num_uncomputed_tokens - leave, self.budget)
        if count > 0:
            self.num_scheduled_tokens[seq] = count
            self.total_num_scheduled_tokens += count
            if count == seq.num_uncomputed_tokens:
                self.sampled[seq] = len(self.sampled)


def cache_computed(blocks: BlockManager, output: SchedulerOutput) -> None:
    """The step has run: K and V of its tokens are in the cache, and blocks that they filled can be found."""
    for seq, count in output.num_scheduled_tokens.items():
        seq.num_computed += count
        if blocks.enable_prefix_caching and seq.num_computed % blocks.block_size < count:
            blocks.cache_blocks(seq.seq_id, seq.tokens(0, seq.num_computed), seq.cache_salt)
        if blocks.sliding_window:
            blocks.remove_skipped_blocks(seq.seq_id, seq.num_computed)
