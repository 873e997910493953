"""Chapter 3. Causal attention of one sequence whose K and V lie in one piece. Everything paged is measured against it.

query  [num_queries, num_heads, head_dim]           the last num_queries positions of the context
key    [num_kv_heads, num_keys, head_dim]           head by head, as the caches hold them
value  [num_kv_heads, num_keys, head_dim]
"""

# Exercise ch03_causal_attention, about 30 minutes. Write what raises
# NotImplementedError, in this order, and run `minipaged check 3` after each step:
#
#   1. causal_attention
#   2. visible
#   3. first_seen
#
# What is given may be changed too. Any way that keeps the docstrings' promises is right.
# A call that raises changes nothing. Bad input is a ValueError whose message has the numbers, in any words;
# where two errors are due, either is right.
#
# A query with a sliding_window of w sees the last w positions, its own included (minipaged/reference.py).
#
# Made from minipaged/attention/contiguous.py by minipaged/course/generate.py.

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, sliding_window: int | None = None
) -> Tensor:
    """softmax(Q K^T * scale + M) V, with M aligned at the end of the context. Returns the shape of query.

    The heads of a group share one key/value head: K and V are *viewed* once per query head and never copied.
    """
    raise NotImplementedError("ch03: causal_attention")


def visible(num_queries: int, num_keys: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """True where query i, at position num_keys - num_queries + i, may see key j. Shape [num_queries, num_keys]."""
    raise NotImplementedError("ch03: visible")


def first_seen(seq_len: int, num_queries: int, sliding_window: int | None) -> int:
    """The earliest position that any of the last num_queries positions sees. Keys before it need not be read."""
    raise NotImplementedError("ch03: first_seen")
