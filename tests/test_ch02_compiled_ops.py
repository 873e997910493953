"""Chapter 2. The compiled operations give what the formulas give, in every type, and step aside for a gradient."""

import copy
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from torch import nn

from minipaged.compiling import array_of
from minipaged.halves import number, rounded
from minipaged.model import compiled_ops
from minipaged.model.batch import make_batch
from minipaged.model.compiled_ops import (
    CompiledTransformer,
    add_rms_norm,
    silu_and_multiply,
    split_and_rotate,
    use_compiled_ops,
)
from minipaged.model.load import TINY, load_model, tiny_transformer
from minipaged.model.recompute import RecomputeCache
from minipaged.model.transformer import rotate

pytestmark = pytest.mark.ch02

# A result is computed in float32 (float64 in itself) and rounded once: half a step of its type, and a little.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4.1e-3, torch.float16: 5.2e-4}
dtypes = st.sampled_from(list(TOLERANCES))
is_python = os.environ.get("NUMBA_DISABLE_JIT") == "1"
MANY = 3 if is_python else 200  # rows that several threads share


def close(out, expected, dtype, atol=None):
    tolerance = TOLERANCES[dtype]
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.double(), expected, rtol=tolerance, atol=atol or tolerance, equal_nan=True, check_dtype=False
    )


