"""Chapter 2. What stands between the linear layers, compiled: one pass over the numbers where torch takes several.

    formula (transformer.py)                            operations of torch     here
    hidden + added, RMSNorm of it                       8                       add_rms_norm
    q, k and v apart, q and k turned by cos and sin     11                      split_and_rotate
    silu(gate) * up                                     2                       silu_and_multiply

At a decode step's few rows an operation takes as long to begin as to do, and each writes a tensor that the next one
reads. Of the loops below, compiled by Numba, each is one pass; `hidden`, the residual stream, is added to in place.
Threads share the rows of a long prompt. Halves are computed in float32, and a result is rounded once, to the nearest,
ties to even.
"""

from collections.abc import Iterable
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from minipaged.cdiv import cdiv
from minipaged.compiling import DTYPES, array_of, compiled, inlined
from minipaged.compiling_helpers import exp
from minipaged.halves import computed, number, rounded
from minipaged.model.batch import ForwardBatch, KVCache
from minipaged.model.transformer import Layer, Transformer
from minipaged.openmp import shared_out, team

_PIECE = 1 << 15  # numbers: rows that hold as many are worth another thread


class CompiledTransformer(Transformer):
    """`Transformer` with another `forward`: the same steps in the same order. Weights, names and layers are its own."""

    def forward(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        if not self._can_run_compiled():
            return super().forward(batch, cache)
        heads, kv_heads, head_dim = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        added = self.embed_tokens(batch.token_ids)  # [num_tokens, hidden_size]
        hidden = torch.zeros_like(added)
        cos, sin = self.cos[batch.positions], self.sin[batch.positions]  # [num_tokens, head_dim / 2]
        for layer in cast(Iterable[Layer], self.layers):
            normed = add_rms_norm(hidden, added, layer.attention_norm)
            qkv = layer.qkv_proj(normed).view(-1, heads + 2 * kv_heads, head_dim)
            if self.config.qk_norm:
                query, key, _ = qkv.split([heads, kv_heads, kv_heads], dim=1)  # views: changed in place, like qkv
                query.copy_(layer.q_norm(query))
                key.copy_(layer.k_norm(key))
            query, key, value = split_and_rotate(qkv, cos, sin, heads, layer.has_rope)
            out = cache.attend(layer.index, query, key, value, batch, layer.sliding_window)  # the shape of query
            normed = add_rms_norm(hidden, layer.o_proj(out.reshape(-1, heads * head_dim)), layer.mlp_norm)
            added = layer.down_proj(silu_and_multiply(layer.gate_up_proj(normed)))
        return add_rms_norm(hidden, added, self.norm)

    def _can_run_compiled(self) -> bool:
        if self.cos.device.type != "cpu" or self.cos.dtype not in DTYPES:
            return False
        # A gradient needs the formulas: what was changed in place cannot be differentiated.
        return not (torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()))


def use_compiled_ops(transformer: Transformer) -> None:
    """Make a `Transformer` a `CompiledTransformer`, in place. Where a gradient is wanted, it runs the formulas."""
    if type(transformer) is Transformer:
        transformer.__class__ = CompiledTransformer


def add_rms_norm(hidden: Tensor, added: Tensor, norm: nn.RMSNorm) -> Tensor:
    """hidden += added, in place; returns RMSNorm(hidden), a new tensor. All [num_tokens, hidden_size]."""
    out = torch.empty_like(hidden)
    arrays = array_of(hidden), array_of(added), array_of(norm.weight)
    num_tokens, size = hidden.shape
    _add_rms_norm(team(num_tokens, cdiv(_PIECE, size)), 0, num_tokens, *arrays, norm.eps, array_of(out))
    return out


def split_and_rotate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, turn: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each in new and contiguous memory; turn: each pair (x[i], x[i + head_dim / 2]) of q and k is turned
    by its token's angle.

    qkv [num_tokens, heads + 2 * kv_heads, head_dim]; cos, sin [num_tokens, head_dim / 2].
    """
    num_tokens, all_heads, head_dim = qkv.shape
    kv_heads = (all_heads - heads) // 2
    query, key, value = (qkv.new_empty(num_tokens, count, head_dim) for count in (heads, kv_heads, kv_heads))
    arrays = [array_of(x) for x in (qkv, cos, sin, query, key, value)]
    _split_and_rotate(team(num_tokens, cdiv(_PIECE, all_heads * head_dim)), 0, num_tokens, *arrays, turn)
    return query, key, value


def silu_and_multiply(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, a new tensor. gate_up [num_tokens, 2 * intermediate_size]: gate first."""
    num_tokens, size = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(num_tokens, size)
    _silu_and_multiply(team(num_tokens, cdiv(_PIECE, 2 * size)), 0, num_tokens, array_of(gate_up), array_of(out))
    return out


@compiled
def _add_rms_norm(team, first, last, hidden, added, weight, eps, out):
    if shared_out(team):
        return
    size = len(weight)
    for row in range(first, last):
        squares = computed(0.0, weight[0])
        for d in range(size):
            hidden[row, d] = rounded(number(hidden[row, d]) + number(added[row, d]), weight[0])
            squares += number(hidden[row, d]) * number(hidden[row, d])
        factor = computed(1.0 / np.sqrt(squares / size + eps), weight[0])
        for d in range(size):
            out[row, d] = rounded(number(hidden[row, d]) * factor * number(weight[d]), weight[0])


@compiled
def _split_and_rotate(team, first, last, qkv, cos, sin, query, key, value, turn):
    if shared_out(team):
        return
    heads, kv_heads = query.shape[1], key.shape[1]
    for row in range(first, last):
        for head in range(heads):
            _turn(qkv, head, cos, sin, row, turn, query, head)
        for head in range(kv_heads):
            _turn(qkv, heads + head, cos, sin, row, turn, key, head)
            _turn(qkv, heads + kv_heads + head, cos, sin, row, False, value, head)


@inlined
def _turn(x, head, cos, sin, row, turn, out, out_head):
    """A head of x, turned if it is to be, to a head of out."""
    half = cos.shape[1]
    for i in range(half):
        a, b = number(x[row, head, i]), number(x[row, head, half + i])
        c, s = number(cos[row, i]), number(sin[row, i])
        out[row, out_head, i] = rounded(a * c - b * s, x[row, head, i]) if turn else x[row, head, i]
        out[row, out_head, half + i] = rounded(b * c + a * s, x[row, head, i]) if turn else x[row, head, half + i]


@compiled
def _silu_and_multiply(team, first, last, gate_up, out):
    if shared_out(team):
        return
    size = out.shape[1]
    for row in range(first, last):
        for d in range(size):
            gate, up = number(gate_up[row, d]), number(gate_up[row, size + d])
            silu = gate / (computed(1.0, gate_up[row, d]) + exp(-gate))
            out[row, d] = rounded(silu * up, gate_up[row, d])
