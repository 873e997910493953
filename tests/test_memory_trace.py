"""The trace: on, it tells all that happened; off, nothing else changes. (Of no chapter: all of them draw from it.)"""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.memory.block_allocator import BlockAllocator, OutOfBlocks
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.block_table import BlockTable
from minipaged.memory.prefix_cache import PrefixCache
from minipaged.memory.swap import Swap
from minipaged.memory.trace import EVENTS, VERSION, Trace
from minipaged.viz.trace_file import load_trace, read_trace
from sharing_model import PagedMemoryMachine
from trace_model import Replay


class TracedMachine(PagedMemoryMachine):
    """The same scripts, recorded. The events, replayed into plain dictionaries, must say what the tables say."""

    def build(self, data):
        self.trace = Trace(self.num_blocks, self.block_size)
        super().build(data)
        self.trace.num_host_blocks = self.num_host_blocks
        self.replay, self.num_replayed = Replay(self.block_size), 0

    def new_allocator(self):
        return PrefixCache(self.num_blocks, self.block_size, trace=self.trace)

    def new_table(self, name):
        return BlockTable(self.allocator, self.block_size, seq=name, trace=self.trace)

    def fork_table(self, parent, name):
        return parent.table.fork(seq=name)

    def wrote(self, name, start):
        """The code that stores K and V records it; here the model does."""
        if count := len(self.sequences[name].tokens) - start:
            self.trace.record("write", seq=name, start=start, count=count)

    def a_replay_of_the_events_gives_the_tables(self):
        for event in self.trace.events[self.num_replayed :]:
            self.replay.apply(event)
        self.num_replayed = len(self.trace.events)
        self.trace.step += 1
        for on_host in (False, True):
            tables = {
                name: sequence.table.blocks
                for name, sequence in self.sequences.items()
                if sequence.on_host == on_host and sequence.tokens
            }
            assert self.replay.whole_tables(on_host) == tables
        assert self.replay.cached == self.kept()

    parts = (*PagedMemoryMachine.parts, a_replay_of_the_events_gives_the_tables)

    def teardown(self):
        if hasattr(self, "trace"):
            again = read_trace(self.trace.dumps().splitlines())
            assert again.events == self.trace.events and again.header() == self.trace.header()


TestTraced = TracedMachine.TestCase


def replayed(trace):
    replay = Replay(trace.block_size)
    for event in trace.events:
        replay.apply(event)
    return replay


def run(script, trace):
    """One script over everything, traced or not. Returns what could be seen after each of its steps."""
    cache = PrefixCache(6, 2, trace=trace)
    host = BlockAllocator(3)
    swap = Swap(cache, host)
    tables, seen = {}, []
    for verb, name, argument in script:
        table = tables.get(name)
        try:
            if table is None:
                table = tables[name] = BlockTable(cache, 2, seq=name, trace=trace)
                table.append_shared(cache.match([1] * argument))
                seen.append(table.append_tokens(argument - table.num_tokens))
                cache.cache_blocks(table, [1] * argument)
            elif verb == "swap":
                seen.append((swap.swap_out if table.allocator is cache else swap.swap_in)([table]))
            elif verb == "release":
                tables.pop(name).release()
            elif table.allocator is cache and verb == "append":
                seen.append(table.append_tokens(argument))
            elif table.allocator is cache and verb == "fork" and name + "'" not in tables:
                tables[name + "'"] = table.fork(seq=name + "'")
        except OutOfBlocks as error:
            seen.append(str(error))
        seen.append([(name, table.num_tokens, table.blocks) for name, table in tables.items()])
        seen.append((cache.num_free, cache.num_evictable, host.num_free))
    return seen


VERBS = st.sampled_from(["append", "fork", "swap", "release"])
SCRIPTS = st.lists(st.tuples(VERBS, st.sampled_from(["A", "B", "A'"]), st.integers(0, 6)))


@given(script=SCRIPTS)
def test_recording_changes_nothing_else(script):
    assert run(script, trace=Trace(6, 2, 3)) == run(script, trace=None)


