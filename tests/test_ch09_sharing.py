"""Chapter 9. Sharing: two tables name one block, and neither may see the other write.

Any implementation that keeps the contract passes: no block id is pinned, and no order in which blocks are handed out.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_model import BLOCK_SIZES, Pool, state
from minipaged.memory.block_allocator import BlockAllocator, OutOfBlocks
from minipaged.memory.block_table import BlockTable
from sharing_model import SharingMachine

pytestmark = pytest.mark.ch09

TestSharing = SharingMachine.TestCase


def filled(num_blocks=6, block_size=4, num_tokens=6):
    allocator = BlockAllocator(num_blocks)
    table = BlockTable(allocator, block_size)
    table.append_tokens(num_tokens)
    return allocator, table


@given(num_tokens=st.integers(0, 20), num_forks=st.integers(1, 5) | st.just(256), block_size=BLOCK_SIZES)
def test_forks_cost_nothing_and_the_last_one_out_gives_back(num_tokens, num_forks, block_size):
    """Parallel sampling: n samples of one prompt hold the prompt once."""
    allocator, table = filled(20, block_size, num_tokens)
    free = allocator.num_free
    tables = [table] + [table.fork() for _ in range(num_forks)]
    assert allocator.num_free == free
    assert all(other.blocks == table.blocks for other in tables)
    assert all(allocator.ref_count(block) == num_forks + 1 for block in table.blocks)
    for other in tables[:-1]:
        other.release()
        assert allocator.num_free == free, "a table still names these blocks"
    tables[-1].release()
    assert allocator.num_free == 20


@given(prompt=st.integers(0, 12), ours=st.integers(0, 6), theirs=st.integers(0, 6), block_size=BLOCK_SIZES)
def test_after_a_fork_each_writes_alone(prompt, ours, theirs, block_size):
    allocator = BlockAllocator(60)
    pool = Pool(60, block_size)
    parent = BlockTable(allocator, block_size)
    parent.append_tokens(prompt)
    pool.write(parent, 0, ["prompt"] * prompt)
    child = parent.fork()
    for table, count, text in ((parent, ours, "parent"), (child, theirs, "child")):
        pool.copy(table.append_tokens(count))
        pool.write(table, prompt, [text] * count)
    assert pool.read(parent) == ["prompt"] * prompt + ["parent"] * ours
    assert pool.read(child) == ["prompt"] * prompt + ["child"] * theirs


def test_a_partly_full_shared_block_is_copied_once():
    """The first of two that writes takes a copy. The block is then the other one's alone, and needs none."""
    allocator, parent = filled()
    child = parent.fork()
    last = parent.blocks[-1]
    assert parent.blocks_needed(1) == 1
    assert parent.append_tokens(1) == [(last, parent.blocks[-1])]
    assert parent.blocks[-1] != last
    assert (child.blocks[-1], allocator.ref_count(last), allocator.ref_count(parent.blocks[-1])) == (last, 1, 1)
    assert child.blocks_needed(1) == 0
    assert child.append_tokens(1) == []
    assert child.blocks[-1] == last
    assert parent.blocks[0] == child.blocks[0], "the full block stays shared: it is not written"


def test_a_full_shared_block_is_not_copied():
    allocator, parent = filled(num_tokens=8)
    child = parent.fork()
    assert child.blocks_needed(1) == 1
    assert child.append_tokens(1) == []
    assert child.blocks[:2] == parent.blocks
    assert allocator.ref_count(child.blocks[2]) == 1


def test_an_append_of_nothing_copies_nothing():
    allocator, parent = filled()
    child = parent.fork()
    before = state(allocator, parent, child)
    assert child.append_tokens(0) == []
    assert state(allocator, parent, child) == before


def test_a_block_cut_open_by_truncate_is_copied_too():
    """The parent's block is full. The child keeps one token of it and goes on from there: elsewhere."""
    _, parent = filled(num_tokens=8)
    pool = Pool(6, 4)
    pool.write(parent, 0, list("abcdefgh"))
    child = parent.fork()
    child.truncate(5)
    pool.copy(child.append_tokens(1))
    pool.write(child, 5, ["X"])
    assert "".join(pool.read(parent)) == "abcdefgh"
    assert "".join(pool.read(child)) == "abcdeX"


