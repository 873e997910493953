"""Chapter 9. The prefix cache: full blocks stay findable by their tokens, also after their sequence is gone.

    tokens   [the cat sat on] [the mat and then] [it sl
    key       k0 = H(root, the cat sat on)         a full block: findable
                     k1 = H(k0, the mat and then)  a full block: findable, and only behind k0
                                                   a partial block: never, since it would still be written

The key of a block hashes the key of the block before it, so one key stands for the whole prefix. K and V of a token
depend on every token before it: equal tokens behind different prefixes are different blocks, with different keys.

To a block, the cache is one more owner. That one idea gives the rest. A findable block in use has its tables and the
cache as owners, so copy-on-write keeps a table from writing into it. A findable block whose last table went away is
still owned, so it is not handed out. When the free list is empty, the cache lets go of the one that has been without
a table longest. An operating system's page cache holds its pages in the same way.

A block becomes findable when its tokens are *written*, not when they are planned: a request that is aborted between
the two leaves nothing behind. So two requests with one prefix that are admitted in the same step do not see each other
and both compute it. The blocks of the one that is inserted first become findable. A block whose key another block has
stays as it is, in its table and not findable, and so do those behind it: the cache only appends, and a table never
changes because of it. (A scheduler that wants to save the second computation lets that request wait: see `block_keys`.)

Through all of this, tables that name one block name the same blocks before it. A prefix is shared as a whole or not.

H is SHA-256 over fields of fixed width: 32 bytes of parent, 8 bytes a token, and the extra key last. With a key of 64
bits, as Python's own hash() makes, two prefixes that collide are taken for one, and one user is answered from another
user's text. vLLM had that hole (CVE-2025-25183) and made SHA-256 its default in v0.10.2. Nobody has found two inputs
with one SHA-256. The other safe way is to keep the tokens of each block and to compare them at every hit.
Sources: vLLM's design page "Automatic Prefix Caching"; the PagedAttention paper, section 4.4 (shared prefix).
"""

# Exercise ch09_prefix_cache, about 60 minutes. Write what raises
# NotImplementedError, in this order, and run `minipaged check 9` after each step:
#
#   1. block_keys
#   2. PrefixCache.num_free
#   3. PrefixCache.num_findable
#   4. PrefixCache.num_unused
#   5. PrefixCache.num_evictable
#   6. PrefixCache.match
#   7. PrefixCache.insert
#   8. PrefixCache.allocate
#   9. PrefixCache.share
#   10. PrefixCache.free
#
# What is given may be changed too. Any way that keeps the docstrings' promises is right.
# Made from minipaged/memory/prefix_cache.py by minipaged/course/generate.py.

import struct
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import takewhile

from minipaged.memory.block_allocator import BlockAllocator
from minipaged.memory.block_table import BlockTable
from minipaged.memory.trace import Trace

ROOT = bytes(32)  # the parent of a first block


def block_keys(
    tokens: Sequence[int], block_size: int, extra: str | None = None, parent: bytes = ROOT
) -> Iterator[bytes]:
    """The key of each full block of tokens, behind the block with the key `parent`. 32 bytes each, made on demand.

    `extra` keeps apart what tokens do not tell apart: a tenant's salt, an adapter, an image. Token ids fit in 64 bits.
    A scheduler that keeps the keys which this step computes may hold back a request whose first key behind
    its hits is among them: in the next step it will find that block.
    """
    raise NotImplementedError("ch09: block_keys")


class PrefixCache(BlockAllocator):
    """A BlockAllocator with a memory: the same verbs, so that a BlockTable draws from it and knows no difference.

    Every block is free, in use by a table, or unused: findable, but named by no table. Unused blocks count as free
    ones, since `allocate` evicts them on demand. `ref_count` counts the tables, and one more for a findable block.
    Invariant: a block is findable by at most one key, a key finds at most one block, and a findable block holds
    exactly the tokens of its key, whoever asks.
    """

    def __init__(self, num_blocks: int, block_size: int, *, trace: Trace | None = None):
        super().__init__(num_blocks)
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.block_size = block_size
        self.trace = trace
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        # Findable and without a table, the longest so first. (A plain dict would do, but its first entry is O(n) to
        # find after n deletions at the front.)
        self._unused: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """How many blocks `allocate` can hand out: the free ones, and the unused ones that it would evict."""
        raise NotImplementedError("ch09: PrefixCache.num_free")

    @property
    def num_findable(self) -> int:
        """How many blocks can be found by their tokens, in use or not."""
        raise NotImplementedError("ch09: PrefixCache.num_findable")

    @property
    def num_unused(self) -> int:
        """How many blocks are findable and named by no table."""
        raise NotImplementedError("ch09: PrefixCache.num_unused")

    def num_evictable(self, blocks: Iterable[int]) -> int:
        """How many of these blocks no table names: they count as free ones until a table does."""
        raise NotImplementedError("ch09: PrefixCache.num_evictable")

    def match(self, tokens: Sequence[int], extra: str | None = None) -> list[int]:
        """The longest run of findable blocks that holds the first tokens of a prompt. O(1) a block; changes nothing.

        The caller names them with `BlockTable.append_shared` before it allocates anything, or they may be evicted.
        Never the whole prompt: at least one token is left to compute, since its logits give the first new token.
        """
        raise NotImplementedError("ch09: PrefixCache.match")

    def insert(self, table: BlockTable, tokens: Sequence[int], extra: str | None = None) -> None:
        """Cache each full block of a table whose tokens are written: `tokens`, from position 0 on.

        Nothing cached is ever replaced: if another block has the key already, the table keeps its own block, and that
        block and those behind it stay uncached. Blocks that are cached already cost nothing, so a decode step calls
        this with all its tokens. Raises ValueError, changing nothing, on a table of another pool or shorter than its
        tokens, and where block_keys does.
        """
        raise NotImplementedError("ch09: PrefixCache.insert")

    def allocate(self) -> int:
        """Take a free block, or evict the block that has been unused longest. Raises OutOfBlocks, changing nothing.

        A leaf goes before its parent: whoever names a block names all blocks before it, and gives the last one back
        first, so a parent is never unused for longer than its child.
        """
        raise NotImplementedError("ch09: PrefixCache.allocate")

    def share(self, block: int) -> None:
        """One more table names a block in use, or an unused one, which is in use from now on."""
        raise NotImplementedError("ch09: PrefixCache.share")

    def free(self, block: int) -> None:
        """One table fewer names the block; with the last one it is free, or unused if it is findable."""
        raise NotImplementedError("ch09: PrefixCache.free")
