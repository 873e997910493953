"""Chapter 2. The transformer equals a second writing of it, in NumPy float64, over the oracle of chapter 1.

The second writing has no layers, no modules and no steps: one function, one sequence, all tokens at once. Where the
model turns halves of a head by sines and cosines, it multiplies complex numbers.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipaged.model.batch import make_batch
from minipaged.model.load import tiny_transformer
from minipaged.model.recompute import RecomputeCache, generate, next_logits
from minipaged.model.transformer import MAX_POSITION, ModelConfig, Transformer, rotary_table, rotate
from minipaged.reference import masked_attention
from strategies import generators, head_shapes

pytestmark = pytest.mark.ch02

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


# ---- the second writing ----------------------------------------------------------------------------------------------


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight."""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def turned(x, config):
    """The pair (x[i], x[i + d/2]) of the token at position p, as one complex number, times e^(i p theta^(-2i/d))."""
    half = config.head_dim // 2
    speeds = config.rope_theta ** (-2.0 * np.arange(half) / config.head_dim) / (config.rope_factors or (1.0,))
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * np.arange(len(x))[:, None, None] * speeds)
    return np.concatenate([z.real, z.imag], axis=-1) * config.rope_attention_factor


def model_in_numpy(model, token_ids):
    """Hidden states and logits of one sequence: [num_tokens, hidden_size] and [num_tokens, vocab_size], float64."""
    config = model.config
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    hidden = weights["embed_tokens.weight"][token_ids]
    for i in range(config.num_layers):
        layer = {name.removeprefix(f"layers.{i}."): w for name, w in weights.items() if name.startswith(f"layers.{i}.")}
        x = rms_norm(hidden, layer["attention_norm.weight"], config.rms_norm_eps)
        edges = [heads * head_dim, (heads + kv_heads) * head_dim]  # rows are outputs, as torch lays them
        w_q, w_k, w_v = np.split(layer["qkv_proj.weight"], edges)
        b_q, b_k, b_v = np.split(layer["qkv_proj.bias"], edges) if config.qkv_bias else (0.0, 0.0, 0.0)
        query = (x @ w_q.T + b_q).reshape(-1, heads, head_dim)
        key = (x @ w_k.T + b_k).reshape(-1, kv_heads, head_dim)
        value = (x @ w_v.T + b_v).reshape(-1, kv_heads, head_dim)
        if config.qk_norm:
            query = rms_norm(query, layer["q_norm.weight"], config.rms_norm_eps)
            key = rms_norm(key, layer["k_norm.weight"], config.rms_norm_eps)
        if i not in config.no_rope_layers:
            query, key = turned(query, config), turned(key, config)
        window = config.sliding_windows[i] if config.sliding_windows else None
        attended = masked_attention(query, key, value, sliding_window=window).reshape(-1, heads * head_dim)
        hidden = hidden + attended @ layer["o_proj.weight"].T
        x = rms_norm(hidden, layer["mlp_norm.weight"], config.rms_norm_eps)
        gate, up = np.split(x @ layer["gate_up_proj.weight"].T, 2, axis=-1)
        hidden = hidden + (gate / (1.0 + np.exp(-gate)) * up) @ layer["down_proj.weight"].T
    hidden = rms_norm(hidden, weights["norm.weight"], config.rms_norm_eps)
    return hidden, hidden @ weights["embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"].T


# ---- what is drawn ---------------------------------------------------------------------------------------------------


@st.composite
def configs(draw):
    num_heads, num_kv_heads, head_dim = draw(head_shapes(max_group=3), label="heads")
    num_layers, half = draw(st.integers(1, 3)), head_dim // 2
    layers = st.sets(st.integers(0, num_layers - 1))
    windows = st.lists(st.none() | st.integers(1, 8), min_size=num_layers, max_size=num_layers)
    factors = st.lists(st.floats(0.5, 16.0), min_size=half, max_size=half)
    return ModelConfig(
        qkv_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        rope_factors=tuple(draw(st.just([]) | factors)),
        rope_attention_factor=draw(st.sampled_from((1.0, 1.2))),
        no_rope_layers=tuple(draw(st.just(set()) | layers)),
        sliding_windows=tuple(draw(st.just([]) | windows)),
        vocab_size=draw(st.integers(2, 40)),
        hidden_size=draw(st.sampled_from((2, 8, 18))),  # not always num_heads * head_dim
        intermediate_size=draw(st.integers(1, 20)),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=32,
        rope_theta=draw(st.sampled_from((1.0, 100.0, 10_000.0, 500_000.0))),
        rms_norm_eps=draw(st.sampled_from((1e-6, 1e-5, 0.1))),
        tie_embeddings=draw(st.booleans()),
    )


