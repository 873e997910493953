# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Chapter 8. Prefill, chunked prefill, decode and any mix: a ragged batch of queries behind cached prefixes.

    query             [ a a a a a | b | c c c ]      query_start_loc [0, 5, 6, 9];  4 query tokens a program

    grid              (query tile, KV head)          num_tokens // 4 + num_seqs tiles: never too few, and known without
      tile 0          a a a a                        asking the device how long the longest sequence is
      tile 1          a
      tile 2          b                              a tile finds its sequence by bisection of query_start_loc
      tile 3          c c c
      tile 4          (returns at once)

    rows of the dot   token 0: heads 0 .. GROUP - 1 | token 1: heads 0 .. GROUP - 1 | ...    one read of K, V serves all

    keys of a tile    [ prefix, seen by every row: no mask ][ diagonal: causal ]
                      0                                     ^ the first query's position

The queries of a sequence are its last positions: query i of n stands at seq_len - n + i and sees what is not after it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from minipaged.kernels.checks import check_attention
from minipaged.kernels.online_softmax import LOG2_E, attend_context, finish_softmax, start_softmax


def paged_prefill(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    max_query_len: int | None = None,
    out: Tensor | None = None,
    tile: int | None = None,
    rows: int | None = None,
    check: bool = False,
) -> Tensor:
    """Causal attention of a ragged batch through the block tables; the arguments of `paged_attention`.

    `max_query_len`, where the caller knows it, keeps the rows of a program few when all sequences have few queries;
    the answer does not depend on it. `tile` (keys a step) and `rows` (query rows a program) are powers of two from 16;
    None: what fits the head size.
    """
    tables = block_tables, seq_lens, query_start_loc
    check_attention(query, key_cache, value_cache, *tables, sliding_window, out=out, tile=tile, rows=rows, check=check)
    num_tokens, num_heads, head_dim = query.shape
    _, num_kv_heads, block_size, _ = key_cache.shape
    num_seqs = len(seq_lens)
    out = torch.empty_like(query) if out is None else out
    if num_tokens == 0:
        return out
    group = num_heads // num_kv_heads
    constants = prefill_constants(
        group,
        head_dim,
        block_size,
        query.dtype.itemsize,
        sliding_window,
        num_tokens if max_query_len is None else max_query_len,
        multiplies_from_shared_memory=multiplies_from_shared_memory(query.device),
        tile=tile,
        rows=rows,
    )
    num_tiles = num_tokens // (constants["ROWS"] // group) + num_seqs
    paged_prefill_kernel[(num_tiles, num_kv_heads)](
        out,
        query,
        key_cache,
        value_cache,
        block_tables,
        seq_lens,
        query_start_loc,
        num_seqs,
        scale * LOG2_E,
        *out.stride()[:2],
        *query.stride()[:2],
        *key_cache.stride()[:3],
        block_tables.stride(0),
        **constants,
    )
    return out


def prefill_constants(
    group: int,
    head_dim: int,
    block_size: int,
    itemsize: int,
    sliding_window: int | None = None,
    max_query_len: int = 128,
    multiplies_from_shared_memory: bool = True,
    tile: int | None = None,
    rows: int | None = None,
) -> dict[str, Any]:
    """The constexprs and options of the kernel."""
    head_dim_padded = max(16, triton.next_power_of_2(head_dim))
    # 128 rows are two warpgroups of wgmma on Hopper. The accumulator of a larger head, or of float32, leaves less room.
    most = 32 if itemsize > 2 else 64 if head_dim_padded > 128 else 128
    needed = triton.next_power_of_2(max_query_len * group)  # no rows for queries that are not there
    rows = rows or max(16, triton.next_power_of_2(group), min(most, needed))
    # Where operands come from registers, 128 rows by 64 keys of head_dim 128 do not fit into 255 of them.
    short = itemsize > 2 or head_dim_padded > (128 if multiplies_from_shared_memory else 64)
    return {
        "GROUP": group,
        "ROWS": rows,
        "HEAD_DIM": head_dim,
        "HEAD_DIM_PADDED": head_dim_padded,
        "BLOCK_SIZE": block_size,
        "TILE": tile or (32 if short else 64),
        "WINDOW": sliding_window or 0,
        "num_warps": 8 if rows >= 128 or head_dim_padded > 128 else 4,
        "num_stages": 3 if head_dim_padded <= 128 else 2,
    }


def multiplies_from_shared_memory(device: torch.device) -> bool:
    """wgmma of Hopper (sm_90) and tcgen05 of Blackwell (sm_100) do; every other tensor core takes registers."""
    return device.type != "cpu" and driver.active.get_current_target().arch in (90, 100)


