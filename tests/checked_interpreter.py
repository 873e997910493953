"""Chapter 8. Triton's interpreter, checked: no lane leaves the arguments of its launch, and every byte is counted.

    with checked(live={"key_cache": owned, "value_cache": owned}) as memory:
        paged_attention(...)
    memory.loaded["key_cache"]      bytes that unmasked lanes loaded from the kernels' argument `key_cache`
    memory.distinct["key_cache"]    how many bytes of it were loaded at least once
    memory.stored["out"]            bytes stored

The interpreter reads past the end of a tensor in silence, as a GPU does, and returns what lies there. Here a lane that
is not masked must point at an element of some tensor argument of the launch: at one that its shape and strides reach,
so that the gaps of a view are outside too, and, where `live` names the argument, at one that `live` allows. A masked
lane may point anywhere, as on a GPU.

How: all loads and stores of the interpreter end in four functions of one C++ module. A stand-in for that module looks
at the addresses first. This holds from triton 3.6 on, though the builder above it changed.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
import triton
from triton.runtime import interpreter

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    pytest.skip("triton 3.6's interpreter needs NumPy below 2.4 (triton issue 9171)", allow_module_level=True)


class OutsideArguments(AssertionError):
    """A lane that was not masked points outside every tensor argument of its launch, or at what `live` forbids."""


class Memory:
    """What the launches inside one `with checked()` did: bytes by the kernel's argument, whose `_ptr` is left out."""

    def __init__(self, live: dict[str, torch.Tensor]):
        self.launches: list[str] = []  # the kernels' names, in order
        self.loaded: Counter[str] = Counter()
        self.stored: Counter[str] = Counter()
        self._live = live
        self._regions: dict[tuple[str, int, torch.Size, tuple[int, ...]], _Region] = {}
        self._arguments: list[_Region] = []  # of the launch that runs
        self._error: OutsideArguments | None = None

    @property
    def distinct(self) -> Counter[str]:
        """Bytes that were loaded once or more. Equal to `loaded`: no byte was loaded twice."""
        counts: Counter[str] = Counter()
        for region in self._regions.values():
            counts[region.name] += int(region.seen.sum()) * region.itemsize
        return +counts  # without those that were only stored to

    def launch(self, kernel: str, tensors: dict[str, torch.Tensor]) -> None:
        self.launches.append(kernel)
        self._arguments = []
        for name, tensor in tensors.items():
            key = (name, tensor.data_ptr(), tensor.shape, tensor.stride())
            if key not in self._regions:
                self._regions[key] = _Region(name, tensor, self._live.get(name))
            self._arguments.append(self._regions[key])

    def access(self, verb: str, pointers: np.ndarray, mask: np.ndarray, itemsize: int) -> None:
        counts = self.loaded if verb == "loads" else self.stored
        addresses = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.int64)  # [unmasked lanes]
        for region in self._arguments:
            if not addresses.size:
                return
            inside = region.contains(addresses, itemsize)
            if inside is None:
                continue
            taken = int(np.count_nonzero(inside)) * itemsize
            if taken:
                counts[region.name] += taken
                if verb == "loads":
                    region.seen[region.element(addresses[inside])] = True
                addresses = addresses[~inside]
        if addresses.size:
            nearest = min(self._arguments, key=lambda region: region.distance(int(addresses[0])))
            program = interpreter.interpreter_builder.grid_idx
            where = nearest.describe(int(addresses[0]))
            self._error = OutsideArguments(f"{self.launches[-1]}, program {program}, {verb} {where}")
            raise self._error


