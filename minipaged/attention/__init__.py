"""Chapter 7. Attention over tensors: contiguous and paged, one signature (docs/design.md, section 3).

`paged_attention` and `write_kv` are the compiled ones, imported when they are asked for: Numba takes its time.
"""

from typing import TYPE_CHECKING, Any

from minipaged.attention.online_softmax import paged_attention_online
from minipaged.attention.paged import paged_attention_gathered

if TYPE_CHECKING:
    from minipaged.attention.compiled import paged_attention, write_kv

__all__ = ["paged_attention", "paged_attention_gathered", "paged_attention_online", "write_kv"]


def __getattr__(name: str) -> Any:
    if name in ("paged_attention", "write_kv"):
        from minipaged.attention import compiled

        return getattr(compiled, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
