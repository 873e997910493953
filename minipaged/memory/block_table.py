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
        return list(self._blocks)

    def slot(self, position: int) -> int:
        """Physical slot of a token: block * block_size + offset. Raises IndexError where no token was appended."""
        if not 0 <= position < self.num_tokens:
            raise IndexError(f"position {position} is not in the table: it holds {self.num_tokens} tokens")
        return self._blocks[position // self.block_size] * self.block_size + position % self.block_size

    def blocks_needed(self, num_new_tokens: int) -> int:
        """How many blocks append_tokens(num_new_tokens) would take: new ones, and one if it must copy the last. Both
        raise ValueError for a negative number of tokens."""
        if num_new_tokens < 0:
            raise ValueError(f"cannot append {num_new_tokens} tokens")
        new = cdiv(self.num_tokens + num_new_tokens, self.block_size) - len(self._blocks)
        return new + self._must_copy(num_new_tokens)

    def append_tokens(self, num_new_tokens: int) -> list[tuple[int, int]]:
        """Make room for tokens at the end. Returns the copies (source, target) to make before anything is written.

        A shared block is never written. If the new tokens begin inside a last block that another table names too, this
        table takes a block of its own for it (copy-on-write, the paper's section 4.4). Copies of several calls are
        made in the order of the calls: the source of one may be the target of a later one.
        Raises OutOfBlocks, changing nothing.
        """
        needed = self.blocks_needed(num_new_tokens)
        if needed > self.allocator.num_free:
            raise OutOfBlocks(f"{num_new_tokens} tokens need {needed} blocks, {self.allocator.num_free} are free")
        copies = []
        if self._must_copy(num_new_tokens):
            shared, own = self._blocks[-1], self.allocator.allocate()
            self.allocator.free(shared)
            self._blocks[-1] = own
            copies.append((shared, own))
            if self.trace is not None:
                self.trace.record("copy", seq=self.seq, logical=len(self._blocks) - 1, source=shared, target=own)
        self.num_tokens += num_new_tokens
        while len(self._blocks) < cdiv(self.num_tokens, self.block_size):
            self._blocks.append(self.allocator.allocate())
            if self.trace is not None:
                self.trace.record("allocate", seq=self.seq, logical=len(self._blocks) - 1, block=self._blocks[-1])
        return copies

    def truncate(self, num_tokens: int) -> None:
        """Keep the first num_tokens tokens, and free the blocks after them. Raises ValueError if there are fewer.

        The last block is freed first. A prefix cache (chapter 9) evicts blocks in the order in which they were freed,
        so the end of a prefix is evicted before its beginning.
        """
        if not 0 <= num_tokens <= self.num_tokens:
            raise ValueError(f"cannot keep {num_tokens} tokens of {self.num_tokens}")
        self.num_tokens = num_tokens
        while len(self._blocks) > cdiv(num_tokens, self.block_size):
            block = self._blocks.pop()
            self.allocator.free(block)
            if self.trace is not None:
                self.trace.record("free", seq=self.seq, logical=len(self._blocks), block=block)

    def release(self) -> None:
        """Free every block. The table is empty afterwards and may be used again."""
        self.truncate(0)

    def fork(self, *, seq: str | None = None) -> "BlockTable":
        """A second sequence with the same tokens. No block is taken: both tables name the same ones, and the new one
        has a reference to each. (Chapter 9.)"""
        child = BlockTable(self.allocator, self.block_size, seq=seq, trace=self.trace)
        child._name(self._blocks)
        child.num_tokens = self.num_tokens
        if self.trace is not None:
            self.trace.record("fork", seq=seq, parent=self.seq, count=self.num_tokens)
        return child

    def append_shared(self, blocks: Sequence[int]) -> None:
        """Begin with full blocks that are written already, with a reference to each: what a prefix cache found.
        (Chapter 9.)

        Raises ValueError, changing nothing, if the table is not empty or one of the blocks is free.
        """
        if self.num_tokens:
            raise ValueError(f"shared blocks come first, and the table holds {self.num_tokens} tokens already")
        for block in blocks:
            if self.allocator.ref_count(block) == 0:
                raise ValueError(f"block {block} is free: it holds no tokens")
        self._name(blocks)
        self.num_tokens += len(blocks) * self.block_size

    def move(self, allocator: BlockAllocator, blocks: Sequence[int]) -> None:
        """Replace each block by one of another pool, and free the old ones. (Chapter 9: swap.)

        The caller took one reference to each of `blocks` for this table, which owns it from now on.
        Raises ValueError, changing nothing, for another number of blocks.
        """
        if len(blocks) != len(self._blocks):
            raise ValueError(f"{len(blocks)} blocks cannot replace the {len(self._blocks)} of the table")
        for own in reversed(self._blocks):
            self.allocator.free(own)
        self.allocator, self._blocks = allocator, list(blocks)

    def _name(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.allocator.share(block)
            self._blocks.append(block)
            if self.trace is not None:
                self.trace.record("share", seq=self.seq, logical=len(self._blocks) - 1, block=block)

    def _must_copy(self, num_new_tokens: int) -> bool:
        partly_full = self.num_tokens % self.block_size != 0
        return num_new_tokens > 0 and partly_full and self.allocator.ref_count(self._blocks[-1]) > 1
