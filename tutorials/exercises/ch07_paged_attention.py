"""Chapter 7. Paged attention, the plain form: store through the slot mapping; gather a sequence's blocks, then attend.

    block table of a sequence     [ 7, 1, 3 ]
    key_cache                     [ 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 ]     blocks of block_size tokens
    gathered                      [ 7 | 1 | 3 ] -> cut to seq_len -> causal attention of chapter 3

The gather copies the context once a step. `online_softmax.py` works without the copy, and `compiled.py` is that loop at
full speed, which the engine runs. This form is the one to read first, and a second oracle.
Source: the PagedAttention paper, section 4.1.
"""

# Exercise ch07_paged_attention, about 40 minutes. Write what raises
# NotImplementedError, in this order, and run `minipaged check 7` after each step:
#
#   1. write_kv
#   2. paged_attention_gathered
#   3. gather
#
# What is given may be changed too. Any way that keeps the docstrings' promises is right.
# A call that raises changes nothing. Bad input is a ValueError whose message has the numbers, in any words;
# where two errors are due, either is right.
#
# Shapes: docs/design.md, section 3. Sequence s has the rows query_start_loc[s] to query_start_loc[s + 1] - 1 of
# query, perhaps none; its last query stands at position seq_lens[s] - 1. What no token owns is never read.
# The promised errors: call check_write_kv or check_paged_attention (minipaged/attention/checks.py) first.
#
# Given, in minipaged/attention/contiguous.py:
#
#   causal_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float, sliding_window: int |
#       None=None) -> Tensor
#       softmax(Q K^T * scale + M) V, with M aligned at the end of the context. Returns the shape of query.
#       The heads of a group share one key/value head: K and V are *viewed* once per query head and never
#       copied.
#
# Given, in minipaged/attention/contiguous.py:
#
#   first_seen(seq_len: int, num_queries: int, sliding_window: int | None) -> int
#       The earliest position that any of the last num_queries positions sees. Keys before it need not be
#       read.
#
# Made from minipaged/attention/gathered.py by minipaged/course/generate.py.

import torch
from torch import Tensor

from minipaged.attention.checks import check_paged_attention, check_write_kv
from minipaged.attention.contiguous import causal_attention, first_seen
from minipaged.cdiv import cdiv


def write_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """Store each new token's K and V in its slot: block = slot // block_size, offset = slot % block_size.

    key, value [num_tokens, num_kv_heads, head_dim]; caches [num_blocks, num_kv_heads, block_size, head_dim];
    slot_mapping int64 [num_tokens], -1 for a token that is not stored. No slot may appear twice.
    Raises ValueError for arguments that do not fit, before anything is written.
    """
    raise NotImplementedError("ch07: write_kv")


def paged_attention_gathered(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Causal attention of a ragged batch that reads K and V through each sequence's block table.

    query [num_tokens, num_heads, head_dim], the queries of sequence s in rows query_start_loc[s] to
    query_start_loc[s + 1] - 1, its last query at position seq_lens[s] - 1;
    key_cache, value_cache [num_blocks, num_kv_heads, block_size, head_dim];
    block_tables int32 [num_seqs, max_blocks]; seq_lens int32 [num_seqs]; query_start_loc int32 [num_seqs + 1].
    Entries of a table past the sequence's end, and slots past it in its last block, are never read; nor is what lies
    before the window of the sequence's first query.
    Returns the shape of query. Raises ValueError for arguments that do not fit.
    """
    raise NotImplementedError("ch07: paged_attention_gathered")


def gather(cache: Tensor, block_table: Tensor, seq_len: int, first: int = 0) -> Tensor:
    """K or V of a sequence from position `first` on, in one piece: [num_kv_heads, seq_len - first, head_dim]."""
    raise NotImplementedError("ch07: gather")