@st.composite
def models(draw):
    """A model in float64 with norms that are not 1: a norm that is forgotten, or taken for another, shows."""
    model = tiny_transformer(torch.float64, draw(st.integers(0, 1000), label="seed"), draw(configs(), label="config"))
    rng = draw(generators())
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data = torch.from_numpy(rng.uniform(0.5, 2.0, parameter.shape)).requires_grad_(False)
        assert not parameter.requires_grad, name
    return model


def token_lists(config, max_size=12):
    return st.lists(st.integers(0, config.vocab_size - 1), min_size=1, max_size=max_size)


def run(model, *sequences):
    """Hidden states of whole sequences in one ragged batch, one array each."""
    batch = make_batch(sequences, [0] * len(sequences))
    with torch.inference_mode():
        hidden = model(batch, RecomputeCache())
    return [part.numpy() for part in hidden.split([len(token_ids) for token_ids in sequences])]


# ---- the properties --------------------------------------------------------------------------------------------------


@given(model=models(), data=st.data())
def test_equals_the_model_written_in_numpy(model, data):
    token_ids = data.draw(token_lists(model.config), label="tokens")
    hidden, logits = model_in_numpy(model, token_ids)
    (ours,) = run(model, token_ids)
    np.testing.assert_allclose(ours, hidden, **CLOSE)
    np.testing.assert_allclose(model.logits(torch.from_numpy(ours)).numpy(), logits, **CLOSE)


@given(seed=st.integers(0, 100), token_ids=st.lists(st.integers(0, 256), min_size=1, max_size=40))
def test_the_tiny_model_equals_the_model_written_in_numpy(seed, token_ids):
    model = tiny_transformer(torch.float64, seed)
    (ours,) = run(model, token_ids)
    np.testing.assert_allclose(ours, model_in_numpy(model, token_ids)[0], **CLOSE)


@given(model=models(), data=st.data())
def test_a_later_token_never_moves_an_earlier_hidden_state(model, data):
    token_ids = data.draw(token_lists(model.config), label="tokens")
    at = data.draw(st.integers(0, len(token_ids) - 1), label="changed position")
    other = token_ids[:at] + data.draw(token_lists(model.config), label="another end")
    if at:
        np.testing.assert_allclose(run(model, other)[0][:at], run(model, token_ids)[0][:at], **CLOSE)


@given(num_tokens=st.integers(2, 24), rng=generators())
def test_in_the_tiny_model_earlier_tokens_change_the_greedy_token(num_tokens, rng):
    """What `tiny` promises. Without it, a test of caches on this model could pass whatever attention did.

    Attention may well look away from a token, so this counts: of 32 random changes of one earlier token, some show.
    """
    before = rng.integers(0, 257, (32, num_tokens))
    after = before.copy()
    for row in after:
        row[rng.integers(0, num_tokens - 1)] += rng.integers(1, 257)
    model = tiny_transformer(torch.float64)
    last = np.stack([hidden[-1] for hidden in run(model, *before.tolist(), *(after % 257).tolist())])
    greedy = model.logits(torch.from_numpy(last)).argmax(-1)
    assert (greedy[:32] != greedy[32:]).sum() >= 3


@given(model=models(), data=st.data())
def test_a_ragged_batch_equals_each_sequence_alone(model, data):
    sequences = data.draw(st.lists(token_lists(model.config, 8), min_size=1, max_size=4), label="sequences")
    for together, token_ids in zip(run(model, *sequences), sequences, strict=True):
        np.testing.assert_allclose(together, run(model, token_ids)[0], **CLOSE)


class Recorder(RecomputeCache):
    """Notes what it is asked, and answers as its parent does."""

    def __init__(self):
        self.calls = []

    def attend(self, layer, query, key, value, batch, sliding_window=None):
        self.calls.append((layer, query.shape, key.shape, value.shape, batch))
        return super().attend(layer, query, key, value, batch, sliding_window)


@given(model=models(), data=st.data())
def test_every_layer_asks_the_cache_once_under_its_own_number(model, data):
    config, recorder = model.config, Recorder()
    token_ids = data.draw(token_lists(config), label="tokens")
    batch = make_batch([token_ids], [0])
    with torch.inference_mode():
        model(batch, recorder)
    query = (len(token_ids), config.num_heads, config.head_dim)
    key = (len(token_ids), config.num_kv_heads, config.head_dim)
    assert recorder.calls == [(layer, query, key, key, batch) for layer in range(config.num_layers)]


