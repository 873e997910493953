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
# Made from minipaged/kernels/paged_decode.py by minipaged/course/generate.py.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minipaged.kernels.checks import check_attention
from minipaged.kernels.online_softmax import LOG2_E, attend_context, finish_softmax, start_softmax


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
    check: bool = False,
) -> Tensor:
    """Attention of one query a sequence, at position seq_lens - 1, through the block tables.

    query [num_seqs, num_heads, head_dim]; caches [num_blocks, num_kv_heads, block_size, head_dim]; block_tables
    int32 [num_seqs, max_blocks]; seq_lens int32 [num_seqs]. Returns the shape of query, 0 where seq_lens is 0.
    `tile` is the number of tokens a step of the loop takes, a power of two from 16; None: what fits the head size.
    Raises ValueError for arguments that do not fit; for numbers out of range only with `check`.
    """
    tables = block_tables, seq_lens, None
    check_attention(query, key_cache, value_cache, *tables, sliding_window, out=out, tile=tile, check=check)
    num_seqs, num_heads, head_dim = query.shape
    _, num_kv_heads, block_size, _ = key_cache.shape
    out = torch.empty_like(query) if out is None else out
    if num_seqs == 0:
        return out
    paged_decode_kernel[(num_seqs, num_kv_heads)](
        out,
        query,
        key_cache,
        value_cache,
        block_tables,
        seq_lens,
        scale * LOG2_E,
        *out.stride()[:2],
        *query.stride()[:2],
        *key_cache.stride()[:3],
        block_tables.stride(0),
        **decode_constants(num_heads // num_kv_heads, head_dim, block_size, query.dtype.itemsize, sliding_window, tile),
    )
    return out


def decode_constants(
    group: int,
    head_dim: int,
    block_size: int,
    itemsize: int,
    sliding_window: int | None = None,
    tile: int | None = None,
) -> dict[str, Any]:
    """The constexprs and options of the decode kernels, split or not."""
    head_dim_padded = max(16, triton.next_power_of_2(head_dim))
    # 16 KiB of K and as much of V a step: two steps in flight and three programs on a multiprocessor fit in 228 KiB.
    tile = tile or min(128, max(16, 16_384 // (head_dim_padded * itemsize)))
    return {
        "GROUP": group,
        "ROWS": max(16, triton.next_power_of_2(group)),
        "HEAD_DIM": head_dim,
        "HEAD_DIM_PADDED": head_dim_padded,
        "BLOCK_SIZE": block_size,
        "TILE": tile,
        "WINDOW": sliding_window or 0,
        "num_warps": 4,
        "num_stages": 3,
    }


@triton.jit
def paged_decode_kernel(
    out_ptr,  # [num_seqs, num_heads, HEAD_DIM]
    query_ptr,  # [num_seqs, num_heads, HEAD_DIM]
    key_cache_ptr,  # [num_blocks, num_kv_heads, BLOCK_SIZE, HEAD_DIM]
    value_cache_ptr,
    block_tables_ptr,  # [num_seqs, max_blocks]
    seq_lens_ptr,  # [num_seqs]
    scale_log2,
    out_stride_seq,
    out_stride_head,
    query_stride_seq,
    query_stride_head,
    stride_block,  # of both caches
    stride_kv_head,
    stride_slot,
    table_stride_seq,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    raise NotImplementedError("ch08: paged_decode_kernel")
