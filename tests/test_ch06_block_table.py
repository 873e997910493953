"""Chapter 6. The block allocator and the block table: requests that share one memory, and never each other's.

Any implementation that keeps the contract passes: no block id is pinned, and no order in which blocks are handed out.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memory_model import BLOCK_SIZES, POISON, TablesMachine, all_blocks, state
from minipaged.memory.block_allocator import BlockAllocator, OutOfBlocks
from minipaged.memory.block_table import BlockTable
from operations import Counted

pytestmark = pytest.mark.ch06


class AllocatorMachine(RuleBasedStateMachine):
    """The model is a plain dictionary: block -> how many tables name it."""

    @initialize(num_blocks=st.integers(1, 6))
    def start(self, num_blocks):
        self.num_blocks, self.model = num_blocks, {}
        self.allocator = BlockAllocator(num_blocks)

    @rule()
    def allocate(self):
        try:
            block = self.allocator.allocate()
        except OutOfBlocks:
            assert len(self.model) == self.num_blocks, "refused although a block is free"
        else:
            assert block in range(self.num_blocks), f"block {block} is not in the pool"
            assert block not in self.model, f"block {block} was handed out while a table names it"
            self.model[block] = 1

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def share(self, data):
        block = data.draw(st.sampled_from(sorted(self.model)))
        self.allocator.share(block)
        self.model[block] += 1

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free(self, data):
        block = data.draw(st.sampled_from(sorted(self.model)))
        self.allocator.free(block)
        self.model[block] -= 1
        if not self.model[block]:
            del self.model[block]

    @rule(data=st.data(), verb=st.sampled_from(["share", "free"]))
    def misuse(self, data, verb):
        """A free block, or one outside the pool. (-1 is what a padded table holds past its end.)"""
        block = data.draw(st.sampled_from([b for b in range(-2, self.num_blocks + 2) if b not in self.model]))
        with pytest.raises(ValueError):
            getattr(self.allocator, verb)(block)

    @invariant()
    def free_and_in_use_partition_the_pool(self):
        assert self.allocator.num_blocks == self.num_blocks
        assert self.allocator.num_free == self.num_blocks - len(self.model), (
            f"{len(self.model)} of {self.num_blocks} blocks are in use, {self.allocator.num_free} are said to be free"
        )
        for block in range(self.num_blocks):
            owners, count = self.model.get(block, 0), self.allocator.ref_count(block)
            assert count == owners, f"{owners} tables name block {block}, and its count is {count}"


TestAllocator = AllocatorMachine.TestCase
TestTables = TablesMachine.TestCase


@given(num_blocks=st.integers(1, 50) | st.sampled_from([128, 257, 1_000, 4_096]))
def test_each_block_is_handed_out_once(num_blocks):
    """And once more after all were freed, also in a pool as large as a server's."""
    allocator = BlockAllocator(num_blocks)
    for _ in range(2):
        assert allocator.num_free == num_blocks
        blocks = all_blocks(allocator)
        assert sorted(blocks) == list(range(num_blocks))
        assert allocator.num_free == 0
        for block in blocks:
            allocator.free(block)


@given(num_tables=st.integers(1, 5) | st.sampled_from([255, 256, 257, 1_000, 65_537]))
def test_a_block_is_named_by_as_many_tables_as_come(num_tables):
    """Samples of one prompt, or requests behind one system prompt: a count has no limit."""
    allocator = BlockAllocator(2)
    block = allocator.allocate()
    for _ in range(num_tables - 1):
        allocator.share(block)
    assert allocator.ref_count(block) == num_tables
    for _ in range(num_tables - 1):
        allocator.free(block)
    assert (allocator.ref_count(block), allocator.num_free) == (1, 1), "one table still names it"
    allocator.free(block)
    assert (allocator.ref_count(block), allocator.num_free) == (0, 2)


