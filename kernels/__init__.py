"""Chapter 8. Attention through a block table, in Triton. Read in this order:

    kv_write.py        write_kv         store K and V of new tokens in their slots
    block_copy.py      copy_blocks      whole blocks (source, target), for copy-on-write
    online_softmax.py  attend_context   chapter 7's loop over the context, which both attention kernels share
    paged_decode.py    paged_decode     one query a sequence: a program per (sequence, KV head), or several and a merge
    paged_prefill.py   paged_prefill    any number of queries a sequence, behind a cached prefix
    attention.py       paged_attention  the one signature, which picks one of the two
    launch.py                           what launchers share: checks, strides, tiles, warps and stages

Shapes and names are those of docs/design.md, section 3, and of `minipaged.attention`. On a machine with no GPU the
kernels run in Triton's interpreter: set TRITON_INTERPRET=1 before they are imported, and pass tensors on the CPU.

Importing this package needs no Triton. The first use of a name below does, and says so where there is none. The single
launchers are imported from their own modules: `from minipaged.kernels.paged_decode import paged_decode`.
"""

from importlib import import_module
from typing import Any

__all__ = ["copy_blocks", "paged_attention", "write_kv"]

_MODULES = {"copy_blocks": "block_copy", "paged_attention": "attention", "write_kv": "kv_write"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"minipaged.kernels.{name} needs Triton, which runs on Linux (pip install triton); "
            f"minipaged.attention has the same function in torch"
        ) from error
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
