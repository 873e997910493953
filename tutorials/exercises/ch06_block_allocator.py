"""Chapter 6. The block allocator: a free list and a reference count per block.

    free:    3 1 6                      blocks that no table names
    owners:  0 -> 2   2 -> 1   ...      how many block tables name each block in use

A block is in exactly one of the two, always: the suite of this chapter checks it after every call. The allocator
handles block numbers only; the tensors are in kvcache/. Every block has the same size, so any free block serves any
request: external fragmentation cannot happen. Operating systems call these blocks page frames.
Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", section 4.2.
"""

# Exercise ch06_block_allocator, about 20 minutes. Write what raises
# NotImplementedError, in this order, and run `minipaged check 6` after each step:
#
#   1. BlockAllocator.__init__
#   2. BlockAllocator.num_blocks
#   3. BlockAllocator.num_free
#   4. BlockAllocator.ref_count
#   5. BlockAllocator.allocate
#   6. BlockAllocator.share
#   7. BlockAllocator.free
#
# What is given may be changed too. Any way that keeps the docstrings' promises is right.
# A call that raises changes nothing. Bad input is a ValueError whose message has the numbers, in any words;
# where two errors are due, either is right.
#
# Made from minipaged/memory/block_allocator.py by minipaged/course/generate.py.

from collections import deque


class OutOfBlocks(RuntimeError):
    """No block is free. Nothing was changed: the caller may free blocks, preempt a request or wait, and retry."""


class BlockAllocator:
    """A pool of `num_blocks` physical blocks, numbered from 0. Every method is O(1).

    Invariant: a block's reference count is the number of block tables that name it, and it is free when that is 0.
    Raises ValueError for a pool of less than one block.
    """

    def __init__(self, num_blocks: int):
        raise NotImplementedError("ch06: BlockAllocator.__init__")

    @property
    def num_blocks(self) -> int:
        raise NotImplementedError("ch06: BlockAllocator.num_blocks")

    @property
    def num_free(self) -> int:
        raise NotImplementedError("ch06: BlockAllocator.num_free")

    def ref_count(self, block: int) -> int:
        """How many tables name the block; 0 means that it is free. Raises ValueError for a block outside the pool."""
        raise NotImplementedError("ch06: BlockAllocator.ref_count")

    def allocate(self) -> int:
        """Take a block from the free list, with a reference count of 1. Raises OutOfBlocks, changing nothing."""
        raise NotImplementedError("ch06: BlockAllocator.allocate")

    def share(self, block: int) -> None:
        """Add one reference to a block in use. A free block is refused: the next allocate() may return it.

        Raises ValueError for a block that is free or not in the pool, changing nothing.
        """
        raise NotImplementedError("ch06: BlockAllocator.share")

    def free(self, block: int) -> None:
        """Drop one reference. The last one puts the block back on the free list. Raises ValueError like share."""
        raise NotImplementedError("ch06: BlockAllocator.free")
