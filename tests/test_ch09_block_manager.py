"""Chapter 9. The block manager: sequences over a device and a host, by name, and each refusal exact.

The machine beside it counts blocks by itself. Where too few are free a method returns None, and then nothing at all has
changed: not a table, not a count, not the order in which blocks will be handed out or evicted. Where enough are free it
never returns None. Everything is traced, and at any time a replay of the trace gives the tables. No block id is pinned.
"""

import copy
from dataclasses import dataclass

import pytest
from hypothesis import given, note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memory_model import BLOCK_SIZES, NUM_BLOCKS, Pool
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.trace import Trace
from minipaged.viz.state import State
from sharing_model import SALTS
from trace_model import Replay

pytestmark = pytest.mark.ch09


def everything(blocks: BlockManager):
    """All that can be seen of a manager, and all that it would hand out from now on, in order: of an untraced copy."""
    tables = {name: (table.num_tokens, table.blocks, blocks.is_swapped(name)) for name, table in blocks.tables.items()}
    pools = [pool for pool in (blocks.device, blocks.host) if pool]
    counts = [[pool.ref_count(block) for block in range(pool.num_blocks)] for pool in pools]
    copies = copy.deepcopy(pools, {id(blocks.trace): None})
    handed_out = [[pool.allocate() for _ in range(pool.num_free)] for pool in copies]
    return tables, counts, handed_out, len(blocks.trace.events) if blocks.trace else 0


@dataclass
class Entry:
    """What the model knows of a sequence: its tokens, all of them written, and where it is."""

    tokens: list
    cache_salt: str | None
    on_host: bool = False

    def contents(self):
        return [(self.cache_salt, tuple(self.tokens[: position + 1])) for position in range(len(self.tokens))]


