# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Chapter 8. Store the K and V of new tokens: one program a token, which translates one address.

    slot_mapping   [  9  |  4  | -1  |  2  ]          block_size 4:  9 = block 2, offset 1
                      |     |     |     |
    program           0     1     2     3              program 2 stores nothing
                      |     |           |
    key_cache      [ block 0 ][ block 1 ][ block 2 ]   [num_blocks, num_kv_heads, block_size, head_dim]
                        ^2      ^4          ^9

The caches are written through their strides, so a pool in FlashAttention's order (NHD) is passed as a transposed view.
"""

# Exercise ch08_kv_write, about 20 minutes. Write what raises
# NotImplementedError, in this order, and run `minipaged check 8` after each step:
#
#   1. write_kv_kernel
#
# What is given may be changed too. Any way that keeps the docstrings' promises is right.
# Made from minipaged/kernels/kv_write.py by minipaged/course/generate.py.

import triton
import triton.language as tl
from torch import Tensor

from minipaged.kernels.checks import check_write_kv


def write_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, *, check: bool = False
) -> None:
    """Store each new token's K and V in its slot: block = slot // block_size, offset = slot % block_size.

    key, value [num_tokens, num_kv_heads, head_dim]; caches [num_blocks, num_kv_heads, block_size, head_dim];
    slot_mapping int64 [num_tokens], -1 for a token that is not stored. No slot may stand in it twice.
    Raises ValueError for shapes, dtypes, strides and devices that do not fit, before anything is written; for slots
    outside the pool only with `check`, which has to wait for the device.
    """
    check_write_kv(key, value, key_cache, value_cache, slot_mapping, check)
    num_tokens, num_kv_heads, head_dim = key.shape
    if num_tokens == 0:
        return
    write_kv_kernel[(num_tokens,)](
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        *key_cache.stride()[:3],
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=key_cache.shape[2],
        NUM_KV_HEADS_PADDED=triton.next_power_of_2(num_kv_heads),
        HEAD_DIM_PADDED=triton.next_power_of_2(head_dim),
    )


@triton.jit
def write_kv_kernel(
    key_ptr,  # [num_tokens, NUM_KV_HEADS, HEAD_DIM]
    value_ptr,
    key_cache_ptr,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    value_cache_ptr,
    slot_mapping_ptr,  # [num_tokens]
    key_stride_token,
    key_stride_head,
    value_stride_token,
    value_stride_head,
    stride_block,  # of both caches
    stride_head,
    stride_slot,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS_PADDED: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
):
    raise NotImplementedError("ch08: write_kv_kernel")
