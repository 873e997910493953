"""Chapter 5. Any page table that passes is right: what is pinned is where an address leads, and what the way costs.

The model of a page table is a dictionary, page -> frame. The model of a shared memory is a dictionary too: page of a
process -> one cell of bytes, the same cell for all that share it. No frame number is pinned.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from messages import says
from minipaged.memory.address_space import OutOfFrames, PhysicalMemory, Process
from minipaged.memory.kv_cache_size import (
    ENTRY_BYTES,
    GIB,
    LLAMA_3_8B,
    LLAMA_3_8B_POOL_BYTES,
    OPT_13B,
    OPT_13B_POOL_BYTES,
    KVShape,
    block_table_cost,
)
from minipaged.memory.page_table import (
    X86_32,
    X86_64,
    AddressLayout,
    FlatPageTable,
    MultiLevelPageTable,
    PageFault,
)
from operations import Counted

pytestmark = pytest.mark.ch05

KIB, MIB = 1 << 10, 1 << 20
KINDS = [FlatPageTable, MultiLevelPageTable]
SMALL_LAYOUTS = st.builds(
    AddressLayout,
    index_bits=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    offset_bits=st.integers(0, 3),
    entry_bytes=st.sampled_from([4, 8]),
)
LAYOUTS = st.one_of(SMALL_LAYOUTS, st.sampled_from([X86_32, X86_64]))


def tables_cost(layout, pages):
    """Bytes of the tables that these pages need: at each level one table for each way to begin their indices."""
    cost = 0
    for level, bits in enumerate(layout.index_bits):
        begins = {layout.indices(page)[:level] for page in pages} | ({()} if level == 0 else set())
        cost += len(begins) * (1 << bits) * layout.entry_bytes
    return cost


# --- the bits of an address -------------------------------------------------------------------------------------------


@given(layout=LAYOUTS, data=st.data())
def test_indices_and_offset_are_the_address_in_a_mixed_base(layout, data):
    """Put together again they give the address, so no two addresses share them; and each stays below its own base."""
    address = data.draw(st.integers(0, (1 << layout.address_bits) - 1), label="address")
    indices, offset = layout.split(address)
    assert len(indices) == len(layout.index_bits)
    assert 0 <= offset < layout.page_bytes, "an offset stays inside its page"
    again = 0
    for index, bits in zip(indices, layout.index_bits, strict=True):
        assert 0 <= index < 1 << bits, f"an index of {bits} bits names one of {1 << bits} entries"
        again = (again << bits) + index
    assert again * layout.page_bytes + offset == address, "the pieces do not make up the address"
    assert layout.indices(address // layout.page_bytes) == indices


def test_an_address_of_x86_64_by_hand():
    address = (5 << 39) | (4 << 30) | (3 << 21) | (2 << 12) | 0xABC  # 48 bits: 9 + 9 + 9 + 9 + 12
    assert X86_64.split(address) == ((5, 4, 3, 2), 0xABC)
    assert (X86_64.address_bits, X86_64.page_bytes, X86_64.num_pages) == (48, 4 * KIB, 2**36)


@pytest.mark.parametrize("address", [-1, 1 << 32])
def test_an_address_outside_the_space_is_refused(address):
    with pytest.raises(ValueError) as error:
        X86_32.split(address)
    assert says(error.value, {address, f"{address:#x}", f"{address:x}"}), (
        f"the message does not name {address}: {error.value}"
    )
    for kind in KINDS:
        with pytest.raises(ValueError):
            kind(X86_32).translate(address)


@pytest.mark.parametrize(
    ("index_bits", "offset_bits", "entry_bytes"), [((), 12, 4), ((9, 0), 12, 4), ((9,), -1, 4), ((9,), 12, 0)]
)
def test_a_layout_that_makes_no_sense_is_refused(index_bits, offset_bits, entry_bytes):
    with pytest.raises(ValueError):
        AddressLayout(index_bits, offset_bits, entry_bytes)


# --- the tables -------------------------------------------------------------------------------------------------------


class TablesAgainstADictionary(RuleBasedStateMachine):
    """One level and several, side by side: one contract, two prices. The model: page -> frame."""

    pages = Bundle("pages")  # that were mapped once; perhaps not any more
    ANY_PAGE = st.integers(0, 15) | st.integers(0, 2**36 - 1)  # taken modulo the pages that there are

    @initialize(layout=LAYOUTS)
    def start(self, layout):
        self.layout = layout
        self.tables = [kind(layout) for kind in KINDS]
        self.model = {}

    @rule(target=pages, page=ANY_PAGE, frame=st.integers(0, 9))
    def map(self, page, frame):
        page %= self.layout.num_pages
        self.map_again(page, frame)
        return page

    @rule(page=pages, frame=st.integers(0, 9))
    def map_again(self, page, frame):
        for table in self.tables:
            if page in self.model:
                with pytest.raises(ValueError):
                    table.map(page, frame)
            else:
                table.map(page, frame)
        self.model.setdefault(page, frame)

    @rule(page=pages)
    def unmap(self, page):
        for table in self.tables:
            if page in self.model:
                assert table.unmap(page) == self.model[page], "unmap returns the frame, so that it can be freed"
            else:
                with pytest.raises(ValueError):
                    table.unmap(page)
        self.model.pop(page, None)

    @rule(page=ANY_PAGE)
    def unmap_anywhere(self, page):
        self.unmap(page % self.layout.num_pages)

    @rule(page=pages, offset=st.integers(0, 4095))
    def translate(self, page, offset):
        offset %= self.layout.page_bytes
        address = page * self.layout.page_bytes + offset
        for table in self.tables:
            assert table.is_mapped(page) == (page in self.model)
            if page in self.model:
                assert table.translate(address) == self.model[page] * self.layout.page_bytes + offset
            else:
                with pytest.raises(PageFault) as fault:
                    table.translate(address)
                assert fault.value.page == page, "the kernel must be told which page to map"

    @rule(page=ANY_PAGE, offset=st.integers(0, 4095))
    def translate_anywhere(self, page, offset):
        self.translate(page % self.layout.num_pages, offset)

    @rule(beyond=st.booleans())
    def misuse(self, beyond):
        outside = self.layout.num_pages if beyond else -1
        for table in self.tables:
            for call in (table.unmap, table.frame, table.is_mapped, lambda page, table=table: table.map(page, 0)):
                with pytest.raises(ValueError):
                    call(outside)
            with pytest.raises(ValueError):
                table.map(0, -1)

    @invariant()
    def every_page_leads_to_its_frame(self):
        for table in self.tables:
            for page, frame in self.model.items():
                assert table.frame(page) == frame, f"page {page} leads to another frame than it was mapped to"

    @invariant()
    def the_tables_cost_what_the_pages_need(self):
        flat, multi_level = self.tables
        assert flat.cost_bytes == self.layout.num_pages * self.layout.entry_bytes, "a flat table is always all there"
        assert multi_level.cost_bytes == tables_cost(self.layout, self.model), "a table is missing, or left over empty"
        least, most = self.layout.dense_bytes(len(self.model)), self.layout.sparse_bytes(len(self.model))
        assert least <= multi_level.cost_bytes <= most


TestPageTables = TablesAgainstADictionary.TestCase


@given(layout=SMALL_LAYOUTS, data=st.data())
def test_dense_and_sparse_costs_are_reached(layout, data):
    """Pages 0, 1, 2, ... cost the least; pages whose *first* index changes fastest cost the most."""
    num_pages = data.draw(st.integers(0, layout.num_pages), label="pages")
    spread = sorted(range(layout.num_pages), key=lambda page: layout.indices(page)[::-1])
    dense, sparse = MultiLevelPageTable(layout), MultiLevelPageTable(layout)
    for number in range(num_pages):
        dense.map(number, 0)
        sparse.map(spread[number], 0)
    assert dense.cost_bytes == layout.dense_bytes(num_pages)
    assert sparse.cost_bytes == layout.sparse_bytes(num_pages)


@pytest.mark.parametrize("num_pages", [-1, 2**20 + 1])
def test_a_cost_is_asked_for_pages_that_exist(num_pages):
    for cost in (X86_32.dense_bytes, X86_32.sparse_bytes):
        with pytest.raises(ValueError) as error:
            cost(num_pages)
        assert says(error.value, num_pages), f"the message does not name {num_pages}: {error.value}"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_refused_changes_nothing(kind):
    table = kind(AddressLayout(index_bits=(2, 2), offset_bits=3, entry_bytes=4))
    table.map(11, 6)
    before = table.cost_bytes
    refused = [
        (ValueError, lambda: table.map(11, 5)),  # mapped already
        (ValueError, lambda: table.map(0, -1)),  # no such frame
        (ValueError, lambda: table.map(16, 0)),  # no such page
        (ValueError, lambda: table.unmap(0)),
        (PageFault, lambda: table.frame(0)),
        (PageFault, lambda: table.translate(10 * 8)),  # the neighbour, in a table that exists
        (PageFault, lambda: table.translate(0)),  # in a table that does not
    ]
    for error, call in refused:
        with pytest.raises(error):
            call()
    assert table.cost_bytes == before, "a fault brought a table into being"
    assert [page for page in range(16) if table.is_mapped(page)] == [11]
    assert table.translate(11 * 8 + 3) == 6 * 8 + 3 == 51  # the header of the chapter


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_map_one_frame(kind):
    """A table is one process's own: the same frame under two page numbers, and unmapping one leaves the other."""
    layout = AddressLayout(index_bits=(2, 2), offset_bits=3, entry_bytes=4)
    one, other = kind(layout), kind(layout)
    one.map(0, 2)
    other.map(13, 2)
    assert one.translate(0 * 8 + 5) == other.translate(13 * 8 + 5) == 2 * 8 + 5
    one.unmap(0)
    assert other.translate(13 * 8 + 5) == 2 * 8 + 5
    assert not one.is_mapped(0)


