"""Chapter 1. Masked attention, in NumPy float64: what every later step must reproduce.

Written to be read, not to be fast: each line of code is one line of the formula

    Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k) + M) V,    M[i, j] = 0 if j <= i, else -inf

    MultiHead(X) = Concat(head_1, ..., head_h) W^O,           head_i = Attention(X W^Q_i, X W^K_i, X W^V_i)

This file has no cache. Every cache in this project is tested against it: a cache must not change the result.

Sources: Vaswani et al., "Attention Is All You Need" (2017), section 3.2, for the formulas; Ainslie et al., "GQA"
(2023), section 2.2, for key/value heads shared by a group of query heads; Beltagy et al., "Longformer" (2020),
section 3.1, for the sliding window.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def causal_mask(num_queries: int, num_keys: int, sliding_window: int | None = None) -> Array:
    """M of shape [num_queries, num_keys]: 0 where query i may see key j, -inf elsewhere.

    The queries are the *last* num_queries of the num_keys positions, so query i is at position
    num_keys - num_queries + i. With a window it sees the last sliding_window positions, its own included.
    Invariant: every row has at least one 0, since a query always sees itself.
    Raises ValueError for more queries than keys, and for a window below 1.
    """
    if num_queries > num_keys:
        raise ValueError(f"num_queries ({num_queries}) exceeds num_keys ({num_keys}): a query would have no position")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1, got {sliding_window}")
    i = np.arange(num_keys - num_queries, num_keys)[:, None]  # [num_queries, 1]
    j = np.arange(num_keys)[None, :]  # [1, num_keys]
    visible = j <= i
    if sliding_window is not None:
        visible &= j > i - sliding_window
    return np.where(visible, 0.0, -np.inf)  # [num_queries, num_keys]


def attention_weights(
    query: Array, key: Array, *, scale: float | None = None, sliding_window: int | None = None
) -> Array:
    """softmax(Q K^T * scale + M), of shape [num_heads, num_queries, num_keys]; every row sums to 1.

    query [num_queries, num_heads, head_dim]; key [num_keys, num_kv_heads, head_dim]. Query head h reads key/value
    head h // (num_heads // num_kv_heads). The scale is 1 / sqrt(head_dim) unless another is given.
    Raises ValueError where num_heads is no multiple of num_kv_heads or head_dim differs, and as causal_mask does.
    """
    num_queries, num_heads, head_dim = query.shape
    num_keys, num_kv_heads, key_dim = key.shape
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads ({num_heads}) must be a multiple of num_kv_heads ({num_kv_heads})")
    if head_dim != key_dim:
        raise ValueError(f"query has head_dim {head_dim}, key has {key_dim}")
    if scale is None:
        scale = 1.0 / np.sqrt(head_dim)
    key = np.repeat(key.astype(np.float64), num_heads // num_kv_heads, axis=1)  # [num_keys, num_heads, head_dim]
    scores = np.einsum("qhd,khd->hqk", query.astype(np.float64), key) * scale  # [num_heads, num_queries, num_keys]
    scores = scores + causal_mask(num_queries, num_keys, sliding_window)
    # Subtracting a row's maximum changes nothing in the quotient and keeps exp from overflowing. It is finite,
    # because every query sees itself.
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def masked_attention(
    query: Array, key: Array, value: Array, *, scale: float | None = None, sliding_window: int | None = None
) -> Array:
    """Causal grouped-query attention of one sequence. Returns [num_queries, num_heads, head_dim], float64.

    query [num_queries, num_heads, head_dim]; key and value [num_keys, num_kv_heads, head_dim]; the queries are the
    last num_queries positions of the context, so that a prompt in one piece (num_queries == num_keys), a chunk of it
    and a single decoded token (num_queries == 1) are one formula. Raises ValueError where key and value differ in
    tokens or heads, and as attention_weights does.
    """
    if key.shape[:2] != value.shape[:2]:
        raise ValueError(f"key has shape {key.shape}, value {value.shape}: tokens and heads must be the same")
    weights = attention_weights(query, key, scale=scale, sliding_window=sliding_window)
    group = query.shape[1] // key.shape[1]
    value = np.repeat(value.astype(np.float64), group, axis=1)  # [num_keys, num_heads, head_dim]
    return np.einsum("hqk,khd->qhd", weights, value)  # [num_queries, num_heads, head_dim]


def multi_head_attention(hidden: Array, w_q: Array, w_k: Array, w_v: Array, w_o: Array) -> Array:
    """MultiHead(X): project, attend in every head, concatenate, project back. Returns [num_tokens, hidden_size].

    hidden [num_tokens, hidden_size]; w_q [num_heads, hidden_size, head_dim]; w_k, w_v [num_kv_heads, hidden_size,
    head_dim]; w_o [num_heads * head_dim, hidden_size]. The heads are laid side by side along the feature axis: head i
    fills columns i * head_dim to (i + 1) * head_dim - 1, and meets those rows of W^O.
    Raises ValueError for a w_o of another shape.
    """
    num_tokens, hidden_size = hidden.shape
    num_heads, _, head_dim = w_q.shape
    expected = [num_heads * head_dim, hidden_size]
    if list(w_o.shape) != expected:
        raise ValueError(f"w_o must be [num_heads * head_dim, hidden_size] = {expected}, got {list(w_o.shape)}")
    query = np.einsum("te,hed->thd", hidden, w_q)  # [num_tokens, num_heads, head_dim]
    key = np.einsum("te,hed->thd", hidden, w_k)  # [num_tokens, num_kv_heads, head_dim]
    value = np.einsum("te,hed->thd", hidden, w_v)  # [num_tokens, num_kv_heads, head_dim]
    heads = masked_attention(query, key, value)  # [num_tokens, num_heads, head_dim]
    concatenated = heads.reshape(num_tokens, num_heads * head_dim)  # [num_tokens, num_heads * head_dim]
    return concatenated @ w_o  # [num_tokens, hidden_size]
