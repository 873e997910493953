"""One right answer to the exercise of the same name."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from minipaged.memory.block_allocator import BlockAllocator
from minipaged.memory.block_table import BlockTable
from minipaged.memory.prefix_cache import PrefixCache
from minipaged.memory.swap import Swap


def copy(plan, source, target, block_size):
    for a, b in plan:
        target[b * block_size : (b + 1) * block_size] = source[a * block_size : (a + 1) * block_size]


def write(slots, table, start, text):
    for position, sign in enumerate(text, start=start):
        slots[table.slot(position)] = sign


def read(slots, table):
    return "".join(slots[table.slot(position)] for position in range(table.num_tokens))


@given(data=st.data())
def test_after_a_fork_each_reads_what_it_wrote(data):
    block_size = data.draw(st.integers(1, 4))
    allocator, slots = BlockAllocator(30), ["?"] * 30 * block_size
    parent = BlockTable(allocator, block_size)
    prompt = "p" * data.draw(st.integers(0, 9))
    parent.append_tokens(len(prompt))
    write(slots, parent, 0, prompt)
    child = parent.fork()
    for table, sign in ((parent, "a"), (child, "b")):
        count = data.draw(st.integers(0, 5))
        copy(table.append_tokens(count), slots, slots, block_size)
        write(slots, table, len(prompt), sign * count)
        assert read(slots, table) == prompt + sign * count
    assert set(read(slots, parent)) <= set("pa")


@given(data=st.data())
def test_reference_counts_are_entries_of_tables(data):
    allocator = BlockAllocator(10)
    tables = [BlockTable(allocator, 2)]
    tables[0].append_tokens(data.draw(st.integers(0, 9)))
    for _ in range(data.draw(st.integers(0, 4))):
        table = data.draw(st.sampled_from(tables))
        if data.draw(st.booleans()):
            tables.append(table.fork())
        else:
            table.release()
        owners = Counter(block for table in tables for block in table.blocks)
        assert all(allocator.ref_count(block) == owners[block] for block in range(10))


@given(data=st.data())
def test_a_prompt_finds_the_blocks_of_its_own_prefix_alone(data):
    tokens = st.lists(st.integers(0, 1), max_size=8)
    first, other = data.draw(tokens), data.draw(tokens)
    salts = data.draw(st.sampled_from([(None, None), ("a", "a"), ("a", "b"), (None, "a")]))
    cache = PrefixCache(4, 2)
    table = BlockTable(cache, 2)
    table.append_tokens(len(first))
    cache.cache_blocks(table, first, salts[0])
    table.release()
    pairs = list(zip(first, other, strict=False))
    common = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    expected = min(common, max(0, len(other) - 1)) // 2 if salts[0] == salts[1] else 0
    assert len(cache.match(other, salts[1])) == expected
    BlockTable(cache, 2).append_tokens(8)
    assert cache.match([*first, 0], salts[0]) == [], "all blocks have a new owner"


@given(data=st.data())
def test_a_group_comes_back_from_the_host_as_it_went(data):
    device, host = BlockAllocator(8), BlockAllocator(8)
    slots, host_slots = ["?"] * 16, ["?"] * 16
    text = "abcdefghijk"[: data.draw(st.integers(1, 11))]
    table = BlockTable(device, 2)
    table.append_tokens(len(text))
    write(slots, table, 0, text)
    fork, swap = table.fork(), Swap(device, host)
    copy(swap.swap_out([table, fork]), slots, host_slots, 2)
    assert all(host.ref_count(block) == 2 for block in table.blocks)
    slots[:] = ["?"] * 16
    copy(swap.swap_in([table, fork]), host_slots, slots, 2)
    assert read(slots, table) == read(slots, fork) == text
    assert table.blocks == fork.blocks and all(device.ref_count(block) == 2 for block in table.blocks)