class Deaf:
    """A cache in which no token sees another; it keeps what it is asked."""

    def __init__(self):
        self.asked = []

    def attend(self, layer, query, key, value, batch, sliding_window=None):
        self.asked.append((query, key, value))
        return torch.zeros_like(query)


@given(model=models(), data=st.data())
def test_queries_and_keys_carry_their_own_position_wherever_a_chunk_begins(model, data):
    """Differences alone would not show in one step: a cached key meets the queries of later ones."""
    token_ids = data.draw(token_lists(model.config), label="tokens")
    starts = data.draw(st.lists(st.integers(0, len(token_ids) - 1), min_size=1, max_size=3), label="chunks from")
    whole, chunks = Deaf(), Deaf()
    with torch.inference_mode():
        model(make_batch([token_ids], [0]), whole)
        model(make_batch([token_ids[start:] for start in starts], starts), chunks)
    for expected, found in zip(whole.asked, chunks.asked, strict=True):
        for all_at_once, parts in zip(expected, found, strict=True):
            pieces = torch.cat([all_at_once[start:] for start in starts])
            np.testing.assert_allclose(parts.numpy(), pieces.numpy(), **CLOSE)


@given(model=models(), data=st.data())
def test_next_logits_are_those_of_each_texts_last_token(model, data):
    texts = data.draw(st.lists(token_lists(model.config, 8), min_size=1, max_size=4), label="texts")
    expected = np.stack([model_in_numpy(model, text)[1][-1] for text in texts])
    np.testing.assert_allclose(next_logits(model, texts).numpy(), expected, **CLOSE)


@given(model=models(), num_new=st.integers(0, 4), data=st.data())
def test_generate_appends_the_likeliest_token_to_every_text(model, num_new, data):
    """Each text for itself, however many are generated together; the prompts that were given stay as they are."""
    prompts = data.draw(st.lists(token_lists(model.config, 6), min_size=1, max_size=3), label="prompts")
    texts = [list(prompt) for prompt in prompts]
    steps = list(generate(model, prompts, num_new))
    assert len(steps) == num_new and prompts == texts
    for tokens in steps:
        for text, token in zip(texts, tokens, strict=True):
            logits = model_in_numpy(model, text)[1][-1]
            np.testing.assert_allclose(logits[token], logits.max(), **CLOSE)
            text.append(token)


@given(
    half=st.integers(1, 8),
    theta=st.sampled_from((1.0, 100.0, 10_000.0)),
    m=st.integers(0, 400),
    n=st.integers(0, 400),
    shift=st.integers(0, 111),
    rng=generators(),
)
def test_rotated_products_depend_on_the_difference_of_positions_alone(half, theta, m, n, shift, rng):
    config = ModelConfig(4, 4, 4, 1, 1, 1, head_dim=2 * half, max_position=512, rope_theta=theta)
    cos, sin = rotary_table(config, torch.float64)
    query, key = torch.from_numpy(rng.standard_normal((2, 1, 3, 2 * half)))  # [1 token, 3 heads, head_dim] each

    def product(query_position, key_position):
        q = rotate(query, cos[[query_position], None], sin[[query_position], None])
        k = rotate(key, cos[[key_position], None], sin[[key_position], None])
        return (q * k).sum(-1)

    torch.testing.assert_close(product(m + shift, n + shift), product(m, n), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(product(0, 0), (query * key).sum(-1))
    if m != n and theta > 1.0:
        assert not torch.allclose(product(m, n), product(0, 0), rtol=1e-9, atol=1e-9), "positions do not enter at all"


@given(half=st.integers(1, 8), position=st.integers(0, 511), rng=generators())
def test_rotation_keeps_lengths_and_leaves_position_0_alone(half, position, rng):
    config = ModelConfig(4, 4, 4, 1, 1, 1, head_dim=2 * half, max_position=512)
    cos, sin = rotary_table(config, torch.float64)
    x = torch.from_numpy(rng.standard_normal((1, 2, 2 * half)))
    out = rotate(x, cos[[position], None], sin[[position], None])
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotate(x, cos[[0], None], sin[[0], None]), x)


