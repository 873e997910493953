"""Chapter 10. What a step of the scheduler becomes on the device: copies of blocks, then one forward pass.

    SchedulerOutput   swap_out -> swap_in -> copies     whole blocks, all layers, before anything is written
                      work -> one ragged batch          prompts, chunks and single tokens end to end, no padding
                      -> logits                         of those tokens alone that are somebody's last

The runner knows block tables as lists of numbers, and asks nobody why they are so.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from minipaged.engine.scheduler import SchedulerOutput
from minipaged.engine.settings import CacheSettings
from minipaged.kvcache import ContiguousCache, PagedCache, RecomputeCache
from minipaged.kvcache.host import HostPool
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.trace import Trace
from minipaged.memory.unpaged import NoMemory, SlabManager
from minipaged.model.contract import KVCache, Scheduled, make_step
from minipaged.model.transformer import Transformer


class Runner:
    """A model and its cache. Invariant: after `run`, K and V of the step's tokens lie in their slots."""

    def __init__(self, transformer: Transformer, settings: CacheSettings, trace: Trace | None = None):
        """Raises ValueError for a pool that the device, or the host, has no memory for."""
        self.transformer = transformer
        weights = transformer.embed_tokens.weight
        self.device, self.dtype = weights.device, weights.dtype
        self.bytes_per_token = transformer.config.kv_bytes_per_token(self.dtype)
        self.memory: BlockManager | NoMemory
        self.cache: KVCache
        self.host: HostPool | None = None
        # The tensors first: a pool that no memory holds is refused before anybody counts its blocks.
        num_slots = settings.num_blocks * settings.block_size
        try:
            if settings.cache == "paged":
                sizes = settings.num_blocks, settings.block_size
                self.cache = PagedCache(transformer.config, *sizes, self.dtype, self.device, settings.backend)
                if settings.num_host_blocks:
                    num_slots = settings.num_host_blocks * settings.block_size
                    self.host = HostPool(self.cache, settings.num_host_blocks)
                self.memory = BlockManager(
                    *sizes,
                    num_host_blocks=settings.num_host_blocks,
                    enable_prefix_caching=settings.enable_prefix_caching,
                    trace=trace,
                )
            elif settings.cache == "contiguous":
                num_slabs, length = num_slots // settings.max_model_len, settings.max_model_len
                self.cache = ContiguousCache(transformer.config, num_slabs, length, self.dtype, self.device)
                self.memory = SlabManager(num_slabs, length)
            else:
                self.cache, self.memory = RecomputeCache(), NoMemory()
        except (RuntimeError, MemoryError) as error:  # OutOfMemoryError of CUDA is a RuntimeError
            raise ValueError(
                f"a pool of {num_slots:,} slots of {self.bytes_per_token:,} bytes each is more than device "
                f"'{self.device}' has: give it fewer blocks"
            ) from error

    @torch.inference_mode()
    def run(self, output: SchedulerOutput) -> Tensor:
        """One step. Returns logits [num_ends, vocab_size], a row for each piece of work that reaches an end."""
        # Triton launches on the current device, which need not be ours.
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            if self.host is not None:
                self.host.swap_out(output.swap_out)
                self.host.swap_in(output.swap_in)
            if isinstance(self.cache, PagedCache):
                self.cache.copy_blocks(output.copies)
            batch = [
                Scheduled(
                    item.seq.tokens(item.start, item.start + item.count),
                    item.start,
                    self.memory.blocks(item.seq.seq_id),
                )
                for item in output.work
            ]
            step = make_step(batch, self.memory.block_size, self.device)
            hidden = self.transformer(step, self.cache)  # [num_tokens, hidden_size]
            ends = [i for i, item in enumerate(output.work) if item.reaches_end]
            last = step.query_start_loc[1:][ends].long() - 1  # [num_ends]
            return self.transformer.logits(hidden[last])
