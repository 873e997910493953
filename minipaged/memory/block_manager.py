"""Chapters 3, 6, 9. Which sequence holds which blocks: one block table for each, all drawn from one pool.

    "A" -> [ 0 1 4 ]        apart in their logical view: A's block 0 and B's block 0 have nothing in common
    "B" -> [ 2 3 ]          together in the physical one: both come from the same free list

The scheduler speaks to memory through these verbs alone, each with a twin that says what it would cost:

    begin      blocks_to_begin       a request enters: what a prefix cache finds, then blocks of its own
    grow       blocks_to_grow        room for one more token of each sequence, with copy-on-write
    swap_in    blocks_to_swap_in     back from the host
    swap_out   can_swap_out          to the host

Nothing is asked for that was not counted before, so OutOfBlocks does not happen. unpaged.py has two simpler memories
with the same verbs.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from minipaged.memory.block_allocator import BlockAllocator
from minipaged.memory.block_table import BlockTable
from minipaged.memory.prefix_cache import PrefixCache
from minipaged.memory.swap import Swap
from minipaged.memory.trace import Trace

Copies = list[tuple[int, int]]  # (source, target), to be made in this order


class Memory(Protocol):
    """What a scheduler asks of memory. `BlockManager` says what each verb means."""

    keeps_tokens: bool  # whether what a step computed is there in the next
    shares_blocks: bool  # whether two sequences may name one block
    finds_prefixes: bool  # whether `find` ever finds anything
    block_size: int  # tokens; 0 where there are no blocks

    @property
    def num_slots(self) -> int: ...
    @property
    def num_free(self) -> int: ...
    def fits(self, prompt_len: int, num_tokens: int, num_seqs: int = 1) -> bool: ...
    def find(self, tokens: Sequence[int], salt: str | None = None) -> list[int]: ...
    def blocks_to_begin(self, found: Sequence[int], lengths: Sequence[int], prompt_len: int) -> int: ...
    def begin(self, seq_id: str, found: Sequence[int], length: int) -> None: ...
    def insert(self, seq_id: str, tokens: Sequence[int], salt: str | None = None) -> None: ...
    def blocks_to_grow(self, lengths: Mapping[str, int]) -> int: ...
    def grow(self, lengths: Mapping[str, int]) -> Copies: ...
    def fork(self, parent: str, child: str) -> None: ...
    def free(self, seq_id: str) -> None: ...
    def recover(self) -> None: ...
    def can_swap_out(self, seq_ids: Iterable[str]) -> bool: ...
    def swap_out(self, seq_ids: Iterable[str]) -> Copies: ...
    def blocks_to_swap_in(self, lengths: Mapping[str, int]) -> int: ...
    def swap_in(self, seq_ids: Iterable[str]) -> Copies: ...


class BlockManager:
    """Invariant: the blocks in use are exactly those that the tables name."""

    keeps_tokens = True
    shares_blocks = True

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        num_host_blocks: int = 0,
        enable_prefix_caching: bool = False,
        trace: Trace | None = None,
    ):
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.block_size = block_size
        self.trace = trace
        self._sizes = num_blocks, num_host_blocks
        self._tables: dict[str, BlockTable] = {}
        self.finds_prefixes = enable_prefix_caching
        self._build()

    def _build(self) -> None:
        num_blocks, num_host_blocks = self._sizes
        self.allocator = (
            PrefixCache(num_blocks, self.block_size, trace=self.trace)
            if self.finds_prefixes
            else BlockAllocator(num_blocks)
        )
        self.host = BlockAllocator(num_host_blocks) if num_host_blocks else None
        self._swap = Swap(self.allocator, self.host) if self.host else None

    # ---- what there is -----------------------------------------------------------------------------------------

    @property
    def num_slots(self) -> int:
        """Tokens that the whole pool can hold."""
        return self.allocator.num_blocks * self.block_size

    @property
    def num_free(self) -> int:
        """Blocks that can be had now, those that only the prefix cache remembers among them."""
        return self.allocator.num_free

    @property
    def num_slots_reserved(self) -> int:
        """Slots in blocks that are in use, written or not."""
        return (self.allocator.num_blocks - self.allocator.num_free) * self.block_size

    @property
    def num_tokens(self) -> int:
        """Tokens that the sequences have room for on the device, those of a shared block counted once for each."""
        return sum(table.num_tokens for table in self._tables.values() if table.allocator is self.allocator)

    def blocks(self, seq_id: str) -> list[int]:
        """The block table of a sequence: physical block of each logical block. Empty where it holds nothing."""
        return self._table(seq_id).blocks

    def length(self, seq_id: str) -> int:
        """Tokens that the sequence has room for in its blocks, all of them written once it is computed."""
        return self._table(seq_id).num_tokens

    def fits(self, prompt_len: int, num_tokens: int, num_seqs: int = 1) -> bool:
        """Whether `num_seqs` sequences of this length, with one prompt, could be held by the whole pool.

        They share the full blocks of the prompt, and at worst nothing else.
        """
        shared = prompt_len // self.block_size
        return shared + num_seqs * (self._blocks_for(num_tokens) - shared) <= self.allocator.num_blocks

    # ---- a request enters --------------------------------------------------------------------------------------

    def find(self, tokens: Sequence[int], salt: str | None = None) -> list[int]:
        """The blocks that already hold the first of these tokens, never all of them. Changes nothing."""
        return self.allocator.match(tokens, salt) if isinstance(self.allocator, PrefixCache) else []

    def blocks_to_begin(self, found: Sequence[int], lengths: Sequence[int], prompt_len: int) -> int:
        """Blocks that sequences of these lengths take, if they share the full blocks of their prompt.

        A block that was found costs nothing while a table names it, and else itself.
        """
        first, *others = lengths
        in_use = sum(self.allocator.ref_count(block) > 1 for block in found)
        shared = prompt_len // self.block_size
        return self._blocks_for(first) - in_use + sum(self._blocks_for(length) - shared for length in others)

    def begin(self, seq_id: str, found: Sequence[int], length: int) -> None:
        """Make a table with room for `length` tokens, the first of them in the blocks that were found.

        Raises OutOfBlocks; see `blocks_to_begin`.
        """
        table = self._tables[seq_id] = self._table(seq_id)
        table.append_shared(found)  # before anything is allocated: until a table names them, they may be evicted
        table.append_tokens(length - table.num_tokens)

    def insert(self, seq_id: str, tokens: Sequence[int], salt: str | None = None) -> None:
        """These first tokens of the sequence are written: let their full blocks be found."""
        if isinstance(self.allocator, PrefixCache):
            self.allocator.insert(self._tables[seq_id], tokens, salt)

    # ---- it goes on --------------------------------------------------------------------------------------------

    def blocks_to_grow(self, lengths: Mapping[str, int]) -> int:
        """Blocks that `grow` takes: new ones, and copies of last blocks that are shared."""
        needed = 0
        copied: Counter[int] = Counter()
        for seq_id, length in lengths.items():
            table = self._tables[seq_id]
            more = length - table.num_tokens
            needed += table.blocks_needed(more)
            if len(lengths) > 1 and more and table.num_tokens % self.block_size:
                copied[table.slot(table.num_tokens - 1) // self.block_size] += 1
        # Where all owners of a block take a copy, the last of them finds itself alone and keeps the original.
        for block, owners in copied.items():
            needed -= owners > 1 and table.allocator.ref_count(block) == owners
        return needed

    def grow(self, lengths: Mapping[str, int]) -> Copies:
        """Make room up to these lengths. Returns the copies to make. Raises OutOfBlocks; see `blocks_to_grow`."""
        copies = []
        for seq_id, length in lengths.items():
            table = self._tables[seq_id]
            copies += table.append_tokens(length - table.num_tokens)
        return copies

    def fork(self, parent: str, child: str) -> None:
        """A second sequence with the same tokens, in the same blocks."""
        table = self._tables[child] = self._tables[parent].fork(seq=child)
        if self.trace is not None:  # a replay cannot know how much of a shared, partly full block is the child's
            self.trace.record("write", seq=child, start=table.num_tokens, count=0)

    def free(self, seq_id: str) -> None:
        """Give back all that the sequence holds, here or on the host. One that holds nothing may be freed too."""
        if table := self._tables.pop(seq_id, None):
            table.release()

    def recover(self) -> None:
        """No table is left. If the pool says otherwise, an interrupt has hit it in the middle of a change: build it
        anew. Otherwise what the prefix cache knows stays known."""
        assert not self._tables
        pools = filter(None, (self.allocator, self.host))
        if any(pool.num_free != pool.num_blocks for pool in pools):
            self._build()

    # ---- to the host and back ----------------------------------------------------------------------------------

    def can_swap_out(self, seq_ids: Iterable[str]) -> bool:
        """Whether the host has a block for each that the sequences hold."""
        return self.host is not None and Swap.blocks_needed(self._all(seq_ids)) <= self.host.num_free

    def swap_out(self, seq_ids: Iterable[str]) -> Copies:
        """Move sequences to the host, together. Returns the copies (device block, host block) to make."""
        assert self._swap, "can_swap_out is False where there is no host pool"
        return self._swap.swap_out(self._all(seq_ids))

    def blocks_to_swap_in(self, lengths: Mapping[str, int]) -> int:
        """Blocks of the device to bring the sequences back and let them grow to these lengths."""
        return Swap.blocks_needed(self._all(lengths)) + self.blocks_to_grow(lengths)

    def swap_in(self, seq_ids: Iterable[str]) -> Copies:
        """Bring them back. Returns the copies (host block, device block) to make."""
        assert self._swap, "nothing can be on a host that is not there"
        return self._swap.swap_in(self._all(seq_ids))

    def _table(self, seq_id: str) -> BlockTable:
        table = self._tables.get(seq_id)
        return table or BlockTable(self.allocator, self.block_size, seq=seq_id, trace=self.trace)

    def _all(self, seq_ids: Iterable[str]) -> list[BlockTable]:
        return [self._tables[seq_id] for seq_id in seq_ids]

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)
