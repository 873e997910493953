"""Chapter 10. What a step of the scheduler becomes on the device: copies of blocks, then one forward pass.

    SchedulerOutput   swap_out -> swap_in -> copies     whole blocks, all layers, before anything is written
                      work -> one ragged batch          prompts, chunks and single tokens end to end, no padding
                      -> logits                         of those tokens alone that are somebody's last

The runner knows block tables as lists of numbers, and asks nobody why they are so. What a device has to be told of a
step is one `StepDescription`. With several devices (chapter 13) every one is told the same.
"""

import ctypes
import sys
from contextlib import nullcontext
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from minipaged.engine.scheduler import SchedulerOutput
from minipaged.engine.settings import CacheSettings
from minipaged.kvcache import ContiguousCache, PagedCache, RecomputeCache
from minipaged.kvcache.host import HostPool
from minipaged.memory.block_manager import BlockManager, Copies
from minipaged.memory.trace import Trace
from minipaged.memory.unpaged import NoMemory, SlabManager
from minipaged.model.contract import KVCache, Scheduled, make_step
from minipaged.model.transformer import Transformer


class StepDescription(NamedTuple):
    """A step in numbers: no request, no sequence, no table that anybody else holds on to."""

    swap_out: Copies
    swap_in: Copies
    copies: Copies
    batch: list[Scheduled]  # tokens, where they start, and the block table, of each piece of work
    ends: list[int]  # pieces of work whose last logits are wanted


class Executor:
    """A model and its cache, and nobody who decides anything. Invariant: after `execute`, K and V of the step's tokens
    lie in their slots."""

    def __init__(self, transformer: Transformer, settings: CacheSettings):
        """Raises ValueError for a pool that the device, or the host, has no memory for."""
        self.transformer, self.settings = transformer, settings
        weights = transformer.embed_tokens.weight
        self.device, self.dtype = weights.device, weights.dtype
        if self.device.type == "cpu":
            keep_freed_memory()
        self.bytes_per_token = transformer.config.kv_bytes_per_token(self.dtype)
        self.cache: KVCache
        self.host: HostPool | None = None
        num_slots = settings.num_blocks * settings.block_size
        try:
            if settings.cache == "paged":
                sizes = settings.num_blocks, settings.block_size
                self.cache = PagedCache(transformer.config, *sizes, self.dtype, self.device, settings.backend)
                if settings.num_host_blocks:
                    num_slots = settings.num_host_blocks * settings.block_size
                    self.host = HostPool(self.cache, settings.num_host_blocks)
            elif settings.cache == "contiguous":
                num_slabs, length = num_slots // settings.max_model_len, settings.max_model_len
                self.cache = ContiguousCache(transformer.config, num_slabs, length, self.dtype, self.device)
            else:
                self.cache = RecomputeCache()
        except (RuntimeError, MemoryError) as error:  # OutOfMemoryError of CUDA is a RuntimeError
            raise ValueError(
                f"a pool of {num_slots:,} slots of {self.bytes_per_token:,} bytes each is more than device "
                f"'{self.device}' has: give it fewer blocks"
            ) from error
        # Tokens of a block, as `make_step` takes them: a slab is a block as long as the longest request.
        self.block_size = {"paged": settings.block_size, "contiguous": settings.max_model_len}.get(settings.cache, 0)

    @torch.inference_mode()
    def execute(self, told: StepDescription) -> Tensor:
        """One step. Returns logits [num_ends, vocab_size]."""
        # Triton launches on the current device, which need not be ours.
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            if self.host is not None:
                self.host.swap_out(told.swap_out)
                self.host.swap_in(told.swap_in)
            if isinstance(self.cache, PagedCache):
                self.cache.copy_blocks(told.copies)
            step = make_step(told.batch, self.block_size, self.device)
            hidden = self.transformer(step, self.cache)  # [num_tokens, hidden_size]
            last = step.query_start_loc[1:][told.ends].long() - 1  # [num_ends]
            return self.transformer.logits(hidden[last])


class Runner(Executor):
    """An executor, and the memory that its scheduler asks: who holds which block."""

    def __init__(self, transformer: Transformer, settings: CacheSettings, trace: Trace | None = None):
        # The tensors first: a pool that no memory holds is refused before anybody counts its blocks.
        super().__init__(transformer, settings)
        self.memory: BlockManager | NoMemory
        if settings.cache == "paged":
            self.memory = BlockManager(
                settings.num_blocks,
                settings.block_size,
                num_host_blocks=settings.num_host_blocks,
                enable_prefix_caching=settings.enable_prefix_caching,
                trace=trace,
            )
        elif settings.cache == "contiguous":
            num_slabs = settings.num_blocks * settings.block_size // settings.max_model_len
            self.memory = SlabManager(num_slabs, settings.max_model_len)
        else:
            self.memory = NoMemory()

    def describe(self, output: SchedulerOutput) -> StepDescription:
        """What the scheduler decided, with the tokens and the block tables that it means."""
        batch = [
            Scheduled(
                item.seq.tokens(item.start, item.start + item.count), item.start, self.memory.blocks(item.seq.seq_id)
            )
            for item in output.work
        ]
        ends = [i for i, item in enumerate(output.work) if item.reaches_end]
        return StepDescription(output.swap_out, output.swap_in, output.copies, batch, ends)

    def run(self, output: SchedulerOutput) -> Tensor:
        """One step. Returns logits [num_ends, vocab_size], a row for each piece of work that reaches an end."""
        return self.execute(self.describe(output))

    def start(self) -> None:
        """Whatever has to be there before the first step, beyond this process: nothing, on one device."""

    def close(self) -> None:
        """Give back what would outlive this object: nothing, on one device."""


@cache
def keep_freed_memory() -> bool:
    """Have the C library keep up to 512 MiB of freed memory for the next tensor. False where it is not glibc.

    By default it maps every larger tensor anew and unmaps it again. Steps of 2,048 tokens of SmolLM2-135M spent 5 % of
    their time in float32, and 22 % in bfloat16, on pages that were handed out, zeroed and taken back. Pools, being
    above 64 MiB, are still given back.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of <malloc.h>
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(trim_threshold, 512 << 20) and mallopt(mmap_threshold, 64 << 20))
