"""Chapter 2. No cache: every step brings the whole of every sequence, and its K and V are forgotten afterwards.

Token n then costs n tokens' worth of work, and a text of n tokens costs 1 + 2 + ... + n: O(n^2). It is the baseline of
the course for one more reason: with nothing kept, there is nothing that could be kept wrongly.
"""

import torch
from torch import Tensor

from minipaged.attention.contiguous import causal_attention
from minipaged.model.contract import Step


class RecomputeCache:
    """Invariant: nothing is remembered between two calls."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, step: Step) -> Tensor:
        """Causal attention of each sequence over itself. Raises ValueError where a sequence does not come whole."""
        starts, lens = step.query_start_loc.tolist(), step.seq_lens.tolist()
        out = torch.empty_like(query)
        for seq, seq_len in enumerate(lens):
            rows = slice(starts[seq], starts[seq + 1])
            if rows.stop - rows.start != seq_len:
                raise ValueError(f"without a cache, all {seq_len} tokens must come; got {rows.stop - rows.start}")
            out[rows] = causal_attention(
                query[rows], key[rows].transpose(0, 1), value[rows].transpose(0, 1), scale=query.shape[-1] ** -0.5
            )
        return out