@pytest.mark.parametrize("num_used", [0, 990])
def test_a_call_costs_the_same_however_large_the_pool_is(num_used):
    """O(1) is a count here: entries of the allocator's lists, deques, dictionaries and sets that a call looks at."""
    allocator = BlockAllocator(1_000)
    for _ in range(num_used):
        allocator.allocate()
    block, counted = allocator.allocate(), Counted(allocator)
    for name, call in {
        "num_free": lambda: allocator.num_free,
        "num_blocks": lambda: allocator.num_blocks,
        "ref_count": lambda: allocator.ref_count(block),
        "share": lambda: allocator.share(block),
        "free, of a shared block,": lambda: allocator.free(block),
        "free": lambda: allocator.free(block),
        "allocate": allocator.allocate,
    }.items():
        entries = counted.of(call)
        assert entries < 50, f"{name} looks at {entries} entries in a pool of 1000 blocks, and is to be O(1)"


@pytest.mark.parametrize("num_blocks", [0, -1])
def test_a_pool_has_blocks(num_blocks):
    with pytest.raises(ValueError):
        BlockAllocator(num_blocks)


def test_no_block_is_left():
    allocator = BlockAllocator(3)
    blocks = all_blocks(allocator)
    before = state(allocator)
    with pytest.raises(OutOfBlocks):
        allocator.allocate()
    assert state(allocator) == before
    allocator.free(blocks[1])
    assert allocator.allocate() == blocks[1], "the one free block"


@pytest.mark.parametrize("verb", ["share", "free", "ref_count"])
@pytest.mark.parametrize("block", [-1, 3, 10**9])
def test_a_block_outside_the_pool(verb, block):
    """-1 is a legal index of a Python list, and the last block's. It is no block."""
    allocator = BlockAllocator(3)
    all_blocks(allocator)
    before = state(allocator)
    with pytest.raises(ValueError):
        getattr(allocator, verb)(block)
    assert state(allocator) == before


@pytest.mark.parametrize("verb", ["share", "free"])
def test_a_free_block_has_no_owner_to_lose_or_to_join(verb):
    allocator = BlockAllocator(3)
    block = allocator.allocate()
    allocator.free(block)
    before = state(allocator)
    with pytest.raises(ValueError):
        getattr(allocator, verb)(block)
    assert state(allocator) == before
    assert sorted(all_blocks(allocator)) == [0, 1, 2], "a block freed twice must not be handed out twice"


@pytest.mark.parametrize("block_size", [0, -4])
def test_a_block_has_slots(block_size):
    with pytest.raises(ValueError):
        BlockTable(BlockAllocator(2), block_size)


@given(
    lengths=st.lists(st.integers(0, 30) | st.sampled_from([100, 1_000]), max_size=5),
    block_size=BLOCK_SIZES | st.sampled_from([32, 256]),
)
def test_every_token_has_a_slot_of_its_own(lengths, block_size):
    """Translation is one to one: no two positions, of one sequence or of two, lie in one slot."""
    allocator, owners = BlockAllocator(5_000), {}
    for number, length in enumerate(lengths):
        table = BlockTable(allocator, block_size)
        table.append_tokens(length)
        for position in range(length):
            slot, token = table.slot(position), f"position {position} of table {number}"
            assert slot in range(5_000 * block_size), f"{token} lies in slot {slot}, outside the pool"
            other = owners.setdefault(slot, token)
            assert other == token, f"{token} lies in slot {slot}, as does {other}"


