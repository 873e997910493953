"""Chapter 2. Linear layers at a decode step's few rows, as fast as memory allows: weights packed once.

A decode step multiplies a handful of rows by every weight of the model, so it takes as long as reading the weights
does. A plain `linear` takes longer: its library wants the weight in tiles of its own shape, and lays it out at every
call. MKL and oneDNN, which torch brings, can lay it out once and keep it. Which is the faster depends on the processor
(docs/tried.md has figures), so `trial.py` measures it. A processor without bfloat16 instructions multiplies a bfloat16
model in float32, over weights packed in float32; K and V stay bfloat16. Results differ by rounding alone (4e-6). The
operators have no public name: torch's compiler writes them into CPU code (`torch/_inductor/mkldnn_lowerings.py`).
Another device, float64 and a wanted gradient take the plain way.
"""

from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Hints of how many rows there will be: with these, the tiles were good from 1 row on.
_ROWS_FOR_MKL, _ROWS_FOR_ONEDNN = 256, 32
LIBRARIES = ("MKL", "oneDNN", "plain")
MIN_SIZE = 1 << 16  # numbers in a weight: a smaller one stays in the processor's cache, and nothing is gained


class Way(NamedTuple):
    """A way to multiply: who does it, in which type, and up to how many rows the plain weight is the faster."""

    library: str  # one of LIBRARIES
    dtype: torch.dtype
    plain_rows: int = 0

    def __str__(self) -> str:
        return f"{self.library} {str(self.dtype).removeprefix('torch.')}"


class Packed(NamedTuple):
    """A weight in the layout of a way. The product does not need the parameter."""

    way: Way
    numbers: Tensor
    shape: Tensor  # [out_features, in_features], without memory: MKL's product reads only its shape


class PackedLinear(nn.Linear):
    """`nn.Linear` over the same parameters, with a packed copy of the weight beside.

    Invariant: the packed copy is used only while the parameter is the one, and holds the numbers, that were packed.
    """

    def __init__(self, linear: nn.Linear, packed: Packed):
        nn.Module.__init__(self)  # not nn.Linear's: it would draw random numbers for a weight that is here already
        self.out_features, self.in_features = linear.weight.shape
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self._packed: Packed | None = packed
        self._packed_of = weight_version(linear.weight)

    def forward(self, input: Tensor) -> Tensor:
        weight, bias, packed = self.weight, self.bias, self._packed
        is_stale = self._packed_of != weight_version(weight)
        # The packed product has no gradient.
        is_learning = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (input, weight, bias))
        if packed is None or is_stale or input.dtype != weight.dtype or is_learning:
            return F.linear(input, weight, bias)
        if 0 < input.numel() <= packed.way.plain_rows * self.in_features:
            return F.linear(input, weight, bias)
        return product(input, packed, bias)

    def release(self) -> None:
        """Give up the parameter's memory. One NaN stands for all of its numbers: a use of them would show."""
        nothing = torch.full((1, 1), torch.nan, dtype=self.weight.dtype).expand(self.weight.shape)
        self.weight = nn.Parameter(nothing, requires_grad=False)
        self._packed_of = weight_version(self.weight)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # a packed copy cannot be copied or saved; the parameter can


def pack_linears(model: nn.Module, way: Way, keep: bool = True) -> None:
    """Replace every linear layer whose weight is large enough and can be packed by a PackedLinear.

    Names, parameters and state_dict stay as they are, beside the packed copy. keep=False: the parameters are given up,
    except where few rows are multiplied by them.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and is_packable(child) and (packed := pack(child.weight, way)) is not None:
                layer = PackedLinear(child, packed)
                setattr(module, name, layer)
                if not (keep or way.plain_rows):
                    layer.release()


def is_packable(module: nn.Module) -> bool:
    return type(module) is nn.Linear and module.weight.device.type == "cpu" and module.weight.numel() >= MIN_SIZE


def is_packing(way: Way, dtype: torch.dtype) -> bool:
    return way.library != "plain" or way.dtype != dtype


def ways(dtype: torch.dtype) -> list[Way]:
    """All ways to multiply by weights of this type on this processor, the plain one first. Ask for each, and see."""
    if dtype == torch.float64:
        return [Way("plain", dtype)]
    small = torch.zeros(8, 8, dtype=dtype)
    packing = [Way(library, type) for type in dict.fromkeys((dtype, torch.float32)) for library in LIBRARIES]
    return [Way("plain", dtype), *(way for way in packing if pack(small, way) is not None)]


def pack(weight: Tensor, way: Way) -> Packed | None:
    """The weight in the layout of a way. None where it needs no packing, or this torch or processor cannot do it."""
    if not is_packing(way, weight.dtype) or weight.device.type != "cpu":
        return None
    numbers = weight.detach().to(way.dtype)
    with suppress(RuntimeError, AttributeError):
        if way.library == "MKL":
            numbers = torch.ops.mkl._mkl_reorder_linear_weight(numbers, _ROWS_FOR_MKL)
        elif way.library == "oneDNN":
            numbers = torch.ops.mkldnn._reorder_linear_weight(numbers, _ROWS_FOR_ONEDNN)
        packed = Packed(way, numbers, torch.empty(1, 1, dtype=way.dtype).expand(weight.shape))
        product(weight.new_zeros(1, weight.shape[1]), packed)
        return packed
    return None


def product(input: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """What `F.linear` of the packed weight gives, in the type of the input."""
    way, numbers, shape = packed
    x = input.to(way.dtype)
    bias = None if bias is None else bias.to(way.dtype)
    if way.library == "MKL":
        rows = x.numel() // x.shape[-1]  # were it not what is packed for, torch would take `shape` for the weight
        out = torch.ops.mkl._mkl_linear(x, numbers, shape, bias, rows)
    elif way.library == "oneDNN":
        out = torch.ops.mkldnn._linear_pointwise(x, numbers, bias, "none", [], "")
    else:
        out = F.linear(x, numbers, bias)
    return out.to(input.dtype)


def weight_version(weight: Tensor) -> tuple[int, int]:
    """Changes when the parameter moves (another device or dtype) and when it is written to."""
    return weight.data_ptr(), weight._version
