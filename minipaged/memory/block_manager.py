"""Chapters 3, 6, 9. The block manager: a block table for each sequence, all filled from one pool.

    "A" -> [ 0 1 4 ]        logical block 0 of A is physical block 0
    "B" -> [ 2 3 ]          logical block 0 of B is physical block 2; both come from one free list

Three methods take blocks: `allocate_slots`, `swap_out` and `swap_in`. Each returns the block copies that the device
makes before the step, or None if the pool has too few free blocks; then nothing was changed, and the scheduler lets the
sequence wait or preempts another.

A contiguous cache is this class with one block a sequence, as long as the longest request may be (chapter 3: a *slab*):
BlockManager(num_slabs, block_size=max_model_len). A sequence then holds its one block from its first token on, however
few it writes. That is the whole of the memory that paging saves.

In a model whose layers all have a sliding window, a token that every layer has slid past is never read again. Its block
is freed (`remove_skipped_blocks`), and one block that is neither written nor read takes its place in the table: the
null block, which all sequences name. So a table has no holes, and a logical block keeps its number.
"""

from collections.abc import Sequence

from minipaged.cdiv import cdiv
from minipaged.memory.block_allocator import BlockAllocator
from minipaged.memory.block_table import BlockTable
from minipaged.memory.prefix_cache import PrefixCache, block_keys
from minipaged.memory.swap import Swap
from minipaged.memory.trace import Trace

Copies = list[tuple[int, int]]  # (source block, target block), to be made in this order


