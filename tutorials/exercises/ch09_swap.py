"""Chapter 9. Swap: a sequence that must wait moves to the host's memory, and back when there is room.

    device                              host
    A  [7, 1, 4]     swap_out([A, B])   A  [0, 1, 2]      plan [(7, 0), (1, 1), (4, 2), (3, 3)]
    B  [7, 1, 3]     --------------->   B  [0, 1, 3]      four copies for six entries; 7 and 1 are still shared

Tables that move together form a group. The plan names each block once, so a shared block moves once and is shared
after. (The paper moves all sequences of a request together. The scheduler of chapter 10 moves one at a time, and a
sample that moves back names the blocks of the prompt that another sample still has on the device.) The last block
moves whole, also when it is partly empty. A block that a table outside the group names too is copied like the others,
and the other table keeps it. This class decides, and the caller copies the tensors.
Source: the PagedAttention paper, section 4.5, which compares this with recomputation.
"""

# Exercise ch09_swap, about 30 minutes. Write what raises
# NotImplementedError, in this order, and run `minipaged check 9` after each step:
#
#   1. Swap.swap_out
#   2. Swap.swap_in
#
# What is given may be changed too. Any way that keeps the docstrings' promises is right.
# A call that raises changes nothing. Bad input is a ValueError whose message has the numbers, in any words;
# where two errors are due, either is right.
#
# A table has allocator and num_tokens besides what is listed below. Where table.trace is not None, record after
# the move, for each block, table.trace.record("swap_out", seq=table.seq, logical=0, block=DEVICE,
# host_block=HOST), or "swap_in" with the same fields.
#
# Given: BlockTable, in minipaged/memory/block_table.py.
#
#   blocks -> list[int]
#       Physical block of each logical block (a copy).
#   move(allocator: BlockAllocator, blocks: Sequence[int]) -> None
#       Replace each block by one of another pool, and free the old ones. (Chapter 9: swap.) The caller took
#       one reference to each of `blocks` for this table, which owns it from now on. Raises ValueError,
#       changing nothing, for another number of blocks.
#
# Given: BlockAllocator, in minipaged/memory/block_allocator.py.
#
#   num_free -> int
#   allocate() -> int
#       Take a block from the free list, with a reference count of 1. Raises OutOfBlocks, changing nothing.
#   share(block: int) -> None
#       Add one reference to a block in use. A free block is refused: the next allocate() may return it.
#       Raises ValueError for a block that is free or not in the pool, changing nothing.
#
# Made from minipaged/memory/swap.py by minipaged/course/generate.py.

from collections.abc import Mapping, Sequence

from minipaged.memory.block_allocator import BlockAllocator, OutOfBlocks
from minipaged.memory.block_table import BlockTable


class Swap:
    """Moves groups of tables between a device pool and a host pool. O(1) a block.

    Invariant: a table's blocks are all of the pool that it draws from, `table.allocator`, before and after.
    """

    def __init__(self, device: BlockAllocator, host: BlockAllocator):
        if device is host:
            raise ValueError("device and host are one pool: there is nothing to swap between")
        self.device = device
        self.host = host

    def swap_out(self, tables: Sequence[BlockTable]) -> list[tuple[int, int]]:
        """Move a group to the host. Returns the copies to make, (device_block, host_block).

        The copies come before whatever is written to the device next, and plans of several calls are carried out in
        the order of the calls: the next call may take the blocks that this one frees.
        Raises OutOfBlocks if the host has too few blocks, and ValueError if a table is not on the device or is
        given twice; both change nothing.
        """
        raise NotImplementedError("ch09: Swap.swap_out")

    def swap_in(self, tables: Sequence[BlockTable], known: Mapping[int, int] | None = None) -> list[tuple[int, int]]:
        """Move a group back. Returns the copies to make, (host_block, device_block). Raises as swap_out does.

        known: host block -> a block in use on the device with the same tokens. It is named, with a reference for each
        table, and nothing is copied.
        """
        raise NotImplementedError("ch09: Swap.swap_in")
