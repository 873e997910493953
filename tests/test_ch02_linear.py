"""Chapter 2. Packed linear layers give what plain ones give, and step aside where they cannot."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minipaged.model import linear
from minipaged.model.linear import PackedLinear, pack_linears
from minipaged.model.load import load_model, tiny_transformer

pytestmark = pytest.mark.ch02

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def can_pack(dtype):
    return linear._pack(torch.zeros(8, 8, dtype=dtype))[1] is not None


needs_packing = pytest.mark.skipif(not can_pack(torch.float32), reason="this torch has no packed linear layers")


def frozen(rows, columns, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows * columns)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    return nn.Parameter(weight, requires_grad=False)


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    num_tokens=st.integers(0, 40),
    dtype=st.sampled_from(list(TOLERANCES)),
)
@settings(max_examples=100)
def test_equals_the_plain_product(rows, columns, num_tokens, dtype):
    weight = frozen(rows, columns, dtype)
    x = torch.randn(num_tokens, columns).to(dtype)
    expected = (x.double() @ weight.double().T) / columns**0.5
    out = PackedLinear(weight)(x).double() / columns**0.5
    torch.testing.assert_close(out, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@needs_packing
def test_the_packed_weight_is_what_is_used(monkeypatch):
    layer = PackedLinear(frozen(8, 8))
    monkeypatch.setattr(F, "linear", lambda *arguments: pytest.fail("the plain product was taken"))
    layer(torch.ones(2, 8))


def test_rows_that_lie_apart_are_read_as_they_lie():
    weight, x = frozen(16, 8), torch.randn(5, 16)[:, ::2]
    torch.testing.assert_close(PackedLinear(weight)(x), x @ weight.T, rtol=1e-5, atol=1e-5)


def test_a_weight_that_was_written_to_is_not_taken_from_the_packed_copy():
    weight, x = frozen(16, 8), torch.randn(3, 8)
    layer = PackedLinear(weight)
    weight.mul_(2.0)
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-5, atol=1e-5)


def test_a_model_that_moved_to_another_dtype_goes_the_plain_way():
    layer, x = PackedLinear(frozen(16, 8)).double(), torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ layer.weight.T)


def test_gradients_come_through():
    weight = nn.Parameter(frozen(16, 8).clone())
    x = torch.randn(3, 8, requires_grad=True)
    PackedLinear(weight)(x).sum().backward()
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(16, 8))
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(3, 8))


def test_a_weight_that_cannot_be_packed_stays_plain(monkeypatch):
    assert linear._pack(frozen(8, 8).double())[1] is None
    assert linear._pack(torch.empty(8, 8, device="meta"))[1] is None

    def refuse(*arguments):
        raise RuntimeError("not on this processor")

    monkeypatch.setattr(torch.ops.mkl, "_mkl_reorder_linear_weight", refuse)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    model = nn.Sequential(nn.Linear(300, 300, bias=False))
    pack_linears(model)
    assert type(model[0]) is nn.Linear


@needs_packing
def test_packing_changes_no_name_and_no_parameter():
    model = tiny_transformer(torch.float32)
    before, state = dict(model.named_parameters()), model.state_dict()
    minimum, linear._MIN_SIZE = linear._MIN_SIZE, 1
    try:
        pack_linears(model)
    finally:
        linear._MIN_SIZE = minimum
    assert sum(type(module) is PackedLinear for module in model.modules()) == 4 * len(model.layers) + 1
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    assert list(state) == list(model.state_dict())
    assert model.lm_head.weight is model.embed_tokens.weight
    x = torch.randn(2, model.config.hidden_size)
    torch.testing.assert_close(copy.deepcopy(model).logits(x), model.logits(x), rtol=1e-4, atol=1e-4)


def test_a_small_model_is_left_plain_and_a_layer_with_a_bias_too():
    assert not any(type(module) is PackedLinear for module in load_model("tiny").transformer.modules())
    model = nn.Sequential(nn.Linear(300, 300))
    pack_linears(model)
    assert type(model[0]) is nn.Linear
