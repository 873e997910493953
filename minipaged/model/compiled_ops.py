"""Chapter 2. What stands between the linear layers, compiled: one pass over the numbers where torch takes several.

    formula (transformer.py)                            operations of torch     here
    hidden + added, RMSNorm of it                       8                       add_rms_norm
    q and k turned by cos and sin                       8                       rotate
    silu(gate) * up                                     2                       silu_and_multiply

At a decode step's few rows an operation takes as long to begin as to do, and each writes a tensor that the next one
reads. Numba compiles the loops below for this processor. They change a tensor where it lies: `hidden`, the residual
stream, is added to in place, and q and k are turned in the output of their linear layer. Threads share the rows of a
long prompt. With NUMBA_DISABLE_JIT=1 the same functions run as Python, slowly, and can be stepped through.

Numba has no 16-bit floats, so it is given their bits, and the integer's type says which float they are:

    bfloat16   uint16   the upper half of a float32:   sign, 8 bits of exponent,  7 of fraction
    float16    int16    IEEE's half:                   sign, 5 bits of exponent, 10 of fraction

They are read as float32 and computed with in float32. A result is rounded once, to the nearest, ties to even.
"""

from collections.abc import Iterable
from typing import cast

import numpy as np
import torch
from numba import njit
from torch import Tensor, nn

from minipaged.compiling import compiled, in_threads
from minipaged.model.contract import KVCache, Step
from minipaged.model.transformer import Layer, Transformer

_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
_DTYPES = {torch.float64, torch.float32, *_BITS}
_PIECE = 1 << 16  # numbers at least that are worth another thread


class CompiledTransformer(Transformer):
    """`Transformer` with another `forward`: the same steps in the same order. Weights, names and layers are its own."""

    def forward(self, step: Step, cache: KVCache) -> Tensor:
        if not self._can_run_compiled():
            return super().forward(step, cache)
        heads, kv_heads, head_dim = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        added = self.embed_tokens(step.token_ids)  # [num_tokens, hidden_size]
        hidden = torch.zeros_like(added)
        cos, sin = self.cos[step.positions], self.sin[step.positions]  # [num_tokens, head_dim / 2]
        for layer in cast(Iterable[Layer], self.layers):
            normed = add_rms_norm(hidden, added, layer.attention_norm)
            qkv = layer.qkv_proj(normed).view(-1, heads + 2 * kv_heads, head_dim)
            rotate(qkv, cos, sin, heads + kv_heads)
            query, key, value = qkv.split([heads, kv_heads, kv_heads], dim=1)
            out = cache.attend(layer.index, query, key, value, step)  # [num_tokens, heads, head_dim]
            normed = add_rms_norm(hidden, layer.o_proj(out.reshape(-1, heads * head_dim)), layer.mlp_norm)
            added = layer.down_proj(silu_and_multiply(layer.gate_up_proj(normed)))
        return add_rms_norm(hidden, added, self.norm)

    def _can_run_compiled(self) -> bool:
        if self.cos.device.type != "cpu" or self.cos.dtype not in _DTYPES:
            return False
        # A gradient needs the formulas: what was changed in place cannot be differentiated.
        return not (torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()))


def use_compiled_ops(transformer: Transformer) -> None:
    """Make a `Transformer` a `CompiledTransformer`, in place. It goes on by the formulas wherever these are needed."""
    if type(transformer) is Transformer:
        transformer.__class__ = CompiledTransformer


# ---- the operations --------------------------------------------------------------------------------------------------


def add_rms_norm(hidden: Tensor, added: Tensor, norm: nn.RMSNorm) -> Tensor:
    """hidden += added, in place; returns RMSNorm(hidden), a new tensor. All [num_tokens, hidden_size]."""
    out = torch.empty_like(hidden)
    arrays = _array(hidden), _array(added), _array(norm.weight.detach())
    in_threads(_add_rms_norm, len(hidden), *arrays, norm.eps, _array(out), least=_rows(hidden.shape[1]))
    return out


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, num_turned: int) -> None:
    """Turn each pair (x[i], x[i + head_dim / 2]) of the first num_turned heads by its token's angle, in place.

    qkv [num_tokens, heads, head_dim]; cos, sin [num_tokens, head_dim / 2].
    """
    least = _rows(num_turned * qkv.shape[2])
    in_threads(_rotate, len(qkv), _array(qkv), _array(cos), _array(sin), num_turned, least=least)


