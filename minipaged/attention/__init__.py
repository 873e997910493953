"""Chapter 7. Attention over tensors: contiguous and paged, one signature (docs/design.md, section 3)."""

from minipaged.attention.compiled import paged_attention, write_kv
from minipaged.attention.gathered import paged_attention_gathered
from minipaged.attention.online_softmax import paged_attention_online

__all__ = ["paged_attention", "paged_attention_gathered", "paged_attention_online", "write_kv"]