# --- two processes in one memory --------------------------------------------------------------------------------------


class ProcessesAgainstCells(RuleBasedStateMachine):
    """Three processes in one memory. The model: (process, page) -> cell, and a cell is the list of its bytes."""

    @initialize(
        num_frames=st.integers(1, 5),
        layout=st.sampled_from([AddressLayout((3,), 1, 4), AddressLayout((1, 2), 1, 4)]),
        kinds=st.lists(st.sampled_from(KINDS), min_size=3, max_size=3),
    )
    def start(self, num_frames, layout, kinds):
        self.layout, self.num_frames = layout, num_frames
        self.memory = PhysicalMemory(num_frames, layout.page_bytes)
        self.processes = [Process(self.memory, kind(layout)) for kind in kinds]
        self.cells = {}

    def num_cells(self):
        return len({id(cell) for cell in self.cells.values()})

    who = st.integers(0, 2)
    any_page = st.integers(0, 7)
    mappings = Bundle("mappings")  # (process, page), that was mapped once; perhaps not any more

    @rule(target=mappings, who=who, page=any_page)
    def map(self, who, page):
        mapped, full = (who, page) in self.cells, self.num_cells() == self.num_frames
        try:
            self.processes[who].map(page)
        except ValueError:
            assert mapped, f"page {page} has no frame, and could not be given one"
        except OutOfFrames:
            assert full, "refused although a frame is free"
        else:
            assert not mapped, f"page {page} lost the frame that it had"
            assert not full, "a frame in use was handed out"
            self.cells[who, page] = [0] * self.layout.page_bytes  # cleared: no process reads what another left there
        return who, page

    @rule(target=mappings, who=who, page=any_page, owners=mappings)
    def share(self, who, page, owners):
        owner, owner_page = owners
        due = (ValueError,) * ((who, page) in self.cells) + (PageFault,) * (owners not in self.cells)
        if due:  # where both are due, either is right
            with pytest.raises(due):
                self.processes[who].share(page, self.processes[owner], owner_page)
        else:
            self.processes[who].share(page, self.processes[owner], owner_page)
            self.cells[who, page] = self.cells[owners]
        return who, page

    @rule(mapping=mappings)
    def unmap(self, mapping):
        who, page = mapping
        if mapping in self.cells:
            self.processes[who].unmap(page)
            del self.cells[mapping]
        else:
            with pytest.raises(ValueError):
                self.processes[who].unmap(page)

    @rule(mapping=mappings, offset=st.integers(0, 1), byte=st.integers(0, 255))
    def store(self, mapping, offset, byte):
        who, page = mapping
        address = page * self.layout.page_bytes + offset
        if mapping in self.cells:
            self.processes[who].store(address, byte)
            self.cells[mapping][offset] = byte
        else:
            for call in (lambda: self.processes[who].load(address), lambda: self.processes[who].store(address, byte)):
                with pytest.raises(PageFault):
                    call()

    @invariant()
    def every_process_reads_its_own_cells(self):
        for (who, page), cell in self.cells.items():
            start = page * self.layout.page_bytes
            seen = [self.processes[who].load(start + offset) for offset in range(self.layout.page_bytes)]
            assert seen == cell, f"process {who} reads in page {page} what was not written there"

    @invariant()
    def a_frame_is_named_as_often_as_its_cell(self):
        frames = {}
        for (who, page), cell in self.cells.items():
            frames.setdefault(self.processes[who].table.frame(page), []).append(id(cell))
        for frame, cells in frames.items():
            assert len(set(cells)) == 1, f"frame {frame} stands behind pages that share nothing"
            assert self.memory.num_mappings(frame) == len(cells), f"frame {frame} is named by {len(cells)} entries"
        assert len(frames) == self.num_cells(), "pages that share have two frames"
        assert self.memory.num_free == self.num_frames - len(frames), "a frame is free when no entry names it"
        assert all(self.memory.num_mappings(f) == 0 for f in range(self.num_frames) if f not in frames)


