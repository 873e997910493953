"""What a block costs to manage: nanoseconds an operation, from 10^3 to 10^6 blocks. `minipaged bench memory`.

Every operation is O(1) a block, so each row should be flat. If one still rises, the machine is the reason: the
bookkeeping of 10^6 blocks does not fit into its caches, and scattered blocks miss them. So a plain allocator is
measured in the same run, in turn with ours: a deque of free blocks, a set of used ones and a dictionary of reference
counts, without checks.
"""

import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from rich.console import Console

from minipaged.bench.timing import Settings, in_turn, numbers_table, save
from minipaged.memory.block_allocator import BlockAllocator
from minipaged.memory.block_table import BlockTable
from minipaged.memory.prefix_cache import PrefixCache
from minipaged.processor import processor

SIZES = [10**3, 10**4, 10**5, 10**6]  # blocks in the pool
BLOCK_SIZE = 16  # tokens
BATCH = 400  # blocks an operation is measured over
BATCHES = 5  # of each operation, a round

Batch = Callable[[], float]  # runs a batch, and returns how many seconds it took
clock = time.perf_counter


class PlainAllocator:
    """The allocator that one would write first."""

    def __init__(self, num_blocks: int):
        self.free_blocks = deque(range(num_blocks))
        self.used: set[int] = set()
        self.counts: dict[int, int] = {}

    def allocate(self) -> int:
        block = self.free_blocks.popleft()
        self.used.add(block)
        self.counts[block] = 1
        return block

    def share(self, block: int) -> None:
        self.counts[block] += 1

    def free(self, block: int) -> None:
        self.counts[block] -= 1
        if self.counts[block] == 0:
            del self.counts[block]
            self.used.remove(block)
            self.free_blocks.append(block)


def half_used(allocator: BlockAllocator | PlainAllocator, num_blocks: int, in_order: bool) -> None:
    """Leave a pool as a server has it after a minute (in order), or after a day (the free blocks are all over it)."""
    blocks = [allocator.allocate() for _ in range(num_blocks)]
    if not in_order:
        random.Random(0).shuffle(blocks)
    for block in blocks[: num_blocks // 2]:
        allocator.free(block)


def allocator_batches(name: str, allocator: BlockAllocator | PlainAllocator) -> Iterator[tuple[str, Batch]]:
    def allocate_and_free() -> float:
        start = clock()
        blocks = [allocator.allocate() for _ in range(BATCH)]
        for block in blocks:
            allocator.free(block)
        return clock() - start

    def share_and_free() -> float:
        blocks = [allocator.allocate() for _ in range(BATCH)]
        start = clock()
        for block in blocks:
            allocator.share(block)
        for block in blocks:
            allocator.free(block)
        spent = clock() - start
        for block in blocks:
            allocator.free(block)
        return spent

    yield f"allocate + free, {name}", allocate_and_free
    yield f"share + free, {name}", share_and_free


def table_batches(allocator: BlockAllocator) -> Iterator[tuple[str, Batch]]:
    table = BlockTable(allocator, BLOCK_SIZE)

    def append_one_token() -> float:
        start = clock()
        for _ in range(BATCH):
            table.append_tokens(1)
        spent = clock() - start
        table.release()
        return spent

    def fork_and_release() -> float:
        table.append_tokens(BATCH * BLOCK_SIZE)
        start = clock()
        table.fork().release()
        spent = clock() - start
        table.release()
        return spent

    yield "append_tokens(1)", append_one_token
    yield "fork + release, a block", fork_and_release


def prefix_batches(num_blocks: int) -> Iterator[tuple[str, Batch]]:
    """A cache whose every block is evictable, so that each allocation evicts."""
    cache = PrefixCache(num_blocks, BLOCK_SIZE)
    table = BlockTable(cache, BLOCK_SIZE)
    prompts = iter(range(num_blocks * BLOCK_SIZE))

    def appended(num_tokens: int) -> list[int]:
        """A prompt that was not seen before, with room made for it."""
        table.append_tokens(num_tokens)
        return [next(prompts)] * num_tokens

    for num_cached in range(0, num_blocks, BATCH):
        cache.cache_blocks(table, appended(min(BATCH, num_blocks - num_cached) * BLOCK_SIZE))
        table.release()

    def allocate_with_eviction() -> float:
        start = clock()
        blocks = [cache.allocate() for _ in range(BATCH)]
        spent = clock() - start
        for block in blocks:
            cache.free(block)
        cache.cache_blocks(table, appended(BATCH * BLOCK_SIZE))  # the next batch shall have to evict again
        table.release()
        return spent

    def cache_blocks() -> float:
        tokens = appended(BATCH * BLOCK_SIZE)
        start = clock()
        cache.cache_blocks(table, tokens)
        spent = clock() - start
        table.release()
        return spent

    def match() -> float:
        tokens = appended(BATCH * BLOCK_SIZE)
        cache.cache_blocks(table, tokens)
        table.release()
        start = clock()
        found = len(cache.match([*tokens, 0]))
        spent = clock() - start
        assert found == BATCH
        return spent

    yield "prefix: cache_blocks, a block", cache_blocks
    yield "prefix: match, a block", match
    yield "prefix: allocate with an eviction", allocate_with_eviction


def measure(num_blocks: int, rounds: int) -> dict[str, list[float]]:
    """Nanoseconds of each operation, in each of its batches."""
    batches: list[tuple[str, Batch]] = []
    for order in ("in order", "scattered"):
        for name, allocator in (("ours", BlockAllocator(num_blocks)), ("plain", PlainAllocator(num_blocks))):
            half_used(allocator, num_blocks, order == "in order")
            batches += allocator_batches(f"{name}, {order}", allocator)
    ours = BlockAllocator(num_blocks)
    half_used(ours, num_blocks, in_order=True)
    batches += [*table_batches(ours), *prefix_batches(num_blocks)]
    seconds = in_turn(dict(batches), rounds, f"{num_blocks:,} blocks")
    return {name: [1e9 * each / BATCH for each in times] for name, times in seconds.items()}


def run(console: Console, out: Path | None, settings: Settings) -> None:
    """Time every operation at every size of the pool, and print the table."""
    rounds = BATCHES * settings.rounds
    columns = {size: measure(size, rounds) for size in SIZES}
    title = f"ns an operation, median (and best) of {rounds} batches of {BATCH}, Python {sys.version.split()[0]}"
    table = numbers_table(title, "blocks in the pool", *(f"{size:,}" for size in SIZES))
    for name in columns[SIZES[0]]:
        table.add_row(name, *(f"{median(found[name]):.0f} ({min(found[name]):.0f})" for found in columns.values()))
    console.print(processor(), highlight=False)
    console.print(table)
    save(out, {size: {name: median(times) for name, times in found.items()} for size, found in columns.items()})
