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

import torch
import triton
import triton.language as tl
from torch import Tensor

from minipaged.kernels.launch import LOG2_E, check_attention, prefill_constants, strides
from minipaged.kernels.online_softmax import attend_context, finish_softmax, locate_context, locate_rows, start_softmax


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
) -> Tensor:
    """`paged_attention` of any number of queries a sequence.

    `max_query_len`, where the caller knows it, keeps the rows of a program few when all sequences have few queries;
    the answer does not depend on it. `tile` (keys a step) and `rows` (query rows a program) are powers of two from 16;
    None: what fits the head size.
    """
    tensors = query, key_cache, value_cache, block_tables, seq_lens, query_start_loc
    check_attention(*tensors, sliding_window, out=out, tile=tile, rows=rows)
    num_tokens, num_seqs = len(query), len(seq_lens)
    out = torch.empty_like(query) if out is None else out
    if num_tokens > 0:
        max_query_len = num_tokens if max_query_len is None else max_query_len
        constants = prefill_constants(query, key_cache, sliding_window, max_query_len, tile, rows)
        num_tiles = num_tokens // (constants["ROWS"] // constants["GROUP"]) + num_seqs
        places = strides(out, query, key_cache, block_tables)
        grid = num_tiles, key_cache.shape[1]
        paged_prefill_kernel[grid](out, *tensors, num_seqs, scale * LOG2_E, *places, **constants)
    return out


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
    out_strides,  # of a token and a head
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
    TOKENS: tl.constexpr = ROWS // GROUP  # query tokens of a program
    query_tile, kv_head = tl.program_id(0), tl.program_id(1)
    seq = find_sequence(query_start_loc_ptr, num_seqs, query_tile, TOKENS)
    query_start = tl.load(query_start_loc_ptr + seq).to(tl.int32)
    num_queries = tl.load(query_start_loc_ptr + seq + 1).to(tl.int32) - query_start
    first_token = (query_tile - (query_start // TOKENS + seq)) * TOKENS  # of this tile, within the sequence
    if first_token >= num_queries:
        return

    row = tl.arange(0, ROWS)
    token = first_token + row // GROUP  # [ROWS], within the sequence
    head = kv_head * GROUP + row % GROUP  # [ROWS]
    is_query = (row < TOKENS * GROUP) & (token < num_queries)  # [ROWS]; a group of 3 leaves rows over
    exists = is_query[:, None] & (tl.arange(0, HEAD_DIM_PADDED) < HEAD_DIM)[None, :]  # [ROWS, HEAD_DIM_PADDED]
    query_row = query_start + token  # [ROWS], in the whole batch
    q = tl.load(locate_rows(query_ptr, query_row, head, query_strides, HEAD_DIM_PADDED), mask=exists, other=0.0)

    prefix = tl.load(seq_lens_ptr + seq).to(tl.int32) - num_queries  # tokens before the sequence's first query
    position = prefix + token  # [ROWS]
    first_position = prefix + first_token  # of the tile's first query
    end = prefix + tl.minimum(first_token + TOKENS, num_queries)  # behind the tile's last query
    context = locate_context(
        seq, kv_head, key_cache_ptr, value_cache_ptr, block_tables_ptr, cache_strides, table_strides
    )
    softmax = start_softmax(q)
    start = 0
    if WINDOW > 0:
        # What lies before the first query's window is not even loaded, and every tile from there on has a mask.
        start = tl.maximum(first_position - WINDOW + 1, 0)
    else:
        # Whole tiles that every query sees: no mask, which is most of the work behind a long prefix.
        start = tl.maximum(first_position + 1, 0) // TILE * TILE
        softmax = attend_context(
            softmax, q, position, context, 0, start, scale_log2, HEAD_DIM, BLOCK_SIZE, TILE, 0, MASKED=False
        )
    softmax = attend_context(
        softmax, q, position, context, start, end, scale_log2, HEAD_DIM, BLOCK_SIZE, TILE, WINDOW, MASKED=True
    )
    out = finish_softmax(softmax).to(out_ptr.dtype.element_ty)
    tl.store(locate_rows(out_ptr, query_row, head, out_strides, HEAD_DIM_PADDED), out, mask=exists)


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
