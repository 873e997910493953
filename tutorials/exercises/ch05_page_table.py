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

# Exercise ch05_page_table, about 60 minutes. Write what raises
# NotImplementedError, in this order, and run `minipaged check 5` after each step:
#
#   1. AddressLayout.address_bits
#   2. AddressLayout.page_bytes
#   3. AddressLayout.num_pages
#   4. AddressLayout.split
#   5. AddressLayout.indices
#   6. AddressLayout.table_bytes
#   7. AddressLayout.flat_bytes
#   8. AddressLayout.dense_bytes
#   9. AddressLayout.sparse_bytes
#   10. MultiLevelPageTable.cost_bytes
#   11. MultiLevelPageTable.map
#   12. MultiLevelPageTable.unmap
#   13. MultiLevelPageTable.is_mapped
#   14. MultiLevelPageTable.frame
#   15. MultiLevelPageTable.translate
#
# What is given may be changed too. Any way that keeps the docstrings' promises is right.
# A call that raises changes nothing. Bad input is a ValueError whose message has the numbers, in any words;
# where two errors are due, either is right.
#
# Made from minipaged/memory/page_table.py by minipaged/course/generate.py.

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
        raise NotImplementedError("ch05: AddressLayout.address_bits")

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, and of a frame."""
        raise NotImplementedError("ch05: AddressLayout.page_bytes")

    @property
    def num_pages(self) -> int:
        raise NotImplementedError("ch05: AddressLayout.num_pages")

    def split(self, address: int) -> tuple[tuple[int, ...], int]:
        """The index into the table of each level, top first, and the offset. Raises ValueError outside the space."""
        raise NotImplementedError("ch05: AddressLayout.split")

    def indices(self, page: int) -> tuple[int, ...]:
        """The index into the table of each level, top first. Raises ValueError for a page outside the space."""
        raise NotImplementedError("ch05: AddressLayout.indices")

    def table_bytes(self, level: int) -> int:
        """Bytes of one table of a level (0 is the top): an entry for each value of the index."""
        raise NotImplementedError("ch05: AddressLayout.table_bytes")

    @property
    def flat_bytes(self) -> int:
        """Bytes of one table with an entry for each page, used or not."""
        raise NotImplementedError("ch05: AddressLayout.flat_bytes")

    def dense_bytes(self, num_pages: int) -> int:
        """The least that tables of all levels cost when num_pages are mapped: pages 0, 1, 2, ... with no hole.
        Raises ValueError for a number of pages that the space does not have, as sparse_bytes does."""
        raise NotImplementedError("ch05: AddressLayout.dense_bytes")

    def sparse_bytes(self, num_pages: int) -> int:
        """The most that they cost: every page as far from the others as can be, so that it needs tables of its own."""
        raise NotImplementedError("ch05: AddressLayout.sparse_bytes")

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
        raise NotImplementedError("ch05: MultiLevelPageTable.cost_bytes")

    def map(self, page: int, frame: int) -> None:
        """Write the page's entry, and make the tables on the way that do not exist yet.

        Raises ValueError, changing nothing, if the page has a frame already, or if page or frame do not exist.
        """
        raise NotImplementedError("ch05: MultiLevelPageTable.map")

    def unmap(self, page: int) -> int:
        """Clear the page's entry, and return its frame. A table that is left empty is removed; the top one stays.

        Raises ValueError if the page has no frame.
        """
        raise NotImplementedError("ch05: MultiLevelPageTable.unmap")

    def is_mapped(self, page: int) -> bool:
        """Whether the page has a frame."""
        raise NotImplementedError("ch05: MultiLevelPageTable.is_mapped")

    def frame(self, page: int) -> int:
        """The frame of a page: one table read for each level. Raises PageFault if it has none."""
        raise NotImplementedError("ch05: MultiLevelPageTable.frame")

    def translate(self, address: int) -> int:
        """Virtual address -> physical address: frame * page_bytes + offset. Raises PageFault."""
        raise NotImplementedError("ch05: MultiLevelPageTable.translate")

    def check_unmapped(self, page: int) -> None:
        """Raises ValueError if the page has a frame."""
        if self.is_mapped(page):
            raise ValueError(f"page {page} has frame {self.frame(page)} already: unmap it first")


class FlatPageTable(MultiLevelPageTable):
    """One level: all index bits of the layout are read as one, so the page number is the index. One table read finds
    a frame, and the table costs the same with no page mapped and with all of them."""

    def __init__(self, layout: AddressLayout):
        super().__init__(replace(layout, index_bits=(sum(layout.index_bits),)))
