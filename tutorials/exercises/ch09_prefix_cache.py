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

# Exercise ch09_prefix_cache, about 60 minutes. Write what raises
# NotImplementedError, in this order, and run `minipaged check 9` after each step:
#
#   1. block_keys
#   2. PrefixCache.num_free
#   3. PrefixCache.num_evictable
#   4. PrefixCache.is_evictable
#   5. PrefixCache.match
#   6. PrefixCache.cache_blocks
#   7. PrefixCache.allocate
#   8. PrefixCache.share
#   9. PrefixCache.free
#
# What is given may be changed too. Any way that keeps the docstrings' promises is right.
# A call that raises changes nothing. Bad input is a ValueError whose message has the numbers, in any words;
# where two errors are due, either is right.
#
# A table has allocator, block_size, num_tokens and blocks (a copy). Where self.trace is not None, record
# "cache" (block) and "evict" (block) after the change, as in self.trace.record("cache", block=3).
#
# Given: BlockAllocator, in minipaged/memory/block_allocator.py.
#
#   num_blocks -> int
#   num_free -> int
#   ref_count(block: int) -> int
#       How many tables name the block; 0 means that it is free. Raises ValueError for a block outside the
#       pool.
#   allocate() -> int
#       Take a block from the free list, with a reference count of 1. Raises OutOfBlocks, changing nothing.
#   share(block: int) -> None
#       Add one reference to a block in use. A free block is refused: the next allocate() may return it.
#       Raises ValueError for a block that is free or not in the pool, changing nothing.
#   free(block: int) -> None
#       Drop one reference. The last one puts the block back on the free list. Raises ValueError like share.
#
# Made from minipaged/memory/prefix_cache.py by minipaged/course/generate.py.

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
    raise NotImplementedError("ch09: block_keys")


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
        raise NotImplementedError("ch09: PrefixCache.num_free")

    @property
    def num_evictable(self) -> int:
        """How many blocks are cached and named by no table."""
        raise NotImplementedError("ch09: PrefixCache.num_evictable")

    def is_evictable(self, block: int) -> bool:
        """Whether the block is one of these."""
        raise NotImplementedError("ch09: PrefixCache.is_evictable")

    def match(self, tokens: Sequence[int], cache_salt: str | None = None) -> list[int]:
        """The longest run of cached blocks that holds the first tokens of a prompt. O(1) a block. Changes nothing, and
        takes no reference.

        Name them with `BlockTable.append_shared` before anything is allocated, which could evict them.
        Never the whole prompt: at least one token is left to compute, since its logits give the first new token.
        """
        raise NotImplementedError("ch09: PrefixCache.match")

    def cache_blocks(self, table: BlockTable, tokens: Sequence[int], cache_salt: str | None = None) -> None:
        """Cache the full blocks of a table whose tokens are written: `tokens`, from position 0 on. The cache takes one
        reference to each block that was not cached.

        Blocks that are cached already cost nothing, so a decode step passes all its tokens. At a key that another
        block has, caching ends. Raises ValueError, changing nothing, for a table of another pool or shorter than its
        tokens, and where block_keys does.
        """
        raise NotImplementedError("ch09: PrefixCache.cache_blocks")

    def allocate(self) -> int:
        """Take a free block, or evict the block that has been evictable longest. Raises OutOfBlocks, changing nothing.

        A leaf is evicted before its parent: a table that names a block names all blocks before it, and gives the last
        one back first.
        """
        raise NotImplementedError("ch09: PrefixCache.allocate")

    def share(self, block: int) -> None:
        """One more table names a block in use, or an evictable one, which is in use from now on. Raises ValueError for
        any other."""
        raise NotImplementedError("ch09: PrefixCache.share")

    def free(self, block: int) -> None:
        """One table fewer names the block; after the last one it is evictable if it is cached, and else free. Raises
        ValueError for a block that no table names."""
        raise NotImplementedError("ch09: PrefixCache.free")