TestProcesses = ProcessesAgainstCells.TestCase

SMALL = AddressLayout(index_bits=(1, 1), offset_bits=2, entry_bytes=4)


def two_processes(num_frames=2):
    memory = PhysicalMemory(num_frames, SMALL.page_bytes)
    return memory, Process(memory, FlatPageTable(SMALL)), Process(memory, MultiLevelPageTable(SMALL))


def test_a_shared_frame_lives_as_long_as_one_process_names_it():
    memory, a, b = two_processes()
    a.map(0)
    b.share(3, a, 0)
    for byte in (0, 255, 42):  # the least, the largest, and one that stays
        a.store(1, byte)
        assert b.load(3 * 4 + 1) == byte, "what a writes, b reads"
    a.unmap(0)
    assert b.load(3 * 4 + 1) == 42, "a is gone from the frame, b is not"
    assert memory.num_free == 1
    b.unmap(3)
    assert memory.num_free == 2


def test_a_frame_is_cleared_before_another_process_gets_it():
    _, a, b = two_processes(num_frames=1)
    a.map(0)
    for offset in range(4):
        a.store(offset, 99)
    a.unmap(0)
    b.map(0)
    assert [b.load(offset) for offset in range(4)] == [0, 0, 0, 0], "b reads what a left behind"


