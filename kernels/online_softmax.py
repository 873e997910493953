# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Chapter 8. The loop of chapter 7, for one program: rows of queries attend to a stretch of one sequence's context.

    positions       start                                         end
                      |                                            |
    tiles             [ TILE tokens ][ TILE tokens ][ TILE toke.. ]      one step of the loop each
    blocks        [  7   |  1   |  3   |  0   |  9   |  4   |  2   ]     block_size tokens each, anywhere in the pool

The tensor cores set the length of a tile, the allocator that of a block, and neither need be a multiple of the
other: every *token* looks up its own block, position // BLOCK_SIZE. So one kernel serves blocks of 1, 3, 16 and 256
tokens, and a stretch may start anywhere. Tokens of one block share its table entry, which costs one transaction.

Scores are kept in units of log2: exp(x) = exp2(x * log2(e)), the GPU has an instruction for exp2, and log2(e) is folded
into the scale.
"""

import triton
import triton.language as tl


@triton.jit
def start_softmax(q):
    """Nothing seen yet: maximum [ROWS], total [ROWS] and accumulator [ROWS, HEAD_DIM_PADDED] in float32.

    float64 is there for tests that compare tokens, and keeps float64 here. (The scale, as every number that is a
    kernel's argument, is rounded to float32 on a GPU.)
    """
    dtype: tl.constexpr = tl.float64 if q.dtype == tl.float64 else tl.float32
    maximum = tl.full([q.shape[0]], -float("inf"), dtype)
    total = tl.zeros([q.shape[0]], dtype)
    accumulator = tl.zeros([q.shape[0], q.shape[1]], dtype)
    return maximum, total, accumulator


@triton.jit
def finish_softmax(softmax):
    """accumulator / total, and 0 for a row that saw nothing (a padded row of a batch, with no context)."""
    _, total, accumulator = softmax
    return accumulator / tl.where(total == 0.0, 1.0, total)[:, None]  # [ROWS, HEAD_DIM_PADDED]


@triton.jit
def attend_context(
    softmax,  # what start_softmax or an earlier call returned; returned again with these positions in it
    q,  # [ROWS, HEAD_DIM_PADDED]
    row_position,  # [ROWS], the position of each row's query: it sees this one and those before it
    context,  # what locate_context returned
    start,  # positions start to end - 1 of the context
    end,
    scale_log2,  # scale * log2(e)
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,  # tokens that a row may see, its own included; 0: all
    MASKED: tl.constexpr,  # False promises whole tiles, all of which every row may see
):
    maximum, total, accumulator = softmax
    key_ptr, value_ptr, table_ptr, stride_block, stride_slot = context
    token = tl.arange(0, TILE)  # [TILE]
    dim = tl.arange(0, q.shape[1])  # [HEAD_DIM_PADDED]
    last = tl.minimum(row_position, end - 1)  # [ROWS], the last position that a row sees here
    block = tl.load(table_ptr + (start + token) // BLOCK_SIZE, mask=start + token < end, other=0)
    for tile_start in range(start, end, TILE):
        position = tile_start + token  # [TILE]
        # Block number times stride outgrows 32 bits in a pool of real size.
        place = block.to(tl.int64) * stride_block + (position % BLOCK_SIZE) * stride_slot  # [TILE]
        # The block numbers of the *next* tile are loaded now and carried around the loop. Loaded where they are used,
        # they would stand between the loop and the loads of K and V, and software pipelining would get no buffers.
        ahead = position + TILE
        block = tl.load(table_ptr + ahead // BLOCK_SIZE, mask=ahead < end, other=0)

        # A slot that is not ours is not read: it may hold NaN, and 0 * NaN is NaN.
        exists = (dim < HEAD_DIM)[None, :]
        if MASKED:
            exists &= (position < end)[:, None]
        k = tl.load(key_ptr + place[:, None] + dim[None, :], mask=exists, other=0.0)  # [TILE, HEAD_DIM_PADDED]
        v = tl.load(value_ptr + place[:, None] + dim[None, :], mask=exists, other=0.0)

        # "ieee": float32 is not rounded to tf32. float16 and bfloat16 are multiplied exactly and summed in float32.
        scores = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=total.dtype) * scale_log2  # [ROWS, TILE]
        if MASKED:
            visible = position[None, :] <= last[:, None]
            if WINDOW > 0:
                visible &= position[None, :] > row_position[:, None] - WINDOW
            scores = tl.where(visible, scores, -float("inf"))

        new_maximum = tl.maximum(maximum, tl.max(scores, 1))  # [ROWS]
        # A row may have seen nothing yet (its window starts later), and -inf - (-inf) is NaN: subtract 0 instead.
        finite = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
        weights = tl.exp2(scores - finite[:, None])  # [ROWS, TILE]
        rescale = tl.exp2(maximum - finite)  # [ROWS]
        total = total * rescale + tl.sum(weights, 1)
        accumulator = accumulator * rescale[:, None]  # [ROWS, HEAD_DIM_PADDED]
        accumulator = tl.dot(weights.to(v.dtype), v, accumulator, input_precision="ieee", out_dtype=total.dtype)
        maximum = new_maximum
    return maximum, total, accumulator


@triton.jit
def locate_context(seq, kv_head, key_cache_ptr, value_cache_ptr, block_tables_ptr, cache_strides, table_strides):
    """Both caches from the KV head on, the sequence's row of the block tables, the strides of a block and of a slot."""
    stride_block, stride_kv_head, stride_slot = cache_strides
    first = kv_head.to(tl.int64) * stride_kv_head
    table_ptr = block_tables_ptr + seq.to(tl.int64) * table_strides[0]
    return key_cache_ptr + first, value_cache_ptr + first, table_ptr, stride_block, stride_slot


@triton.jit
def locate_rows(pointer, token, head, strides, HEAD_DIM_PADDED: tl.constexpr):
    """[ROWS, HEAD_DIM_PADDED]: the elements of rows (token, head) of a tensor [num_tokens, num_heads, HEAD_DIM]."""
    row = token.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]  # [ROWS]
    return pointer + row[:, None] + tl.arange(0, HEAD_DIM_PADDED)[None, :]