class ManagerMachine(RuleBasedStateMachine):
    """Sequences enter, grow, fork, move and go. Tokens are of two kinds, so that prefixes meet."""

    @initialize(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZES, num_host_blocks=st.integers(0, 8), caching=st.booleans())
    def start(self, num_blocks, block_size, num_host_blocks, caching):
        self.num_blocks, self.block_size, self.num_host_blocks = num_blocks, block_size, num_host_blocks
        self.trace = Trace(num_blocks, block_size, num_host_blocks)
        self.blocks = BlockManager(
            num_blocks, block_size, num_host_blocks=num_host_blocks, enable_prefix_caching=caching, trace=self.trace
        )
        self.caching = caching
        self.pool, self.host_pool = Pool(num_blocks, block_size), Pool(max(1, num_host_blocks), block_size)
        self.entries: dict[str, Entry] = {}
        self.num_named = self.num_replayed = 0
        self.replay, self.state = Replay(block_size), State(self.trace)

    # What is drawn.

    def draw_tokens(self, data, least, most):
        return data.draw(st.lists(st.integers(0, 1), min_size=least, max_size=most), label="tokens")

    def draw_name(self, data, on_host=False):
        return data.draw(st.sampled_from([n for n, e in self.entries.items() if e.on_host == on_host]), label="who")

    def any_on(self, on_host):
        return any(entry.on_host == on_host for entry in self.entries.values())

    # The model's own arithmetic.

    def named(self, on_host=False):
        return [block for n, e in self.entries.items() if e.on_host == on_host for block in self.blocks.blocks(n)]

    def blocks_for(self, num_tokens):
        return len(range(0, num_tokens, self.block_size))

    def cached(self):
        """Blocks that a sequence which enters now could find, by what the trace says."""
        return self.replay.cached

    def attempt(self, enough, act):
        """Carry out `act`, which returns None if and only if `enough` is false, and changes nothing then."""
        before = everything(self.blocks)
        done = act()
        assert (done is not None) == enough, "there is room" if enough else "there is none"
        if not enough:
            assert everything(self.blocks) == before, "a refusal changed something"
        return done

    def write(self, name, start):
        """The step has run. What it wrote is cached now."""
        entry, table = self.entries[name], self.blocks.tables[name]
        self.pool.write(table, start, entry.contents()[start:])
        if count := len(entry.tokens) - start:
            self.trace.record("write", seq=name, start=start, count=count)
        before = self.blocks.blocks(name)
        self.blocks.cache_blocks(name, entry.tokens, entry.cache_salt)
        assert self.blocks.blocks(name) == before

    # The script.

    @precondition(lambda self: len(self.entries) < 4)
    @rule(data=st.data(), cache_salt=SALTS, looks=st.booleans(), reserve=st.integers(0, 3))
    def enter(self, data, cache_salt, looks, reserve):
        self.num_named += 1
        name, tokens = f"s{self.num_named}", self.draw_tokens(data, 1, 4 * self.block_size)
        before = everything(self.blocks)
        prefix = self.blocks.get_computed_blocks(tokens, cache_salt) if looks else []
        assert everything(self.blocks) == before, "to look is not to take"
        assert len(prefix) * self.block_size < len(tokens), "one token is left to compute"
        contents = Entry(tokens, cache_salt).contents()
        held = [content for block in prefix for content in self.pool.block(block)]
        assert held == contents[: len(prefix) * self.block_size], "a hit holds the tokens that it was found by"
        free = self.num_blocks - len({*self.named(), *prefix})
        needed = self.blocks_for(len(tokens)) - len(prefix)
        taken = {*self.named(), *prefix}
        done = self.attempt(
            free - needed >= reserve, lambda: self.blocks.allocate_slots(name, len(tokens), prefix, reserve)
        )
        if done is None:
            assert name not in self.blocks.tables
            return
        assert done == [], "new blocks, and full ones that nothing is written to: there is nothing to copy"
        blocks = self.blocks.blocks(name)
        assert blocks[: len(prefix)] == prefix
        assert not taken & {*blocks[len(prefix) :]}, "a block that another table names was handed out"
        self.entries[name] = Entry(tokens, cache_salt)
        self.write(name, len(prefix) * self.block_size)

    @precondition(lambda self: self.any_on(False))
    @rule(data=st.data(), reserve=st.integers(0, 3))
    def grow(self, data, reserve):
        name = self.draw_name(data)
        entry, before = self.entries[name], self.blocks.blocks(name)
        new = self.draw_tokens(data, 0, 2 * self.block_size + 1)
        start, length = len(entry.tokens), len(entry.tokens) + len(new)
        shared = self.named().count(before[-1]) > 1 or before[-1] in self.cached()
        copies_last = bool(new) and start % self.block_size != 0 and shared
        needed = self.blocks_for(length) - len(before) + copies_last
        free = self.num_blocks - len({*self.named()})
        done = self.attempt(free - needed >= reserve, lambda: self.blocks.allocate_slots(name, length, reserve=reserve))
        if done is None:
            return
        after = self.blocks.blocks(name)
        kept = before[: len(before) - copies_last]
        assert after[: len(kept)] == kept
        assert done == ([(before[-1], after[len(kept)])] if copies_last else [])
        self.pool.copy(done)
        entry.tokens = entry.tokens + new
        self.write(name, start)

    @precondition(lambda self: self.any_on(False) and len(self.entries) < 4)
    @rule(data=st.data())
    def fork(self, data):
        parent = self.draw_name(data)
        self.num_named += 1
        child, free, num_events = f"s{self.num_named}", self.blocks.num_free, len(self.trace.events)
        self.blocks.fork(parent, child)
        entry, blocks = self.entries[parent], self.blocks.blocks(parent)
        self.entries[child] = Entry(list(entry.tokens), entry.cache_salt)
        assert (self.blocks.blocks(child), self.blocks.num_free) == (blocks, free), "the same blocks, and none is taken"
        shares = [("share", child, logical, block) for logical, block in enumerate(blocks)]
        events = [tuple(v for k, v in event.items() if k != "step") for event in self.trace.events[num_events:]]
        assert events == [*shares, ("fork", child, parent, len(entry.tokens))]

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def free(self, data):
        name = data.draw(st.sampled_from([*self.entries]), label="who")
        self.blocks.free(name)
        del self.entries[name]

    @rule()
    def free_one_that_is_not_there(self):
        before = everything(self.blocks)
        self.blocks.free("unknown")
        assert everything(self.blocks) == before

    @precondition(lambda self: self.any_on(False))
    @rule(data=st.data())
    def swap_out(self, data):
        name = self.draw_name(data)
        before = self.blocks.blocks(name)
        room = self.num_host_blocks - len(self.named(on_host=True))
        enough = self.num_host_blocks > 0 and room >= len(before)
        plan = self.attempt(enough, lambda: self.blocks.swap_out(name))
        if plan is not None:
            assert plan == list(zip(before, self.blocks.blocks(name), strict=True))
            self.pool.copy(plan, self.host_pool)
            self.entries[name].on_host = True

    @precondition(lambda self: self.any_on(True))
    @rule(data=st.data(), reserve=st.integers(0, 3), num_more=st.integers(0, 3))
    def swap_in(self, data, reserve, num_more):
        name = self.draw_name(data, on_host=True)
        before, num_tokens = self.blocks.blocks(name), len(self.entries[name].tokens) + num_more
        free = self.num_blocks - len({*self.named()})
        enough = free - self.blocks_for(num_tokens) >= reserve
        plan = self.attempt(enough, lambda: self.blocks.swap_in(name, num_tokens, reserve=reserve))
        if plan is None:
            return
        assert plan == list(zip(before, self.blocks.blocks(name), strict=True))
        self.host_pool.copy(plan, self.pool)
        entry = self.entries[name]
        entry.on_host = False
        start, new = len(entry.tokens), self.draw_tokens(data, num_more, num_more)
        assert self.blocks.allocate_slots(name, num_tokens) == [], "there is room for as many as were asked for"
        entry.tokens = entry.tokens + new
        self.write(name, start)

    @rule(really=st.integers(0, 4))
    def reset(self, really):
        """What lies in the blocks counts for nothing afterwards, and is found by nothing."""
        if really == 0:
            num_events = len(self.trace.events)
            self.blocks.reset()
            assert [event["event"] for event in self.trace.events[num_events:]] == ["reset"]
            self.entries = {}
            assert self.blocks.num_free == self.num_blocks
            assert not self.blocks.tables

    # What must always hold.

    @invariant()
    def what_must_always_hold(self):
        names = [f"{name} {self.blocks.blocks(name)}{' on the host' * e.on_host}" for name, e in self.entries.items()]
        note("    block tables: " + (", ".join(names) or "none"))
        self.a_block_is_in_use_exactly_if_a_table_names_it()
        self.what_is_read_is_what_was_written()
        self.a_replay_gives_the_tables()

    def a_block_is_in_use_exactly_if_a_table_names_it(self):
        assert self.blocks.num_free == self.blocks.device.num_free == self.num_blocks - len({*self.named()})
        on_host = self.named(on_host=True)
        assert len({*on_host}) == len(on_host)
        if self.blocks.host:
            assert self.blocks.host.num_free == self.num_host_blocks - len(on_host)
        assert {*self.blocks.tables} == {*self.entries}
        for name, entry in self.entries.items():
            assert self.blocks.num_tokens(name) == len(entry.tokens)
            assert len(self.blocks.blocks(name)) == self.blocks_for(len(entry.tokens))
            assert self.blocks.is_swapped(name) == entry.on_host
        assert (self.blocks.blocks("unknown"), self.blocks.num_tokens("unknown")) == ([], 0)
        assert not self.blocks.is_swapped("unknown")

    def what_is_read_is_what_was_written(self):
        self.pool.poison({*range(self.num_blocks)} - {*self.named()} - self.cached())
        for name, entry in self.entries.items():
            pool = self.host_pool if entry.on_host else self.pool
            assert pool.read(self.blocks.tables[name]) == entry.contents(), f"{name} does not read what was written"

    def a_replay_gives_the_tables(self):
        """The one of the tests and the one of the pictures, event by event."""
        for number in range(self.num_replayed, len(self.trace.events)):
            self.replay.apply(self.trace.events[number])
            self.state.apply(number)
        self.num_replayed = len(self.trace.events)
        self.trace.step += 1
        pools = [{n: self.blocks.blocks(n) for n, e in self.entries.items() if e.on_host == here} for here in (0, 1)]
        assert [self.replay.whole_tables(on_host) for on_host in (False, True)] == pools
        if not self.num_replayed:
            return
        snapshot = self.state.snapshot(self.num_replayed - 1, self.num_replayed)
        assert [snapshot.tables, snapshot.host_tables] == pools
        assert snapshot.num_tokens == {name: len(entry.tokens) for name, entry in self.entries.items()}
        assert snapshot.cached == self.replay.cached
        assert self.caching or not self.replay.cached