def test_what_a_process_may_not_do_changes_nothing():
    memory, a, b = two_processes(num_frames=2)
    frame = a.map(0)
    a.store(0, 7)
    b.share(0, a, 0)
    b.map(1)  # the memory is full now
    elsewhere = two_processes()[1]
    elsewhere.map(0)

    def seen():
        pages = [[page for page in range(4) if process.table.is_mapped(page)] for process in (a, b)]
        return memory.num_free, memory.num_mappings(frame), pages, a.load(0), b.load(0), b.load(4)

    before = seen()
    refused = [
        (OutOfFrames, lambda: a.map(1)),
        ((ValueError, OutOfFrames), lambda: a.map(0)),
        ((ValueError, OutOfFrames), lambda: a.map(4)),
        (ValueError, lambda: b.share(1, a, 0)),
        (PageFault, lambda: b.share(2, a, 3)),
        (ValueError, lambda: b.share(4, a, 0)),
        (ValueError, lambda: b.share(2, elsewhere, 0)),
        (ValueError, lambda: a.unmap(1)),
        (ValueError, lambda: a.unmap(4)),
        (PageFault, lambda: a.load(4)),
        (PageFault, lambda: a.store(4, 1)),
        (ValueError, lambda: a.load(16)),
        (ValueError, lambda: a.store(0, 256)),
        (ValueError, lambda: memory.num_mappings(3)),
        (ValueError, lambda: Process(PhysicalMemory(2, 2), FlatPageTable(SMALL))),
        (ValueError, lambda: Process(PhysicalMemory(2, 8), FlatPageTable(SMALL))),
        (ValueError, lambda: a.store(0, -1)),
    ]
    for error, call in refused:
        with pytest.raises(error):
            call()
        assert seen() == before