@triton.jit
def paged_prefill_kernel(
    out_ptr,  # [num_tokens, num_heads, HEAD_DIM]
    query_ptr,  # [num_tokens, num_heads, HEAD_DIM]
    key_cache_ptr,  # [num_blocks, num_kv_heads, BLOCK_SIZE, HEAD_DIM]
    value_cache_ptr,
    block_tables_ptr,  # [num_seqs, max_blocks]
    seq_lens_ptr,  # [num_seqs]
    query_start_loc_ptr,  # [num_seqs + 1]
    num_seqs,
    scale_log2,
    out_stride_token,
    out_stride_head,
    query_stride_token,
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
    TOKENS: tl.constexpr = ROWS // GROUP  # query tokens of a program
    query_tile = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    seq = find_sequence(query_start_loc_ptr, num_seqs, query_tile, TOKENS)
    query_start = tl.load(query_start_loc_ptr + seq).to(tl.int32)
    num_queries = tl.load(query_start_loc_ptr + seq + 1).to(tl.int32) - query_start
    first_token = (query_tile - (query_start // TOKENS + seq)) * TOKENS  # of this tile, within the sequence
    if first_token >= num_queries:
        return

    row = tl.arange(0, ROWS)
    token = first_token + row // GROUP  # [ROWS], within the sequence
    head = kv_head * GROUP + row % GROUP  # [ROWS]
    dim = tl.arange(0, HEAD_DIM_PADDED)
    is_query = (row < TOKENS * GROUP) & (token < num_queries)  # [ROWS]; a group of 3 leaves rows over
    exists = is_query[:, None] & (dim < HEAD_DIM)[None, :]  # [ROWS, HEAD_DIM_PADDED]
    query_row = (query_start + token).to(tl.int64)  # [ROWS], in the whole batch
    query_place = (query_row * query_stride_token + head * query_stride_head)[:, None] + dim[None, :]
    q = tl.load(query_ptr + query_place, mask=exists, other=0.0)

    seq_len = tl.load(seq_lens_ptr + seq).to(tl.int32)
    prefix = seq_len - num_queries  # tokens before the sequence's first query
    row_position = prefix + token  # [ROWS]
    first_position = prefix + first_token  # of the tile's first and last query
    last_position = prefix + tl.minimum(first_token + TOKENS, num_queries) - 1
    key_ptr = key_cache_ptr + kv_head * stride_kv_head
    value_ptr = value_cache_ptr + kv_head * stride_kv_head
    table_ptr = block_tables_ptr + seq.to(tl.int64) * table_stride_seq

    maximum, total, accumulator = start_softmax(q)
    start = 0
    if WINDOW > 0:
        # What lies before the first query's window is not even loaded, and every tile from there on has a mask.
        start = tl.maximum(first_position - WINDOW + 1, 0)
    else:
        # Whole tiles that every query sees: no mask, which is most of the work behind a long prefix.
        whole = tl.maximum(first_position + 1, 0) // TILE * TILE
        maximum, total, accumulator = attend_context(
            maximum,
            total,
            accumulator,
            q,
            row_position,
            key_ptr,
            value_ptr,
            table_ptr,
            0,
            whole,
            stride_block,
            stride_slot,
            scale_log2,
            HEAD_DIM,
            BLOCK_SIZE,
            TILE,
            MASKED=False,
            CAUSAL=False,
            WINDOW=0,
        )
        start = whole
    maximum, total, accumulator = attend_context(
        maximum,
        total,
        accumulator,
        q,
        row_position,
        key_ptr,
        value_ptr,
        table_ptr,
        start,
        last_position + 1,
        stride_block,
        stride_slot,
        scale_log2,
        HEAD_DIM,
        BLOCK_SIZE,
        TILE,
        MASKED=True,
        CAUSAL=True,
        WINDOW=WINDOW,
    )
    out = finish_softmax(total, accumulator)
    out_place = (query_row * out_stride_token + head * out_stride_head)[:, None] + dim[None, :]
    tl.store(out_ptr + out_place, out.to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def find_sequence(query_start_loc_ptr, num_seqs, query_tile, TOKENS: tl.constexpr):
    """The last sequence whose first tile is not after `query_tile`, by bisection.

    The first tile of sequence s is query_start_loc[s] // TOKENS + s. So a sequence of n queries owns n // TOKENS + 1
    tiles at least, which is enough for them.
    """
    low = 0
    high = num_seqs  # the answer is in [low, high)
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_loc_ptr + middle).to(tl.int32) // TOKENS + middle <= query_tile:
            low = middle
        else:
            high = middle
    return low
