"""Where K and V live, behind one interface (`minipaged.model.batch.KVCache`): in one piece, or in blocks."""

from minipaged.kvcache.contiguous import ContiguousCache
from minipaged.kvcache.paged import PagedCache

__all__ = ["ContiguousCache", "PagedCache"]
