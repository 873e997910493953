# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Chapter 8. Decode: every sequence has one query. One program for each (sequence, KV head), or several that split it.

                KV head 0     KV head 1              program (1, 0) reads K and V of KV head 0 of sequence 1, once,
    sequence 0  (0, 0)        (0, 1)                 for all query heads of the group:
    sequence 1  (1, 0) <--    (1, 1)
    sequence 2  (2, 0)        (2, 1)                 rows of the dot = query heads 0 .. GROUP - 1, padded to 16

Decode is bound by memory: each byte of K and V is used for GROUP queries and never again. So the heads of a group share
one read, and the tensor cores, which take 16 rows at least, work on padding that costs no bytes.

One sequence of 32 K tokens with 8 KV heads is 8 programs for 132 multiprocessors: most of the GPU, and of its memory
bandwidth, is idle. Then the context is cut over several programs, and a second kernel merges what they found:

    context   [ tile tile tile | tile tile tile | tile tile .. ]       whole tiles; a short sequence leaves splits empty
    program        split 0          split 1          split 2           grid (sequence, KV head, split)
                 m0  l0  o0       m1  l1  o1       m2  l2  o2          maximum, sum, and output, float32
                        \\              |              /
    merge            m = max(m0, m1, m2),  w_i = exp2(m_i - m) l_i,  out = sum w_i o_i / sum w_i   grid (sequence, head)

The merge is the online softmax of chapter 7 with a split in the place of a block.
Source: Dao et al., "Flash-Decoding for long-context inference" (2023).
"""

# Exercise ch08_paged_decode, about 75 minutes. Write what raises
# NotImplementedError, in this order, and run `minipaged check 8` after each step:
#
#   1. choose_num_splits
#   2. paged_decode_kernel
#   3. merge_splits_kernel
#
# What is given may be changed too. Any way that keeps the docstrings' promises is right.
# A call that raises changes nothing. Bad input is a ValueError whose message has the numbers, in any words;
# where two errors are due, either is right.
#
# Made from minipaged/kernels/paged_decode.py by minipaged/course/generate.py.

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minipaged.cdiv import cdiv
from minipaged.kernels.launch import LOG2_E, check_attention, decode_constants, strides
from minipaged.kernels.online_softmax import attend_context, finish_softmax, locate_context, locate_rows, start_softmax

MAX_SPLITS = 64  # the merge holds all splits of a head in registers
MIN_TOKENS = 128  # of a split: below, what is written for the merge weighs against the K and V that is read
PROGRAMS_PER_MULTIPROCESSOR = 2  # enough loads in flight to fill the memory's latency


def choose_num_splits(num_seqs: int, num_kv_heads: int, max_seq_len: int, num_multiprocessors: int) -> int:
    """How many programs shall share one (sequence, KV head): 1 where the batch fills the GPU by itself.

    The fewest splits that give every multiprocessor its programs, but none shorter than MIN_TOKENS.
    """
    raise NotImplementedError("ch08: choose_num_splits")


@functools.cache
def count_multiprocessors(device: torch.device) -> int:
    """Of the GPU; 1 on a CPU, where the interpreter runs one program after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def paged_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    num_splits: int = 1,
    sliding_window: int | None = None,
    out: Tensor | None = None,
    tile: int | None = None,
) -> Tensor:
    """`paged_attention` of one query a sequence, at position seq_lens - 1: query [num_seqs, num_heads, head_dim].

    Each context is cut into `num_splits` parts, 1 to MAX_SPLITS. `tile` is the number of tokens a step of the loop
    takes, a power of two from 16; None: what fits the head size.
    """
    tensors = query, key_cache, value_cache, block_tables, seq_lens
    check_attention(*tensors, None, sliding_window, out=out, tile=tile)
    if not 1 <= num_splits <= MAX_SPLITS:
        raise ValueError(f"num_splits must lie in 1 to {MAX_SPLITS}, got {num_splits}")
    num_seqs, num_heads, head_dim = query.shape
    out = torch.empty_like(query) if out is None else out
    if num_seqs == 0:
        return out
    outputs, maxima, totals = out, None, None
    if num_splits > 1:
        options: dict[str, Any] = {"dtype": torch.promote_types(query.dtype, torch.float32), "device": query.device}
        outputs = torch.empty((num_seqs, num_heads, num_splits, head_dim), **options)
        maxima, totals = torch.empty((2, num_seqs, num_heads, num_splits), **options)
    constants = decode_constants(query, key_cache, sliding_window, tile)
    places = outputs.stride()[:2], *strides(query, key_cache, block_tables)
    grid = num_seqs, key_cache.shape[1], num_splits
    paged_decode_kernel[grid](outputs, maxima, totals, *tensors, scale * LOG2_E, *places, **constants)
    if num_splits > 1:
        merge_splits_kernel[(num_seqs, num_heads)](
            *(out, outputs, maxima, totals, num_splits, *strides(out)),
            HEAD_DIM=head_dim,
            HEAD_DIM_PADDED=constants["HEAD_DIM_PADDED"],
            SPLITS_PADDED=triton.next_power_of_2(num_splits),
        )
    return out


@triton.jit
def paged_decode_kernel(
    out_ptr,  # [num_seqs, num_heads, HEAD_DIM], or [num_seqs, num_heads, num_splits, HEAD_DIM], splits in one piece
    maxima_ptr,  # [num_seqs, num_heads, num_splits]; None with one split, which needs no merge
    totals_ptr,  # the same
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


@triton.jit
def merge_splits_kernel(
    out_ptr,  # [num_seqs, num_heads, HEAD_DIM]
    outputs_ptr,  # [num_seqs, num_heads, num_splits, HEAD_DIM]
    maxima_ptr,  # [num_seqs, num_heads, num_splits]
    totals_ptr,  # [num_seqs, num_heads, num_splits]
    num_splits,
    out_strides,  # of a sequence and a head
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
):
    raise NotImplementedError("ch08: merge_splits_kernel")
