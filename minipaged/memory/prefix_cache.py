"""Chapter 9. The prefix cache: full blocks are found by their tokens, also after their sequence has ended.

    tokens   [the cat sat on] [the mat and then] [it sl
    key       k0 = H(root, the cat sat on)         a full block: cached
                     k1 = H(k0, the mat and then)  a full block: cached, and found only behind k0
                                                   a partial block: never cached, since it will still be written

The key of a block hashes the key of the block before it, so one key stands for the whole prefix. K and V of a token
depend on every token before it: equal tokens behind different prefixes are different blocks, with different keys.

The cache is one more owner of each cached block. While tables name the block, copy-on-write keeps them from writing
into it. After its last table is released, the block is still owned, so it is not handed out: it is *evictable*. When
the free list is empty, the block that has been evictable longest is evicted, as in an operating system's page cache.

A block is cached when its tokens are *written*, not when they are planned, so an aborted request leaves nothing behind.
The cache only appends: a block whose key another block has stays in its table, uncached, and so do those behind it. So
a table never changes because of the cache, and tables that name one block name the same blocks before it.

H is SHA-256 over fields of fixed width: 32 bytes of parent, 8 bytes a token, and the salt last. With a key of 64 bits,
as Python's own hash() makes, two prefixes can collide, and one user is answered from another user's text: vLLM had that
hole (CVE-2025-25183) and made SHA-256 its default in v0.10.2.
Sources: vLLM's design page "Automatic Prefix Caching"; the PagedAttention paper, section 4.4 (shared prefix).
"""

import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import takewhile

from minipaged.memory.block_allocator import BlockAllocator
from minipaged.memory.block_table import BlockTable
from minipaged.memory.trace import Trace

ROOT = bytes(32)  # the parent of a first block


def block_keys(
    tokens: Sequence[int], block_size: int, cache_salt: str | None = None, parent: bytes = ROOT
) -> Iterator[bytes]:
    """The key of each full block of tokens, after the block with the key `parent`. 32 bytes each, made on demand.

    `cache_salt` separates what tokens do not: tenants, adapters, images. Raises ValueError for a token over 64 bits.
    """
    suffix = b"" if cache_salt is None else b"salt" + cache_salt.encode()
    for end in range(block_size, len(tokens) + 1, block_size):
        try:
            packed = struct.pack(f"<{block_size}q", *tokens[end - block_size : end])
        except struct.error as error:
            raise ValueError(f"tokens {end - block_size} to {end - 1} are not all integers of 64 bits") from error
        parent = sha256(parent + packed + suffix).digest()
        yield parent


class PrefixCache(BlockAllocator):
    """A BlockAllocator with a memory. It has the same methods, so a BlockTable draws from it and sees no difference.

    Every block is free, named by a table, or evictable. Evictable blocks count as free, since `allocate` evicts them
    on demand. `ref_count` counts the tables, and one more for a cached block.
    Invariant: a block has at most one key, a key finds at most one block, and that block holds the tokens of its key.
    """

    def __init__(self, num_blocks: int, block_size: int, *, trace: Trace | None = None):
        super().__init__(num_blocks)
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.block_size = block_size
        self.trace = trace
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        # The longest evictable first. (After n deletions at its front, a plain dict finds its first entry in O(n).)
        self._evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """How many blocks `allocate` can hand out: the free and the evictable ones."""
        return super().num_free + len(self._evictable)

    @property
    def num_evictable(self) -> int:
        """How many blocks are cached and named by no table."""
        return len(self._evictable)

    def is_evictable(self, block: int) -> bool:
        """Whether the block is one of these."""
        return block in self._evictable

    def match(self, tokens: Sequence[int], cache_salt: str | None = None) -> list[int]:
        """The longest run of cached blocks that holds the first tokens of a prompt. O(1) a block. Changes nothing, and
        takes no reference.

        Name them with `BlockTable.append_shared` before anything is allocated, which could evict them.
        Never the whole prompt: at least one token is left to compute, since its logits give the first new token.
        """
        keys = block_keys(tokens[:-1], self.block_size, cache_salt)
        return [self._block_of[key] for key in takewhile(self._block_of.__contains__, keys)]

    def cache_blocks(self, table: BlockTable, tokens: Sequence[int], cache_salt: str | None = None) -> None:
        """Cache the full blocks of a table whose tokens are written: `tokens`, from position 0 on. The cache takes one
        reference to each block that was not cached.

        Blocks that are cached already cost nothing, so a decode step passes all its tokens. At a key that another
        block has, caching ends. Raises ValueError, changing nothing, for a table of another pool or shorter than its
        tokens, and where block_keys does.
        """
        if table.allocator is not self or table.block_size != self.block_size:
            raise ValueError("the table draws from another pool, or its blocks are of another size")
        if len(tokens) > table.num_tokens:
            raise ValueError(f"{len(tokens)} tokens cannot be written in a table of {table.num_tokens}")
        blocks = table.blocks[: len(tokens) // self.block_size]
        first = len(blocks)  # the first block to cache: the cached blocks of a table are always a run from its start
        while first > 0 and blocks[first - 1] not in self._key_of:
            first -= 1
        parent = self._key_of[blocks[first - 1]] if first else ROOT
        keys = block_keys(tokens[first * self.block_size :], self.block_size, cache_salt, parent)
        new = [*takewhile(lambda pair: pair[1] not in self._block_of, zip(blocks[first:], keys, strict=False))]
        for block, key in new:  # after all keys were made: one of them may be refused
            super().share(block)
            self._block_of[key], self._key_of[block] = block, key
            if self.trace is not None:
                self.trace.record("cache", block=block)

    def allocate(self) -> int:
        """Take a free block, or evict the block that has been evictable longest. Raises OutOfBlocks, changing nothing.

        A leaf is evicted before its parent: a table that names a block names all blocks before it, and gives the last
        one back first.
        """
        if super().num_free == 0 and self._evictable:
            block, _ = self._evictable.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
            super().free(block)
            if self.trace is not None:
                self.trace.record("evict", block=block)
        return super().allocate()

    def share(self, block: int) -> None:
        """One more table names a block in use, or an evictable one, which is in use from now on. Raises ValueError for
        any other."""
        super().share(block)
        self._evictable.pop(block, None)

    def free(self, block: int) -> None:
        """One table fewer names the block; after the last one it is evictable if it is cached, and else free. Raises
        ValueError for a block that no table names."""
        if block in self._evictable:
            raise ValueError(f"no table names block {block}, only the cache does: freed twice?")
        super().free(block)
        if block in self._key_of and super().ref_count(block) == 1:
            self._evictable[block] = None
