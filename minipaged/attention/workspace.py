"""Memory that attention works in, asked for once and used again at every step and in every layer.

A fresh tensor of some megabytes is memory that the system hands out page by page as it is first written, and takes
back when it is freed. Copying blocks into one takes about 7 times as long as into memory that is there already.
"""

import math

import torch
from torch import Tensor


class Workspace:
    """Named buffers. Invariant: a buffer's contents mean nothing once the call that asked for it has returned."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor of this shape, on the device of `like`, and of its dtype unless another is given."""
        size, dtype = math.prod(shape), dtype or like.dtype
        key = (name, dtype, like.device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            # A context grows by a token a step: take a quarter more than is asked for, and not a new buffer each time.
            with torch.inference_mode(False):  # a tensor made in that mode could be written in that mode alone
                buffer = self._buffers[key] = torch.empty(size + size // 4, dtype=dtype, device=like.device)
        return buffer[:size].view(shape)