class _Region:
    """One tensor argument: where its elements lie, which of them may be touched, and which were loaded."""

    def __init__(self, name: str, tensor: torch.Tensor, live: torch.Tensor | None):
        self.name = name
        self.tensor = tensor  # kept, so that no other tensor can come to lie at its address
        self.itemsize = tensor.element_size()
        self.start = tensor.data_ptr()
        # An axis of stride 0 is one element, however often it is repeated.
        axes = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
        self.span = 1 + sum((size - 1) * stride for size, stride in axes) if tensor.numel() else 0  # in elements
        self.seen = np.zeros(self.span, dtype=bool)  # lazily committed: a large pool costs what is touched of it
        self.live = live
        self.allowed: np.ndarray | None = None  # None: every element of the span
        if live is not None:
            allowed = torch.zeros(self.span, dtype=torch.bool)
            allowed.as_strided(tensor.shape, tensor.stride()).copy_(live.expand(tensor.shape))
            self.allowed = allowed.numpy()
        elif self.span != tensor.numel():
            allowed = torch.zeros(self.span, dtype=torch.bool)
            allowed.as_strided([size for size, _ in axes], [stride for _, stride in axes]).fill_(True)
            self.allowed = allowed.numpy()

    def element(self, addresses: np.ndarray) -> np.ndarray:
        return (addresses - self.start) // self.itemsize

    def contains(self, addresses: np.ndarray, itemsize: int) -> np.ndarray | None:
        """One bool a lane; None if no lane can be inside, which is the common case and costs little."""
        end = self.start + self.span * self.itemsize
        if addresses.max() < self.start or addresses.min() >= end:
            return None
        inside = (addresses >= self.start) & (addresses + itemsize <= end)
        inside &= (addresses - self.start) % self.itemsize == 0
        if self.allowed is not None:
            inside[inside] = self.allowed[self.element(addresses[inside])]
        return inside

    def distance(self, address: int) -> int:
        return max(self.start - address, address - (self.start + self.span * self.itemsize) + 1, 0)

    def describe(self, address: int) -> str:
        element, rest = divmod(address - self.start, self.itemsize)
        if rest or not 0 <= element < self.span:
            shift = f" and {rest} bytes" if rest else ""
            return f"element {element}{shift} of {self.name}, whose elements are 0 to {self.span - 1}"
        index, left = [0] * self.tensor.dim(), element
        for axis in sorted(range(self.tensor.dim()), key=self.tensor.stride, reverse=True):
            if self.tensor.stride(axis):
                index[axis], left = divmod(left, self.tensor.stride(axis))
        if left or any(i >= size for i, size in zip(index, self.tensor.shape, strict=True)):
            view = f"a view of shape {list(self.tensor.shape)}, strides {list(self.tensor.stride())}"
            return f"element {element} of {self.name}, which lies in a gap of {view}"
        return f"{self.name}{index}, which holds nothing that is live"


class _Watched:
    """Stands in for the C++ module of the interpreter. What is not a memory access goes through untouched."""

    def __init__(self, module, memory: Memory):
        self._module, self._memory = module, memory

    def __getattr__(self, name):
        return getattr(self._module, name)

    def load(self, pointers, mask, other, dtype):
        self._memory.access("loads", pointers, mask, np.dtype(dtype).itemsize)
        return self._module.load(pointers, mask, other, dtype)

    def store(self, pointers, value, mask):
        self._memory.access("stores", pointers, mask, value.dtype.itemsize)
        return self._module.store(pointers, value, mask)

    def atomic_rmw(self, operation, pointers, value, mask, semantic):
        for verb in ("loads", "stores"):
            self._memory.access(verb, pointers, mask, value.dtype.itemsize)
        return self._module.atomic_rmw(operation, pointers, value, mask, semantic)

    def atomic_cas(self, pointers, compare, value, semantic):
        for verb in ("loads", "stores"):
            self._memory.access(verb, pointers, np.True_, value.dtype.itemsize)
        return self._module.atomic_cas(pointers, compare, value, semantic)


@contextmanager
def checked(live: dict[str, torch.Tensor] | None = None) -> Iterator[Memory]:
    """Watch every launch inside the `with`. Raises OutsideArguments, and never the interpreter's wrapping of it.

    live: by name of a kernel's argument, a bool tensor that broadcasts to its shape; what is False counts as outside.
    """
    memory = Memory(live or {})
    host_copies, run = interpreter.GridExecutor._init_args_hst, interpreter.GridExecutor.__call__

    def note_arguments(executor, args, kwargs):
        """The interpreter works on host copies of the arguments (on a CPU, the tensors themselves)."""
        args, kwargs = host_copies(executor, args, kwargs)
        given = dict(zip(executor.arg_names, args, strict=False)) | kwargs
        tensors = {name.removesuffix("_ptr"): value for name, value in given.items() if isinstance(value, torch.Tensor)}
        memory.launch(executor.fn.__name__, tensors)
        return args, kwargs

    def run_unwrapped(executor, *args, **kwargs):
        try:
            return run(executor, *args, **kwargs)
        except interpreter.InterpreterError:
            if memory._error is not None:
                raise memory._error from None
            raise

    with (
        patch.object(interpreter, "_interpreter", _Watched(interpreter._interpreter, memory)),
        patch.object(interpreter.GridExecutor, "_init_args_hst", note_arguments),
        patch.object(interpreter.GridExecutor, "__call__", run_unwrapped),
    ):
        yield memory
