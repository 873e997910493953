"""Where K and V live, behind one contract (`minipaged.model.contract.KVCache`): nowhere, in one piece, or in blocks."""

from minipaged.kvcache.contiguous import ContiguousCache
from minipaged.kvcache.paged import PagedCache
from minipaged.kvcache.recompute import RecomputeCache

__all__ = ["ContiguousCache", "PagedCache", "RecomputeCache"]
