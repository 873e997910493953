"""Memory that attention works in, asked for once and used again at every step and in every layer.

A fresh tensor of some megabytes is memory that the system hands out page by page as it is first written, and takes
back when it is freed. Copying blocks into one takes about 7 times as long as into memory that is there already.
What attention needs, it keeps by name (`Workspace`); what the rest of a model needs, the C library can be told to keep.
"""

import ctypes
import math
import sys
from functools import cache

import torch
from torch import Tensor


class Workspace:
    """Named buffers. Invariant: a buffer's contents mean nothing once the call that asked for it has returned."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}  # what was last asked for

    def take(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor of this shape, on the device of `like`, and of its dtype unless another is given."""
        key = (name, dtype or like.dtype, like.device)
        view = self._views.get(key)
        if view is not None and view.shape == shape:  # all layers of a step ask for the same
            return view
        size, dtype = math.prod(shape), dtype or like.dtype
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            # A context grows by a token a step: take a quarter more than is asked for, and not a new buffer each time.
            with torch.inference_mode(False):  # a tensor made in that mode could be written in that mode alone
                buffer = self._buffers[key] = torch.empty(size + size // 4, dtype=dtype, device=like.device)
        view = self._views[key] = buffer[:size].view(shape)
        return view


@cache
def keep_freed_memory() -> bool:
    """Have the C library keep up to 512 MiB of freed memory for the next tensor. False where it is not glibc.

    By default it maps every larger tensor anew and unmaps it again. Steps of 2,048 tokens of SmolLM2-135M spent 5 % of
    their time in float32, and 22 % in bfloat16, on pages that were handed out, zeroed and taken back. Pools, being
    above 64 MiB, are still given back.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of <malloc.h>
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(trim_threshold, 512 << 20) and mallopt(mmap_threshold, 64 << 20))