@given(steps=st.lists(st.integers(0, 9), max_size=12), block_size=BLOCK_SIZES)
def test_token_by_token_is_as_all_at_once(steps, block_size):
    """A table wastes less than one block, however it was filled, and a token stays where it was put."""
    allocator = BlockAllocator(200)
    table = BlockTable(allocator, block_size)
    slots = []
    for count in steps:
        needed = table.blocks_needed(count)
        free = allocator.num_free
        assert table.append_tokens(count) == [], "nothing is shared, so there is nothing to copy"
        assert free - allocator.num_free == needed, "blocks_needed says what append_tokens takes"
        assert [table.slot(position) for position in range(len(slots))] == slots
        slots = [table.slot(position) for position in range(table.num_tokens)]
    assert table.num_tokens == sum(steps)
    assert 0 <= len(table.blocks) * block_size - table.num_tokens < block_size
    for position, slot in enumerate(slots):
        assert slot == table.blocks[position // block_size] * block_size + position % block_size


def filled(num_blocks=4, block_size=2, num_tokens=5):
    allocator = BlockAllocator(num_blocks)
    table = BlockTable(allocator, block_size)
    table.append_tokens(num_tokens)
    return allocator, table


@pytest.mark.parametrize("position", [-1, 5, 6, 100])
def test_a_position_that_was_not_appended(position):
    """The last block has a slot for position 5, but no token has that position yet."""
    allocator, table = filled()
    before = state(allocator, table)
    with pytest.raises(IndexError):
        table.slot(position)
    assert state(allocator, table) == before


@pytest.mark.parametrize("count", [4, 5, 100])
def test_an_append_that_does_not_fit_takes_nothing(count):
    """One block is free, and two or more are needed: not even the one may be taken."""
    allocator, table = filled()
    before = state(allocator, table)
    with pytest.raises(OutOfBlocks):
        table.append_tokens(count)
    assert state(allocator, table) == before
    table.append_tokens(3)
    assert allocator.num_free == 0, "what fits exactly still fits"


@pytest.mark.parametrize("verb", ["append_tokens", "blocks_needed", "truncate"])
def test_a_negative_count(verb):
    allocator, table = filled()
    before = state(allocator, table)
    with pytest.raises(ValueError):
        getattr(table, verb)(-1)
    assert state(allocator, table) == before


def test_truncate_does_not_lengthen():
    allocator, table = filled()
    before = state(allocator, table)
    with pytest.raises(ValueError):
        table.truncate(6)
    assert state(allocator, table) == before


@given(num_tokens=st.integers(0, 20), keep=st.integers(0, 20), block_size=BLOCK_SIZES)
def test_truncate_gives_back_the_blocks_with_no_token_left(num_tokens, keep, block_size):
    keep = min(keep, num_tokens)
    allocator, table = filled(20, block_size, num_tokens)
    slots = [table.slot(position) for position in range(keep)]
    table.truncate(keep)
    assert [table.slot(position) for position in range(keep)] == slots
    assert allocator.num_free == 20 - len(range(0, keep, block_size))


def test_a_released_table_is_empty_and_may_be_used_again():
    allocator, table = filled()
    table.release()
    assert state(allocator, table) == state(BlockAllocator(4), BlockTable(BlockAllocator(4), 2))
    table.release()  # an empty table has nothing to give back twice
    table.append_tokens(8)
    assert allocator.num_free == 0


def test_blocks_is_a_copy():
    allocator, table = filled()
    before = state(allocator, table)
    table.blocks.clear()
    assert state(allocator, table) == before


@given(block_size=BLOCK_SIZES, num_tokens=st.integers(1, 20))
def test_a_sequence_never_reads_what_the_last_owner_left(block_size, num_tokens):
    """Freed memory is not cleaned. A new owner sees room for its own tokens, and no position beyond them."""
    allocator = BlockAllocator(20)
    pool = [POISON] * (20 * block_size)
    first, second = BlockTable(allocator, block_size), BlockTable(allocator, block_size)
    first.append_tokens(20 * block_size)
    for position in range(first.num_tokens):
        pool[first.slot(position)] = "secret"
    first.release()
    second.append_tokens(num_tokens)
    for position in range(num_tokens):
        pool[second.slot(position)] = "own"
    assert [pool[second.slot(position)] for position in range(num_tokens)] == ["own"] * num_tokens
    with pytest.raises(IndexError):
        second.slot(num_tokens)
