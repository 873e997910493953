"""Chapter 9's machines: the model of memory_model.py, with fork, a prefix cache and swap on top.

Each builds on TablesMachine, so that they are tried one at a time and then all in one script:

    SharingMachine       fork, copy-on-write         reference counts are the entries of tables that name a block
    PrefixMachine        match, cache, evict         a dictionary: prefix -> when it was last used
    SwapMachine          swap_out, swap_in           what was shared before is shared after
    PagedMemoryMachine   all of it
"""

from dataclasses import dataclass

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from memory_model import Pool, Sequence, TablesMachine, state
from minipaged.memory.block_allocator import BlockAllocator, OutOfBlocks
from minipaged.memory.prefix_cache import PrefixCache
from minipaged.memory.swap import Swap

SALTS = st.sampled_from([None, "", "a", "b"])
SENTINEL = 7  # a token that no script writes: it stands behind a prompt, so that all of the prompt may be found


class SharingMachine(TablesMachine):
    """Sequences fork. The two have the same past and, from then on, a future each."""

    @precondition(lambda self: self.any_on_device() and self.there_is_a_place())
    @rule(data=st.data())
    def fork(self, data):
        parent = self.sequences[self.draw_sequence(data)]
        name, free = self.new_name(), self.allocator.num_free
        child = Sequence(self.fork_table(parent, name), list(parent.tokens), parent.cache_salt)
        assert child.table.blocks == parent.table.blocks, "a fork names the same blocks"
        assert self.allocator.num_free == free, "a fork takes no block"
        self.sequences[name] = child

    def fork_table(self, parent, name):
        return parent.table.fork()

    def who_names_a_block_names_what_is_before_it(self):
        """A prefix is shared as a whole: K and V of a block are right behind one past only."""
        behind = {}
        for sequence in self.sequences.values():
            blocks = sequence.table.blocks
            for logical, block in enumerate(blocks):
                past = behind.setdefault((sequence.on_host, block), blocks[:logical])
                assert past == blocks[:logical], f"block {block} stands behind {past} and behind {blocks[:logical]}"

    parts = (*TablesMachine.parts, who_names_a_block_names_what_is_before_it)


@dataclass
class Entry:
    """What the model knows of one prefix that was cached."""

    used: int  # the step in which a table last came to name it
    left: float = float("inf")  # the step in which the last table that named it went