@pytest.mark.parametrize("count", [1, 3, 100])
def test_a_copy_that_does_not_fit_changes_nothing(count):
    """One slot is free in the last block, and still the append needs a block: its own copy."""
    allocator, parent = filled(num_blocks=2)
    child = parent.fork()
    before = state(allocator, parent, child)
    for table in (parent, child):
        with pytest.raises(OutOfBlocks):
            table.append_tokens(count)
        assert state(allocator, parent, child) == before
    parent.release()
    assert child.append_tokens(1) == [], "alone again, it writes in place"


def test_a_copy_and_new_blocks_fit_together_or_not_at_all():
    allocator, parent = filled(num_blocks=4)
    child = parent.fork()
    before = state(allocator, parent, child)
    assert child.blocks_needed(7) == 3
    with pytest.raises(OutOfBlocks):
        child.append_tokens(7)  # one copy and two new blocks, and two are free
    assert state(allocator, parent, child) == before
    assert len(child.append_tokens(6)) == 1
    assert allocator.num_free == 0


@given(data=st.data(), width=st.integers(1, 4), steps=st.integers(1, 10), block_size=BLOCK_SIZES)
def test_beam_search(data, width, steps, block_size):
    """Each step keeps the best beams, which may all descend from one: fork the survivors, release the rest."""
    allocator = BlockAllocator(200)
    pool = Pool(200, block_size)
    beams = [(BlockTable(allocator, block_size), [])]
    for step in range(steps):
        ancestors = data.draw(st.lists(st.integers(0, len(beams) - 1), min_size=width, max_size=width))
        children = [(beams[a][0].fork(), [*beams[a][1], f"{step}.{rank}"]) for rank, a in enumerate(ancestors)]
        for table, _ in beams:
            table.release()
        for table, tokens in children:
            pool.copy(table.append_tokens(1))
            pool.write(table, step, tokens[-1:])
        beams = children
        assert all(pool.read(table) == tokens for table, tokens in beams)
        assert allocator.num_free == 200 - len({block for table, _ in beams for block in table.blocks})
    for table, _ in beams:
        table.release()
    assert allocator.num_free == 200


# What a prefix cache and a swap do to a table. Each is refused whole, or done whole.


def test_append_shared_names_what_another_table_wrote():
    allocator, owner = filled(num_tokens=8)
    table = BlockTable(allocator, 4)
    table.append_shared(owner.blocks)
    assert (table.num_tokens, table.blocks, allocator.num_free) == (8, owner.blocks, 4)
    assert [allocator.ref_count(block) for block in owner.blocks] == [2, 2]
    owner.release()
    assert allocator.num_free == 4, "they are this table's now"


def test_append_shared_of_a_free_block():
    allocator, owner = filled(num_tokens=8)
    free = allocator.allocate()
    allocator.free(free)
    table = BlockTable(allocator, 4)
    before = state(allocator, owner, table)
    for block in (free, -1, 6):
        with pytest.raises(ValueError):
            table.append_shared([owner.blocks[0], block])
        assert state(allocator, owner, table) == before, "not even the first of the two may be shared"


@pytest.mark.parametrize("num_tokens", [1, 4, 6])
def test_what_is_shared_comes_first(num_tokens):
    allocator, table = filled(num_tokens=num_tokens)
    other = BlockTable(allocator, 4)
    other.append_tokens(4)
    before = state(allocator, table, other)
    with pytest.raises(ValueError):
        table.append_shared(other.blocks)
    assert state(allocator, table, other) == before


def test_a_move_to_too_few_blocks_changes_nothing():
    allocator, table = filled()
    host = BlockAllocator(3)
    theirs = host.allocate()
    before = state(allocator, table), state(host)
    with pytest.raises(ValueError):
        table.move(host, [theirs])
    assert (state(allocator, table), state(host)) == before
