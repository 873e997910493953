"""Chapter 6. The block table: where the tokens of one sequence lie, logical block by logical block.

    position 9, block_size 4  ->  logical block 9 // 4 = 2, offset 9 % 4 = 1
    blocks [7, 1, 3]          ->  physical block 3
    slot                      ->  3 * 4 + 1 = 13

This is the page table of an operating system with one level: a page is a block of tokens, a process is a sequence,
and an address is a position. Logical blocks are filled in order, so only the last one may be partly empty: a
sequence never wastes more than block_size - 1 slots. Source: the PagedAttention paper, sections 4.2 and 4.3.
"""

from minipaged.memory.block_allocator import BlockAllocator, OutOfBlocks


class BlockTable:
    """The blocks of one sequence, drawn from a shared allocator.

    Invariant: len(blocks) == ceil(num_tokens / block_size), and this table holds one reference to each of its blocks.
    """

    def __init__(self, allocator: BlockAllocator, block_size: int):
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.block_size = block_size
        self.num_tokens = 0
        self._allocator = allocator
        self._blocks: list[int] = []

    @property
    def blocks(self) -> list[int]:
        """Physical block of each logical block (a copy)."""
        return list(self._blocks)

    def slot(self, position: int) -> int:
        """Physical slot of a token: block * block_size + offset. Raises IndexError where no token was appended."""
        if not 0 <= position < self.num_tokens:
            raise IndexError(f"position {position} is not in the table: it holds {self.num_tokens} tokens")
        return self._blocks[position // self.block_size] * self.block_size + position % self.block_size

    def blocks_needed(self, num_new_tokens: int) -> int:
        """How many blocks append_tokens(num_new_tokens) would take: new ones, and one if it must copy the last."""
        if num_new_tokens < 0:
            raise ValueError(f"cannot append {num_new_tokens} tokens")
        total = -(-(self.num_tokens + num_new_tokens) // self.block_size)
        return total - len(self._blocks) + self._must_copy(num_new_tokens)

    def append_tokens(self, num_new_tokens: int) -> list[tuple[int, int]]:
        """Make room for tokens at the end. Returns the copies (source, target) to make before anything is written.

        A shared block is never written. If the new tokens begin inside a last block that another table names too,
        this table takes a block of its own in its place (copy-on-write, the paper's section 4.4).
        Raises OutOfBlocks, changing nothing.
        """
        needed = self.blocks_needed(num_new_tokens)
        if needed > self._allocator.num_free:
            raise OutOfBlocks(f"{num_new_tokens} tokens need {needed} blocks, {self._allocator.num_free} are free")
        copies = []
        if self._must_copy(num_new_tokens):
            shared, own = self._blocks[-1], self._allocator.allocate()
            self._allocator.free(shared)
            self._blocks[-1] = own
            copies.append((shared, own))
        self.num_tokens += num_new_tokens
        while len(self._blocks) * self.block_size < self.num_tokens:
            self._blocks.append(self._allocator.allocate())
        return copies

    def fork(self) -> "BlockTable":
        """A second sequence with the same tokens. No block is taken: both tables name the same ones."""
        child = BlockTable(self._allocator, self.block_size)
        for block in self._blocks:
            self._allocator.share(block)
        child._blocks, child.num_tokens = list(self._blocks), self.num_tokens
        return child

    def truncate(self, num_tokens: int) -> None:
        """Keep the first num_tokens tokens; blocks with none of them are given back. Raises ValueError on a longer one."""
        if not 0 <= num_tokens <= self.num_tokens:
            raise ValueError(f"cannot keep {num_tokens} tokens of {self.num_tokens}")
        while (len(self._blocks) - 1) * self.block_size >= num_tokens and self._blocks:
            self._allocator.free(self._blocks.pop())
        self.num_tokens = num_tokens

    def release(self) -> None:
        """Give back every block. The table is empty afterwards and may be used again."""
        self.truncate(0)

    def _must_copy(self, num_new_tokens: int) -> bool:
        partly_full = self.num_tokens % self.block_size != 0
        return num_new_tokens > 0 and partly_full and self._allocator.ref_count(self._blocks[-1]) > 1
