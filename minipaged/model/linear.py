"""Chapter 2. Linear layers at a decode step's few rows, as fast as memory allows: weights packed once for oneDNN.

A decode step multiplies a handful of rows by every weight of the model, so it takes as long as reading the weights
does. A plain `linear` takes longer: the library that does the product wants the weight in tiles of its own shape, and
lays it out anew at every call. oneDNN, which torch brings, can lay it out once and keep it. On two CPU cores all linear
layers of SmolLM2-135M but the head took, plain against packed, at 32 rows 114 against 49 ms in float32 and 43 against
31 ms in bfloat16. One packing serves every number of rows. Results differ by rounding alone (4e-6).

torch offers this through two operators without a public name, those that its compiler writes into CPU code
(`torch/_inductor/mkldnn_lowerings.py`). So they are named here and nowhere else, and whatever they do not take (another
device, float64, a build of torch without them, a gradient) goes the plain way.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PACKED_FOR_ROWS = 32  # a hint to oneDNN; with it, the tiles were good from 1 row to 256
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
        self._packed = _pack(weight)
        self._packed_of = stamp(weight)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        is_stale = self._packed_of != stamp(weight)
        if self._packed is None or is_stale or input.dtype != weight.dtype or is_learning(input, weight):
            return F.linear(input, weight)
        return torch.ops.mkldnn._linear_pointwise(input, self._packed, None, "none", [], "")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # oneDNN's layout cannot be copied or saved; the parameter can


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


def _pack(weight: Tensor) -> Tensor | None:
    """The weight in oneDNN's layout; None where it cannot be, or its product cannot be taken."""
    if (
        weight.device.type != "cpu"
        or weight.dtype == torch.float64
        or not hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        return None
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _PACKED_FOR_ROWS)
        # Not every processor has products of bfloat16 or float16: ask for one, and see.
        torch.ops.mkldnn._linear_pointwise(weight.new_zeros(1, weight.shape[1]), packed, None, "none", [], "")
    except (RuntimeError, AttributeError):
        return None
    return packed


def is_learning(input: Tensor, weight: Tensor) -> bool:
    """Whether this call's gradient is wanted: then the plain operation is taken, which has one."""
    return torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)


def stamp(weight: Tensor) -> tuple[int, int]:
    """Changes when the parameter moves (another device or dtype) and when it is written to: a copy of it is stale."""
    return weight.data_ptr(), weight._version
