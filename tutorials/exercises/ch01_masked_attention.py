"""Chapter 1. Masked attention, in NumPy float64: what every later step must reproduce.

Written to be read, not to be fast: each line of code is one line of the formula

    Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k) + M) V,    M[i, j] = 0 if j <= i, else -inf

    MultiHead(X) = Concat(head_1, ..., head_h) W^O,           head_i = Attention(X W^Q_i, X W^K_i, X W^V_i)

This file has no cache. Every cache in this project is tested against it: a cache must not change the result.

Sources: Vaswani et al., "Attention Is All You Need" (2017), section 3.2, for the formulas; Ainslie et al., "GQA"
(2023), section 2.2, for key/value heads shared by a group of query heads; Beltagy et al., "Longformer" (2020),
section 3.1, for the sliding window.
"""

# Exercise ch01_masked_attention, about 45 minutes. Write what raises
# NotImplementedError, in this order, and run `minipaged check 1` after each step:
#
#   1. causal_mask
#   2. attention_weights
#   3. masked_attention
#   4. multi_head_attention
#
# What is given may be changed too. Any way that keeps the docstrings' promises is right.
# A call that raises changes nothing. Bad input is a ValueError whose message has the numbers, in any words;
# where two errors are due, either is right.
#
# Made from minipaged/reference.py by minipaged/course/generate.py.

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
    raise NotImplementedError("ch01: causal_mask")


def attention_weights(
    query: Array, key: Array, *, scale: float | None = None, sliding_window: int | None = None
) -> Array:
    """softmax(Q K^T * scale + M), of shape [num_heads, num_queries, num_keys]; every row sums to 1.

    query [num_queries, num_heads, head_dim]; key [num_keys, num_kv_heads, head_dim]. Query head h reads key/value
    head h // (num_heads // num_kv_heads). The scale is 1 / sqrt(head_dim) unless another is given.
    Raises ValueError where num_heads is no multiple of num_kv_heads or head_dim differs, and as causal_mask does.
    """
    raise NotImplementedError("ch01: attention_weights")


def masked_attention(
    query: Array, key: Array, value: Array, *, scale: float | None = None, sliding_window: int | None = None
) -> Array:
    """Causal grouped-query attention of one sequence. Returns [num_queries, num_heads, head_dim], float64.

    query [num_queries, num_heads, head_dim]; key and value [num_keys, num_kv_heads, head_dim]; the queries are the
    last num_queries positions of the context, so that a prompt in one piece (num_queries == num_keys), a chunk of it
    and a single decoded token (num_queries == 1) are one formula. Raises ValueError where key and value differ in
    tokens or heads, and as attention_weights does.
    """
    raise NotImplementedError("ch01: masked_attention")


def multi_head_attention(hidden: Array, w_q: Array, w_k: Array, w_v: Array, w_o: Array) -> Array:
    """MultiHead(X): project, attend in every head, concatenate, project back. Returns [num_tokens, hidden_size].

    hidden [num_tokens, hidden_size]; w_q [num_heads, hidden_size, head_dim]; w_k, w_v [num_kv_heads, hidden_size,
    head_dim]; w_o [num_heads * head_dim, hidden_size]. The heads are laid side by side along the feature axis: head i
    fills columns i * head_dim to (i + 1) * head_dim - 1, and meets those rows of W^O.
    Raises ValueError for a w_o of another shape.
    """
    raise NotImplementedError("ch01: multi_head_attention")
