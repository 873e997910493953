# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Chapter 8. Decode: every sequence has one query. One program for each (sequence, KV head).

                KV head 0     KV head 1              program (1, 0) reads K and V of KV head 0 of sequence 1, once,
    sequence 0  (0, 0)        (0, 1)                 for all query heads of the group:
    sequence 1  (1, 0) <--    (1, 1)
    sequence 2  (2, 0)        (2, 1)                 rows of the dot = query heads 0 .. GROUP - 1, padded to 16

Decode is bound by memory: each byte of K and V is used for GROUP queries and never again. So the heads of a group share
one read, and the tensor cores, which take 16 rows at least, work on padding that costs no bytes.
"""

# Exercise ch08_paged_decode, about 30 minutes. Write what raises
# NotImplementedError, in this order, and run `minipaged check 8` after each step:
#
#   1. paged_decode_kernel
#
# What is given may be changed too. Any way that keeps the docstrings' promises is right.
# A call that raises changes nothing. Bad input is a ValueError whose message has the numbers, in any words;
# where two errors are due, either is right.
#
# Made from minipaged/kernels/paged_decode.py by minipaged/course/generate.py.

import torch
import triton
import triton.language as tl
from torch import Tensor

from minipaged.kernels.launch import LOG2_E, check_attention, decode_constants, strides
from minipaged.kernels.online_softmax import attend_context, finish_softmax, locate_context, locate_rows, start_softmax


def paged_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    out: Tensor | None = None,
    tile: int | None = None,
) -> Tensor:
    """`paged_attention` of one query a sequence, at position seq_lens - 1: query [num_seqs, num_heads, head_dim].

    `tile` is the number of tokens a step of the loop takes, a power of two from 16; None: what fits the head size.
    """
    tensors = query, key_cache, value_cache, block_tables, seq_lens
    check_attention(*tensors, None, sliding_window, out=out, tile=tile)
    out = torch.empty_like(query) if out is None else out
    if len(query) > 0:
        places = strides(out, query, key_cache, block_tables)
        constants = decode_constants(query, key_cache, sliding_window, tile)
        paged_decode_kernel[(len(query), key_cache.shape[1])](out, *tensors, scale * LOG2_E, *places, **constants)
    return out


@triton.jit
def paged_decode_kernel(
    out_ptr,  # [num_seqs, num_heads, HEAD_DIM]
    query_ptr,  # [num_seqs, num_heads, HEAD_DIM]
    key_cache_ptr,  # [num_blocks, num_kv_heads, BLOCK_SIZE, HEAD_DIM]
    value_cache_ptr,
    block_tables_ptr,  # [num_seqs, max_blocks]
    seq_lens_ptr,  # [num_seqs]
    scale_log2,
    out_strides,  # of a sequence and a head
    query_strides,
    cache_strides,  # of a block, a KV head and a slot, in both caches
    table_strides,  # of a sequence
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    raise NotImplementedError("ch08: paged_decode_kernel")
