"""Chapter 3. The contiguous cache: one slab a request, as long as the request may become.

    slab 0   [ A A A A A . . . . . . . . . . . ]     5 tokens held, 11 slots reserved for tokens that may never come
    slab 1   [ B B . . . . . . . . . . . . . . ]
    slab 2   [ . . . . . . . . . . . . . . . . ]     free

K and V of past tokens are needed at every step and never change, so they are kept. Q is not: the query of a token is
used once, in the step that computes the token. Attention reads a view of the slab: no table, no copy.
A row of the step's `block_tables` has one entry here, the number of the slab.
"""

# Exercise ch03_contiguous_cache, about 30 minutes. Write what raises
# NotImplementedError, in this order, and run `minipaged check 3` after each step:
#
#   1. ContiguousCache.__init__
#   2. ContiguousCache.attend
#
# What is given may be changed too. Any way that keeps the docstrings' promises is right.
# A call that raises changes nothing. Bad input is a ValueError whose message has the numbers, in any words;
# where two errors are due, either is right.
#
# A batch (minipaged/model/batch.py): sequence s has the rows query_start_loc[s] to query_start_loc[s + 1] - 1
# of query, key and value; its context, these tokens included, has seq_lens[s] tokens; its slab is
# block_tables[s, 0]. The scale is head_dim ** -0.5.
#
# Given: ForwardBatch, in minipaged/model/batch.py.
#
#   token_ids: Tensor  # int64 [num_tokens]
#   positions: Tensor  # int64 [num_tokens]
#   query_start_loc: Tensor  # int32 [num_seqs + 1]
#   seq_lens: Tensor  # int32 [num_seqs]
#   block_tables: Tensor  # int32 [num_seqs, max_blocks], -1 past the end of a table
#   slot_mapping: Tensor  # int64 [num_tokens], -1 where nothing is kept
#   logits_rows: Tensor  # int64 [num_sampled], rows of the hidden states
#   max_query_len: int  # the most tokens that one sequence brings, known here without asking the device
#
# Given, in minipaged/attention/contiguous.py:
#
#   causal_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float, sliding_window: int |
#       None=None) -> Tensor
#       softmax(Q K^T * scale + M) V, with M aligned at the end of the context. Returns the shape of query.
#       The heads of a group share one key/value head: K and V are *viewed* once per query head and never
#       copied.
#
# Made from minipaged/kvcache/contiguous.py by minipaged/course/generate.py.

import torch
from torch import Tensor

from minipaged.attention.contiguous import causal_attention
from minipaged.model.batch import ForwardBatch
from minipaged.model.transformer import ModelConfig


class ContiguousCache:
    """`num_slabs` slabs of `max_len` tokens, in every layer: `key_cache` and `value_cache`, each
    [num_layers, num_slabs, num_kv_heads, max_len, head_dim]. Raises ValueError for sizes below 1.

    Invariant: position p of a sequence lies at offset p of its slab, and offsets past its length are never read.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_slabs: int,
        max_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        raise NotImplementedError("ch03: ContiguousCache.__init__")

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, batch: ForwardBatch, sliding_window: int | None
    ) -> Tensor:
        """Store the new K and V after the old ones in each slab, then attend over the slab. Returns query's shape."""
        raise NotImplementedError("ch03: ContiguousCache.attend")

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy whole slabs (source, target) in every layer, in this order: the cost of a fork without blocks."""
        for source, target in copies:
            self.key_cache[:, target] = self.key_cache[:, source]
            self.value_cache[:, target] = self.value_cache[:, source]
