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
and both compute it. When the first of them is inserted its blocks become findable; when the second is, it finds them
under its own keys, names them instead of its own, and gives its own back. From the first written block on, they share.
(A scheduler that wants to save the computing too lets the second wait: see `block_keys`.)

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
#   4. PrefixCache.match
#   5. PrefixCache.insert
#   6. PrefixCache.allocate
#   7. PrefixCache.share
#   8. PrefixCache.free
#
# What is given may be changed too. Any way that keeps the docstrings' promises is right.
# Made from minipaged/memory/prefix_cache.py by minipaged/course/generate.py.

import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import sha256

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
        return len(self._unused)

    def match(self, tokens: Sequence[int], extra: str | None = None) -> list[int]:
        """The longest run of findable blocks that holds the first tokens of a prompt. O(1) a block; changes nothing.

        The caller names them with `BlockTable.append_shared` before it allocates anything, or they may be evicted.
        Never the whole prompt: at least one token is left to compute, since its logits give the first new token.
        """
        raise NotImplementedError("ch09: PrefixCache.match")

    def insert(self, table: BlockTable, tokens: Sequence[int], extra: str | None = None) -> None:
        """Make findable each full block of a table whose tokens are written: `tokens`, from position 0 on.

        Where two blocks have the same key, one block in use remains: the table names the findable block instead of
        its own, or the findable one, if it is unused, is forgotten for the table's own. (If a fork names the own one
        too, and the other is in use, both stay, and nothing behind them is inserted: insert a prompt, then fork it.)
        Blocks that are findable already cost nothing, so a decode step calls this with all its tokens.
        Raises ValueError, changing nothing, on a table of another pool or shorter than its tokens.
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
