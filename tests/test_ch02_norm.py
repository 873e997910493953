"""Chapter 2. The quick RMSNorm is the RMSNorm, of any row; and it steps aside where a gradient is wanted."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minipaged.model.load import tiny_transformer
from minipaged.model.norm import QuickRMSNorm, quicken_norms

pytestmark = pytest.mark.ch02

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def norms(size, eps, dtype=torch.float32):
    plain = nn.RMSNorm(size, eps=eps, dtype=dtype)
    plain.weight.data.normal_(1.0, 0.5, generator=torch.Generator().manual_seed(size)).to(dtype)
    plain.requires_grad_(False)
    return plain, QuickRMSNorm(plain)


def expected(x, norm):
    x, weight = x.double(), norm.weight.double()
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * weight


@given(
    num_tokens=st.integers(0, 5),
    size=st.integers(1, 70),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
    shift=st.sampled_from([0.0, 3.0]),
    eps=st.sampled_from([1e-6, 1e-5, 1e-2]),
    dtype=st.sampled_from(list(TOLERANCES)),
    seed=st.integers(0, 1000),
)
def test_equals_the_formula(num_tokens, size, scale, shift, eps, dtype, seed):
    plain, quick = norms(size, eps, dtype)
    x = (torch.randn(num_tokens, size, generator=torch.Generator().manual_seed(seed)) * scale + shift).to(dtype)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(quick(x).double(), expected(x, plain), rtol=tolerance, atol=tolerance)
    assert quick(x).dtype == dtype


def test_follows_a_weight_that_is_written_to():
    plain, quick = norms(8, 1e-5)
    x = torch.randn(2, 8)
    quick(x)
    plain.weight.data.mul_(3.0)
    plain.weight.add_(1.0)
    torch.testing.assert_close(quick(x).double(), expected(x, plain), rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_plain_norm():
    plain, quick = norms(8, 1e-5)
    plain.requires_grad_(True)
    x = torch.randn(2, 8)
    gradients = []
    for norm in (plain, quick):
        norm.weight.grad = None
        norm(x).square().sum().backward()
        gradients.append(norm.weight.grad)
    torch.testing.assert_close(*gradients)


def test_a_model_keeps_its_names_and_its_numbers():
    plain = tiny_transformer()
    quick = copy.deepcopy(plain)
    quicken_norms(quick)
    assert sum(isinstance(module, QuickRMSNorm) for module in quick.modules()) == 2 * plain.config.num_layers + 1
    assert all(torch.equal(quick.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())
    assert copy.deepcopy(quick).state_dict().keys() == plain.state_dict().keys()
