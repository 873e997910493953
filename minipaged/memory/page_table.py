"""Chapter 5. How did operating systems solve it? Pages, frames, and a table between them.

A program sees one long run of addresses. Memory is cut into frames of one size, and any frame may hold any page of the
program. So nothing has to be contiguous, and nothing is reserved before it is used.

    virtual address   1  0 | 1  1 | 0  1  1      two bits of page directory, two of page table, three of offset
                      dir=2  tab=3  offset=3

    page directory    0: -   1: -   2: *   3: -              one entry for each page table; most need not exist
                                     \\
    page table 2              0: -   1: -   2: -   3: 6      page 2 * 4 + 3 = 11  ->  frame 6
    physical address  6 * 8 + 3 = 51                         the offset is never translated

With one level, the table is an array with an entry for each page that there could be: 4 MiB for every process of a
32-bit machine, 512 GiB for 48-bit addresses. With more levels, a table that would be empty is left out.

Chapter 6 is this again: a page is a block of tokens, a process is a sequence, a virtual address is a position.
Source: Silberschatz, Galvin, Gagne, "Operating System Concepts", chapter "Main memory", for the names; the sizes of
x86 are those of Intel's Software Developer's Manual, volume 3A, chapter "Paging".
"""

from dataclasses import dataclass, replace
from typing import Any

from minipaged.cdiv import cdiv


class PageFault(LookupError):
    """An access to a page that has no frame. Nothing was changed: map the page, and access it again."""

    def __init__(self, page: int):
        super().__init__(f"page {page} has no frame")
        self.page = page