class PrefixMachine(SharingMachine):
    """Prompts over two tokens and a few salts, so that prefixes meet. The model: a dictionary of the prefixes."""

    def build(self, data):
        super().build(data)
        self.entries = {}  # (cache_salt, tokens of the prefix) -> Entry
        self.now = 0

    def new_allocator(self):
        return PrefixCache(self.num_blocks, self.block_size)

    def new_tokens(self, data, count):
        return data.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count), label="tokens")

    def find(self, cache_salt, tokens):
        """The blocks of a whole prefix, as far as it is found."""
        return self.allocator.match([*tokens, SENTINEL], cache_salt)

    def block_of(self, key):
        """The block of a prefix in the model, if the cache still finds it."""
        blocks = self.find(*key)
        return blocks[-1] if len(blocks) * self.block_size == len(key[1]) else None

    def kept(self):
        return {self.block_of(key) for key in self.entries} - {None}

    def prefixes(self, cache_salt, tokens):
        ends = range(self.block_size, len(tokens) + 1, self.block_size)
        return [(cache_salt, tuple(tokens[:end])) for end in ends]

    @precondition(lambda self: self.there_is_a_place())
    @rule(data=st.data(), cache_salt=SALTS)
    def arrive(self, data, cache_salt):
        """A request comes with its prompt: name what is found, compute the rest. It stays if the rest has room."""
        prompt = self.new_tokens(data, self.draw_count(data))
        before = state(self.allocator, *self.tables())
        hits = self.allocator.match(prompt, cache_salt)
        assert state(self.allocator, *self.tables()) == before, "to look is not to take"
        run = [key in self.entries for key in self.prefixes(cache_salt, prompt[:-1])] + [False]
        assert len(hits) == run.index(False), "the longest run of blocks that were cached, less than the whole prompt"
        name = self.new_name()
        sequence = Sequence(self.new_table(name), prompt[: len(hits) * self.block_size], cache_salt)
        sequence.table.append_shared(hits)
        self.sequences[name] = sequence
        assert self.pool.read(sequence.table) == sequence.contents(), "a hit holds the tokens it was found by"
        if not self.grow(name, prompt[len(sequence.tokens) :]):
            self.sequences.pop(name).table.release()
            for key in self.prefixes(cache_salt, prompt)[: len(hits)]:
                if key in self.entries and self.block_of(key) not in self.named():
                    self.entries[key].left = self.now

    @precondition(lambda self: self.any_on_device() and self.there_is_a_place())
    @rule(data=st.data())
    def arrive_with(self, data):
        """A request with the tokens of another one, admitted in the same step: it computes all of them too."""
        first = self.sequences[self.draw_sequence(data)]
        name = self.new_name()
        self.sequences[name] = Sequence(self.new_table(name), [], first.cache_salt)
        if not self.grow(name, list(first.tokens)):
            self.sequences.pop(name).table.release()

    @precondition(lambda self: self.any_on_device())
    @rule(data=st.data())
    def cache_blocks(self, data):
        """After a step: what was written is cached. (A step that wrote less than there is room for, too.)"""
        sequence = self.sequences[self.draw_sequence(data)]
        written = data.draw(st.integers(0, len(sequence.tokens)) | st.just(len(sequence.tokens)), label="written")
        tokens, found = sequence.tokens[:written], {key: self.block_of(key) for key in self.entries}
        tables = [table.blocks for table in self.tables()]
        for key, block in zip(self.prefixes(sequence.cache_salt, tokens), sequence.table.blocks, strict=False):
            if found.setdefault(key, block) != block:
                break  # another block has the key: it keeps it, and what the table has from here on is not cached
        self.allocator.cache_blocks(sequence.table, tokens, sequence.cache_salt)
        assert [table.blocks for table in self.tables()] == tables, "caching changes no table"
        assert {key: self.block_of(key) for key in found} == found, "what is found stays, and full blocks are added"
        for key in found:
            self.entries.setdefault(key, Entry(self.now))

    def grow(self, name, tokens):
        needed, free = self.sequences[name].table.blocks_needed(len(tokens)), self.num_unkept()
        there_was_room = super().grow(name, tokens)
        self.check_evictions(max(0, needed - free) if there_was_room else 0)
        return there_was_room

    def num_unkept(self):
        """Blocks that are free without an eviction."""
        return self.num_blocks - len(self.named() | self.kept())

    def check_evictions(self, count):
        """So many were due: never one in use (that is an invariant), leaf before parent, least recently used."""
        evicted = {key: entry for key, entry in self.entries.items() if self.block_of(key) is None}
        assert len(evicted) == count, f"{count} blocks had to go, {len(evicted)} are found no more"
        self.entries = {key: entry for key, entry in self.entries.items() if key not in evicted}
        for evicted_salt, tokens in evicted:
            longer = [key for key in self.entries if key[0] == evicted_salt and key[1][: len(tokens)] == tokens]
            assert not longer, f"the parent {tokens} was evicted before its leaf {longer[0]}"
        for key, entry in self.entries.items():
            if self.block_of(key) not in self.named():
                younger = [other for other, gone in evicted.items() if entry.left < gone.used]
                assert not younger, f"{younger[0]} was evicted, and used after {key} was left"

    def what_was_cached_is_found(self):
        """And nothing else is: no block is found twice, none is found for other tokens than it holds."""
        self.now += 1
        named, found = self.named(), {}
        for key, entry in self.entries.items():
            block = self.block_of(key)
            assert block is not None, f"{key} was cached, and is not found although nothing had to be evicted"
            assert block not in found, f"block {block} is found for {key} and for {found.get(block)}"
            found[block] = key
            cache_salt, tokens = key
            start = len(tokens) - self.block_size
            contents = [(cache_salt, tokens[: position + 1]) for position in range(start, len(tokens))]
            assert self.pool.block(block) == contents, f"block {block} does not hold what it is found for"
            if block in named and entry.left < float("inf"):
                entry.used, entry.left = self.now, float("inf")
            elif block not in named and entry.left == float("inf"):
                entry.left = self.now

    def what_was_not_cached_is_not_found(self):
        for sequence in self.sequences.values():
            run = [key in self.entries for key in self.prefixes(sequence.cache_salt, sequence.tokens)] + [False]
            found = len(self.find(sequence.cache_salt, sequence.tokens))
            assert found == run.index(False), f"{found} blocks of {sequence.tokens} are found"

    parts = (*SharingMachine.parts, what_was_cached_is_found, what_was_not_cached_is_not_found)