def test_frames_that_are_free_or_unknown_are_refused():
    memory = PhysicalMemory(2, page_bytes=4)
    used = memory.take()
    free = 1 - used
    refused = [
        lambda: memory.share(free),
        lambda: memory.drop(free),
        lambda: memory.load(free * 4),
        lambda: memory.store(free * 4, 1),
        lambda: memory.share(2),
        lambda: memory.drop(-1),
        lambda: memory.num_mappings(2),
        lambda: memory.num_mappings(-1),
        lambda: memory.load(8),
        lambda: memory.load(-1),
    ]
    for call in refused:
        with pytest.raises(ValueError):
            call()
        assert (memory.num_free, memory.num_mappings(used), memory.num_mappings(free)) == (1, 1, 0)
    for num_frames, page_bytes in ((0, 4), (4, 0)):
        with pytest.raises(ValueError):
            PhysicalMemory(num_frames, page_bytes)
    with pytest.raises(ValueError):
        Process(PhysicalMemory(2, page_bytes=8), FlatPageTable(SMALL))


@pytest.mark.parametrize("num_used", [0, 990])
def test_a_call_costs_the_same_however_large_the_memory_is(num_used):
    """O(1) is a count here: entries of the memory's lists, deques, dictionaries and sets that a call looks at."""
    memory = PhysicalMemory(1_000, page_bytes=1)
    for _ in range(num_used):
        memory.take()
    frame, counted = memory.take(), Counted(memory)
    for name, call in {
        "num_free": lambda: memory.num_free,
        "num_mappings": lambda: memory.num_mappings(frame),
        "share": lambda: memory.share(frame),
        "load": lambda: memory.load(frame),
        "store": lambda: memory.store(frame, 1),
        "drop, of a shared frame,": lambda: memory.drop(frame),
        "drop": lambda: memory.drop(frame),
        "take": memory.take,
    }.items():
        entries = counted.of(call)
        assert entries < 50, f"{name} looks at {entries} entries in a memory of 1000 frames, and is to be O(1)"


def test_the_cost_of_a_table_is_not_counted_table_by_table():
    """O(levels): 512 pages that lie as far apart as can be have 3 tables each beside the top one."""
    table = MultiLevelPageTable(X86_64)
    for number in range(512):
        table.map(number << 27, 0)
    counted = Counted(table)
    entries = counted.of(lambda: table.cost_bytes)
    assert entries < 50, f"cost_bytes looks at {entries} entries where 512 pages are mapped, and is to be O(levels)"
    assert table.cost_bytes == X86_64.sparse_bytes(512)


# --- what a table costs -----------------------------------------------------------------------------------------------


def test_a_flat_table_costs_4_mib_for_32_bits_and_512_gib_for_48():
    assert FlatPageTable(X86_32).cost_bytes == 4 * MIB  # 2^20 pages of 4 KiB, 4 bytes each, for every process
    assert FlatPageTable(X86_64).cost_bytes == 512 * GIB  # 2^36 pages, 8 bytes each


def test_a_process_of_one_page_costs_one_table_for_each_level():
    for layout, tables in ((X86_32, 2), (X86_64, 4)):
        table = MultiLevelPageTable(layout)
        assert table.cost_bytes == 4 * KIB, "the top table, and nothing else"
        table.map(layout.num_pages - 1, frame=0)
        assert table.cost_bytes == layout.dense_bytes(1) == layout.sparse_bytes(1) == tables * 4 * KIB
        table.unmap(layout.num_pages - 1)
        assert table.cost_bytes == 4 * KIB


def test_one_gib_of_x86_64_costs_2_mib_if_dense_and_2_gib_if_sparse():
    pages = GIB // (4 * KIB)
    assert X86_64.dense_bytes(pages) == (512 + 1 + 1 + 1) * 4 * KIB
    assert X86_64.sparse_bytes(pages) == (pages + pages + 512 + 1) * 4 * KIB  # of its own for each page, twice


def test_with_every_page_mapped_more_levels_cost_more_than_one():
    """The saving is in what is left out. With nothing to leave out, the directories come on top."""
    assert X86_32.dense_bytes(X86_32.num_pages) == 4 * MIB + 4 * KIB
    assert X86_64.dense_bytes(X86_64.num_pages) == 512 * GIB + 1 * GIB + 2 * MIB + 4 * KIB


# --- and what one costs for a KV pool ---------------------------------------------------------------------------------


