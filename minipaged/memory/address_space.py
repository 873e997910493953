"""Chapter 5. Two processes in one memory: each sees its own pages, and one frame may hold a page of both.

    process A   page 0 -> frame 2                  frame   0  1  2  3
                page 7 -> frame 0                  named   1  0  2  0   times by page tables
    process B   page 3 -> frame 2                          |     |
                                                        A.7     A.0 and B.3: a write by A is read by B

A frame is free when no page table entry names it. That is the whole rule of sharing, and chapters 6 and 9 use it again.
A frame is cleared before it is handed out, so that no process reads what another one left there.
"""

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
        return len(self._free)

    def num_mappings(self, frame: int) -> int:
        """How many page table entries name the frame."""
        if not 0 <= frame < self.num_frames:
            raise ValueError(f"frame {frame} does not exist: the memory has frames 0 to {self.num_frames - 1}")
        return self._mappings[frame]

    def take(self) -> int:
        """A free frame, all bytes 0, with one mapping: its entry. Raises OutOfFrames, changing nothing."""
        if not self._free:
            raise OutOfFrames(f"all {self.num_frames} frames are in use")
        frame = self._free.popleft()
        self._bytes[frame * self.page_bytes : (frame + 1) * self.page_bytes] = bytes(self.page_bytes)
        self._mappings[frame] = 1
        return frame

    def share(self, frame: int) -> None:
        """One more entry names a frame in use."""
        self._mappings[self._in_use(frame)] += 1

    def drop(self, frame: int) -> None:
        """One entry fewer names the frame; after the last one it is free."""
        self._mappings[self._in_use(frame)] -= 1
        if self._mappings[frame] == 0:
            self._free.append(frame)

    def load(self, physical_address: int) -> int:
        self._in_use(physical_address // self.page_bytes)
        return self._bytes[physical_address]

    def store(self, physical_address: int, byte: int) -> None:
        if not 0 <= byte <= 255:
            raise ValueError(f"a byte is 0 to 255, got {byte}")
        self._in_use(physical_address // self.page_bytes)
        self._bytes[physical_address] = byte

    def _in_use(self, frame: int) -> int:
        if self.num_mappings(frame) == 0:
            raise ValueError(f"frame {frame} is free: dropped twice, or shared after it was freed?")
        return frame


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
        self.table.check_unmapped(page)
        frame = self.memory.take()
        self.table.map(page, frame)
        return frame

    def share(self, page: int, owner: "Process", owner_page: int) -> int:
        """Map a page to the frame of a page of `owner`, and return the frame. No byte is copied.

        Raises PageFault if the owner's page has no frame, ValueError if ours has one, a page does not exist, or the
        memories differ.
        """
        if owner.memory is not self.memory:
            raise ValueError("the two processes have different memories: no frame belongs to both")
        self.table.check_unmapped(page)
        frame = owner.table.frame(owner_page)
        self.memory.share(frame)
        self.table.map(page, frame)
        return frame

    def unmap(self, page: int) -> None:
        """Take the page away. Its frame is free if no other entry names it. Raises ValueError if it has none."""
        self.memory.drop(self.table.unmap(page))

    def load(self, address: int) -> int:
        """The byte at a virtual address."""
        return self.memory.load(self.table.translate(address))

    def store(self, address: int, byte: int) -> None:
        """Write a byte, 0 to 255, else ValueError. Every process that shares the frame reads it."""
        self.memory.store(self.table.translate(address), byte)