class BlockManager:
    """Invariant: a block is in use if and only if a table names it. Raises ValueError for sizes below 1."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        num_host_blocks: int = 0,
        enable_prefix_caching: bool = False,
        sliding_window: int | None = None,
        trace: Trace | None = None,
    ):
        """sliding_window: the widest of all layers. With a trace, whose tables only grow, no block is freed early."""
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.num_blocks, self.block_size, self.num_host_blocks = num_blocks, block_size, num_host_blocks
        self.enable_prefix_caching, self.trace = enable_prefix_caching, trace
        self.sliding_window = sliding_window if trace is None else None
        self._build()

    def _build(self) -> None:
        pool = self.num_blocks, self.block_size
        self.prefix_cache = PrefixCache(*pool, trace=self.trace) if self.enable_prefix_caching else None
        self.device = self.prefix_cache or BlockAllocator(self.num_blocks)
        self.host = BlockAllocator(self.num_host_blocks) if self.num_host_blocks else None
        self._swap = Swap(self.device, self.host) if self.host else None
        self.tables: dict[str, BlockTable] = {}
        self._null = [self.device.allocate()] if self.sliding_window else []
        self._num_skipped: dict[str, int] = {}  # entries of a table, from its first on, that are the null block

    def reset(self) -> None:
        """Empty pools and no tables: after an exception in a step, the contents of the blocks are undefined."""
        self._build()
        if self.trace is not None:
            self.trace.record("reset")

    # ---- what there is -------------------------------------------------------------------------------------------

    @property
    def num_slots(self) -> int:
        """Tokens that the whole pool can hold."""
        return self.num_blocks * self.block_size

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, those that only the prefix cache holds among them."""
        return self.device.num_free

    @property
    def num_used(self) -> int:
        """Blocks that tables on the device name."""
        return self.num_blocks - self.num_free - len(self._null)

    @property
    def num_stored_tokens(self) -> int:
        """Tokens that the sequences have slots for, on the device or the host; in a shared block, once for each."""
        skipped = sum(self._num_skipped.values()) * self.block_size
        return sum(table.num_tokens for table in self.tables.values()) - skipped

    def blocks(self, seq_id: str) -> list[int]:
        """The block table of a sequence: the physical block of each logical block. Empty if it has none."""
        table = self.tables.get(seq_id)
        return table.blocks if table else []

    def num_tokens(self, seq_id: str) -> int:
        """Tokens that the sequence has slots for."""
        table = self.tables.get(seq_id)
        return table.num_tokens if table else 0

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold this many tokens of one sequence."""
        return cdiv(num_tokens, self.block_size)

    def can_ever_fit(self, num_tokens: int) -> bool:
        """Whether the empty pool could hold a sequence of this length."""
        return self.blocks_for(num_tokens) <= self.num_blocks - len(self._null)

    # ---- prefixes that are computed already ----------------------------------------------------------------------

    def get_computed_blocks(self, tokens: Sequence[int], cache_salt: str | None = None) -> list[int]:
        """The blocks of the longest cached prefix of these tokens (`PrefixCache.match`). Changes nothing."""
        return self.prefix_cache.match(tokens, cache_salt) if self.prefix_cache else []

    def prefix_of(self, seq_id: str, num_tokens: int) -> list[int]:
        """The full blocks that hold the first `num_tokens` tokens of a sequence; none where some were freed."""
        return [] if seq_id in self._num_skipped else self.blocks(seq_id)[: num_tokens // self.block_size]

    def block_keys(self, tokens: Sequence[int], cache_salt: str | None = None) -> list[bytes]:
        """The keys of the full blocks of these tokens; none where nothing is cached."""
        return [*block_keys(tokens, self.block_size, cache_salt)] if self.enable_prefix_caching else []

    def cache_blocks(self, seq_id: str, tokens: Sequence[int], cache_salt: str | None = None) -> None:
        """These first tokens of the sequence are written: cache their full blocks, while it has all of them."""
        if self.prefix_cache and seq_id not in self._num_skipped:
            self.prefix_cache.cache_blocks(self.tables[seq_id], tokens, cache_salt)

    def fork(self, parent: str, child: str) -> None:
        """A second sequence with the same tokens, in the same blocks."""
        self.tables[child] = self.tables[parent].fork(seq=child)
        if parent in self._num_skipped:
            self._num_skipped[child] = self._num_skipped[parent]

    # ---- taking blocks, and giving them back ---------------------------------------------------------------------

    def allocate_slots(
        self, seq_id: str, num_tokens: int, prefix: Sequence[int] = (), reserve: int = 0
    ) -> Copies | None:
        """Slots for the first `num_tokens` tokens of a sequence. One without a table gets one, which begins with the
        full blocks of `prefix`. None if fewer than `reserve` blocks would stay free."""
        table = self.tables.get(seq_id)
        if table is not None:
            num_new = num_tokens - table.num_tokens
            if table.blocks_needed(num_new) > self.device.num_free - reserve:
                return None
            return table.append_tokens(num_new)
        num_free = self.device.num_free
        if self.prefix_cache:  # what the prefix cache alone holds is free until a table names it
            num_free -= sum(map(self.prefix_cache.is_evictable, prefix))
        if self.blocks_for(num_tokens) - len(prefix) > num_free - reserve:
            return None
        table = self.tables[seq_id] = BlockTable(self.device, self.block_size, seq=seq_id, trace=self.trace)
        table.append_shared(prefix)  # before any allocation, which could evict them
        return table.append_tokens(num_tokens - table.num_tokens)

    def free(self, seq_id: str) -> None:
        """Release the blocks of a sequence, on the device or on the host. Does nothing if it has none."""
        if table := self.tables.pop(seq_id, None):
            table.release()
        self._num_skipped.pop(seq_id, None)

    def remove_skipped_blocks(self, seq_id: str, num_computed: int) -> None:
        """Free the blocks of tokens that no query from position `num_computed` on sees, in any layer."""
        if not self.sliding_window:
            return
        num_skipped = max(0, num_computed + 1 - self.sliding_window) // self.block_size
        if num_skipped > self._num_skipped.get(seq_id, 0):
            table = self.tables[seq_id]
            blocks = self._null * num_skipped + table.blocks[num_skipped:]
            for block in blocks:
                self.device.share(block)
            table.move(self.device, blocks)
            self._num_skipped[seq_id] = num_skipped

    # ---- the host's pool -----------------------------------------------------------------------------------------

    def is_swapped(self, seq_id: str) -> bool:
        table = self.tables.get(seq_id)
        return table is not None and table.allocator is self.host

    def swap_out(self, seq_id: str) -> Copies | None:
        """Move a sequence to the host; None also if there is no host pool. The copies are (device, host)."""
        if self._swap is None or len(self.tables[seq_id].blocks) > self._swap.host.num_free:
            return None
        return self._swap.swap_out([self.tables[seq_id]])

    def swap_in(self, seq_id: str, num_tokens: int, prefix: Sequence[int] = (), reserve: int = 0) -> Copies | None:
        """Bring a sequence back, if there is room for `num_tokens` tokens. The copies are (host, device).

        prefix: blocks in use on the device that hold its first tokens. They are named, and not copied.
        """
        if self.blocks_for(num_tokens) - len(prefix) > self.device.num_free - reserve:
            return None
        assert self._swap, "a sequence on the host has come there by a swap"
        known = dict(zip(self.blocks(seq_id), prefix, strict=False))
        if seq_id in self._num_skipped:  # the host's copy of the null block
            known[self.blocks(seq_id)[0]] = self._null[0]
        return self._swap.swap_in([self.tables[seq_id]], known)
