"""Chapter 7. Paged attention for a processor: the loop of `online_softmax.py`, compiled by Numba. The engine runs this.

    seq_len 700, 2 queries       part 0              part 1              part 2
    KV head 0                [ 0 ... 255 ]       [ 256 ... 511 ]     [ 512 ... 699 ]       each: m, l, acc of its slots
    KV head 1                [ 0 ... 255 ]       [ 256 ... 511 ]     [ 512 ... 699 ]

A part walks the block table over PART_SLOTS positions and reads each block where it lies, once for all query heads of
the group. Parts are independent, so threads share them out; then the m, l and acc of a row's parts are merged by the
same rescaling (chapter 8 calls this split-KV). Parts begin at fixed positions: an answer depends, to the last bit,
neither on the number of threads nor on what else is in the batch.

Two things keep the loop near the speed of memory. Four slots are taken at a time, so that an accumulator is loaded and
stored once for four products; and while a block is computed with, the next one of the table is on its way into the
processor's cache (`prefetch`): it lies anywhere, and no processor guesses where.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from minipaged.attention.checks import check_paged_attention, check_write_kv
from minipaged.attention.contiguous import causal_attention
from minipaged.attention.paged import gather, paged_attention_gathered
from minipaged.attention.paged import write_kv as write_kv_by_index
from minipaged.compiling import compiled, in_threads, inlined

PART_SLOTS = 256  # positions of a part
# Sequences with more queries in a step are gathered: K and V are then used so often that copying them costs little, and
# the matrix products of torch's attention win. (Two AVX2 cores, 1,024 tokens in bfloat16, ms: 4 queries 1.0 by the loop
# and 1.2 gathered, 8 queries 1.3 and 1.5, 16 queries 3.0 and 1.6, 32 queries 3.9 and 1.9.)
MOST_QUERIES = 8
MOST_POSITIONS = 2**30  # no context is longer: the window where there is none
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    check: bool = True,
) -> Tensor:
    """Causal attention of a ragged batch that reads K and V through each sequence's block table.

    query [num_tokens, num_heads, head_dim], the queries of sequence s in rows query_start_loc[s] to
    query_start_loc[s + 1] - 1, its last query at position seq_lens[s] - 1;
    key_cache, value_cache [num_blocks, num_kv_heads, block_size, head_dim];
    block_tables int32 [num_seqs, max_blocks]; seq_lens int32 [num_seqs]; query_start_loc int32 [num_seqs + 1].
    Slots past a sequence's end or before its window, and entries of a table past the end, are never read.
    Returns the shape of query. Raises ValueError for arguments that do not fit (check=False: the caller has checked).
    """
    tables = (block_tables, seq_lens, query_start_loc)
    if check:
        check_paged_attention(query, key_cache, value_cache, *tables, sliding_window)
    if not _is_compiled_for(query, key_cache, value_cache):
        return paged_attention_gathered(
            query, key_cache, value_cache, *tables, scale=scale, sliding_window=sliding_window
        )
    num_kv_heads, head_dim = key_cache.shape[1], key_cache.shape[3]
    q = _array(query.to(torch.promote_types(query.dtype, torch.float32)))  # halves are computed in float32
    table, lens, starts = (_array(tensor.to(torch.int32)) for tensor in tables)
    group = q.shape[1] // num_kv_heads
    window = min(sliding_window or MOST_POSITIONS, MOST_POSITIONS)
    parts = _list_parts(lens, starts, num_kv_heads, window)  # [num_parts, 6]
    rows = group * int(parts[:, 1].max(initial=0))
    accumulators = np.empty((len(parts), rows, head_dim), q.dtype)
    maxima, totals = np.empty((2, len(parts), rows), q.dtype)
    inputs = (parts, q, _array(key_cache), _array(value_cache), table, q.dtype.type(scale), window)
    in_threads(_loop(query.dtype), len(parts), *inputs, maxima, totals, accumulators, least=2)
    answers = np.empty_like(q)
    _merge(parts, group, maxima, totals, accumulators, answers)
    out = torch.from_numpy(answers)
    for seq in np.flatnonzero(np.diff(starts) > MOST_QUERIES):
        mine, seq_len = slice(starts[seq], starts[seq + 1]), int(lens[seq])
        blocks = block_tables[seq, : -(-seq_len // key_cache.shape[2])]
        # torch's attention sums bfloat16 in float32. Products of float16 would overflow on the way.
        dtype = torch.float32 if query.dtype == torch.float16 else query.dtype
        key, value = (gather(cache, blocks)[:, :seq_len].to(dtype) for cache in (key_cache, value_cache))
        out[mine] = causal_attention(query[mine].to(dtype), key, value, scale=scale, sliding_window=sliding_window).to(
            out.dtype
        )
    return out.to(query.dtype)


def write_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    check: bool = True,
) -> None:
    """Store each new token's K and V in its slot: block = slot // block_size, offset = slot % block_size.

    key, value [num_tokens, num_kv_heads, head_dim]; caches [num_blocks, num_kv_heads, block_size, head_dim];
    slot_mapping int64 [num_tokens], -1 for a token that is not stored. No slot may stand in it twice.
    Raises ValueError for arguments that do not fit, before anything is written (check=False: the caller has checked).
    """
    if check:
        check_write_kv(key, value, key_cache, value_cache, slot_mapping)
    if not _is_compiled_for(key, value, key_cache, value_cache):
        write_kv_by_index(key, value, key_cache, value_cache, slot_mapping)
        return
    slots = _array(slot_mapping.to(torch.int64))
    in_threads(_store, len(slots), *map(_array, (key, value, key_cache, value_cache)), slots, least=256)


def _is_compiled_for(*tensors: Tensor) -> bool:
    """Whether the loop reads and writes them: on a GPU, or where a gradient is wanted, torch must do it."""
    wants_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    cpu = all(tensor.device.type == "cpu" and tensor.dtype in DTYPES for tensor in tensors)
    *_, key_cache, value_cache = tensors
    return cpu and not wants_gradient and key_cache.is_contiguous() and value_cache.is_contiguous()


def _array(tensor: Tensor) -> np.ndarray:
    """A contiguous tensor's memory as NumPy sees it, no copy. Halves are their bits: Numba computes with neither."""
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.uint16) if tensor.element_size() == 2 else tensor).numpy()


