"""Loops compiled for the CPU by Numba: the options they share, and the folder of the compiled code.

    @compiled                       a plain Python function with loops over NumPy arrays; Numba compiles it at its first
    def double(x, out): ...         call for each combination of types, and keeps the code on disk for the next process

With NUMBA_DISABLE_JIT=1 the same functions run as plain Python, and NumPy checks every index.
Numba does not notice a change in another file, so what loops share stands in `compiling_helpers.py`, `halves.py` and,
for their threads, `openmp.py`.
"""

import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from numba import config, njit
from numba.core import event

from minipaged.home import home

# Sums may be reordered, and a * b + c rounded once. Infinities and NaN are kept: a score of -inf is used, and a NaN in
# what was read must show. Without the GIL, other threads of Python run meanwhile.
OPTIONS: dict[str, Any] = {
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},
    "error_model": "numpy",
    "nogil": True,
    "cache": True,
}
BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
DTYPES = {torch.float64, torch.float32, *BITS}


def can_compile(*tensors: torch.Tensor) -> bool:
    """Whether compiled loops can work on these in place: on a CPU, without a gradient. The last two are caches, which
    must be contiguous; the others may be copied to be contiguous."""
    can_learn = torch.is_grad_enabled()
    for tensor in tensors:
        if not tensor.is_cpu or tensor.dtype not in DTYPES or (can_learn and tensor.requires_grad):
            return False
    return all(cache.is_contiguous() for cache in tensors[-2:])


def array_of(tensor: torch.Tensor) -> Any:
    """The memory of the tensor, as a NumPy array. Numba has no 16-bit floats, so these are given by their bits; the
    integer's type says which float it is (`halves.number`)."""
    bits = BITS.get(tensor.dtype)
    tensor = tensor.detach() if tensor.requires_grad else tensor  # a call of its own, of a microsecond
    return (tensor if bits is None else tensor.view(bits)).numpy()


def compiled(function: Callable[..., Any]) -> Any:
    """The decorator: njit with OPTIONS. The code is kept in the package's __pycache__ or under MINIPAGED_HOME."""
    _say_what_takes_the_seconds()
    before = config.CACHE_DIR  # one setting for the process, read when a function is decorated
    try:
        config.CACHE_DIR = before or _cache_folder()
        return njit(**OPTIONS)(function)
    finally:
        config.CACHE_DIR = before


def inlined(function: Callable[..., Any]) -> Any:
    """The decorator of a helper: it becomes part of each loop that calls it, and sees the loop's constants."""
    return njit(**(OPTIONS | {"cache": False, "inline": "always"}))(function)


def exactly(function: Callable[..., Any]) -> Any:
    """The decorator of a helper of single numbers whose sums may not be taken in another order."""
    return njit(error_model="numpy")(function)


@cache
def _cache_folder() -> str:
    """The helpers' contents name the folder: Numba compiles a loop anew if its own file changed, not if theirs did."""
    package = Path(__file__).parent
    helpers = b"".join((package / name).read_bytes() for name in ("compiling_helpers.py", "halves.py", "openmp.py"))
    folder = package / "__pycache__"
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:  # installed where it cannot be written
        folder = home()
    return str(folder / f"loops-{crc32(helpers):08x}")


@cache
def _say_what_takes_the_seconds() -> None:
    """One line on standard error, when the first function of the package is compiled and not loaded."""

    class Notice(event.Listener):
        def on_start(self, event: Any) -> None:
            module = event.data["dispatcher"].py_func.__module__
            if module.startswith("minipaged.") and not said:
                said.append(module)
                print("minipaged: compiling loops for this processor, once (some seconds)", file=sys.stderr, flush=True)

        def on_end(self, event: Any) -> None:
            pass

    said: list[str] = []
    event.register("numba:compile", Notice())
