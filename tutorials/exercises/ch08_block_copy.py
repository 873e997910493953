# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Chapter 8. Copy whole blocks within a pool: what copy-on-write asks for (chapter 9), in one launch for all layers.

    copies  [(5, 2), (0, 7)]                block 5 -> block 2,  block 0 -> block 7, in every layer

    grid    (copy, layer, piece)            a piece is up to 1,024 elements that lie side by side

            block 5   [ piece 0 | piece 1 | piece 2 ..]
                           |         |         |        one program each, K and V
            block 2   [ piece 0 | piece 1 | piece 2 ..]

The order of heads and slots inside a block does not matter to a copy: both blocks are read as a row of elements.
"""

# Exercise ch08_block_copy, about 15 minutes. Write what raises
# NotImplementedError, in this order, and run `minipaged check 8` after each step:
#
#   1. copy_blocks_kernel
#
# What is given may be changed too. Any way that keeps the docstrings' promises is right.
# A call that raises changes nothing. Bad input is a ValueError whose message has the numbers, in any words;
# where two errors are due, either is right.
#
# Made from minipaged/kernels/block_copy.py by minipaged/course/generate.py.

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from minipaged.attention.checks import INTEGERS, check, check_tensor
from minipaged.kernels.launch import check_memory

PIECE = 1024  # elements: 2 KiB of float16, 16 bytes a thread at 4 warps
Copies = Sequence[tuple[int, int]] | Tensor


def copy_blocks(key_cache: Tensor, value_cache: Tensor, copies: Copies, *, check: bool = False) -> None:
    """Copy block `source` to block `target` for each pair of `copies`: a list, or an integer tensor [num_copies, 2].

    caches [num_blocks, num_kv_heads, block_size, head_dim] of one layer, or [num_layers, num_blocks, ...]: then a
    block's number means the same block in all layers, and one launch serves them all. A target may stand in `copies`
    once and may be no other's source, since programs run in no order.
    Raises ValueError for what does not fit before anything is copied; a tensor's numbers are looked at only with
    `check`, which has to wait for the device, a list's always.
    """
    check_copies(key_cache, value_cache, copies, numbers=check)
    if len(copies) == 0:
        return
    if key_cache.dim() == 4:
        key_cache, value_cache = key_cache[None], value_cache[None]
    pairs = torch.as_tensor(copies, device=key_cache.device).contiguous()  # [num_copies, 2]
    numel = key_cache[0, 0].numel()
    grid = len(pairs), len(key_cache), triton.cdiv(numel, PIECE)
    copy_blocks_kernel[grid](key_cache, value_cache, pairs, numel, *key_cache.stride()[:2], PIECE)


def check_copies(key_cache: Tensor, value_cache: Tensor, copies: Copies, *, numbers: bool) -> None:
    """Raises ValueError for the first argument of copy_blocks that does not fit."""
    layers = "[num_layers, num_blocks, num_kv_heads, block_size, head_dim]"
    check(key_cache.dim() in (4, 5), f"key_cache must be {layers} or one layer of it, got {list(key_cache.shape)}")
    check_tensor("value_cache", value_cache, key_cache.shape, key_cache)
    check_memory(key_cache, value_cache)
    block = key_cache.flatten(0, -4)[0]
    extent = 1 + sum((size - 1) * stride for size, stride in zip(block.shape, block.stride(), strict=True))
    in_one_piece = extent == block.numel() and min(block.stride()) >= 1
    check(in_one_piece, f"key_cache must hold a block in one piece, got strides {list(key_cache.stride())}")
    if isinstance(copies, Tensor):
        check_tensor("copies", copies, (len(copies), 2), key_cache, INTEGERS)
        check_memory(key_cache, value_cache, copies=copies)
        if not numbers:
            return
    pairs = [(int(source), int(target)) for source, target in copies]
    sources, targets = {source for source, _ in pairs}, [target for _, target in pairs]
    num_blocks = key_cache.shape[-4]
    for block_id in (*sources, *targets):
        check(0 <= block_id < num_blocks, f"copies must lie in 0 to {num_blocks - 1}, got {block_id}")
    for target in targets:
        check(targets.count(target) == 1, f"copies must name a target once, got {target} twice")
        check(target not in sources, f"copies must not read a block that they write, got source {target} in {pairs}")


@triton.jit
def copy_blocks_kernel(
    key_cache_ptr,  # [num_layers, num_blocks, numel]
    value_cache_ptr,
    copies_ptr,  # [num_copies, 2]
    numel,  # elements of a block
    stride_layer,
    stride_block,
    PIECE: tl.constexpr,
):
    raise NotImplementedError("ch08: copy_blocks_kernel")