TestManager = ManagerMachine.TestCase


@given(
    tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12),
    written=st.integers(0, 12),
    block_size=BLOCK_SIZES,
    cache_salt=SALTS,
)
def test_a_prefix_is_found_as_far_as_it_was_cached_and_its_keys_say_by_what(tokens, written, block_size, cache_salt):
    blocks = BlockManager(12, block_size, enable_prefix_caching=True)
    blocks.allocate_slots("A", len(tokens))
    blocks.cache_blocks("A", tokens[:written], cache_salt)
    num_cached = min(min(written, len(tokens)), len(tokens) - 1) // block_size
    assert blocks.get_computed_blocks(tokens, cache_salt) == blocks.blocks("A")[:num_cached]
    keys = blocks.block_keys(tokens, cache_salt)
    assert len(keys) == len({*keys}) == len(tokens) // block_size
    assert blocks.block_keys([*tokens, 0], cache_salt)[: len(keys)] == keys
    assert not {*keys} & {*blocks.block_keys(tokens, f"not {cache_salt}")}
    plain = BlockManager(12, block_size)
    plain.allocate_slots("A", len(tokens))
    plain.cache_blocks("A", tokens, cache_salt)
    assert (plain.get_computed_blocks(tokens, cache_salt), plain.block_keys(tokens, cache_salt)) == ([], [])


