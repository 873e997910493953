"""One right answer to the exercise of the same name: what test_course_properties.py holds the grader against."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.memory.block_allocator import BlockAllocator, OutOfBlocks
from minipaged.memory.block_table import BlockTable


@given(data=st.data())
def test_free_and_used_blocks_are_the_whole_pool(data):
    num_blocks = data.draw(st.integers(1, 4))
    allocator, owners = BlockAllocator(num_blocks), {}
    for verb in data.draw(st.lists(st.sampled_from(["allocate", "share", "free"]), max_size=8)):
        if verb == "allocate" and allocator.num_free:
            block = allocator.allocate()
            assert block not in owners
            owners[block] = 1
        elif verb != "allocate" and owners:
            block = data.draw(st.sampled_from(sorted(owners)))
            getattr(allocator, verb)(block)
            owners[block] += 1 if verb == "share" else -1
            if not owners[block]:
                del owners[block]
        assert allocator.num_free == num_blocks - len(owners)


@given(data=st.data())
def test_what_is_refused_changes_nothing(data):
    allocator = BlockAllocator(4)
    table = BlockTable(allocator, 2)
    table.append_tokens(data.draw(st.integers(1, 6)))
    spare = allocator.allocate()
    allocator.free(spare)

    def seen():
        return allocator.num_free, [allocator.ref_count(b) for b in range(4)], table.num_tokens, table.blocks

    before = seen()
    for verb, block in [("free", spare), ("share", spare), *((v, b) for v in ("free", "ref_count") for b in (-1, 4))]:
        with pytest.raises(ValueError):
            getattr(allocator, verb)(block)
        assert seen() == before
    with pytest.raises(OutOfBlocks):
        table.append_tokens(data.draw(st.integers(9, 20)))
    assert seen() == before


@given(data=st.data())
def test_two_sequences_never_share_a_slot(data):
    allocator = BlockAllocator(8)
    tables = BlockTable(allocator, 2), BlockTable(allocator, 2)
    for _ in range(data.draw(st.integers(1, 6))):
        table = data.draw(st.sampled_from(tables))
        if data.draw(st.booleans()):
            if table.blocks_needed(3) <= allocator.num_free:
                table.append_tokens(3)
        else:
            table.truncate(data.draw(st.integers(0, table.num_tokens)))
        slots = [{table.slot(p) for p in range(table.num_tokens)} for table in tables]
        assert not slots[0] & slots[1]
        assert allocator.num_free == 8 - sum(len(table.blocks) for table in tables)
