"""Chapter 5. Two processes in one memory: each sees its own pages, and one frame may hold a page of both.

    process A   page 0 -> frame 2                  frame   0  1  2  3
                page 7 -> frame 0                  named   1  0  2  0   times by page tables
    process B   page 3 -> frame 2                          |     |
                                                        A.7     A.0 and B.3: a write by A is read by B

A frame is free when no page table entry names it. That is the whole rule of sharing, and chapters 6 and 9 use it again.
A frame is cleared before it is handed out, so that no process reads what another one left there.
"""

# Exercise ch05_address_space, about 30 minutes. Write what raises
# NotImplementedError, in this order, and run `minipaged check 5` after each step:
#
#   1. PhysicalMemory.num_free
#   2. PhysicalMemory.num_mappings
#   3. PhysicalMemory.take
#   4. PhysicalMemory.share
#   5. PhysicalMemory.drop
#   6. PhysicalMemory.load
#   7. PhysicalMemory.store
#   8. Process.map
#   9. Process.share
#   10. Process.unmap
#   11. Process.load
#   12. Process.store
#
# What is given may be changed too. Any way that keeps the docstrings' promises is right.
# A call that raises changes nothing. Bad input is a ValueError whose message has the numbers, in any words;
# where two errors are due, either is right.
#
# Given: MultiLevelPageTable, in minipaged/memory/page_table.py.
#
#   map(page: int, frame: int) -> None
#       Write the page's entry, and make the tables on the way that do not exist yet. Raises ValueError,
#       changing nothing, if the page has a frame already, or if page or frame do not exist.
#   unmap(page: int) -> int
#       Clear the page's entry, and return its frame. A table that is left empty is removed; the top one
#       stays. Raises ValueError if the page has no frame.
#   frame(page: int) -> int
#       The frame of a page: one table read for each level. Raises PageFault if it has none.
#   translate(address: int) -> int
#       Virtual address -> physical address: frame * page_bytes + offset. Raises PageFault.
#   check_unmapped(page: int) -> None
#       Raises ValueError if the page has a frame.
#
# Made from minipaged/memory/address_space.py by minipaged/course/generate.py.

from collections import deque

from minipaged.memory.page_table import MultiLevelPageTable


class OutOfFrames(RuntimeError):
    """No frame is free. Nothing was changed: the caller may unmap a page, or swap one out, and retry."""


class PhysicalMemory:
    """`num_frames` frames of `page_bytes` bytes each. Every method is O(1), besides the clearing of a frame.

    Invariant: num_mappings(frame) is the number of page table entries that name it, and it is free when that is 0.
    A frame that does not exist is a ValueError, and so is a free one where one in use is needed.
    """

    def __init__(self, num_frames: int, page_bytes: int):
        if num_frames < 1 or page_bytes < 1:
            raise ValueError(f"num_frames and page_bytes must be at least 1, got {num_frames} and {page_bytes}")
        self.num_frames = num_frames
        self.page_bytes = page_bytes
        self._bytes = bytearray(num_frames * page_bytes)
        self._mappings = [0] * num_frames
        self._free = deque(range(num_frames))

    @property
    def num_free(self) -> int:
        raise NotImplementedError("ch05: PhysicalMemory.num_free")

    def num_mappings(self, frame: int) -> int:
        """How many page table entries name the frame."""
        raise NotImplementedError("ch05: PhysicalMemory.num_mappings")

    def take(self) -> int:
        """A free frame, all bytes 0, with one mapping: its entry. Raises OutOfFrames, changing nothing."""
        raise NotImplementedError("ch05: PhysicalMemory.take")

    def share(self, frame: int) -> None:
        """One more entry names a frame in use."""
        raise NotImplementedError("ch05: PhysicalMemory.share")

    def drop(self, frame: int) -> None:
        """One entry fewer names the frame; after the last one it is free."""
        raise NotImplementedError("ch05: PhysicalMemory.drop")

    def load(self, physical_address: int) -> int:
        raise NotImplementedError("ch05: PhysicalMemory.load")

    def store(self, physical_address: int, byte: int) -> None:
        raise NotImplementedError("ch05: PhysicalMemory.store")


class Process:
    """An address space: one page table over one memory. A load or store of an unmapped page raises PageFault."""

    def __init__(self, memory: PhysicalMemory, table: MultiLevelPageTable):
        if table.layout.page_bytes != memory.page_bytes:
            raise ValueError(f"pages of {table.layout.page_bytes} bytes do not fit frames of {memory.page_bytes}")
        self.memory = memory
        self.table = table

    def map(self, page: int) -> int:
        """Give a page a frame, and return it. Raises OutOfFrames where none is free, and ValueError for a page that has
        one or does not exist, changing nothing."""
        raise NotImplementedError("ch05: Process.map")

    def share(self, page: int, owner: "Process", owner_page: int) -> int:
        """Map a page to the frame of a page of `owner`, and return the frame. No byte is copied.

        Raises PageFault if the owner's page has no frame, ValueError if ours has one, a page does not exist, or the
        memories differ.
        """
        raise NotImplementedError("ch05: Process.share")

    def unmap(self, page: int) -> None:
        """Take the page away. Its frame is free if no other entry names it. Raises ValueError if it has none."""
        raise NotImplementedError("ch05: Process.unmap")

    def load(self, address: int) -> int:
        """The byte at a virtual address."""
        raise NotImplementedError("ch05: Process.load")

    def store(self, address: int, byte: int) -> None:
        """Write a byte, 0 to 255, else ValueError. Every process that shares the frame reads it."""
        raise NotImplementedError("ch05: Process.store")
