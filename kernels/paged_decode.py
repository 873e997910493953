# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Chapter 8. Decode: every sequence has one query. One program for each (sequence, KV head).

                KV head 0     KV head 1              program (1, 0) reads K and V of KV head 0 of sequence 1, once,
    sequence 0  (0, 0)        (0, 1)                 for all query heads of the group:
    sequence 1  (1, 0) <--    (1, 1)
    sequence 2  (2, 0)        (2, 1)                 rows of the dot = query heads 0 .. GROUP - 1, padded to 16

Decode is bound by memory: each byte of K and V is used for GROUP queries and never again. So the heads of a group share
one read, and the tensor cores, which take 16 rows at least, work on padding that costs no bytes.
"""

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
    seq, kv_head = tl.program_id(0), tl.program_id(1)
    seq_len = tl.load(seq_lens_ptr + seq).to(tl.int32)
    start = 0
    if WINDOW > 0:
        start = tl.maximum(seq_len - WINDOW, 0)  # what lies before the window is not even loaded

    row = tl.arange(0, ROWS)
    head = kv_head * GROUP + row  # [ROWS], the query heads that read this KV head
    exists = (row < GROUP)[:, None] & (tl.arange(0, HEAD_DIM_PADDED) < HEAD_DIM)[None, :]  # [ROWS, HEAD_DIM_PADDED]
    q = tl.load(locate_rows(query_ptr, seq, head, query_strides, HEAD_DIM_PADDED), mask=exists, other=0.0)
    position = tl.full([ROWS], seq_len - 1, tl.int32)  # all heads of the query are at the end of the sequence

    context = locate_context(
        seq, kv_head, key_cache_ptr, value_cache_ptr, block_tables_ptr, cache_strides, table_strides
    )
    softmax = attend_context(
        start_softmax(q), q, position, context, start, seq_len, scale_log2, HEAD_DIM, BLOCK_SIZE, TILE, 0, MASKED=True
    )
    out = finish_softmax(softmax).to(out_ptr.dtype.element_ty)
    tl.store(locate_rows(out_ptr, seq, head, out_strides, HEAD_DIM_PADDED), out, mask=exists)
