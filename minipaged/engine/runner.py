"""Chapter 10. What the scheduler decided, carried out: copies of blocks, then one forward pass.

    SchedulerOutput   swap_out -> swap_in -> copies     whole blocks, all layers, before anything is written
                      num_scheduled_tokens              one ragged batch: prompts, chunks and single tokens
                      -> logits                         of those tokens alone whose next token is due

With several devices (chapter 13) each makes the same copies and runs the same batch.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from minipaged.engine.cache_config import CacheConfig
from minipaged.engine.scheduler_output import SchedulerOutput
from minipaged.kvcache import ContiguousCache, PagedCache
from minipaged.kvcache.swap_space import SwapSpace
from minipaged.memory.block_manager import BlockManager
from minipaged.model.batch import ForwardBatch, make_batch
from minipaged.model.transformer import Transformer


def forward_batch(output: SchedulerOutput, blocks: BlockManager, device: torch.device) -> ForwardBatch:
    """The tensors of a step. Its block tables are those of `blocks` now, with slots for all of its tokens."""
    seqs = list(output.num_scheduled_tokens)
    starts = [seq.num_computed for seq in seqs]
    ends = [start + output.num_scheduled_tokens[seq] for seq, start in zip(seqs, starts, strict=True)]
    return make_batch(
        [seq.tokens(start, end) for seq, start, end in zip(seqs, starts, ends, strict=True)],
        starts,
        [blocks.blocks(seq.seq_id) for seq in seqs],
        blocks.block_size,
        sampled=[i for i, seq in enumerate(seqs) if seq in output.sampled],
        device=device,
    )


class Runner:
    """A model and its KV cache. Invariant: after `run`, K and V of the step's tokens lie in their slots."""

    def __init__(self, transformer: Transformer, cache_config: CacheConfig):
        """Raises ValueError for a pool that the device, or the host, has no memory for."""
        self.transformer, self.cache_config = transformer, cache_config
        weights = transformer.embed_tokens.weight
        self.device, self.dtype = weights.device, weights.dtype
        self.bytes_per_token = transformer.config.kv_bytes_per_token(self.dtype)
        self.cache: PagedCache | ContiguousCache
        self.swap_space: SwapSpace | None = None
        num_blocks, block_size = cache_config.num_blocks, cache_config.block_size
        sizes = transformer.config, num_blocks, block_size, self.dtype, self.device
        try:
            if cache_config.cache == "contiguous":
                self.cache = ContiguousCache(*sizes)
            else:
                self.cache = PagedCache(*sizes, cache_config.backend)
            if cache_config.num_host_blocks:
                num_blocks = cache_config.num_host_blocks
                self.swap_space = SwapSpace(self.cache, num_blocks)
        except (RuntimeError, MemoryError, TypeError) as error:  # of CUDA; of a host; of a size past 64 bits
            raise ValueError(
                f"a pool of {num_blocks * block_size:,} slots of {self.bytes_per_token:,} bytes each is more than "
                f"device '{self.device}' has: give it fewer blocks"
            ) from error

    @torch.inference_mode()
    def run(self, output: SchedulerOutput, batch: ForwardBatch) -> Tensor:
        """One step: the block copies of `output`, then the batch. Returns logits [num_sampled, vocab_size], a row for
        each of `output.sampled`."""
        # Triton launches on the current device, which need not be ours.
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            if self.swap_space is not None:
                self.swap_space.swap_out(output.swap_out)
                self.swap_space.swap_in(output.swap_in)
            self.cache.copy_blocks(output.copies)
            hidden = self.transformer(batch, self.cache)  # [num_tokens, hidden_size]
            return self.transformer.logits(hidden[batch.logits_rows])

    def start(self) -> None:
        """Start the other ranks: none, on one device."""

    def close(self) -> None:
        """End the other ranks."""
