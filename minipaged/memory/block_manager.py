"""Chapters 3 and 6. Which sequence holds which blocks: one block table for each, all drawn from one pool.

    "A" -> [ 0 1 4 ]        apart in their logical view: A's block 0 and B's block 0 have nothing in common
    "B" -> [ 2 3 ]          together in the physical one: both come from the same free list

The scheduler speaks to memory through these verbs alone. A contiguous cache is the same with one block as large as the
longest sequence may be (a *slab*): a request then holds one block from its first token on, however few it writes.
That is all there is between the two, and the whole of the memory that paging saves.
"""

from minipaged.memory.block_allocator import BlockAllocator
from minipaged.memory.block_table import BlockTable


class BlockManager:
    """Invariant: the blocks in use are exactly those that the tables name."""

    keeps_tokens = True

    def __init__(self, num_blocks: int, block_size: int):
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.block_size = block_size
        self.allocator = BlockAllocator(num_blocks)
        self._tables: dict[str, BlockTable] = {}

    @property
    def num_slots(self) -> int:
        """Tokens that the whole pool can hold."""
        return self.allocator.num_blocks * self.block_size

    @property
    def num_slots_reserved(self) -> int:
        """Slots in blocks that are in use, written or not."""
        return (self.allocator.num_blocks - self.allocator.num_free) * self.block_size

    @property
    def num_tokens(self) -> int:
        """Tokens that the sequences hold."""
        return sum(table.num_tokens for table in self._tables.values())

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence of this length could ever be held, with the whole pool to itself."""
        return num_tokens <= self.num_slots

    def can_append(self, seq_id: str, num_new_tokens: int) -> bool:
        """Whether append would succeed now. A sequence that holds nothing yet may be asked about too."""
        return self._table(seq_id).blocks_needed(num_new_tokens) <= self.allocator.num_free

    def append(self, seq_id: str, num_new_tokens: int) -> list[tuple[int, int]]:
        """Make room for new tokens of a sequence; its first call creates its table. Returns copies (source, target).

        Raises OutOfBlocks, changing nothing.
        """
        table = self._table(seq_id)
        copies = table.append_tokens(num_new_tokens)
        self._tables[seq_id] = table
        return copies

    def blocks(self, seq_id: str) -> list[int]:
        """The block table of a sequence: physical block of each logical block. Empty where it holds nothing."""
        return self._table(seq_id).blocks

    def length(self, seq_id: str) -> int:
        """Tokens that the sequence has room for in its blocks, all of them written once the step has run."""
        return self._table(seq_id).num_tokens

    def free(self, seq_id: str) -> None:
        """Give back all that the sequence holds. One that holds nothing may be freed too."""
        if table := self._tables.pop(seq_id, None):
            table.release()

    def _table(self, seq_id: str) -> BlockTable:
        return self._tables.get(seq_id) or BlockTable(self.allocator, self.block_size)


class SlabManager(BlockManager):
    """Chapter 3's memory: one contiguous slab a request, as long as the longest request may become."""

    def fits(self, num_tokens: int) -> bool:
        return num_tokens <= self.block_size  # a slab has no second one to go on in

    def can_append(self, seq_id: str, num_new_tokens: int) -> bool:
        return self._table(seq_id).num_tokens + num_new_tokens <= self.block_size and super().can_append(
            seq_id, num_new_tokens
        )


class NoMemory:
    """The memory of a server that keeps no K and V: always room, never a block. Every step computes everything."""

    keeps_tokens = False
    block_size = 0
    num_slots = 0
    num_slots_reserved = 0
    num_tokens = 0

    def fits(self, num_tokens: int) -> bool:
        return True

    def can_append(self, seq_id: str, num_new_tokens: int) -> bool:
        return True

    def append(self, seq_id: str, num_new_tokens: int) -> list[tuple[int, int]]:
        return []

    def blocks(self, seq_id: str) -> list[int]:
        return []

    def length(self, seq_id: str) -> int:
        return 0

    def free(self, seq_id: str) -> None:
        pass
