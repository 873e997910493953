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
# A call that raises changes nothing. Bad input is a ValueError whose message has the numbers, in any words;
# where two errors are due, either is right.
#
# Made from minipaged/kernels/kv_write.py by minipaged/course/generate.py.

import triton
import triton.language as tl
from torch import Tensor

from minipaged.attention.checks import check_write_kv
from minipaged.kernels.launch import check_memory, strides


def write_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, *, check: bool = False
) -> None:
    """`minipaged.attention.write_kv`: the same arguments, effect and errors.

    Slots outside the pool are refused only with `check`, which has to wait for the device.
    """
    check_write_kv(key, value, key_cache, value_cache, slot_mapping, numbers=check)
    check_memory(key_cache, value_cache, key=key, value=value, slot_mapping=slot_mapping)
    num_tokens, num_kv_heads, head_dim = key.shape
    if num_tokens > 0:
        write_kv_kernel[(num_tokens,)](
            *(key, value, key_cache, value_cache, slot_mapping),
            *strides(key, value, key_cache),
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
    key_strides,  # of a token and a head
    value_strides,
    cache_strides,  # of a block, a KV head and a slot, in both caches
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS_PADDED: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
):
    raise NotImplementedError("ch08: write_kv_kernel")
