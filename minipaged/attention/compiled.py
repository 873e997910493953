"""Chapter 7. Paged attention for a processor: the loop of `online_softmax.py`, compiled by Numba. The engine runs this.

    block table [ 7 | 2 | 9 ]       KV head 0:  block 7 -> block 2 -> block 9      m, l, sums, in one thread
                                    KV head 1:  block 7 -> block 2 -> block 9      in this one, or in another

A KV head of a sequence walks the block table and reads each block where it lies, once for all query heads of the group.
Threads share out these walks, and none is cut: an answer depends, to the last bit, neither on the number of threads nor
on the rest of the batch. Each block is prefetched while the one before it is computed with: without this, half of the
time goes into waiting for memory. (Chapter 8 cuts a long walk into parts, since a GPU has far more than a few cores.)
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minipaged.attention.checks import check_paged_attention, check_write_kv
from minipaged.attention.contiguous import causal_attention, first_seen
from minipaged.attention.gathered import gather, paged_attention_gathered
from minipaged.attention.gathered import write_kv as write_kv_by_index
from minipaged.cdiv import cdiv
from minipaged.compiling import array_of, can_compile, compiled, inlined
from minipaged.compiling_helpers import add_weighted, borrowed, exp, floats, larger, scores, use_widest_vectors
from minipaged.halves import number, rounded
from minipaged.openmp import shared_out, team

# Sequences with more queries in a step are gathered: K and V are then used so often that copying them costs little, and
# the matrix products of torch's attention win. (Figures: docs/design.md, section 6.)
MOST_QUERIES = 8
LEAST_SLOTS = 256  # that are worth another thread
UNROLLED = (64, 128)  # common sizes of a head: a loop compiled for one alone takes a fifth less time


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
    caches, tables = (key_cache, value_cache), (block_tables, seq_lens, query_start_loc)
    if check:
        check_paged_attention(query, *caches, *tables, sliding_window)
    if not can_compile(query, *caches):
        return paged_attention_gathered(query, *caches, *tables, scale=scale, sliding_window=sliding_window)
    # In a step of the model, an operation of torch takes 5 to 10 us before it computes anything: here are few of them.
    q, (table, lens, starts) = query.contiguous(), [array_of(tensor.to(torch.int32).contiguous()) for tensor in tables]
    out, is_long = torch.empty_like(q), starts[1:] - starts[: len(lens)] > MOST_QUERIES  # [num_seqs]
    _, num_kv_heads, block_size, size = key_cache.shape
    if not is_long.all():
        items, least = len(lens) * num_kv_heads, cdiv(LEAST_SLOTS, max(1, table.shape[1] * block_size))
        wide = np.float64 if q.dtype == torch.float64 else np.float32  # halves are computed in float32
        inputs = *map(array_of, (q, *caches)), table, lens, starts, wide(scale), min(sliding_window or 2**30, 2**30)
        _loop(size if size in UNROLLED else 0)(team(items, least), 0, items, *inputs, array_of(out))
    for seq in is_long.nonzero()[0].tolist():
        rows, seq_len = slice(starts[seq], starts[seq + 1]), int(lens[seq])
        first = first_seen(seq_len, int(rows.stop - rows.start), sliding_window)
        context = (gather(cache, block_tables[seq], seq_len, first) for cache in caches)
        out[rows] = causal_attention(query[rows], *context, scale=scale, sliding_window=sliding_window)
    return out


def write_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, *, check: bool = True
) -> None:
    """Arguments and errors of `gathered.write_kv`. check=False: the caller has checked the arguments."""
    if check:
        check_write_kv(key, value, key_cache, value_cache, slot_mapping)
    if can_compile(key, value, key_cache, value_cache):
        _store(*(array_of(x.contiguous()) for x in (key, value, key_cache, value_cache, slot_mapping.long())))
    else:
        write_kv_by_index(key, value, key_cache, value_cache, slot_mapping)


@compiled
def _store(key, value, key_cache, value_cache, slot_mapping):
    _, num_kv_heads, block_size, head_dim = key_cache.shape
    for token in range(len(key)):
        block, offset = slot_mapping[token] // block_size, slot_mapping[token] % block_size
        for head in range(num_kv_heads if slot_mapping[token] >= 0 else 0):
            for d in range(head_dim):
                key_cache[block, head, offset, d] = key[token, head, d]
                value_cache[block, head, offset, d] = value[token, head, d]


@lru_cache
def _loop(size: int) -> Any:
    """The loop for one head size (0: any). What a closure holds is a constant to Numba, and part of the code's name."""

    @compiled
    def attend(team, first, last, query, key_cache, value_cache, block_tables, seq_lens, starts, scale, window, out):
        """For items first to last - 1: an item is a KV head of a sequence. A row: a query, one of its heads."""
        if shared_out(team):
            return
        use_widest_vectors()
        key_cache, value_cache = borrowed(key_cache), borrowed(value_cache)
        num_kv_heads, block_size = key_cache.shape[1:3]
        head_dim, group = size or key_cache.shape[3], query.shape[1] // num_kv_heads
        q = np.full((MOST_QUERIES * group, head_dim), scale)  # of its type, in which all is computed
        m, l, sums = np.empty(len(q), q.dtype), np.empty(len(q), q.dtype), np.empty_like(q)
        weights, widened = np.empty((len(q), block_size), q.dtype), np.empty((block_size, head_dim), q.dtype)
        for item in range(first, last):
            seq, kv_head = item // num_kv_heads, item % num_kv_heads
            num_queries, end = starts[seq + 1] - starts[seq], seq_lens[seq]
            if not 0 < num_queries <= MOST_QUERIES:
                continue
            rows, position = num_queries * group, end - num_queries  # position: of the first query
            for row in range(rows):
                token, head = starts[seq] + row // group, kv_head * group + row % group
                for d in range(head_dim):
                    q[row, d] = number(query[token, head, d]) * scale
            m[:rows], l[:rows], sums[:rows] = -np.inf, 0, 0
            begin = max(position + 1 - window, 0)
            for origin in range(begin // block_size * block_size, end, block_size):
                low, high = max(begin - origin, 0), min(end - origin, block_size)  # only these slots are read
                block = block_tables[seq, origin // block_size]
                following = block_tables[seq, min(origin + block_size, end - 1) // block_size]
                keys = floats(key_cache[block, kv_head, low:high], head_dim, widened)  # [slots, head_dim]
                scores(q, rows, keys, head_dim, key_cache[following, kv_head], weights)
                _soften(weights, rows, high - low, group, position - origin - low, window, m, l, sums)
                values = floats(value_cache[block, kv_head, low:high], head_dim, widened)
                add_weighted(weights, rows, values, head_dim, value_cache[following, kv_head], sums)
            for row in range(rows):
                token, head = starts[seq] + row // group, kv_head * group + row % group
                for d in range(head_dim):
                    out[token, head, d] = rounded(sums[row, d] / l[row], query[token, head, d])

    return attend


@inlined
def _soften(weights, rows, num_slots, group, newest, window, m, l, sums):
    """Scores of a block become weights, 0 for a slot that the row's query may not see; what was summed is rescaled.
    newest: the last slot that the first query sees, counted from the first of these."""
    for row in range(rows):
        last, maximum, total = newest + row // group, m[row], weights.dtype.type(0)  # last: the last slot it sees
        for s in range(max(last + 1, 0), num_slots):  # later than the row's query
            weights[row, s] = -np.inf
        for s in range(min(last + 1 - window, num_slots)):  # before its window
            weights[row, s] = -np.inf
        for s in range(num_slots):
            maximum = larger(maximum, weights[row, s])
        finite = maximum if maximum > -np.inf else total  # -inf: nothing is seen yet, and -inf - (-inf) would be NaN
        for s in range(num_slots):
            weights[row, s] = exp(weights[row, s] - finite)
        for s in range(num_slots):
            total += weights[row, s]
        if maximum != m[row]:
            rescale = exp(m[row] - finite)
            m[row], l[row] = maximum, l[row] * rescale
            for d in range(sums.shape[1]):
                sums[row, d] *= rescale
        l[row] += total
