"""Chapter 1. What attention must be, said as properties: no number in this file was computed by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from messages import says
from minipaged.reference import attention_weights, causal_mask, masked_attention, multi_head_attention
from strategies import generators, head_shapes

pytestmark = pytest.mark.ch01

windows = st.none() | st.integers(1, 12)


@st.composite
def sequences(draw):
    """query [num_queries, num_heads, head_dim] and key, value [num_keys, num_kv_heads, head_dim] of one sequence."""
    num_heads, num_kv_heads, head_dim = draw(head_shapes(max_group=3), label="heads")
    num_keys = draw(st.integers(1, 12), label="num_keys")
    num_queries = draw(st.integers(1, num_keys), label="num_queries")
    rng = draw(generators())
    # A wide range of scores: softmax must neither overflow nor lose the small ones.
    size = draw(st.sampled_from((0.1, 1.0, 30.0)), label="size of the numbers")
    shapes = [(num_queries, num_heads), (num_keys, num_kv_heads), (num_keys, num_kv_heads)]
    return tuple(size * rng.standard_normal((*shape, head_dim)) for shape in shapes)


@given(num_keys=st.integers(1, 12), data=st.data())
def test_mask_is_zero_where_a_key_is_not_later_than_the_query(num_keys, data):
    num_queries = data.draw(st.integers(1, num_keys))
    window = data.draw(windows)
    mask = causal_mask(num_queries, num_keys, window)
    assert mask.shape == (num_queries, num_keys)
    for row in range(num_queries):
        i = num_keys - num_queries + row  # the queries are the last positions of the context
        for j in range(num_keys):
            seen = j <= i and (window is None or i - j < window)
            assert mask[row, j] == (0.0 if seen else -np.inf), f"query at {i}, key at {j}, window {window}"


@given(qkv=sequences(), window=windows)
def test_rows_of_weights_sum_to_one(qkv, window):
    query, key, _ = qkv
    weights = attention_weights(query, key, sliding_window=window)
    assert (weights >= 0).all(), "a weight is negative or NaN"
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-12)


@given(qkv=sequences(), window=windows, data=st.data())
def test_a_later_token_never_moves_an_earlier_output(qkv, window, data):
    query, key, value = qkv
    before = masked_attention(query, key, value, sliding_window=window)
    changed = data.draw(st.integers(0, len(key) - 1), label="changed position")
    rng = data.draw(generators())
    key[changed], value[changed] = rng.standard_normal((2, *key.shape[1:]))
    after = masked_attention(query, key, value, sliding_window=window)
    earlier = max(0, changed - (len(key) - len(query)))  # rows of queries that stand before the changed position
    np.testing.assert_array_equal(after[:earlier], before[:earlier])


@given(qkv=sequences(), window=st.integers(1, 12), data=st.data())
def test_a_token_outside_the_window_never_moves_an_output(qkv, window, data):
    query, key, value = qkv
    before = masked_attention(query, key, value, sliding_window=window)
    rng = data.draw(generators())
    last_hidden = len(key) - window  # the last query sees positions from here on
    if last_hidden > 0:
        key[:last_hidden], value[:last_hidden] = rng.standard_normal((2, *key[:last_hidden].shape))
        after = masked_attention(query, key, value, sliding_window=window)
        np.testing.assert_array_equal(after[-1], before[-1])


@given(qkv=sequences())
def test_an_output_is_an_average_of_values(qkv):
    query, key, value = qkv
    out = masked_attention(query, key, value)
    group = query.shape[1] // key.shape[1]
    value = np.repeat(value, group, axis=1)
    assert (out <= value.max(axis=0) + 1e-9).all()
    assert (out >= value.min(axis=0) - 1e-9).all()


@given(qkv=sequences())
def test_the_first_token_sees_only_itself(qkv):
    query, key, value = qkv
    if len(query) == len(key):
        out = masked_attention(query, key, value)
        np.testing.assert_allclose(out[0], np.repeat(value[0], query.shape[1] // key.shape[1], axis=0), rtol=1e-12)


@given(qkv=sequences(), data=st.data())
def test_permuting_heads_permutes_outputs(qkv, data):
    """Whole groups move together: a query head keeps its key/value head."""
    query, key, value = qkv
    order = data.draw(st.permutations(range(key.shape[1])))
    group = query.shape[1] // key.shape[1]
    heads = [kv_head * group + member for kv_head in order for member in range(group)]
    out = masked_attention(query, key, value)
    moved = masked_attention(query[:, heads], key[:, order], value[:, order])
    np.testing.assert_allclose(moved, out[:, heads], rtol=1e-9, atol=1e-9)


@given(qkv=sequences(), window=windows)
def test_grouped_heads_equal_heads_with_keys_of_their_own(qkv, window):
    query, key, value = qkv
    group = query.shape[1] // key.shape[1]
    for head in range(query.shape[1]):
        alone = masked_attention(
            query[:, [head]], key[:, [head // group]], value[:, [head // group]], sliding_window=window
        )
        together = masked_attention(query, key, value, sliding_window=window)[:, [head]]
        np.testing.assert_allclose(alone, together, rtol=1e-9, atol=1e-9)


@given(qkv=sequences(), data=st.data())
def test_a_chunk_of_queries_equals_its_rows_of_the_whole(qkv, data):
    """Prefill in one piece, in chunks, or token by token: the same rows."""
    query, key, value = qkv
    whole = masked_attention(query, key, value)
    first = data.draw(st.integers(0, len(query) - 1))
    last = data.draw(st.integers(first + 1, len(query)))
    context = len(key) - len(query) + last
    chunk = masked_attention(query[first:last], key[:context], value[:context])
    np.testing.assert_allclose(chunk, whole[first:last], rtol=1e-9, atol=1e-12)


@given(qkv=sequences(), window=windows, scale=st.none() | st.floats(0.01, 2.0))
def test_equals_torch(qkv, window, scale):
    query, key, value = qkv
    ours = masked_attention(query, key, value, scale=scale, sliding_window=window)
    q, k, v = (torch.from_numpy(x).transpose(0, 1) for x in (query, key, value))
    i, j = np.arange(len(key) - len(query), len(key))[:, None], np.arange(len(key))
    mask = torch.from_numpy((j <= i) & (j > i - (window or len(key))))
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    np.testing.assert_allclose(ours, theirs.transpose(0, 1).numpy(), rtol=1e-9, atol=1e-9)


@given(num_tokens=st.integers(1, 8), head_dim=st.sampled_from((2, 4)), rng=generators())
def test_one_head_equals_multi_head_with_h_1(num_tokens, head_dim, rng):
    hidden = rng.standard_normal((num_tokens, 6))
    w_q, w_k, w_v = rng.standard_normal((3, 1, 6, head_dim))
    out = multi_head_attention(hidden, w_q, w_k, w_v, np.eye(head_dim, 6))
    q, k, v = (hidden @ w[0] for w in (w_q, w_k, w_v))
    single = masked_attention(q[:, None], k[:, None], v[:, None])[:, 0]
    np.testing.assert_allclose(out[:, :head_dim], single[:, : min(6, head_dim)], rtol=1e-9, atol=1e-12)


@given(shape=head_shapes(max_group=3), num_tokens=st.integers(1, 8), rng=generators())
def test_heads_are_concatenated_along_the_feature_axis(shape, num_tokens, rng):
    """Concat(head_1, ..., head_h) W^O is the sum of head_i times its own rows of W^O."""
    num_heads, num_kv_heads, head_dim = shape
    hidden = rng.standard_normal((num_tokens, 5))
    w_q = rng.standard_normal((num_heads, 5, head_dim))
    w_k, w_v = rng.standard_normal((2, num_kv_heads, 5, head_dim))
    w_o = rng.standard_normal((num_heads * head_dim, 5))
    out = multi_head_attention(hidden, w_q, w_k, w_v, w_o)
    total = np.zeros_like(hidden)
    for head in range(num_heads):
        kv_head = head // (num_heads // num_kv_heads)
        one = masked_attention(*((hidden @ w)[:, None] for w in (w_q[head], w_k[kv_head], w_v[kv_head])))
        total += one[:, 0] @ w_o[head * head_dim : (head + 1) * head_dim]
    np.testing.assert_allclose(out, total, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("call", "numbers"),
    [
        (lambda: causal_mask(3, 2), [3, 2]),
        (lambda: causal_mask(1, 2, sliding_window=0), [0]),
        (lambda: attention_weights(np.ones((1, 3, 4)), np.ones((1, 2, 4))), [3, 2]),
        (lambda: attention_weights(np.ones((1, 2, 4)), np.ones((1, 2, 8))), [4, 8]),
        (lambda: masked_attention(np.ones((1, 2, 4)), np.ones((2, 2, 4)), np.ones((3, 2, 4))), [2, 3]),
        (
            lambda: multi_head_attention(np.ones((1, 6)), *(np.ones((2, 6, 4)) for _ in range(3)), np.ones((7, 6))),
            [8, 7],
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(call, numbers):
    with pytest.raises(ValueError) as error:
        call()
    assert says(error.value, *numbers), f"the message does not name {numbers}: {error.value}"
