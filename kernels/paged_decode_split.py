# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Chapter 8. Split-KV decode: a long context is cut over several programs, and a second kernel merges what they found.

    one (sequence, KV head), 3 splits

    context   [ tile tile tile | tile tile tile | tile tile .. ]       whole tiles; a short sequence leaves splits empty
    program        split 0          split 1          split 2           grid (sequence, KV head, split)
                 m0  l0  acc0     m1  l1  acc1     m2  l2  acc2        maximum, sum, and output not yet divided, float32
                        \\              |              /
    merge            m = max(m0, m1, m2),  out = sum exp2(mi - m) acc_i / sum exp2(mi - m) l_i     grid (sequence, head)

One sequence of 32 K tokens with 8 KV heads is 8 programs for 132 multiprocessors: without splits most of the GPU, and
of its memory bandwidth, is idle. The merge is the online softmax of chapter 7 with a split in the place of a block.
Source: Dao et al., "Flash-Decoding for long-context inference" (2023).
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from minipaged.cdiv import cdiv
from minipaged.kernels.launch import LOG2_E, check_attention, decode_constants, strides
from minipaged.kernels.online_softmax import attend_context, locate_context, locate_rows, start_softmax

MAX_SPLITS = 64  # the merge holds all splits of a head in registers
MIN_TOKENS = 128  # of a split: below, what is written for the merge weighs against the K and V that is read
PROGRAMS_PER_MULTIPROCESSOR = 2  # enough loads in flight to fill the memory's latency


