"""Chapter 2. Linear layers at a decode step's few rows, as fast as memory allows: weights packed once.

A decode step multiplies a handful of rows by every weight of the model, so it takes as long as reading the weights
does. A plain `linear` takes longer: the library that does the product wants the weight in tiles of its own shape, and
lays it out anew at every call. Both libraries that torch brings for it can lay it out once and keep it: MKL, which is
the better in float32, and oneDNN, which also takes bfloat16 and float16. On two CPU cores all linear layers of
SmolLM2-135M but the head took, in milliseconds:

    rows                       1      8     32    256
    float32    plain        15.9   33.0   45.8    172
               oneDNN       18.9   23.2   40.3    168
               MKL          15.9   23.2   34.7    154
    bfloat16   plain        17.8   18.1   19.8     42
               oneDNN       11.9   11.4   13.8     31

One packing serves every number of rows. Results differ by rounding alone (4e-6).

torch offers this through operators without a public name, those that its compiler writes into CPU code
(`torch/_inductor/mkldnn_lowerings.py`). So they are named here and nowhere else, and whatever they do not take (another
device, float64, a build of torch without them, a gradient) goes the plain way.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Hints of how many rows there will be: with these, the tiles were good from 1 row on.
_ROWS_FOR_MKL, _ROWS_FOR_ONEDNN = 256, 32
_MIN_SIZE = 1 << 16  # numbers in a weight: a smaller one stays in the processor's cache, and nothing is gained


class PackedLinear(nn.Linear):
    """`nn.Linear` without bias, over the same parameter, with a packed copy of it beside.

    Invariant: the packed copy is used only while the parameter is the one, and holds the numbers, that were packed.
    """

    def __init__(self, weight: nn.Parameter):
        nn.Module.__init__(self)  # not nn.Linear's: it would draw random numbers for a weight that is here already
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", None)
        self._product, self._packed = _pack(weight)
        self._packed_of = stamp(weight)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        is_stale = self._packed_of != stamp(weight)
        if self._packed is None or is_stale or input.dtype != weight.dtype or is_learning(input, weight):
            return F.linear(input, weight)
        return self._product(input, self._packed, weight)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # a packed copy cannot be copied or saved; the parameter can


def pack_linears(model: nn.Module) -> None:
    """Put a PackedLinear in the place of every linear layer without bias whose weight can be packed, in place.

    Names, parameters and state_dict stay as they are. It costs a second copy of those weights in memory (none of the
    process's own where the first is a mapped file: `weight_cache.py`).
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and child.bias is None and child.weight.numel() >= _MIN_SIZE:
                packed = PackedLinear(child.weight)
                if packed._packed is not None:
                    setattr(module, name, packed)


def _mkl(input: Tensor, packed: Tensor, weight: Tensor) -> Tensor:
    rows = input.numel() // input.shape[-1]  # were it not what is packed for, torch would take the plain weight instead
    return torch.ops.mkl._mkl_linear(input, packed, weight, None, rows)


def _onednn(input: Tensor, packed: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(input, packed, None, "none", [], "")


def _pack(weight: Tensor) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], Tensor | None]:
    """The product of an input with the packed weight, and that weight: None where it cannot be packed, or multiplied.

    Not every torch has both libraries, and not every processor has products of bfloat16: ask for one, and see.
    """
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        with suppress(RuntimeError, AttributeError):
            packed = torch.ops.mkl._mkl_reorder_linear_weight(weight.detach(), _ROWS_FOR_MKL)
            _mkl(weight.new_zeros(1, weight.shape[1]), packed, weight)
            return _mkl, packed
    if weight.device.type == "cpu" and weight.dtype != torch.float64:
        with suppress(RuntimeError, AttributeError):
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS_FOR_ONEDNN)
            _onednn(weight.new_zeros(1, weight.shape[1]), packed, weight)
            return _onednn, packed
    return _onednn, None


def is_learning(input: Tensor, weight: Tensor) -> bool:
    """Whether this call's gradient is wanted: then the plain operation is taken, which has one."""
    return torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)


def stamp(weight: Tensor) -> tuple[int, int]:
    """Changes when the parameter moves (another device or dtype) and when it is written to: a copy of it is stale."""
    return weight.data_ptr(), weight._version