def drawn(seed, *shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def norm_of(size, dtype, eps=1e-5):
    norm = nn.RMSNorm(size, eps=eps, dtype=dtype).requires_grad_(False)
    norm.weight.copy_(drawn(size, size) * 0.5 + 1)
    return norm


def rms_norm(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()


# ---- each operation --------------------------------------------------------------------------------------------------


@given(
    num_tokens=st.sampled_from((0, 1, 3)),
    size=st.integers(1, 70),
    scale=st.sampled_from((0.0, 1e-3, 1.0, 100.0)),
    eps=st.sampled_from((1e-6, 1e-5, 1e-2)),
    dtype=dtypes,
    seed=st.integers(0, 1000),
)
def test_add_rms_norm_is_the_sum_and_its_norm(num_tokens, size, scale, eps, dtype, seed):
    hidden, added = drawn(seed, 2, num_tokens, size, dtype=dtype, scale=scale)
    norm, total = norm_of(size, dtype, eps), hidden + added
    out = add_rms_norm(hidden, added, norm)
    assert torch.equal(hidden, total), "the residual stream is not the sum, rounded once"
    close(out, rms_norm(total.double(), norm), dtype)


@given(
    num_tokens=st.sampled_from((0, 1, 3)),
    heads=st.integers(1, 4),
    kv_heads=st.integers(1, 3),
    half=st.integers(1, 20),
    turn=st.booleans(),
    dtype=dtypes,
    seed=st.integers(0, 1000),
)
def test_split_and_rotate_turns_queries_and_keys_alone(num_tokens, heads, kv_heads, half, turn, dtype, seed):
    qkv = drawn(seed, num_tokens, heads + 2 * kv_heads, 2 * half, dtype=dtype)
    angle = drawn(seed + 1, num_tokens, half).double()
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    before = qkv.clone()
    parts = split_and_rotate(qkv, cos, sin, heads, turn)
    assert torch.equal(qkv, before)
    assert all(part.is_contiguous() for part in parts)
    query, key, value = before.split([heads, kv_heads, kv_heads], dim=1)
    for part, x in zip(parts, (query, key), strict=False):
        if turn:
            close(part, rotate(x.double(), cos.double()[:, None], sin.double()[:, None]), dtype)
        else:
            assert torch.equal(part, x)
    assert torch.equal(parts[2], value)


@given(
    num_tokens=st.sampled_from((0, 1, 3)),
    size=st.integers(1, 70),
    scale=st.sampled_from((0.1, 1.0, 10.0, 60.0)),
    dtype=dtypes,
    seed=st.integers(0, 1000),
)
def test_silu_and_multiply_is_silu_of_the_first_half_times_the_second(num_tokens, size, scale, dtype, seed):
    gate_up = drawn(seed, num_tokens, 2 * size, dtype=dtype)
    gate_up[:, :size] *= scale
    gate, up = gate_up.double().chunk(2, dim=-1)
    close(silu_and_multiply(gate_up), F.silu(gate) * up, dtype, atol=1e-7)  # float16 has steps of 6e-8 near 0


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_rows_that_threads_share_are_those_of_one_thread(dtype, monkeypatch):
    hidden, added = drawn(0, 2, MANY, 24, dtype=dtype)
    norm, gate_up, qkv = norm_of(24, dtype), drawn(1, MANY, 24, dtype=dtype), drawn(2, MANY, 3, 8, dtype=dtype)
    cos, sin = drawn(3, 2, MANY, 4, dtype=dtype)

    def all_three():
        total = hidden.clone()
        normed = add_rms_norm(total, added, norm)
        return total, normed, *split_and_rotate(qkv, cos, sin, 1, True), silu_and_multiply(gate_up)

    alone = all_three()
    torch.set_num_threads(2)
    monkeypatch.setattr(compiled_ops, "_PIECE", 1)
    assert all(map(torch.equal, alone, all_three()))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_show_where_the_formula_shows_them(dtype, odd):
    x = drawn(0, 3, 16, dtype=dtype)
    x[1, 3] = odd
    norm = norm_of(16, dtype)
    out = add_rms_norm(torch.zeros_like(x), x, norm)
    close(out, rms_norm(x.double(), norm), dtype)
    gate, up = x.double().chunk(2, dim=-1)
    close(silu_and_multiply(x), F.silu(gate) * up, dtype, atol=1e-7)
    qkv = x.view(3, 1, 16).clone()
    cos, sin = drawn(1, 2, 3, 8, dtype=dtype)
    expected = rotate(qkv.double(), cos.double()[:, None], sin.double()[:, None])
    turned, _, _ = split_and_rotate(torch.cat([qkv] * 3, dim=1), cos, sin, 1, True)
    close(turned, expected, dtype)


def test_exp_is_right_to_the_last_places_over_the_whole_range():
    x = torch.linspace(-87.0, 88.0, 501 if is_python else 100_001)
    ones = torch.ones_like(x)
    out = silu_and_multiply(torch.stack([x, ones]).T.contiguous())[:, 0].double()
    expected = x.double() / (1 + (-x.double()).exp())
    assert ((out - expected).abs() <= 5e-7 * expected.abs()).all()


# Not kept on disk: Numba would not notice that the functions under test, in another file, have changed.
@njit
def read_and_write(bits, numbers, back):
    for i in range(len(bits)):
        numbers[i] = number(bits[i])
        back[i] = rounded(numbers[i], bits[i])


@njit
def write(numbers, bits):
    for i in range(len(bits)):
        bits[i] = rounded(numbers[i], bits[i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_is_read_and_every_float32_is_rounded_as_torch_does_it(dtype):
    halves = torch.arange(-(2**15), 2**15, 257 if is_python else 1, dtype=torch.int16).view(dtype)
    numbers, back = torch.empty(len(halves)), torch.empty_like(halves)
    read_and_write(array_of(halves), numbers.numpy(), array_of(back))
    torch.testing.assert_close(numbers, halves.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, halves, rtol=0, atol=0, equal_nan=True)

    # Between two halves, on the middle, beside it; and any bits at all.
    exact = halves[halves.isfinite()].float()
    step = (exact.abs().to(dtype).view(torch.int16) + 1).view(dtype).float() - exact.abs()
    middle = exact.abs() + step / 2
    anything = torch.randint(-(2**31), 2**31 - 1, (len(halves),), dtype=torch.int32).view(torch.float32)
    up, down = torch.tensor(float("inf")), torch.tensor(0.0)
    # NaN whose fraction lies in the bits that are rounded away, or is so large that rounding would carry into the sign.
    nan = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    drawn = torch.cat([exact, middle, -middle, middle.nextafter(up), middle.nextafter(down), anything, nan])
    out = torch.empty(len(drawn), dtype=dtype)
    write(drawn.numpy(), array_of(out))
    torch.testing.assert_close(out, drawn.to(dtype), rtol=0, atol=0, equal_nan=True)
    is_number = ~drawn.isnan()
    assert torch.equal(out.signbit()[is_number], drawn.signbit()[is_number]), "a zero has lost its sign"


# ---- the whole model -------------------------------------------------------------------------------------------------


def hidden_states(model, *sequences):
    batch = make_batch(sequences, [0] * len(sequences))
    with torch.inference_mode():
        return model(batch, RecomputeCache())


def quick_of(plain):
    quick = copy.deepcopy(plain)
    use_compiled_ops(quick)
    assert type(quick) is CompiledTransformer
    return quick


@given(sequences=st.lists(st.lists(st.integers(0, 256), min_size=1, max_size=6), min_size=1, max_size=3), dtype=dtypes)
@settings(max_examples=4 if is_python else 40)
def test_a_model_gives_the_hidden_states_of_the_formulas(sequences, dtype):
    plain = tiny_transformer(dtype)
    with torch.no_grad():  # with all of its weight, scores reach some hundreds: what one rounding changes grows tenfold
        for layer in plain.layers:
            layer.qkv_proj.weight *= 0.5
            layer.gate_up_proj.weight *= 0.5
    out, expected = hidden_states(quick_of(plain), *sequences), hidden_states(plain, *sequences)
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.3, torch.float16: 0.05}[dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


FAMILIES = {
    "biases": {"qkv_bias": True},
    "norms": {"qk_norm": True},
    "a layer without positions": {"no_rope_layers": (1,)},
    "scaled positions": {"rope_factors": (1.0, 2.0, 4.0, 4.0), "rope_attention_factor": 1.2},
    "windows": {"sliding_windows": (2, None)},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_each_family_gives_the_hidden_states_of_the_formulas(name):
    plain = tiny_transformer(torch.float64, config=replace(TINY, **FAMILIES[name]))
    for parameter in plain.parameters():
        if parameter.dim() == 1:
            parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) + 0.5)
    sequences = [3, 1, 4, 1, 5, 9], [2, 6]
    expected = hidden_states(plain, *sequences)
    torch.testing.assert_close(hidden_states(quick_of(plain), *sequences), expected, rtol=1e-11, atol=1e-11)
    plain_llama = tiny_transformer(torch.float64)
    plain_llama.load_state_dict({n: p for n, p in plain.state_dict().items() if n in plain_llama.state_dict()})
    assert not torch.allclose(hidden_states(plain_llama, *sequences), expected), "nothing differs"


def test_halves_come_nearer_to_the_truth_than_by_the_formulas():
    """Which round after every operation."""
    sequence = [3, 1, 4, 1, 5, 9, 2, 6]
    for dtype in (torch.bfloat16, torch.float16):
        plain = tiny_transformer(dtype)
        truth = hidden_states(copy.deepcopy(plain).double(), sequence)
        formula, quick = hidden_states(plain, sequence), hidden_states(quick_of(plain), sequence)
        assert (quick - truth).abs().mean() < 1.1 * (formula - truth).abs().mean()


def test_a_model_goes_on_by_the_formulas_where_a_gradient_is_wanted(monkeypatch):
    plain = tiny_transformer().requires_grad_(True)
    quick = quick_of(plain)
    batch = make_batch([[1, 2, 3]], [0])
    for model in (plain, quick):
        model(batch, RecomputeCache()).square().sum().backward()
    for (name, ours), theirs in zip(quick.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            assert torch.equal(ours.grad, theirs.grad), name
    with torch.no_grad():  # the same parameters, and no gradient wanted
        monkeypatch.setattr(compiled_ops, "add_rms_norm", lambda *arguments: pytest.fail("compiled"))
        with pytest.raises(pytest.fail.Exception):
            quick(batch, RecomputeCache())


def test_a_model_elsewhere_than_on_a_cpu_goes_on_by_the_formulas():
    quick = quick_of(tiny_transformer())
    assert quick._can_run_compiled()
    assert not quick.to("meta")._can_run_compiled()


def test_a_loaded_model_is_compiled_and_keeps_its_names_and_its_numbers():
    plain, quick = tiny_transformer(), load_model("tiny").transformer
    assert type(quick) is CompiledTransformer
    for copied in (quick, copy.deepcopy(quick), pickle.loads(pickle.dumps(quick))):
        assert list(copied.state_dict()) == list(plain.state_dict())
        assert all(torch.equal(copied.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())
        assert torch.equal(hidden_states(copied, [1, 2, 3]), hidden_states(quick, [1, 2, 3]))


def test_weights_that_were_written_to_are_those_that_are_used():
    quick = quick_of(tiny_transformer())
    before = hidden_states(quick, [1, 2])
    quick.norm.weight.mul_(2.0)
    torch.testing.assert_close(hidden_states(quick, [1, 2]), 2 * before)


# ---- Numba itself ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(is_python, reason="this is that run")
def test_all_of_this_holds_without_the_compiler_too():
    """Where every function is the Python that it is written in, and NumPy checks each index."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", "not loaded_model", __file__]
    env = {**os.environ, "NUMBA_DISABLE_JIT": "1", "HYPOTHESIS_PROFILE": "numba_as_python"}
    run = subprocess.run(command, cwd=Path(__file__).parent.parent, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]


def test_no_numba_is_imported_before_a_model_is_loaded():
    script = "import sys, minipaged, minipaged.memory; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent.parent).returncode == 0