@compiled
def _store(first, last, key, value, key_cache, value_cache, slot_mapping):
    block_size = key_cache.shape[2]
    for token in range(first, last):
        slot = slot_mapping[token]
        if slot >= 0:
            key_cache[slot // block_size, :, slot % block_size] = key[token]
            value_cache[slot // block_size, :, slot % block_size] = value[token]


@compiled
def _list_parts(seq_lens, query_start_loc, num_kv_heads, window):
    """int64 [num_parts, 6], the parts of a sequence and KV head one after the other: the first row of `query`, how many
    rows, the position of the first, the sequence, the KV head, and the position at which the part begins."""
    count = 0
    parts = np.empty((0, 6), np.int64)
    for listed in range(2):  # counted first, then written
        if listed:
            parts, count = np.empty((count, 6), np.int64), 0
        for seq in range(len(seq_lens)):
            row = query_start_loc[seq]
            num_queries = query_start_loc[seq + 1] - row
            if not 0 < num_queries <= MOST_QUERIES:
                continue
            position = seq_lens[seq] - num_queries
            first = max(0, position + 1 - window) // PART_SLOTS * PART_SLOTS
            for kv_head in range(num_kv_heads):
                for start in range(first, seq_lens[seq], PART_SLOTS):
                    if listed:
                        parts[count, 0], parts[count, 1], parts[count, 2] = row, num_queries, position
                        parts[count, 3], parts[count, 4], parts[count, 5] = seq, kv_head, start
                    count += 1
    return parts


@lru_cache
def _loop(dtype: torch.dtype) -> Any:
    """The loop for caches of one dtype. What a closure holds is a constant to Numba: it compiles one branch of each."""
    is_half, is_bfloat16 = dtype.itemsize == 2, dtype is torch.bfloat16

    @compiled
    def attend_parts(first, last, parts, query, key_cache, value_cache, block_tables, scale, window, m, l, acc):
        """For parts first to last - 1: the maximum m of the scores and the sum l of the weights [num_parts, rows], and
        the sum acc of weight * value [num_parts, rows, head_dim]. A row is one query and one head of the group."""
        num_kv_heads, block_size, head_dim = key_cache.shape[1:]
        group = query.shape[1] // num_kv_heads
        q = np.empty((acc.shape[1], head_dim), query.dtype)
        weights = np.empty((acc.shape[1], block_size + 3), query.dtype)  # slots are taken by four
        widened = np.empty((block_size, head_dim), query.dtype)
        for part in range(first, last):
            num_queries, position, seq = parts[part, 1], parts[part, 2], parts[part, 3]
            kv_head, start = parts[part, 4], parts[part, 5]
            rows = num_queries * group
            for row in range(rows):
                for d in range(head_dim):
                    q[row, d] = query[parts[part, 0] + row // group, kv_head * group + row % group, d] * scale
            m[part], l[part], acc[part] = -np.inf, 0, 0
            begin, end = max(start, position + 1 - window), min(start + PART_SLOTS, position + num_queries)
            for origin in range(begin // block_size * block_size, end, block_size):
                low, high = max(begin - origin, 0), min(end - origin, block_size)  # only these slots are read
                block = block_tables[seq, origin // block_size]
                following = block_tables[seq, min(origin + block_size, end - 1) // block_size]

                keys = key_cache[block, kv_head, low:high]  # [slots, head_dim]
                if is_half:
                    keys = _widen(keys, widened, is_bfloat16)
                _scores(q, rows, keys, key_cache[following, kv_head], weights)
                _soften(weights, rows, high - low, group, position - origin - low, window, m[part], l[part], acc[part])
                values = value_cache[block, kv_head, low:high]
                if is_half:
                    values = _widen(values, widened, is_bfloat16)
                _add(weights, rows, values, value_cache[following, kv_head], acc[part])

    return attend_parts


@inlined
def _scores(q, rows, keys, following, weights):
    """weights[row, slot] = q[row] . keys[slot]. The same slots of the following block are asked for meanwhile."""
    num_slots, head_dim = keys.shape
    for s in range(0, num_slots, 4):
        s1, s2, s3 = min(s + 1, num_slots - 1), min(s + 2, num_slots - 1), min(s + 3, num_slots - 1)
        _prefetch(following, s, s3)
        k0, k1, k2, k3 = keys[s], keys[s1], keys[s2], keys[s3]
        for row in range(rows):
            x0 = x1 = x2 = x3 = q.dtype.type(0)
            for d in range(head_dim):
                x0 += q[row, d] * k0[d]
                x1 += q[row, d] * k1[d]
                x2 += q[row, d] * k2[d]
                x3 += q[row, d] * k3[d]
            weights[row, s], weights[row, s + 1], weights[row, s + 2], weights[row, s + 3] = x0, x1, x2, x3


@inlined
def _soften(weights, rows, num_slots, group, newest, window, m, l, sums):
    """Scores of a block become weights, 0 for a slot that the row's query may not see; what was summed is rescaled.

    newest: the last slot that the first query sees, counted from the first of these.
    """
    for row in range(rows):
        seen_from = min(max(newest + row // group + 1 - window, 0), num_slots)
        seen_to = min(max(newest + row // group + 1, 0), num_slots)
        maximum = m[row]
        for s in range(seen_from, seen_to):
            maximum = max(maximum, weights[row, s])
        if maximum > m[row]:
            rescale = np.exp(m[row] - maximum)
            m[row] = maximum
            l[row] *= rescale
            for d in range(sums.shape[1]):
                sums[row, d] *= rescale
        if weights.itemsize == 8:
            for s in range(num_slots):
                weights[row, s] = np.exp(weights[row, s] - maximum)
        else:
            for s in range(num_slots):
                weights[row, s] = _exp(weights[row, s] - maximum)
        for s in range(seen_from):
            weights[row, s] = 0
        for s in range(seen_to, num_slots + 3):
            weights[row, s] = 0
        total = l[row]
        for s in range(num_slots):
            total += weights[row, s]
        l[row] = total


@inlined
def _add(weights, rows, values, following, sums):
    """sums[row] += weights[row, slot] * values[slot], of all slots."""
    num_slots, head_dim = values.shape
    for s in range(0, num_slots, 4):
        s1, s2, s3 = min(s + 1, num_slots - 1), min(s + 2, num_slots - 1), min(s + 3, num_slots - 1)
        _prefetch(following, s, s3)
        v0, v1, v2, v3 = values[s], values[s1], values[s2], values[s3]
        for row in range(rows):
            w0, w1, w2, w3 = weights[row, s], weights[row, s + 1], weights[row, s + 2], weights[row, s + 3]
            for d in range(head_dim):
                sums[row, d] += w0 * v0[d] + w1 * v1[d] + w2 * v2[d] + w3 * v3[d]


@inlined
def _widen(halves, widened, is_bfloat16):
    """Halves [slots, head_dim], by their bits, as float32 in the first rows of `widened`; returns those rows."""
    num_slots, head_dim = halves.shape
    for s in range(num_slots):
        if is_bfloat16:
            for d in range(head_dim):  # a bfloat16 is the upper half of a float32
                widened[s, d] = np.uint32(np.uint32(halves[s, d]) << np.uint32(16)).view(np.float32)
        else:
            for d in range(head_dim):
                widened[s, d] = _of_float16(halves[s, d])
    return widened[:num_slots]


@compiled
def _of_float16(bits):
    """5 bits of exponent become 8: 2^112 is the difference of the two biases, and right for subnormal numbers too."""
    sign = np.uint32(np.uint32(bits & np.uint16(0x8000)) << np.uint32(16))
    magnitude = np.uint32(np.uint32(bits & np.uint16(0x7FFF)) << np.uint32(13))
    scaled = np.float32(magnitude.view(np.float32) * np.float32(2.0**112)).view(np.uint32)
    if magnitude >= np.uint32(0x0F800000):  # infinite, or NaN
        scaled = np.uint32(magnitude | np.uint32(0x7F800000))
    return np.uint32(scaled | sign).view(np.float32)


@compiled
def _exp(x):
    """exp(x) of a float32 x <= 0, in operations that vectorise: 2^n * e^r with n = round(x / ln 2), and a polynomial
    for e^r (Cephes, expf). The C library's, which float64 can wait for, takes one number at a time."""
    is_zero = x < np.float32(-87.0)
    x = np.float32(-87.0) if is_zero else x  # not max(), which may lose a NaN
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    e = np.float32(1.9875691500e-4)
    e = e * r + np.float32(1.3981999507e-3)
    e = e * r + np.float32(8.3334519073e-3)
    e = e * r + np.float32(4.1665795894e-2)
    e = e * r + np.float32(1.6666665459e-1)
    e = e * r + np.float32(5.0000001201e-1)
    e = e * r * r + r + np.float32(1.0)
    e = e * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return np.float32(0.0) if is_zero else e


@compiled
def _merge(parts, group, m, l, acc, out):
    """The parts of each row, one after the other in `parts`, become its answer: out [num_tokens, num_heads, head_dim]."""
    part = 0
    while part < len(parts):
        first, num_queries, kv_head = parts[part, 0], parts[part, 1], parts[part, 4]
        end = part + 1
        while end < len(parts) and parts[end, 0] == first and parts[end, 4] == kv_head:
            end += 1
        for row in range(num_queries * group):
            answer = out[first + row // group, kv_head * group + row % group]
            maximum, total = m[part:end, row].max(), m.dtype.type(0)
            answer[:] = 0
            for i in range(part, end):
                rescale = np.exp(m[i, row] - maximum)
                total += l[i, row] * rescale
                for d in range(len(answer)):
                    answer[d] += acc[i, row, d] * rescale
            for d in range(len(answer)):
                answer[d] /= total
        part = end


if config.DISABLE_JIT:

    def _prefetch_line(tile, slot, line):
        tile[slot]

else:

    @intrinsic
    def _prefetch_line(typing_context, tile, slot, line):
        """Ask for 64 bytes of tile[slot], of a contiguous array, and do not wait for them."""

        def generate(context, builder, signature, arguments):
            array = context.make_array(signature.args[0])(context, builder, arguments[0])
            byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
            begin = builder.mul(arguments[1], builder.extract_value(array.strides, 0))
            begin = builder.add(begin, builder.shl(arguments[2], arguments[2].type(6)))
            address = builder.gep(builder.bitcast(array.data, byte), [begin])
            of = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
            llvm_prefetch = cgutils.get_or_insert_function(builder.module, of, "llvm.prefetch.p0i8")
            read, keep, data = number(0), number(3), number(1)
            builder.call(llvm_prefetch, [address, read, keep, data])
            return context.get_dummy_value()

        return types.void(tile, types.intp, types.intp), generate


@inlined
def _prefetch(tile, first_slot, last_slot):
    lines = (tile.shape[1] * tile.itemsize + 63) // 64  # a cache line has 64 bytes
    for slot in range(first_slot, last_slot + 1):
        for line in range(lines):
            _prefetch_line(tile, slot, line)