@given(
    num_cached=st.integers(0, 4),
    num_new=st.integers(1, 9),
    num_used=st.integers(0, 6),
    reserve=st.integers(0, 3),
    held=st.booleans(),
    block_size=BLOCK_SIZES,
)
def test_a_sequence_enters_exactly_if_its_new_blocks_are_free_beside_the_reserve(
    num_cached, num_new, num_used, reserve, held, block_size
):
    """A pool of 12 blocks. A prefix costs nothing where another table names it, and its blocks where none does."""
    blocks = BlockManager(12, block_size, enable_prefix_caching=True)
    tokens = [0] * (num_cached * block_size + num_new)
    blocks.allocate_slots("A", num_cached * block_size)
    blocks.cache_blocks("A", tokens[: num_cached * block_size])
    blocks.allocate_slots("B", num_used * block_size)
    if not held:
        blocks.free("A")
    prefix = blocks.get_computed_blocks(tokens)
    assert len(prefix) == num_cached
    before, left = everything(blocks), 12 - num_used - num_cached - len(range(0, num_new, block_size))
    entered = blocks.allocate_slots("C", len(tokens), prefix, reserve)
    assert (entered is not None) == (left >= reserve)
    assert (blocks.num_free == left) if entered is not None else (everything(blocks) == before)


@given(
    num_tokens=st.integers(1, 12),
    num_more=st.integers(0, 8),
    num_used=st.integers(0, 6),
    reserve=st.integers(0, 3),
    block_size=BLOCK_SIZES,
)
def test_a_sequence_comes_back_exactly_if_the_blocks_of_all_its_tokens_are_free_beside_the_reserve(
    num_tokens, num_more, num_used, reserve, block_size
):
    blocks = BlockManager(12, block_size, num_host_blocks=12)
    blocks.allocate_slots("A", num_tokens)
    blocks.swap_out("A")
    blocks.allocate_slots("B", num_used * block_size)
    before = everything(blocks)
    left = 12 - num_used - len(range(0, num_tokens + num_more, block_size))
    came = blocks.swap_in("A", num_tokens + num_more, reserve=reserve)
    assert (came is not None) == (left >= reserve)
    if came is None:
        assert everything(blocks) == before
    else:
        assert blocks.allocate_slots("A", num_tokens + num_more) == []
        assert blocks.num_free == left