@dataclass(frozen=True)
class AddressLayout:
    """How the bits of a virtual address are cut: one index for each level, the top one first, then the offset.

    `entry_bytes` is the size of a page table entry, which names a frame or a table one level down.
    """

    index_bits: tuple[int, ...]
    offset_bits: int
    entry_bytes: int

    def __post_init__(self) -> None:
        if not self.index_bits or min(self.index_bits) < 1:
            raise ValueError(f"index_bits must be one or more levels of at least 1 bit, got {self.index_bits}")
        if self.offset_bits < 0 or self.entry_bytes < 1:
            got = f"got {self.offset_bits} and {self.entry_bytes}"
            raise ValueError(f"offset_bits must be at least 0 and entry_bytes at least 1, {got}")

    @property
    def address_bits(self) -> int:
        return sum(self.index_bits) + self.offset_bits

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, and of a frame."""
        return 1 << self.offset_bits

    @property
    def num_pages(self) -> int:
        return 1 << sum(self.index_bits)

    def split(self, address: int) -> tuple[tuple[int, ...], int]:
        """The index into the table of each level, top first, and the offset. Raises ValueError outside the space."""
        if not 0 <= address < 1 << self.address_bits:
            raise ValueError(f"address {address:#x} is not in a space of {self.address_bits} bits")
        return self.indices(address >> self.offset_bits), address & (self.page_bytes - 1)

    def indices(self, page: int) -> tuple[int, ...]:
        """The index into the table of each level, top first. Raises ValueError for a page outside the space."""
        if not 0 <= page < self.num_pages:
            raise ValueError(f"page {page} does not exist: the space has pages 0 to {self.num_pages - 1}")
        indices = []
        for bits in reversed(self.index_bits):
            indices.append(page & ((1 << bits) - 1))
            page >>= bits
        return tuple(reversed(indices))

    def table_bytes(self, level: int) -> int:
        """Bytes of one table of a level (0 is the top): an entry for each value of the index."""
        return self.entry_bytes << self.index_bits[level]

    @property
    def flat_bytes(self) -> int:
        """Bytes of one table with an entry for each page, used or not."""
        return self.num_pages * self.entry_bytes

    def dense_bytes(self, num_pages: int) -> int:
        """The least that tables of all levels cost when num_pages are mapped: pages 0, 1, 2, ... with no hole.
        Raises ValueError for a number of pages that the space does not have, as sparse_bytes does."""
        self._check_count(num_pages)
        total = self.table_bytes(0)  # the top table always exists
        for level in range(1, len(self.index_bits)):
            pages_of_a_table = 1 << sum(self.index_bits[level:])
            total += cdiv(num_pages, pages_of_a_table) * self.table_bytes(level)
        return total

    def sparse_bytes(self, num_pages: int) -> int:
        """The most that they cost: every page as far from the others as can be, so that it needs tables of its own."""
        self._check_count(num_pages)
        total = self.table_bytes(0)
        for level in range(1, len(self.index_bits)):
            possible_tables = 1 << sum(self.index_bits[:level])
            total += min(num_pages, possible_tables) * self.table_bytes(level)
        return total

    def _check_count(self, num_pages: int) -> None:
        if not 0 <= num_pages <= self.num_pages:
            raise ValueError(f"cannot map {num_pages} pages: the space has {self.num_pages}")


X86_32 = AddressLayout(index_bits=(10, 10), offset_bits=12, entry_bytes=4)  # page directory, page table; 4 KiB pages
X86_64 = AddressLayout(index_bits=(9, 9, 9, 9), offset_bits=12, entry_bytes=8)  # 48 bits; a table fills one page


class MultiLevelPageTable:
    """A table for each level of the layout: a page directory's entry names a table one level down, the last a frame.

    Invariant: a table below the top exists as long as a page under it is mapped, and no longer.
    Raises ValueError for a page or an address outside the space, in every method.
    A real table is an array. Here it is a dictionary of the filled entries, and `cost_bytes` counts the whole array.
    """

    def __init__(self, layout: AddressLayout):
        self.layout = layout
        self._top: dict[int, Any] = {}  # index -> table of the next level; at the last level: index -> frame
        self._num_tables = [1] + [0] * (len(layout.index_bits) - 1)  # that exist, at each level

    @property
    def cost_bytes(self) -> int:
        """Bytes of all the tables that exist now. O(levels)."""
        return sum(count * self.layout.table_bytes(level) for level, count in enumerate(self._num_tables))

    def map(self, page: int, frame: int) -> None:
        """Write the page's entry, and make the tables on the way that do not exist yet.

        Raises ValueError, changing nothing, if the page has a frame already, or if page or frame do not exist.
        """
        if frame < 0:
            raise ValueError(f"frame {frame} does not exist: frames are numbered from 0")
        self.check_unmapped(page)
        *directories, last = self.layout.indices(page)
        table = self._top
        for level, index in enumerate(directories, start=1):
            if index not in table:
                table[index] = {}
                self._num_tables[level] += 1
            table = table[index]
        table[last] = frame

    def unmap(self, page: int) -> int:
        """Clear the page's entry, and return its frame. A table that is left empty is removed; the top one stays.

        Raises ValueError if the page has no frame.
        """
        if not self.is_mapped(page):
            raise ValueError(f"page {page} has no frame: unmapped twice, or never mapped?")
        indices = self.layout.indices(page)
        path = [self._top]  # the tables on the way to the page
        for index in indices[:-1]:
            path.append(path[-1][index])
        frame: int = path[-1].pop(indices[-1])
        for level in range(len(path) - 1, 0, -1):
            if path[level]:
                break
            del path[level - 1][indices[level - 1]]
            self._num_tables[level] -= 1
        return frame

    def is_mapped(self, page: int) -> bool:
        """Whether the page has a frame."""
        return self._walk(page) is not None

    def frame(self, page: int) -> int:
        """The frame of a page: one table read for each level. Raises PageFault if it has none."""
        frame = self._walk(page)
        if frame is None:
            raise PageFault(page)
        return frame

    def translate(self, address: int) -> int:
        """Virtual address -> physical address: frame * page_bytes + offset. Raises PageFault."""
        _, offset = self.layout.split(address)
        return self.frame(address >> self.layout.offset_bits) * self.layout.page_bytes + offset

    def check_unmapped(self, page: int) -> None:
        """Raises ValueError if the page has a frame."""
        if self.is_mapped(page):
            raise ValueError(f"page {page} has frame {self.frame(page)} already: unmap it first")

    def _walk(self, page: int) -> int | None:
        entry: Any = self._top
        for index in self.layout.indices(page):
            entry = entry.get(index)
            if entry is None:
                return None
        frame: int = entry
        return frame


class FlatPageTable(MultiLevelPageTable):
    """One level: all index bits of the layout are read as one, so the page number is the index. One table read finds
    a frame, and the table costs the same with no page mapped and with all of them."""

    def __init__(self, layout: AddressLayout):
        super().__init__(replace(layout, index_bits=(sum(layout.index_bits),)))
