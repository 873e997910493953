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
        return self._move(tables, self.device, self.host, {})

    def swap_in(self, tables: Sequence[BlockTable], known: Mapping[int, int] | None = None) -> list[tuple[int, int]]:
        """Move a group back. Returns the copies to make, (host_block, device_block). Raises as swap_out does.

        known: host block -> a block in use on the device with the same tokens. It is named, with a reference for each
        table, and nothing is copied.
        """
        return self._move(tables, self.host, self.device, known or {})

    def _move(
        self, tables: Sequence[BlockTable], source: BlockAllocator, target: BlockAllocator, known: Mapping[int, int]
    ) -> list[tuple[int, int]]:
        event = "swap_out" if target is self.host else "swap_in"
        if len({id(table) for table in tables}) != len(tables):
            raise ValueError("a table is given twice: it can move once")
        if any(table.allocator is not source for table in tables):
            raise ValueError(f"{event} moves tables of one pool, and one of these is not there")
        needed = len({block for table in tables for block in table.blocks}) - len(known)  # a shared block moves once
        if needed > target.num_free:
            raise OutOfBlocks(f"{event} of {len(tables)} tables needs {needed} blocks, {target.num_free} are free")
        new = dict(known)  # source block -> its target block, in the order of the plan
        for table in tables:
            old = table.blocks
            for block in old:
                if block in new:
                    target.share(new[block])
                else:
                    new[block] = target.allocate()
            table.move(target, [new[block] for block in old])
            if table.trace is not None:
                for logical, block in enumerate(old):
                    device, host = (block, new[block]) if target is self.host else (new[block], block)
                    table.trace.record(event, seq=table.seq, logical=logical, block=device, host_block=host)
        return [pair for pair in new.items() if pair[0] not in known]
