"""Chapter 6. The block table: where the tokens of one sequence lie, logical block by logical block.

    position 9, block_size 4  ->  logical block 9 // 4 = 2, offset 9 % 4 = 1
    blocks [7, 1, 3]          ->  physical block 3
    slot                      ->  3 * 4 + 1 = 13

This is the page table of an operating system with one level: a page is a block of tokens, a process is a sequence,
and an address is a position. Blocks are filled in order, so only the last one may be partly empty: a sequence wastes at
most block_size - 1 slots. Source: the PagedAttention paper, sections 4.2 and 4.3.

Chapter 9 extends the same class: a block that two tables name is shared, and it is never written.

    A  [7, 1]      fork      A  [7, 1]      A appends      A  [7, 4]     copies [(1, 4)]: the caller copies the
                  ----->     B  [7, 1]      --------->     B  [7, 1]     tensors of block 1 to block 4, then writes
"""

# Exercise ch06_block_table, about 40 minutes. Write what raises
# NotImplementedError, in this order, and run `minipaged check 6` after each step:
#
#   1. BlockTable.blocks
#   2. BlockTable.slot
#   3. BlockTable.blocks_needed
#   4. BlockTable.append_tokens
#   5. BlockTable.truncate
#   6. BlockTable.release
#
# What is given may be changed too. Any way that keeps the docstrings' promises is right.
# A call that raises changes nothing. Bad input is a ValueError whose message has the numbers, in any words;
# where two errors are due, either is right.
#
# Nothing is shared before chapter 9, so nothing is copied yet: append_tokens returns [].
# Events need not be recorded here: `minipaged check` watches the calls by itself.
#
# Given: BlockAllocator, in minipaged/memory/block_allocator.py.
#
#   num_blocks -> int
#   num_free -> int
#   ref_count(block: int) -> int
#       How many tables name the block; 0 means that it is free. Raises ValueError for a block outside the
#       pool.
#   allocate() -> int
#       Take a block from the free list, with a reference count of 1. Raises OutOfBlocks, changing nothing.
#   share(block: int) -> None
#       Add one reference to a block in use. A free block is refused: the next allocate() may return it.
#       Raises ValueError for a block that is free or not in the pool, changing nothing.
#   free(block: int) -> None
#       Drop one reference. The last one puts the block back on the free list. Raises ValueError like share.
#
# Left out here, and met in a later chapter: fork, append_shared, move.
# Made from minipaged/memory/block_table.py by minipaged/course/generate.py.

from collections.abc import Sequence

from minipaged.cdiv import cdiv
from minipaged.memory.block_allocator import BlockAllocator, OutOfBlocks
from minipaged.memory.trace import Trace


class BlockTable:
    """The blocks of one sequence, drawn from a shared allocator.

    Invariant: len(blocks) == ceil(num_tokens / block_size), and this table holds one reference to each of its blocks.
    Given a trace and the sequence's name, it records each change of ownership as an event.
    """

    def __init__(
        self, allocator: BlockAllocator, block_size: int, *, seq: str | None = None, trace: Trace | None = None
    ):
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        if trace is not None and seq is None:
            raise ValueError("a traced table needs the name of its sequence: seq is None")
        self.block_size = block_size
        self.num_tokens = 0
        self.allocator = allocator  # the pool of the blocks: the device's, or the host's while swapped out
        self.seq = seq
        self.trace = trace
        self._blocks: list[int] = []

    @property
    def blocks(self) -> list[int]:
        """Physical block of each logical block (a copy)."""
        raise NotImplementedError("ch06: BlockTable.blocks")

    def slot(self, position: int) -> int:
        """Physical slot of a token: block * block_size + offset. Raises IndexError where no token was appended."""
        raise NotImplementedError("ch06: BlockTable.slot")

    def blocks_needed(self, num_new_tokens: int) -> int:
        """How many blocks append_tokens(num_new_tokens) would take: new ones, and one if it must copy the last. Both
        raise ValueError for a negative number of tokens."""
        raise NotImplementedError("ch06: BlockTable.blocks_needed")

    def append_tokens(self, num_new_tokens: int) -> list[tuple[int, int]]:
        """Make room for tokens at the end. Returns the copies (source, target) to make before anything is written.

        A shared block is never written. If the new tokens begin inside a last block that another table names too, this
        table takes a block of its own for it (copy-on-write, the paper's section 4.4). Copies of several calls are
        made in the order of the calls: the source of one may be the target of a later one.
        Raises OutOfBlocks, changing nothing.
        """
        raise NotImplementedError("ch06: BlockTable.append_tokens")

    def truncate(self, num_tokens: int) -> None:
        """Keep the first num_tokens tokens, and free the blocks after them. Raises ValueError if there are fewer.

        The last block is freed first. A prefix cache (chapter 9) evicts blocks in the order in which they were freed,
        so the end of a prefix is evicted before its beginning.
        """
        raise NotImplementedError("ch06: BlockTable.truncate")

    def release(self) -> None:
        """Free every block. The table is empty afterwards and may be used again."""
        raise NotImplementedError("ch06: BlockTable.release")