@given(
    num_tokens=st.integers(1, 12),
    num_more=st.integers(0, 4),
    num_used=st.integers(0, 8),
    num_shared=st.integers(0, 12),
    reserve=st.integers(0, 3),
    block_size=BLOCK_SIZES,
)
def test_a_sequence_comes_back_to_the_full_blocks_that_another_has(
    num_tokens, num_more, num_used, num_shared, reserve, block_size
):
    """B has forked from A. What they share and A still has costs B nothing: no block, no copy."""
    blocks = BlockManager(24, block_size, num_host_blocks=12)
    blocks.allocate_slots("A", num_tokens)
    blocks.fork("A", "B")
    blocks.swap_out("B")
    prefix = blocks.prefix_of("A", min(num_shared, num_tokens))
    assert prefix == blocks.blocks("A")[: min(num_shared, num_tokens) // block_size]
    blocks.allocate_slots("C", num_used * block_size)
    before, free, lay = everything(blocks), blocks.num_free, blocks.blocks("B")
    left = free + len(prefix) - len(range(0, num_tokens + num_more, block_size))
    came = blocks.swap_in("B", num_tokens + num_more, prefix, reserve)
    assert (came is not None) == (left >= reserve)
    if came is None:
        assert everything(blocks) == before
        return
    back = blocks.blocks("B")
    assert back[: len(prefix)] == prefix
    assert came == list(zip(lay, back, strict=True))[len(prefix) :]
    assert not {*back[len(prefix) :]} & {*blocks.blocks("A"), *blocks.blocks("C")}
    assert blocks.allocate_slots("B", num_tokens + num_more) == []
    assert blocks.num_free == left


def test_a_refusal_keeps_the_order_of_eviction():
    """Three cached blocks, and the one used longest ago is found again by the request that is refused."""
    blocks = BlockManager(4, 1, enable_prefix_caching=True)
    for number in range(3):
        blocks.allocate_slots(str(number), 1)
        blocks.cache_blocks(str(number), [number])
        blocks.free(str(number))
    before = everything(blocks)
    prefix = blocks.get_computed_blocks([0, 5, 5, 5, 5])
    assert len(prefix) == 1
    assert blocks.allocate_slots("A", 5, prefix) is None
    assert blocks.allocate_slots("A", 3, prefix, reserve=2) is None
    assert everything(blocks) == before
    blocks.allocate_slots("B", 2)  # the free block, and the one that was used longest ago
    found = [len(blocks.get_computed_blocks([number, 5])) for number in range(3)]
    assert found == [0, 1, 1]


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (-1, 4), (4, -1)])
def test_a_manager_has_blocks_and_they_have_slots(sizes):
    with pytest.raises(ValueError):
        BlockManager(*sizes)


def test_what_cannot_be_asked_for():
    blocks = BlockManager(8, 2, num_host_blocks=4)
    blocks.allocate_slots("A", 5)
    blocks.allocate_slots("B", 1)
    blocks.swap_out("B")
    before = everything(blocks)
    with pytest.raises(ValueError):
        blocks.allocate_slots("A", 4)  # fewer than it has: tokens are not taken back
    with pytest.raises(ValueError):
        blocks.swap_out("B")
    with pytest.raises(ValueError):
        blocks.swap_in("A", 5)
    for act in (lambda: blocks.fork("unknown", "C"), lambda: blocks.swap_out("unknown")):
        with pytest.raises(KeyError):
            act()
    assert everything(blocks) == before


def test_where_nothing_is_said_there_is_no_host_and_no_reserve():
    plain = BlockManager(2, 1)
    assert plain.host is None and plain.allocate_slots("A", 2) == []
    assert plain.swap_out("A") is None
    blocks = BlockManager(2, 1, num_host_blocks=2)
    blocks.allocate_slots("A", 2)
    blocks.swap_out("A")
    assert len(blocks.swap_in("A", 2)) == 2
    blocks.swap_out("A")
    blocks.allocate_slots("B", 1)
    assert blocks.swap_in("A", 2) is None