class SwapMachine(SharingMachine):
    """Groups of sequences go to the host and come back, whole, however they share and with whom."""

    def build(self, data):
        self.num_host_blocks = data.draw(st.integers(1, 8), label="num_host_blocks")
        super().build(data)
        self.host = BlockAllocator(self.num_host_blocks)
        self.host_pool = Pool(self.num_host_blocks, self.block_size)
        self.swap = Swap(self.allocator, self.host)

    def memory_of(self, sequence):
        return self.host_pool if sequence.on_host else self.pool

    def draw_group(self, data, on_host):
        names = [name for name, sequence in self.sequences.items() if sequence.on_host == on_host]
        return [self.sequences[name] for name in data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))]

    @precondition(lambda self: self.any_on_device())
    @rule(data=st.data())
    def swap_out(self, data):
        self.check_swap(self.draw_group(data, on_host=False), self.swap.swap_out, self.pool, self.host_pool, self.host)

    @precondition(lambda self: any(sequence.on_host for sequence in self.sequences.values()))
    @rule(data=st.data())
    def swap_in(self, data):
        group = self.draw_group(data, on_host=True)
        self.check_swap(group, self.swap.swap_in, self.host_pool, self.pool, self.allocator)

    def check_swap(self, group, move, source, target, allocator):
        """Whether it moved."""
        tables = [sequence.table for sequence in group]
        before = [block for table in tables for block in table.blocks]
        evictable = self.evictable() if allocator is self.allocator else set()
        taken = {b for b in range(allocator.num_blocks) if allocator.ref_count(b)} - evictable
        outside = [sequence for sequence in self.sequences.values() if sequence not in group]
        others = [sequence.table.blocks for sequence in outside]
        unchanged = state(self.allocator, *self.tables()), state(self.host)
        try:
            plan = move(tables)
        except OutOfBlocks:
            assert len(set(before)) > allocator.num_free, "refused although there is room for each block once"
            assert (state(self.allocator, *self.tables()), state(self.host)) == unchanged, "a refusal changed something"
            return False
        sources, targets = [pair[0] for pair in plan], [pair[1] for pair in plan]
        assert sorted(sources) == sorted(set(before)), "each block of the group moves, and moves once"
        assert len(set(targets)) == len(targets) and not taken & set(targets), "a target that is in use"
        after = [block for table in tables for block in table.blocks]
        assert after == [dict(plan)[block] for block in before], "what was one block before is one block after"
        assert [sequence.table.blocks for sequence in outside] == others, "a table outside the group was changed"
        source.copy(plan, target)
        for sequence in group:
            sequence.on_host = not sequence.on_host
        return True

    def free_and_named_partition_the_host(self):
        self.check_owners(self.host, self.num_host_blocks, on_host=True)
        self.host_pool.poison(set(range(self.num_host_blocks)) - set(self.owners(on_host=True)))

    parts = (free_and_named_partition_the_host, *SharingMachine.parts)


class PagedMemoryMachine(SwapMachine, PrefixMachine):
    """Everything at once: appends, forks, truncations, releases, prefix hits, evictions and swaps."""

    def check_swap(self, group, move, source, target, allocator):
        """A swap-in may evict, as an append may."""
        needed, free = len({block for sequence in group for block in sequence.table.blocks}), self.num_unkept()
        moved = super().check_swap(group, move, source, target, allocator)
        self.check_evictions(max(0, needed - free) if moved and allocator is self.allocator else 0)
        return moved

    parts = (SwapMachine.free_and_named_partition_the_host, *PrefixMachine.parts)
