"""Chapter 7. Paged attention, block by block: no copy of the context, because softmax can be computed in one pass.

Softmax needs the maximum and the sum of a whole row, and a block shows only block_size scores of it. So keep, for each
query, the maximum m so far, the sum l of exp(score - m) so far, and the unnormalised output acc. A new block with
scores s and values v moves the maximum to m', and the sums under the old maximum are rescaled:

    m'   = max(m, max_j s_j)
    l'   = l * exp(m - m')   +  sum_j exp(s_j - m')
    acc' = acc * exp(m - m') +  sum_j exp(s_j - m') v_j            output = acc / l

Sources: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Dao et al., "FlashAttention"
(2022), section 3.1. The Triton kernels of chapter 8 are this loop, with one program for each (sequence, KV head).
"""

# Exercise ch07_online_softmax, about 40 minutes. Write what raises
# NotImplementedError, in this order, and run `minipaged check 7` after each step:
#
#   1. paged_attention_online
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
#   visible(num_queries: int, num_keys: int, sliding_window: int | None, device: torch.device) -> Tensor
#       True where query i, at position num_keys - num_queries + i, may see key j. Shape [num_queries,
#       num_keys].
#
# Given, in minipaged/attention/contiguous.py:
#
#   first_seen(seq_len: int, num_queries: int, sliding_window: int | None) -> int
#       The earliest position that any of the last num_queries positions sees. Keys before it need not be
#       read.
#
# Made from minipaged/attention/online_softmax.py by minipaged/course/generate.py.

import torch
from torch import Tensor

from minipaged.attention.checks import check_paged_attention
from minipaged.attention.contiguous import first_seen, visible
from minipaged.cdiv import cdiv


def paged_attention_online(
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
    """Arguments, answer and errors of `paged_attention_gathered`; each block is read where it lies."""
    raise NotImplementedError("ch07: paged_attention_online")