@given(script=SCRIPTS)
def test_a_trace_survives_json_lines(script, tmp_path_factory):
    trace = Trace(6, 2, 3)
    run(script, trace)
    trace.record("write", seq="A", start=0, count=1, tokens=["\u2028 a line break of its own", "\n"])
    for again in (read_trace(trace.dumps().splitlines()), read_trace(trace.dumps().splitlines(keepends=True))):
        assert (again.events, again.header(), again.step) == (trace.events, trace.header(), trace.step)
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    trace.save(path)
    assert load_trace(path).events == trace.events
    assert len(path.read_text(encoding="utf-8").split("\n")) == len(trace.events) + 2, "a header, and one line an event"


def test_what_each_verb_records():
    trace = Trace(8, 2, 4)
    cache = PrefixCache(8, 2, trace=trace)
    table = BlockTable(cache, 2, seq="A", trace=trace)
    table.append_tokens(3)
    first, second = table.blocks
    trace.step = 1
    child = table.fork(seq="B")
    ((source, target),) = child.append_tokens(1)
    trace.step = 2
    cache.cache_blocks(table, [5, 6, 7])
    ((_, host_first), (_, host_second)) = Swap(cache, BlockAllocator(4)).swap_out([table])
    table.release()
    child.truncate(2)
    assert source == second
    assert [[event["step"], event["event"], *list(event.values())[2:]] for event in trace.events] == [
        [0, "allocate", "A", 0, first],
        [0, "allocate", "A", 1, second],
        [1, "share", "B", 0, first],
        [1, "share", "B", 1, second],
        [1, "fork", "B", "A", 3],
        [1, "copy", "B", 1, second, target],
        [2, "cache", first],
        [2, "swap_out", "A", 0, first, host_first],
        [2, "swap_out", "A", 1, second, host_second],
        [2, "free", "A", 1, host_second],
        [2, "free", "A", 0, host_first],
        [2, "free", "B", 1, target],
    ]


def test_a_twin_records_nothing():
    """Two sequences computed the same block. The later one keeps its own, which is not cached."""
    trace = Trace(4, 2)
    cache = PrefixCache(4, 2, trace=trace)
    tables = [BlockTable(cache, 2, seq=seq, trace=trace) for seq in "AB"]
    for table in tables:
        table.append_tokens(3)
    first = tables[0].blocks[0]
    del trace.events[:]
    for table in tables:
        cache.cache_blocks(table, [5, 6, 7])
    assert trace.events == [{"event": "cache", "step": 0, "block": first}]


def test_a_reset_is_one_event_and_what_follows_begins_with_empty_pools():
    trace = Trace(4, 2, 4)
    blocks = BlockManager(4, 2, num_host_blocks=4, enable_prefix_caching=True, trace=trace)
    for seq in "AB":
        blocks.allocate_slots(seq, 4)
        blocks.cache_blocks(seq, [1, 2, 3, 4], cache_salt=seq)
    blocks.swap_out("B")
    num_before = len(trace.events)
    blocks.reset()
    blocks.allocate_slots("B", 8)
    assert trace.events[num_before] == {"event": "reset", "step": 0}
    assert [event["event"] for event in trace.events[num_before + 1 :]] == ["allocate"] * 4, "and no evict"
    assert replayed(trace).whole_tables() == {"B": blocks.blocks("B")}
    assert not replayed(trace).whole_tables(on_host=True) and not replayed(trace).cached


def test_a_refusal_records_nothing():
    trace = Trace(2, 2, 1)
    allocator = BlockAllocator(2)
    table = BlockTable(allocator, 2, seq="A", trace=trace)
    table.append_tokens(3)
    before = list(trace.events)
    with pytest.raises(OutOfBlocks):
        table.append_tokens(2)
    with pytest.raises(OutOfBlocks):
        Swap(allocator, BlockAllocator(1)).swap_out([table])
    with pytest.raises(ValueError):
        table.truncate(4)
    assert trace.events == before


def test_a_traced_table_has_a_name():
    trace = Trace(2, 2)
    with pytest.raises(ValueError, match="name"):
        BlockTable(BlockAllocator(2), 2, trace=trace)
    table = BlockTable(BlockAllocator(2), 2, seq="A", trace=trace)
    table.append_tokens(2)
    with pytest.raises(ValueError, match="name"):
        table.fork()
    assert table.allocator.ref_count(table.blocks[0]) == 1, "the fork that failed shares nothing"


