"""Chapter 3. The contiguous cache: one slab a request, as long as the request may become.

    slab 0   [ A A A A A . . . . . . . . . . . ]     5 tokens held, 11 slots reserved for tokens that may never come
    slab 1   [ B B . . . . . . . . . . . . . . ]
    slab 2   [ . . . . . . . . . . . . . . . . ]     free

K and V of past tokens are needed at every step and never change, so they are kept. Q is not: the query of a token is
used once, in the step that computes the token. Attention reads a view of the slab: no table, no copy.
A row of the step's `block_tables` has one entry here, the number of the slab.
"""

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
        if num_slabs < 1 or max_len < 1:
            raise ValueError(f"num_slabs and max_len must be at least 1, got {num_slabs} and {max_len}")
        shape = (config.num_layers, num_slabs, config.num_kv_heads, max_len, config.head_dim)
        self.key_cache = torch.empty(shape, dtype=dtype, device=device)
        self.value_cache = torch.empty(shape, dtype=dtype, device=device)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, batch: ForwardBatch, sliding_window: int | None
    ) -> Tensor:
        """Store the new K and V after the old ones in each slab, then attend over the slab. Returns query's shape."""
        starts, lens = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
        slabs = batch.block_tables[:, 0].tolist()
        out = torch.empty_like(query)
        for seq, (slab, seq_len) in enumerate(zip(slabs, lens, strict=True)):
            rows = slice(starts[seq], starts[seq + 1])
            new = slice(seq_len - (rows.stop - rows.start), seq_len)
            keys = self.key_cache[layer, slab]  # [num_kv_heads, max_len, head_dim], a view
            values = self.value_cache[layer, slab]
            keys[:, new] = key[rows].transpose(0, 1)
            values[:, new] = value[rows].transpose(0, 1)
            context = keys[:, :seq_len], values[:, :seq_len]
            scale = query.shape[-1] ** -0.5
            out[rows] = causal_attention(query[rows], *context, scale=scale, sliding_window=sliding_window)
        return out

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy whole slabs (source, target) in every layer, in this order: the cost of a fork without blocks."""
        for source, target in copies:
            self.key_cache[:, target] = self.key_cache[:, source]
            self.value_cache[:, target] = self.value_cache[:, source]
