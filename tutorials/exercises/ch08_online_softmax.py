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

# Exercise ch08_online_softmax, about 60 minutes. Write what raises
# NotImplementedError, in this order, and run `minipaged check 8` after each step:
#
#   1. start_softmax
#   2. finish_softmax
#   3. attend_context
#
# What is given may be changed too. Any way that keeps the docstrings' promises is right.
# A call that raises changes nothing. Bad input is a ValueError whose message has the numbers, in any words;
# where two errors are due, either is right.
#
# Made from minipaged/kernels/online_softmax.py by minipaged/course/generate.py.

import triton
import triton.language as tl


@triton.jit
def start_softmax(q):
    """Nothing seen yet: maximum [ROWS], total [ROWS] and accumulator [ROWS, HEAD_DIM_PADDED] in float32.

    float64 is there for tests that compare tokens, and keeps float64 here. (The scale, as every number that is a
    kernel's argument, is rounded to float32 on a GPU.)
    """
    raise NotImplementedError("ch08: start_softmax")


@triton.jit
def finish_softmax(softmax):
    """accumulator / total, and 0 for a row that saw nothing (a padded row of a batch, with no context)."""
    raise NotImplementedError("ch08: finish_softmax")


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
    raise NotImplementedError("ch08: attend_context")


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
