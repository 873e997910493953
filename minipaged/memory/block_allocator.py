"""Chapter 6. The block allocator: a free list and a reference count per block.

    free:    3 1 6                      blocks that no table names
    owners:  0 -> 2   2 -> 1   ...      how many block tables name each block in use

A block is in exactly one of the two, always: the suite of this chapter checks it after every call. The allocator
handles block numbers only; the tensors are in kvcache/. Every block has the same size, so any free block serves any
request: external fragmentation cannot happen. Operating systems call these blocks page frames.
Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", section 4.2.
"""

from collections import deque


class OutOfBlocks(RuntimeError):
    """No block is free. Nothing was changed: the caller may free blocks, preempt a request or wait, and retry."""


class BlockAllocator:
    """A pool of `num_blocks` physical blocks, numbered from 0. Every method is O(1).

    Invariant: a block's reference count is the number of block tables that name it, and it is free when that is 0.
    Raises ValueError for a pool of less than one block.
    """

    def __init__(self, num_blocks: int):
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self._free = deque(range(num_blocks))
        self._owners = [0] * num_blocks

    @property
    def num_blocks(self) -> int:
        return len(self._owners)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def ref_count(self, block: int) -> int:
        """How many tables name the block; 0 means that it is free. Raises ValueError for a block outside the pool."""
        return self._owners[self._known(block)]

    def allocate(self) -> int:
        """Take a block from the free list, with a reference count of 1. Raises OutOfBlocks, changing nothing."""
        if not self._free:
            raise OutOfBlocks(f"all {len(self._owners)} blocks are in use")
        block = self._free.popleft()
        self._owners[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add one reference to a block in use. A free block is refused: the next allocate() may return it.

        Raises ValueError for a block that is free or not in the pool, changing nothing.
        """
        self._owners[self._in_use(block)] += 1

    def free(self, block: int) -> None:
        """Drop one reference. The last one puts the block back on the free list. Raises ValueError like share."""
        self._owners[self._in_use(block)] -= 1
        if self._owners[block] == 0:
            self._free.append(block)

    def _known(self, block: int) -> int:
        if not 0 <= block < len(self._owners):
            raise ValueError(f"block {block} does not exist: the pool has blocks 0 to {len(self._owners) - 1}")
        return block

    def _in_use(self, block: int) -> int:
        if self._owners[self._known(block)] == 0:
            raise ValueError(f"block {block} is free: freed twice, or shared after it was freed?")
        return block
