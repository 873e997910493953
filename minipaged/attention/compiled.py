"""Chapter 7. Paged attention for a processor: the loop of `online_softmax.py`, compiled by Numba. The engine runs this.

    seq_len 700        part 0              part 1              part 2
    KV head 0      [ 0 ... 255 ]       [ 256 ... 511 ]     [ 512 ... 699 ]        each: m, l, acc of its slots
    KV head 1      [ 0 ... 255 ]       [ 256 ... 511 ]     [ 512 ... 699 ]

A part walks the block table over PART_SLOTS positions and reads each block where it lies, once for all query heads of
the group. Threads share the parts out; then m, l and acc of a row's parts are merged by the same rescaling (chapter 8
calls it split-KV). Parts begin at fixed positions: an answer depends, to the last bit, neither on the number of threads
nor on the rest of the batch. Each block is prefetched while the one before it is computed with: without this, half of
the time goes into waiting for memory.
"""

import math
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minipaged.attention.checks import check_paged_attention, check_write_kv
from minipaged.attention.gathered import paged_attention_gathered
from minipaged.attention.gathered import write_kv as write_kv_by_index
from minipaged.cdiv import cdiv
from minipaged.compiling import BITS, array_of, can_compile, compiled, in_threads, inlined
from minipaged.compiling_helpers import add_weighted, exp, scores, widen

PART_SLOTS = 256  # positions of a part
# Sequences with more queries in a step are gathered: K and V are then used so often that copying them costs little, and
# the matrix products of torch's attention win. (Figures: docs/design.md, section 6.)
MOST_QUERIES = 8
LEAST_PARTS = 4  # that are worth waking up a thread
NO_WINDOW = 2**30  # positions


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
    """Arguments, answer and errors of `paged_attention_gathered`. check=False: the caller has checked the arguments."""
    tables = block_tables, seq_lens, query_start_loc
    gathered = partial(paged_attention_gathered, scale=scale, sliding_window=sliding_window)
    if check:
        check_paged_attention(query, key_cache, value_cache, *tables, sliding_window)
    if not can_compile(query, key_cache, value_cache):
        return gathered(query, key_cache, value_cache, *tables)
    # In a step of the model, an operation of torch takes 5 to 10 us before it computes anything: here are few of them.
    wide = query.to(torch.promote_types(query.dtype, torch.float32)).contiguous()  # halves are computed in float32
    q, (table, lens, starts) = array_of(wide), [array_of(tensor.to(torch.int32).contiguous()) for tensor in tables]
    out, counts = np.empty_like(q), np.diff(query_start_loc.numpy())
    is_long = counts > MOST_QUERIES  # [num_seqs]
    if rows := query.shape[1] // key_cache.shape[1] * counts[~is_long].max(initial=0):
        max_parts = cdiv(block_tables.shape[1] * key_cache.shape[2], PART_SLOTS)
        parts = max_parts, len(lens), key_cache.shape[1], rows
        m_l_acc = np.empty(parts, q.dtype), np.empty(parts, q.dtype), np.empty((*parts, query.shape[2]), q.dtype)
        window = q.dtype.type(scale), min(sliding_window or NO_WINDOW, NO_WINDOW)
        work = (q, array_of(key_cache), array_of(value_cache), table, lens, starts, *window, *m_l_acc)
        in_threads(_loop(query.dtype), math.prod(parts[:3]), *work, least=LEAST_PARTS)
        _merge(starts, *m_l_acc, out)
    answers = torch.from_numpy(out)
    if is_long.any():
        mine, seqs = torch.from_numpy(np.repeat(is_long, counts)), torch.from_numpy(is_long)
        tables = block_tables[seqs], seq_lens[seqs], torch.from_numpy(np.append(0, counts[is_long].cumsum()))
        answers[mine] = gathered(query[mine], key_cache, value_cache, *tables).to(answers.dtype)
    return answers.to(query.dtype)


def write_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, *, check: bool = True
) -> None:
    """Arguments and errors of `gathered.write_kv`. check=False: the caller has checked the arguments."""
    if check:
        check_write_kv(key, value, key_cache, value_cache, slot_mapping)
    if can_compile(key, value, key_cache, value_cache):
        new = array_of(key.contiguous()), array_of(value.contiguous())
        slots = array_of(slot_mapping.to(torch.int64).contiguous())
        in_threads(_store, len(slots), *new, array_of(key_cache), array_of(value_cache), slots, least=256)
    else:
        write_kv_by_index(key, value, key_cache, value_cache, slot_mapping)