def silu_and_multiply(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, a new tensor. gate_up [num_tokens, 2 * intermediate_size]: gate first."""
    num_tokens, size = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(num_tokens, size)
    in_threads(_silu_and_multiply, num_tokens, _array(gate_up), _array(out), least=_rows(2 * size))
    return out


def _array(tensor: Tensor) -> np.ndarray:
    """The tensor's own memory as NumPy sees it, halves as their bits: written to, the tensor changes."""
    bits = _BITS.get(tensor.dtype)
    return (tensor if bits is None else tensor.view(bits)).numpy()


def _rows(numbers: int) -> int:
    """How many rows of so many numbers are worth another thread."""
    return -(-_PIECE // numbers)


# ---- the loops -------------------------------------------------------------------------------------------------------


@compiled
def _add_rms_norm(first, last, hidden, added, weight, eps, out):
    size = len(weight)
    for row in range(first, last):
        squares = _computed(0.0, weight[0])
        for d in range(size):
            hidden[row, d] = _rounded(_number(hidden[row, d]) + _number(added[row, d]), weight[0])
            squares += _number(hidden[row, d]) * _number(hidden[row, d])
        factor = _computed(1.0 / np.sqrt(squares / size + eps), weight[0])
        for d in range(size):
            out[row, d] = _rounded(_number(hidden[row, d]) * factor * _number(weight[d]), weight[0])


@compiled
def _rotate(first, last, x, cos, sin, num_turned):
    half = cos.shape[1]
    for row in range(first, last):
        for head in range(num_turned):
            for i in range(half):
                a, b = _number(x[row, head, i]), _number(x[row, head, half + i])
                c, s = _number(cos[row, i]), _number(sin[row, i])
                x[row, head, i] = _rounded(a * c - b * s, x[row, head, i])
                x[row, head, half + i] = _rounded(b * c + a * s, x[row, head, i])


@compiled
def _silu_and_multiply(first, last, gate_up, out):
    size = out.shape[1]
    for row in range(first, last):
        for d in range(size):
            gate, up = _number(gate_up[row, d]), _number(gate_up[row, size + d])
            silu = gate / (_computed(1.0, gate_up[row, d]) + _exp(-gate))
            out[row, d] = _rounded(silu * up, gate_up[row, d])


# ---- one number ------------------------------------------------------------------------------------------------------
# Which type an element has is known when a loop is compiled, and of each function below one branch is left then.

_INFINITY = np.uint32(0x7F800000)  # of float32: every bit of the exponent, none of the fraction. NaN has more
_SIGN = np.uint32(0x80000000)
_TOO_LARGE = np.uint32((127 + 16) << 23)  # 65,536: from here on a float16 is infinite, or NaN
_SUBNORMAL = np.uint32((127 - 14) << 23)  # 2^-14: below it a float16 has steps of 2^-24
_REBIAS = np.uint32((127 - 15) << 23)  # from the exponents of float16 to those of float32


@njit
def _computed(x, like):
    """x in the type that elements such as `like` are computed in."""
    return np.float64(x) if isinstance(like, np.float64) else np.float32(x)


@njit
def _number(x):
    """An element of an array, as the number that it stands for."""
    if isinstance(x, np.uint16):
        return np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    if isinstance(x, np.int16):
        bits = np.uint32(np.uint16(x))
        magnitude = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))
        scaled = np.float32(magnitude.view(np.float32) * np.float32(2.0**112)).view(np.uint32)
        if magnitude >= np.uint32(31 << 23):  # infinity or NaN
            scaled = magnitude | _INFINITY
        return np.uint32(scaled | ((bits & np.uint32(0x8000)) << np.uint32(16))).view(np.float32)
    return x


@njit
def _rounded(x, like):
    """x as an element of the array that `like` is an element of."""
    if isinstance(like, np.uint16):
        bits = np.float32(x).view(np.uint32)
        if np.uint32(bits & ~_SIGN) > _INFINITY:  # rounded like a number, NaN could become one
            return np.uint16(0x7FC0)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    if isinstance(like, np.int16):
        bits = np.float32(x).view(np.uint32)
        sign, magnitude = bits & _SIGN, np.uint32(bits & ~_SIGN)
        if magnitude >= _TOO_LARGE:
            half = np.uint32(0x7E00) if magnitude > _INFINITY else np.uint32(0x7C00)
        elif magnitude < _SUBNORMAL:  # added to 0.5, a float32 is rounded to steps of 2^-24
            half = np.float32(magnitude.view(np.float32) + np.float32(0.5)).view(np.uint32) - np.uint32(126 << 23)
        else:
            odd = (magnitude >> np.uint32(13)) & np.uint32(1)
            half = np.uint32(magnitude - _REBIAS + np.uint32(0xFFF) + odd) >> np.uint32(13)
        return np.uint16(half | (sign >> np.uint32(16))).view(np.int16)
    return x


# The coefficients are those of Cephes' expf.
_POLYNOMIAL = tuple(
    map(np.float32, (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5))
)


# Without fastmath: the two parts of log 2 would be added up, and the smaller lost.
@njit(error_model="numpy")
def _exp(x):
    """e^x within 1e-7 of itself, of operations that a processor does on eight numbers at once; float64 by the library.

    x = n log 2 + r with |r| <= log 2 / 2, so e^x = 2^n e^r: 2^n is the bits of an exponent, e^r a polynomial. Above
    88.4 it is infinite, and below -87.3 it stays at 1e-38. NaN gives that too: its factor in SiLU is NaN already.
    """
    if isinstance(x, np.float64):
        return np.exp(x)
    bounded = x if x > np.float32(-87.3) else np.float32(-87.3)
    bounded = bounded if bounded < np.float32(89.0) else np.float32(89.0)
    n = np.floor(bounded * np.float32(1.44269504) + np.float32(0.5))
    r = (bounded - n * np.float32(0.693359375)) - n * np.float32(-2.12194440e-4)  # the first product is exact
    power = np.float32(0.0)
    for coefficient in _POLYNOMIAL:
        power = power * r + coefficient
    power = power * r * r + r + np.float32(1.0)
    return power * np.uint32(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23)).view(np.float32)