@pytest.mark.parametrize("event", sorted(EVENTS))
def test_an_event_has_the_fields_of_the_schema(event):
    trace = Trace(2, 2)
    fields = dict.fromkeys(EVENTS[event], 0)
    trace.record(event, **fields, text="further fields are allowed")
    for name in fields:
        with pytest.raises(ValueError, match=name):
            trace.record(event, **{key: value for key, value in fields.items() if key != name})
    assert trace.events == [{"event": event, "step": 0, **fields, "text": "further fields are allowed"}]


def test_what_is_no_event():
    trace = Trace(2, 2)
    trace.step = 3
    trace.record("cache", block=0)
    before = list(trace.events)
    with pytest.raises(ValueError, match="unknown"):
        trace.record("forget", block=0)
    with pytest.raises(ValueError, match="step"):
        trace.record("cache", block=0, step=5)
    trace.step = 2
    with pytest.raises(ValueError, match="only rise"):
        trace.record("cache", block=0)
    assert trace.events == before


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (1, 1, -1), (None, 1), (2.5, 1)])
def test_a_header_has_sizes(sizes):
    with pytest.raises(ValueError, match="must be an integer"):
        Trace(*sizes)


# Written out: traces are kept in files, and a reader of this version must read them.
HEADER = {"schema": "minipaged.trace", "version": 2, "num_blocks": 2, "block_size": 2, "num_host_blocks": 0}


@pytest.mark.parametrize(
    ("line", "lines"),
    [
        (1, ["not JSON"]),
        (1, ["[1, 2]"]),
        (1, [json.dumps({"event": "cache", "step": 0, "block": 1})]),
        (1, [json.dumps({**HEADER, "version": VERSION + 1})]),
        (1, [json.dumps({**HEADER, "version": VERSION - 1})]),
        (1, [json.dumps({**HEADER, "schema": "another"})]),
        (1, [json.dumps({**HEADER, "schema": "other"})]),
        (1, [json.dumps({**HEADER, "num_blocks": 0})]),
        (1, [json.dumps({key: value for key, value in HEADER.items() if key != "block_size"})]),
        (2, [json.dumps(HEADER), "{"]),
        (2, [json.dumps(HEADER), "7"]),
        (2, [json.dumps(HEADER), json.dumps({"event": "cache", "block": 1})]),
        (2, [json.dumps(HEADER), json.dumps({"event": ["cache"], "step": 0})]),
        (3, [json.dumps(HEADER), "", json.dumps({"event": "allocate", "step": 0, "seq": "A"})]),
        (1, [json.dumps({**HEADER, "num_blocks": 10**9})]),
        (1, [json.dumps({**HEADER, "block_size": True})]),
        (1, ["[" * 100_000]),
        (2, [json.dumps(HEADER), json.dumps({"event": "cache", "step": 10**30, "block": 1})]),
        (2, [json.dumps(HEADER), json.dumps({"event": "cache", "step": 0, "block": 10**30})]),
        (2, [json.dumps(HEADER), json.dumps({"event": "cache", "step": 0, "block": 1.5})]),
        (2, [json.dumps(HEADER), json.dumps({"event": "free", "step": 0, "seq": "A" * 101, "logical": 0, "block": 1})]),
        (2, [json.dumps(HEADER), json.dumps({"event": "free", "step": 0, "seq": ["A"], "logical": 0, "block": 1})]),
        (2, [json.dumps(HEADER), json.dumps({"event": "schedule", "step": 0, "seqs": [1]})]),
    ],
)
def test_a_damaged_trace_names_the_line(line, lines):
    with pytest.raises(ValueError, match=f"line {line} "):
        read_trace(lines)


def test_a_header_is_read_and_written_as_it_is():
    assert read_trace([json.dumps(HEADER)]).header() == HEADER


def test_a_step_that_falls_behind_the_last_one_is_refused():
    trace = Trace(2, 2)
    trace.step = -1  # the first is behind none, but there is no step before 0
    with pytest.raises(ValueError, match="only rise"):
        trace.record("cache", block=0)
    for step in (0, 3):
        trace.step = step
        trace.record("cache", block=0)
    trace.step = 1
    with pytest.raises(ValueError, match="only rise"):
        trace.record("cache", block=0)


def test_an_empty_trace():
    with pytest.raises(ValueError, match="empty"):
        read_trace(["", ""])
