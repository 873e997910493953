"""Chapter 3. Causal attention of one sequence whose K and V lie in one piece. Everything paged is measured against it.

query  [num_queries, num_heads, head_dim]           the last num_queries positions of the context
key    [num_kv_heads, num_keys, head_dim]           head by head, as the caches hold them
value  [num_kv_heads, num_keys, head_dim]
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, sliding_window: int | None = None
) -> Tensor:
    """softmax(Q K^T * scale + M) V, with M aligned at the end of the context. Returns the shape of query.

    The heads of a group share one key/value head: K and V are *viewed* once per query head and never copied.
    """
    num_queries, num_heads, head_dim = query.shape
    num_kv_heads, num_keys, _ = key.shape
    group = num_heads // num_kv_heads
    if num_queries == 1 and sliding_window is None:
        # A decoded token sees everything. Its group's heads become the rows of one matrix product per KV head.
        rows = query.view(1, num_kv_heads, group, head_dim)  # [1, num_kv_heads, group, head_dim]
        out = F.scaled_dot_product_attention(rows, key[None], value[None], scale=scale)
        return out.reshape(1, num_heads, head_dim)
    heads = query.transpose(0, 1).reshape(num_kv_heads, group, num_queries, head_dim)
    keys = key[:, None].expand(num_kv_heads, group, num_keys, head_dim)
    values = value[:, None].expand(num_kv_heads, group, num_keys, head_dim)
    mask = None
    if num_queries < num_keys or sliding_window is not None:
        mask = visible(num_queries, num_keys, sliding_window, query.device)  # [num_queries, num_keys]
    out = F.scaled_dot_product_attention(heads, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out.reshape(num_heads, num_queries, head_dim).transpose(0, 1)  # [num_queries, num_heads, head_dim]


def visible(num_queries: int, num_keys: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """True where query i, at position num_keys - num_queries + i, may see key j. Shape [num_queries, num_keys]."""
    i = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    j = torch.arange(num_keys, device=device)[None, :]
    return (j <= i) if sliding_window is None else (j <= i) & (j > i - sliding_window)


def first_seen(seq_len: int, num_queries: int, sliding_window: int | None) -> int:
    """The earliest position that any of the last num_queries positions sees. Keys before it need not be read."""
    return 0 if sliding_window is None else max(0, seq_len - num_queries + 1 - sliding_window)