def choose_num_splits(num_seqs: int, num_kv_heads: int, max_seq_len: int, num_multiprocessors: int) -> int:
    """How many programs shall share one (sequence, KV head): 1 where the batch fills the GPU by itself.

    The fewest splits that give every multiprocessor its programs, but none shorter than MIN_TOKENS.
    """
    programs = max(1, num_seqs * num_kv_heads)
    wanted = cdiv(PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors, programs)
    return max(1, min(wanted, max_seq_len // MIN_TOKENS, MAX_SPLITS))


@functools.cache
def count_multiprocessors(device: torch.device) -> int:
    """Of the GPU; 1 on a CPU, where the interpreter runs one program after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def paged_decode_split(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    num_splits: int,
    sliding_window: int | None = None,
    out: Tensor | None = None,
    tile: int | None = None,
) -> Tensor:
    """The arguments and the answer of `paged_decode`; each context is cut into `num_splits` parts, 1 to MAX_SPLITS."""
    tensors = query, key_cache, value_cache, block_tables, seq_lens
    check_attention(*tensors, None, sliding_window, out=out, tile=tile)
    if not 1 <= num_splits <= MAX_SPLITS:
        raise ValueError(f"num_splits must lie in 1 to {MAX_SPLITS}, got {num_splits}")
    num_seqs, num_heads, head_dim = query.shape
    out = torch.empty_like(query) if out is None else out
    if num_seqs == 0:
        return out
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    accumulators = torch.empty((num_seqs, num_heads, num_splits, head_dim), dtype=dtype, device=query.device)
    maxima, totals = torch.empty((2, num_seqs, num_heads, num_splits), dtype=dtype, device=query.device)
    parts = accumulators, maxima, totals
    places = strides(query, key_cache, block_tables)
    constants = decode_constants(query, key_cache, sliding_window, tile)
    grid = num_seqs, key_cache.shape[1], num_splits
    paged_decode_split_kernel[grid](*parts, *tensors, scale * LOG2_E, *places, **constants)
    merge_splits_kernel[(num_seqs, num_heads)](
        *(out, *parts, num_splits, *strides(out)),
        HEAD_DIM=head_dim,
        HEAD_DIM_PADDED=constants["HEAD_DIM_PADDED"],
        SPLITS_PADDED=triton.next_power_of_2(num_splits),
    )
    return out


@triton.jit
def paged_decode_split_kernel(
    accumulators_ptr,  # [num_seqs, num_heads, num_splits, HEAD_DIM], in one piece
    maxima_ptr,  # [num_seqs, num_heads, num_splits]
    totals_ptr,  # [num_seqs, num_heads, num_splits]
    query_ptr,  # [num_seqs, num_heads, HEAD_DIM]
    key_cache_ptr,  # [num_blocks, num_kv_heads, BLOCK_SIZE, HEAD_DIM]
    value_cache_ptr,
    block_tables_ptr,  # [num_seqs, max_blocks]
    seq_lens_ptr,  # [num_seqs]
    scale_log2,
    query_strides,  # as in decode
    cache_strides,
    table_strides,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    seq, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_splits = tl.num_programs(2)
    seq_len = tl.load(seq_lens_ptr + seq).to(tl.int32)

    # My part of the context: whole tiles, as many for each split of this sequence; the last splits may get none.
    first = 0
    if WINDOW > 0:
        first = tl.maximum(seq_len - WINDOW, 0)
    tokens = tl.cdiv(tl.cdiv(seq_len - first, TILE), num_splits) * TILE
    start = first + split * tokens
    end = tl.minimum(start + tokens, seq_len)

    row = tl.arange(0, ROWS)
    head = kv_head * GROUP + row  # [ROWS]
    dim = tl.arange(0, HEAD_DIM_PADDED)
    queries = tl.where(start < end, GROUP, 0)  # an empty split has nothing to ask
    exists = (row < queries)[:, None] & (dim < HEAD_DIM)[None, :]  # [ROWS, HEAD_DIM_PADDED]
    q = tl.load(locate_rows(query_ptr, seq, head, query_strides, HEAD_DIM_PADDED), mask=exists, other=0.0)
    position = tl.full([ROWS], seq_len - 1, tl.int32)

    context = locate_context(
        seq, kv_head, key_cache_ptr, value_cache_ptr, block_tables_ptr, cache_strides, table_strides
    )
    maximum, total, accumulator = attend_context(
        start_softmax(q), q, position, context, start, end, scale_log2, HEAD_DIM, BLOCK_SIZE, TILE, 0, MASKED=True
    )
    num_heads = tl.num_programs(1) * GROUP
    place = (seq.to(tl.int64) * num_heads + head) * num_splits + split  # [ROWS]
    tl.store(maxima_ptr + place, maximum, mask=row < GROUP)  # -inf of an empty split: its accumulator is not read
    tl.store(totals_ptr + place, total, mask=row < GROUP)
    tl.store(accumulators_ptr + place[:, None] * HEAD_DIM + dim[None, :], accumulator, mask=exists)


@triton.jit
def merge_splits_kernel(
    out_ptr,  # [num_seqs, num_heads, HEAD_DIM]
    accumulators_ptr,  # [num_seqs, num_heads, num_splits, HEAD_DIM]
    maxima_ptr,  # [num_seqs, num_heads, num_splits]
    totals_ptr,  # [num_seqs, num_heads, num_splits]
    num_splits,
    out_strides,  # of a sequence and a head
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
):
    seq, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    split = tl.arange(0, SPLITS_PADDED)  # [SPLITS_PADDED]
    dim = tl.arange(0, HEAD_DIM_PADDED)
    place = (seq * tl.num_programs(1) + head) * num_splits + split
    maxima = tl.load(maxima_ptr + place, mask=split < num_splits, other=-float("inf"))
    totals = tl.load(totals_ptr + place, mask=split < num_splits, other=0.0)
    exists = (maxima > -float("inf"))[:, None] & (dim < HEAD_DIM)[None, :]  # [SPLITS_PADDED, HEAD_DIM_PADDED]
    accumulators = tl.load(accumulators_ptr + place[:, None] * HEAD_DIM + dim[None, :], mask=exists, other=0.0)

    maximum = tl.max(maxima, 0)
    rescale = tl.exp2(maxima - tl.where(maximum == -float("inf"), 0.0, maximum))  # [SPLITS_PADDED]
    total = tl.sum(totals * rescale, 0)
    out = tl.sum(accumulators * rescale[:, None], 0) / tl.where(total == 0.0, 1.0, total)  # [HEAD_DIM_PADDED]
    out_place = seq * out_strides[0] + head * out_strides[1] + dim
    tl.store(out_ptr + out_place, out.to(out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)