@compiled
def _store(first, last, key, value, key_cache, value_cache, slot_mapping):
    _, num_kv_heads, block_size, head_dim = key_cache.shape
    for token in range(first, last):
        slot = slot_mapping[token]
        for head in range(num_kv_heads if slot >= 0 else 0):
            for d in range(head_dim):
                key_cache[slot // block_size, head, slot % block_size, d] = key[token, head, d]
                value_cache[slot // block_size, head, slot % block_size, d] = value[token, head, d]


@lru_cache
def _loop(dtype: torch.dtype) -> Any:
    """The loop for caches of one dtype. What a closure holds is a constant to Numba: dead branches are left out."""
    is_half = dtype in BITS

    @compiled
    def attend_parts(
        first, last, query, key_cache, value_cache, block_tables, seq_lens, starts, scale, window, m, l, acc
    ):
        """For parts first to last - 1: the maximum m of the scores and the sum l of the weights, of shape [max_parts,
        num_seqs, num_kv_heads, rows], and acc [..., head_dim] of weight * value. A row: a query, one of its heads."""
        num_kv_heads, block_size, head_dim = key_cache.shape[1:]
        group = query.shape[1] // num_kv_heads
        q = np.empty((m.shape[3], head_dim), query.dtype)
        weights = np.empty((m.shape[3], block_size), query.dtype)
        widened = np.empty((block_size, head_dim), query.dtype)
        for part in range(first, last):
            kv_head, seq = part % num_kv_heads, part // num_kv_heads % len(seq_lens)
            nth = part // num_kv_heads // len(seq_lens)  # the parts that all sequences have come first
            place = nth, seq, kv_head
            m[place] = -np.inf
            num_queries = starts[seq + 1] - starts[seq]
            position = seq_lens[seq] - num_queries  # of the first query
            begin, end = max(nth * PART_SLOTS, position + 1 - window), min((nth + 1) * PART_SLOTS, seq_lens[seq])
            if begin >= end or not 0 < num_queries <= MOST_QUERIES:
                continue
            rows = num_queries * group
            for row in range(rows):
                for d in range(head_dim):
                    q[row, d] = query[starts[seq] + row // group, kv_head * group + row % group, d] * scale
            maxima, totals, sums = m[place], l[place], acc[place]
            totals[:], sums[:] = 0, 0
            for origin in range(begin // block_size * block_size, end, block_size):
                low, high = max(begin - origin, 0), min(end - origin, block_size)  # only these slots are read
                block = block_tables[seq, origin // block_size]
                following = block_tables[seq, min(origin + block_size, end - 1) // block_size]
                keys = key_cache[block, kv_head, low:high]  # [slots, head_dim]
                if is_half:
                    keys = widen(keys, widened)
                scores(q, rows, keys, key_cache[following, kv_head], weights)
                newest = position - origin - low  # the last of the slots that the first query sees
                _soften(weights, rows, high - low, group, newest, window, maxima, totals, sums)
                values = value_cache[block, kv_head, low:high]
                if is_half:
                    values = widen(values, widened)
                add_weighted(weights, rows, values, value_cache[following, kv_head], sums)

    return attend_parts


@inlined
def _soften(weights, rows, num_slots, group, newest, window, m, l, sums):
    """Scores of a block become weights, 0 for a slot that the row's query may not see; what was summed is rescaled.

    newest: the last slot that the first query sees, counted from the first of these.
    """
    for row in range(rows):
        last, maximum, total = newest + row // group, m[row], weights.dtype.type(0)  # last: the last slot it sees
        for s in range(num_slots):
            if s > last or s <= last - window:
                weights[row, s] = -np.inf
            maximum = max(maximum, weights[row, s])
        finite = maximum if maximum > -np.inf else total  # -inf: nothing is seen yet, and -inf - (-inf) would be NaN
        for s in range(num_slots):
            weights[row, s] = exp(weights[row, s] - finite)
        for s in range(num_slots):
            total += weights[row, s]
        rescale = exp(m[row] - finite)
        m[row], l[row] = maximum, l[row] * rescale + total
        for d in range(sums.shape[1] if rescale != 1 else 0):
            sums[row, d] *= rescale


@compiled
def _merge(starts, m, l, acc, out):
    """The parts of each row become its answer, out [num_tokens, num_heads, head_dim]. An empty one has m = -inf."""
    max_parts, num_seqs, num_kv_heads, _ = m.shape
    group = out.shape[1] // num_kv_heads
    for seq in range(num_seqs):
        first, num_queries = starts[seq], starts[seq + 1] - starts[seq]
        for row in range(num_queries * group if num_queries <= MOST_QUERIES else 0):
            for kv_head in range(num_kv_heads):
                answer = out[first + row // group, kv_head * group + row % group]
                maximum, total = m[:, seq, kv_head, row].max(), m.dtype.type(0)
                answer[:] = 0
                for nth in range(max_parts):
                    if m[nth, seq, kv_head, row] != -np.inf:
                        rescale = np.exp(m[nth, seq, kv_head, row] - maximum)
                        total += l[nth, seq, kv_head, row] * rescale
                        for d in range(len(answer)):
                            answer[d] += acc[nth, seq, kv_head, row, d] * rescale
                for d in range(len(answer)):
                    answer[d] /= total
