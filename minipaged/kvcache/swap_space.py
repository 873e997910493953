"""Chapter 9. Swap space: the host's memory for the blocks of sequences that are swapped out.

    device   key_cache, value_cache  [num_layers, num_blocks,      num_kv_heads, block_size, head_dim]
    host     the same                [num_layers, num_host_blocks, num_kv_heads, block_size, head_dim]

memory/swap.py decides which block moves where; this module copies the tensors, all layers and all blocks of a plan at
once. Without a GPU both pools lie in the same memory. Source: the PagedAttention paper, section 4.5.
"""

import torch

from minipaged.kvcache.contiguous import ContiguousCache
from minipaged.kvcache.paged import PagedCache


class SwapSpace:
    """`num_blocks` blocks like those of `cache`, in the host's memory (pinned, where the device is a GPU)."""

    def __init__(self, cache: PagedCache | ContiguousCache, num_blocks: int):
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.cache = cache
        shape = list(cache.key_cache.shape)
        shape[1] = num_blocks
        pinned = cache.key_cache.device.type == "cuda"
        self.key_cache = torch.empty(shape, dtype=cache.key_cache.dtype, pin_memory=pinned)
        self.value_cache = torch.empty(shape, dtype=cache.key_cache.dtype, pin_memory=pinned)

    def swap_out(self, plan: list[tuple[int, int]]) -> None:
        """Copy blocks (device block, host block) to the host. No host block is named twice."""
        _copy(plan, self.cache.key_cache, self.key_cache)
        _copy(plan, self.cache.value_cache, self.value_cache)

    def swap_in(self, plan: list[tuple[int, int]]) -> None:
        """Copy blocks (host block, device block) back. No device block is named twice."""
        _copy(plan, self.key_cache, self.cache.key_cache)
        _copy(plan, self.value_cache, self.cache.value_cache)


def _copy(plan: list[tuple[int, int]], source: torch.Tensor, target: torch.Tensor) -> None:
    if plan:
        sources, targets = (torch.tensor(blocks) for blocks in zip(*plan, strict=True))
        blocks = source[:, sources.to(source.device)]  # [num_layers, len(plan), num_kv_heads, block_size, head_dim]
        target[:, targets.to(target.device)] = blocks.to(target.device)