@given(config=configs(), dtype=st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16)))
def test_the_rotary_table_is_rounded_once_whatever_its_dtype(config, dtype):
    """bfloat16 has no whole numbers between 256 and 258: what is computed in it would turn neighbours alike."""
    config = replace(config, max_position=700)
    speeds = config.rope_theta ** (-2.0 * np.arange(config.head_dim // 2) / config.head_dim)
    turns = np.arange(700)[:, None] * speeds / np.array(config.rope_factors or (1.0,))
    z = np.exp(1j * turns) * config.rope_attention_factor
    tables = *rotary_table(config, dtype), *(getattr(Transformer(config, dtype), name) for name in ("cos", "sin"))
    for found, expected in zip(tables, (z.real, z.imag) * 2, strict=True):
        step = {torch.float64: 1e-12, torch.float32: 1e-7, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
        assert found.dtype == dtype
        atol = step * config.rope_attention_factor + 1e-9
        np.testing.assert_allclose(found.double().numpy(), expected, rtol=0.0, atol=atol)


@st.composite
def batches(draw):
    """Scheduled tokens as make_batch takes them: any starts, any order of blocks, spare blocks, or no table at all."""
    token_ids = draw(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=6), min_size=1, max_size=4))
    starts = [draw(st.integers(0, 10)) for _ in token_ids]
    sampled = draw(st.none() | st.lists(st.sampled_from(range(len(token_ids))), unique=True), label="sampled")
    block_size = draw(st.integers(0, 5), label="block_size, or 0 without tables")
    blocks = iter(draw(st.permutations(range(100))))
    tables = []
    for tokens, start in zip(token_ids, starts, strict=True):
        needed = len(range(0, start + len(tokens), block_size or 100))
        tables.append([next(blocks) for _ in range(needed + draw(st.integers(0, 2), label="spare blocks"))])
    return token_ids, starts, tables if block_size else [], block_size, sampled


@given(batches())
def test_make_batch_lays_tokens_out_as_a_plain_loop_does(drawn):
    token_ids, starts, tables, block_size, sampled = drawn
    flat, positions, slots, edges = [], [], [], [0]
    for i, (tokens, start) in enumerate(zip(token_ids, starts, strict=True)):
        for position, token in enumerate(tokens, start=start):
            flat.append(token)
            positions.append(position)
            in_table = bool(tables) and tables[i][position // block_size] * block_size + position % block_size
            slots.append(in_table if tables else -1)
        edges.append(len(flat))
    batch = make_batch(token_ids, starts, tables, block_size, sampled=sampled)
    assert batch.token_ids.tolist() == flat
    assert batch.positions.tolist() == positions
    assert batch.slot_mapping.tolist() == slots
    assert batch.query_start_loc.tolist() == edges
    assert batch.seq_lens.tolist() == [start + len(tokens) for tokens, start in zip(token_ids, starts, strict=True)]
    rows = range(len(token_ids)) if sampled is None else sampled
    assert batch.logits_rows.tolist() == [edges[i + 1] - 1 for i in rows], "the last token of each that is sampled"
    assert batch.max_query_len == max(map(len, token_ids))
    width = max([1, *map(len, tables)])
    rows = tables or [[]] * len(starts)
    assert batch.block_tables.tolist() == [table + [-1] * (width - len(table)) for table in rows]
    dtypes = {name: getattr(batch, name).dtype for name in ("block_tables", "seq_lens", "query_start_loc")}
    assert set(dtypes.values()) == {torch.int32}, dtypes
    assert {t.dtype for t in (batch.token_ids, batch.positions, batch.slot_mapping, batch.logits_rows)} == {torch.int64}


@given(block_size=st.integers(1, 5), num_blocks=st.integers(0, 4), over=st.integers(1, 20), others=st.booleans())
def test_tokens_that_no_block_holds_are_refused(block_size, num_blocks, over, others):
    """A slot of -1 would drop them silently."""
    start = block_size * num_blocks + over - 1
    token_ids, starts, tables = [[7]], [start], [list(range(num_blocks))]
    if others:  # a wider row beside it does not lend its columns
        token_ids, starts, tables = [*token_ids, [7]], [*starts, 0], [*tables, list(range(num_blocks, num_blocks + 30))]
    with pytest.raises(ValueError, match=f"{start + 1} tokens do not fit into {num_blocks} blocks of {block_size}"):
        make_batch(token_ids, starts, tables, block_size)


def test_a_sequence_without_tokens_is_refused():
    with pytest.raises(ValueError, match="no token"):
        make_batch([[1], []], [0, 3])


GOOD = {
    "vocab_size": 4, "hidden_size": 4, "intermediate_size": 4, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1,
    "head_dim": 2, "max_position": 8, "rope_theta": 10_000.0, "rms_norm_eps": 1e-5, "tie_embeddings": True,
}  # fmt: skip
_SIZES = st.sampled_from(sorted(set(GOOD) - {"rope_theta", "rms_norm_eps", "tie_embeddings"}))
_NO_SIZE = st.integers(max_value=0) | st.floats() | st.none() | st.booleans() | st.text(max_size=3) | st.just([1])
_NO_THETA = st.floats(max_value=0.99) | st.just(float("nan")) | st.just(float("inf")) | st.just(10**400) | st.none()
_NO_EPS = st.floats(max_value=-1e-9) | st.floats(min_value=1.01) | st.just(float("nan")) | st.text(max_size=3)


@given(
    wrong=st.tuples(_SIZES, _NO_SIZE)
    | st.tuples(_SIZES, st.just(True))  # which Python takes for 1
    | st.tuples(st.just("rope_theta"), _NO_THETA)
    | st.tuples(st.just("rms_norm_eps"), _NO_EPS)
    | st.tuples(st.sampled_from(("tie_embeddings", "qkv_bias", "qk_norm")), st.none() | st.integers(2) | st.text())
    | st.tuples(st.just("rope_factors"), st.sampled_from(((1.0, 1.0), (0.0,), (float("nan"),), (1e9,))))
    | st.tuples(st.just("rope_attention_factor"), st.sampled_from((0.0, -1.0, float("nan"), None, "1")))
    | st.tuples(st.just("sliding_windows"), st.sampled_from(((4, 4), (0,), (True,), (2.0,))))
    | st.tuples(st.just("head_dim"), st.integers(0, 50).map(lambda i: 2 * i + 1))
    | st.tuples(st.just("num_kv_heads"), st.integers(3))
    | st.tuples(st.just("max_position"), st.integers(MAX_POSITION + 1))
)
def test_a_shape_that_cannot_be_is_refused_with_its_name_and_number(wrong):
    ModelConfig(**GOOD)
    name, value = wrong
    with pytest.raises(ValueError) as error:
        ModelConfig(**{**GOOD, name: value})
    assert name in str(error.value)
    assert repr(value).replace(",", "") in str(error.value).replace(",", "")


_BOUNDS = {
    "rope_theta": (1.0, 1e12),
    "rms_norm_eps": (0.0, 1.0),
    "rope_attention_factor": (1e-3, 1e3),
    "rope_factors": (1e-6, 1e6),
    "max_position": (1, MAX_POSITION),
}


@pytest.mark.parametrize("name", _BOUNDS)
@pytest.mark.parametrize("place", [0, 1], ids=["least", "most"])
def test_a_bound_is_taken_and_the_next_number_past_it_is_not(name, place):
    bound, away = _BOUNDS[name][place], (-np.inf, np.inf)[place]
    past = bound + (-1, 1)[place] if isinstance(bound, int) else float(np.nextafter(bound, away))
    bound, past = ((bound,), (past,)) if name == "rope_factors" else (bound, past)
    assert getattr(ModelConfig(**{**GOOD, name: bound}), name) == bound
    with pytest.raises(ValueError, match=name):
        ModelConfig(**{**GOOD, name: past})


@given(config=configs(), dtype=st.sampled_from((torch.float64, torch.float32, torch.bfloat16)))
def test_the_bytes_of_a_token_are_those_of_its_k_and_v(config, dtype):
    stored = torch.empty(2, config.num_layers, config.num_kv_heads, config.head_dim, dtype=dtype)
    assert config.kv_bytes_per_token(dtype) == stored.nbytes


@given(st.lists(st.integers(1, 39), max_size=3) | st.lists(st.none() | st.integers(1, 39), max_size=3))
def test_the_widest_window_sees_what_any_layer_sees(windows):
    config = ModelConfig(**{**GOOD, "num_layers": len(windows) or 1, "sliding_windows": tuple(windows)})
    seen = {back for back in range(40) for window in windows or [None] if window is None or back < window}
    assert seen == set(range(40 if config.widest_window is None else config.widest_window))


@given(config=configs(), dtype=st.sampled_from((torch.float32, torch.bfloat16)))
def test_what_is_saved_are_the_weights_and_no_table(config, dtype):
    """A table that was saved with them would be rounded again wherever they are read in another dtype."""
    model = Transformer(config, dtype)
    assert not [name for name in model.state_dict() if "weight" not in name and "bias" not in name]
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}