def test_16_tokens_of_one_layer_of_a_4096_wide_model_are_256_kib():
    layer = KVShape("one layer", num_layers=1, num_kv_heads=32, head_dim=128, max_model_len=2048)
    assert layer.block_bytes(block_size=16) == 2 * 16 * 4096 * 2 == 256 * KIB


def test_a_token_of_opt_13b_is_800_kib_and_the_pool_has_15_7_k_slots():
    """The paper: "800 KB" in section 3, "15.7K" slots in Table 1."""
    assert OPT_13B.token_bytes == 800 * KIB
    assert OPT_13B_POOL_BYTES // OPT_13B.token_bytes == 15_728


@pytest.mark.parametrize(
    ("shape", "pool_bytes", "block_bytes", "num_blocks", "seq_entries"),
    [
        (OPT_13B, OPT_13B_POOL_BYTES, 12.5 * MIB, 983, 128),
        (LLAMA_3_8B, LLAMA_3_8B_POOL_BYTES, 2 * MIB, 29_205, 512),
    ],
    ids=lambda value: value.name if isinstance(value, KVShape) else "",
)
def test_one_level_is_enough_for_a_kv_pool(shape, pool_bytes, block_bytes, num_blocks, seq_entries):
    cost = block_table_cost(shape, pool_bytes, block_size=16)
    assert (cost.block_bytes, cost.num_blocks) == (block_bytes, num_blocks)
    assert cost.seq_bytes == 4 * seq_entries <= 2 * KIB, "few pages: a sequence's longest table is less than a page"
    assert cost.all_bytes == 4 * num_blocks < 128 * KIB, "all tables together, where every block has one owner"
    assert cost.block_bytes / 4 >= 512 * KIB > 1000 * (4 * KIB / 8), "a block is big: a page has 512 for one byte"
    bits = seq_entries.bit_length() - 1
    layout, as_two = AddressLayout((bits,), 4, ENTRY_BYTES), AddressLayout((bits - 3, 3), 4, ENTRY_BYTES)
    assert layout.flat_bytes == cost.seq_bytes, "the same arithmetic as a page table's"
    assert as_two.dense_bytes(seq_entries) > layout.flat_bytes, "no holes: a directory has nothing to leave out"


def test_the_pool_of_llama_3_8b_is_nine_tenths_of_80_gib_less_its_parameters():
    assert LLAMA_3_8B_POOL_BYTES == 77_309_411_328 - 16_060_522_496 == 61_248_888_832


@given(data=st.data(), offset_bits=st.integers(0, 4))
def test_a_block_table_is_a_page_table_of_one_level(data, offset_bits):
    """A position is a virtual address, a slot a physical one: block * block_size + offset."""
    block_size = 1 << offset_bits
    position = data.draw(st.integers(0, 128 * block_size - 1), label="position")
    blocks = data.draw(st.permutations(range(128)), label="blocks")
    table = FlatPageTable(AddressLayout((7,), offset_bits, ENTRY_BYTES))
    for logical, physical in enumerate(blocks):
        table.map(logical, physical)
    assert table.layout.split(position) == ((position // block_size,), position % block_size)
    assert table.translate(position) == blocks[position // block_size] * block_size + position % block_size


@given(
    layers=st.integers(1, 8), heads=st.integers(1, 8), dim=st.integers(1, 64), size=st.integers(1, 64), data=st.data()
)
def test_blocks_fill_the_pool_but_for_less_than_one(layers, heads, dim, size, data):
    shape = KVShape("any", layers, heads, dim, max_model_len=100)
    assert shape.block_bytes(size) == size * shape.token_bytes == 4 * size * layers * heads * dim
    pool_bytes = data.draw(st.integers(shape.block_bytes(size), 20 * shape.block_bytes(size)), label="pool_bytes")
    cost = block_table_cost(shape, pool_bytes, size)
    assert 0 <= pool_bytes - cost.num_blocks * cost.block_bytes < cost.block_bytes
    assert (cost.seq_bytes // 4 - 1) * size < 100 <= cost.seq_bytes // 4 * size


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: OPT_13B.block_bytes(0), "block_size"),
        (lambda: block_table_cost(OPT_13B, 12 * MIB), "OPT-13B"),
        (lambda: block_table_cost(OPT_13B, OPT_13B_POOL_BYTES, 0), "block_size"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(call, names):
    with pytest.raises(ValueError, match=names):
        call()
