"""What Hypothesis draws: ragged batches over permuted, poisoned memory.

Every array holds ordinary random numbers of a drawn seed. What Hypothesis searches through is the *shape* of things:
how long sequences are, where block edges fall, which block lies where. Slots that hold no token are NaN, so that a
read of something that was never written cannot go unseen.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

from minipaged.cdiv import cdiv
from minipaged.reference import masked_attention

BLOCK_SIZES = (1, 2, 3, 4, 7, 16)
HEAD_DIMS = (2, 4, 8, 16, 64)  # for 64 the loop is compiled apart


def costly(share: float):
    """A test whose examples take long: this share of those that the profile gives a property."""
    return settings(max_examples=max(1, round(share * settings().max_examples)))


@st.composite
def head_shapes(draw, max_group: int = 8, head_dims: tuple[int, ...] = HEAD_DIMS, max_kv_heads: int = 3):
    """(num_heads, num_kv_heads, head_dim): grouped-query shapes, multi-head and multi-query among them."""
    num_kv_heads = draw(st.integers(1, max_kv_heads), label="num_kv_heads")
    group = draw(st.integers(1, max_group), label="query heads in a group")
    head_dim = draw(st.sampled_from(head_dims), label="head_dim")
    return num_kv_heads * group, num_kv_heads, head_dim


def lengths(block_size: int, max_blocks: int = 4):
    """Sequence lengths, mostly at block edges: k * block_size - 1, k * block_size, k * block_size + 1."""
    edges = {k * block_size + d for k in range(max_blocks) for d in (-1, 0, 1)}
    at_edges = st.sampled_from(sorted(n for n in edges if n >= 1))
    return at_edges | st.integers(1, max_blocks * block_size)


def generators():
    return st.integers(0, 2**32 - 1).map(np.random.default_rng)


@dataclass
class PagedBatch:
    """A ragged batch, as the contract wants it, with the plain arrays that it was made from beside it."""

    query: torch.Tensor  # [num_tokens, num_heads, head_dim]
    key_cache: torch.Tensor  # [num_blocks, num_kv_heads, block_size, head_dim], NaN where no token lies
    value_cache: torch.Tensor
    block_tables: torch.Tensor  # int32 [num_seqs, max_blocks]
    seq_lens: torch.Tensor  # int32 [num_seqs]
    query_start_loc: torch.Tensor  # int32 [num_seqs + 1]
    queries: list[np.ndarray]  # one array a sequence, float64
    keys: list[np.ndarray]
    values: list[np.ndarray]

    @property
    def arguments(self):
        return (
            self.query, self.key_cache, self.value_cache, self.block_tables, self.seq_lens, self.query_start_loc,
        )  # fmt: skip

    def expected(self, scale: float, sliding_window: int | None = None) -> torch.Tensor:
        """What the oracle says of each sequence by itself, end to end."""
        outputs = [
            masked_attention(q, k, v, scale=scale, sliding_window=sliding_window)
            for q, k, v in zip(self.queries, self.keys, self.values, strict=True)
        ]
        return torch.from_numpy(np.concatenate(outputs))


@st.composite
def paged_batches(
    draw,
    dtype: torch.dtype = torch.float64,
    decode_only: bool = False,
    max_seqs: int = 4,
    head_dims: tuple[int, ...] = HEAD_DIMS,
    max_kv_heads: int = 3,
    max_queries: int = 64,  # of one sequence
):
    """Sequences of drawn lengths whose blocks lie anywhere in the pool; some share the full blocks of a prefix."""
    heads = draw(head_shapes(head_dims=head_dims, max_kv_heads=max_kv_heads), label="heads")
    num_heads, num_kv_heads, head_dim = heads
    block_size = draw(st.sampled_from(BLOCK_SIZES), label="block_size")
    seq_lens = draw(st.lists(lengths(block_size), min_size=1, max_size=max_seqs), label="seq_lens")
    num_queries = [
        1 if decode_only else draw(st.integers(0, min(n, max_queries)) | st.just(1), label="num_queries")
        for n in seq_lens
    ]
    shared = [0] + [
        draw(st.integers(0, min(a, b) // block_size), label="blocks shared with the sequence before")
        for a, b in pairwise(seq_lens)
    ]
    counts = [cdiv(n, block_size) for n in seq_lens]
    own = [c - s for c, s in zip(counts, shared, strict=True)]
    num_blocks = sum(own) + draw(st.integers(0, 3), label="blocks without an owner")
    order = draw(st.permutations(range(num_blocks)), label="physical order")
    extra_columns = draw(st.integers(0, 2), label="table columns past the longest sequence")
    rng = draw(generators())

    free, tables, keys, values = list(order), [], [], []
    for seq, seq_len in enumerate(seq_lens):
        prefix = shared[seq]
        tables.append((tables[-1][:prefix] if prefix else []) + [free.pop() for _ in range(own[seq])])
        for arrays in (keys, values):
            array = rng.standard_normal((seq_len, num_kv_heads, head_dim))
            if prefix:  # a shared block holds one content
                array[: prefix * block_size] = arrays[-1][: prefix * block_size]
            arrays.append(array)
    # What is stored is rounded to the dtype, so let the oracle start from the rounded numbers.
    keys = [rounded(a, dtype) for a in keys]
    values = [rounded(a, dtype) for a in values]
    queries = [rounded(rng.standard_normal((n, num_heads, head_dim)), dtype) for n in num_queries]

    key_cache = np.full((num_blocks, num_kv_heads, block_size, head_dim), np.nan)
    value_cache = key_cache.copy()
    for table, key, value in zip(tables, keys, values, strict=True):
        for position in range(len(key)):  # the address translation, one token at a time, as plainly as can be
            block, offset = table[position // block_size], position % block_size
            key_cache[block, :, offset], value_cache[block, :, offset] = key[position], value[position]
    block_tables = np.full((len(tables), max(counts) + extra_columns), -1)
    for row, table in zip(block_tables, tables, strict=True):
        row[: len(table)] = table
    return PagedBatch(
        query=torch.from_numpy(np.concatenate(queries)).to(dtype),
        key_cache=torch.from_numpy(key_cache).to(dtype),
        value_cache=torch.from_numpy(value_cache).to(dtype),
        block_tables=torch.from_numpy(block_tables).to(torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        query_start_loc=torch.tensor([0, *np.cumsum(num_queries)], dtype=torch.int32),
        queries=queries,
        keys=keys,
        values=values,
    )


def rounded(array: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(array).to(dtype).double().numpy()
