"""Chapter 2. Packed linear layers give what plain ones give, and step aside where they cannot."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minipaged.model import linear
from minipaged.model.linear import LIBRARIES, PackedLinear, Way, pack, pack_linears, ways
from minipaged.model.load import load_model, tiny_transformer

pytestmark = pytest.mark.ch02

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def packing(dtype):
    """All ways to multiply by a packed weight here."""
    return [way for way in ways(dtype) if pack(torch.zeros(8, 8, dtype=dtype), way) is not None]


WAYS = packing(torch.float32)
needs_packing = pytest.mark.skipif(not WAYS, reason="this torch has no packed linear layers")
each_way = pytest.mark.parametrize("way", WAYS, ids=str)


def frozen(rows, columns, dtype=torch.float32, bias=False):
    generator = torch.Generator().manual_seed(rows * columns)
    linear = nn.Linear(columns, rows, bias=bias, dtype=dtype).requires_grad_(False)
    for parameter in linear.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return linear


def packed(linear, way):
    return PackedLinear(linear, pack(linear.weight, way))


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    num_tokens=st.integers(0, 40),
    plain_rows=st.sampled_from((0, 1, 8)),
    bias=st.booleans(),
    which=st.sampled_from([(dtype, way) for dtype in TOLERANCES for way in packing(dtype)]),
)
@settings(max_examples=100)
def test_equals_the_plain_product(rows, columns, num_tokens, plain_rows, bias, which):
    dtype, way = which
    linear = frozen(rows, columns, dtype, bias)
    x = torch.randn(num_tokens, columns).to(dtype)
    expected = copy.deepcopy(linear).double()(x.double()) / columns**0.5
    out = packed(linear, way._replace(plain_rows=plain_rows))(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double() / columns**0.5, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@each_way
def test_the_packed_weight_is_what_is_used_but_for_the_rows_that_stay_plain(way, monkeypatch):
    layer = packed(frozen(8, 8), way._replace(plain_rows=2))
    monkeypatch.setattr(F, "linear", lambda *arguments: pytest.fail("the plain product was taken"))
    layer(torch.ones(3, 8))
    layer(torch.ones(0, 8))
    with pytest.raises(pytest.fail.Exception):
        layer(torch.ones(2, 8))


@each_way
def test_rows_that_lie_apart_are_read_as_they_lie(way):
    linear, x = frozen(16, 8), torch.randn(5, 16)[:, ::2]
    torch.testing.assert_close(packed(linear, way)(x), linear(x), rtol=1e-5, atol=1e-5)


@each_way
def test_parameters_that_were_written_to_are_not_taken_from_the_packed_copy(way):
    linear, x = frozen(16, 8, bias=True), torch.randn(3, 8)
    layer = packed(linear, way)
    linear.bias.add_(1.0)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-5)
    linear.weight.mul_(2.0)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-5)


@each_way
def test_a_model_that_moved_to_another_dtype_goes_the_plain_way(way):
    layer, x = packed(frozen(16, 8), way).double(), torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ layer.weight.T)


@each_way
def test_gradients_come_through(way):
    linear = frozen(16, 8, bias=True).requires_grad_(True)
    x = torch.randn(3, 8, requires_grad=True)
    packed(linear, way)(x).sum().backward()
    torch.testing.assert_close(linear.weight.grad, x.detach().sum(0).expand(16, 8))
    torch.testing.assert_close(linear.bias.grad, torch.full((16,), 3.0))
    torch.testing.assert_close(x.grad, linear.weight.detach().sum(0).expand(3, 8))
    x.grad = None
    packed(linear.requires_grad_(False), way)(x).sum().backward()  # the input's gradient alone
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(3, 8))


def test_a_weight_that_cannot_be_packed_stays_plain(monkeypatch):
    assert ways(torch.float64) == [Way("plain", torch.float64)]
    assert pack(torch.empty(8, 8, device="meta"), Way("oneDNN", torch.float32)) is None

    def refuse(*arguments):
        raise RuntimeError("not on this processor")

    monkeypatch.setattr(torch.ops.mkl, "_mkl_reorder_linear_weight", refuse)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    assert ways(torch.float32) == [Way("plain", torch.float32)]
    assert ways(torch.bfloat16) == [Way("plain", torch.bfloat16), Way("plain", torch.float32)]
    for library in LIBRARIES:
        model = nn.Sequential(nn.Linear(300, 300))
        pack_linears(model, Way(library, torch.float32))
        assert type(model[0]) is nn.Linear


@each_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packing_changes_no_name_and_no_parameter(dtype, way, monkeypatch):
    model = tiny_transformer(dtype)
    before, state = dict(model.named_parameters()), model.state_dict()
    monkeypatch.setattr(linear, "MIN_SIZE", 1)
    pack_linears(model, way)
    assert sum(type(module) is PackedLinear for module in model.modules()) == 4 * len(model.layers) + 1
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    assert list(state) == list(model.state_dict())
    assert model.lm_head.weight is model.embed_tokens.weight
    x = torch.randn(2, model.config.hidden_size).to(dtype)
    expected = model.logits(x)
    assert expected.dtype == dtype
    tolerance = 4 * TOLERANCES[dtype]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(copied.logits(x), expected, rtol=tolerance, atol=tolerance)


def test_a_small_model_is_left_plain_and_a_large_layer_with_a_bias_is_packed():
    assert not any(type(module) is PackedLinear for module in load_model("tiny").transformer.modules())
    for way in WAYS:
        model = nn.Sequential(nn.Linear(300, 300), nn.Linear(3, 3))
        pack_linears(model, way)
        assert [type(layer) for layer in model] == [PackedLinear, nn.Linear]
