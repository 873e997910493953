"""The model beside the memory: contents in a plain list, owners in a plain dictionary. Too simple to be wrong.

A machine runs one random script on the real tables and on this model, and compares after every step. What it reads is
what makes paging right: each sequence, read through its table, holds exactly what was written for it.

No block id and no order is pinned: any right implementation passes.
"""

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from minipaged.memory.block_allocator import BlockAllocator, OutOfBlocks
from minipaged.memory.block_table import BlockTable

POISON = None  # what lies in a slot that no sequence may read
NUM_BLOCKS = st.integers(1, 8)
BLOCK_SIZES = st.sampled_from([1, 2, 3, 4, 16])  # small ones show a fault in few events, and servers use 16


def state(allocator, *tables):
    """All that can be seen of an allocator and its tables: what an operation that failed must leave as it was."""
    owners = [allocator.ref_count(block) for block in range(allocator.num_blocks)]
    return (
        allocator.num_blocks,
        allocator.num_free,
        owners,
        [(table.num_tokens, list(table.blocks)) for table in tables],
    )


def all_blocks(allocator):
    """Take every block that is left."""
    return [allocator.allocate() for _ in range(allocator.num_free)]


class Pool:
    """The contents of a memory: one entry a slot. In the real cache this is a tensor of K and one of V."""

    def __init__(self, num_blocks, block_size):
        self.block_size = block_size
        self.slots = [POISON] * (num_blocks * block_size)

    def write(self, table, start, contents):
        for position, content in enumerate(contents, start=start):
            self.slots[table.slot(position)] = content

    def read(self, table):
        return [self.slots[table.slot(position)] for position in range(table.num_tokens)]

    def block(self, block):
        return self.slots[block * self.block_size : (block + 1) * self.block_size]

    def copy(self, plan, target=None):
        """Carry out (source, target) copies one after the other, within this pool or into another one."""
        for source, destination in plan:
            (target or self).set_block(destination, self.block(source))

    def set_block(self, block, contents):
        self.slots[block * self.block_size : (block + 1) * self.block_size] = contents

    def poison(self, blocks):
        for block in blocks:
            self.set_block(block, [POISON] * self.block_size)


@dataclass
class Sequence:
    """What a sequence is, apart from where it lies: its tokens, and the table under test."""

    table: BlockTable
    tokens: list = field(default_factory=list)
    cache_salt: str | None = None
    on_host: bool = False

    def contents(self, start=0):
        """What is stored for each token: like K and V, it depends on the token and on all tokens before it."""
        return [(self.cache_salt, tuple(self.tokens[: position + 1])) for position in range(start, len(self.tokens))]


class Tables:
    """The block tables as a line, which is made only when a script failed and is printed."""

    def __init__(self, sequences):
        self.sequences = sequences

    def __repr__(self):
        tables = [f"{n} {s.table.blocks}{' on the host' * s.on_host}" for n, s in self.sequences.items()]
        return "    block tables: " + (", ".join(tables) or "none")


class TablesMachine(RuleBasedStateMachine):
    """Several sequences in one pool. They come, grow, are cut and go; what they hold is theirs alone."""

    @initialize(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZES, data=st.data())
    def start(self, num_blocks, block_size, data):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.sequences = {}  # name -> Sequence
        self.pool = Pool(num_blocks, block_size)
        self.num_named = self.num_written = 0
        self.build(data)

    # What the machines of chapter 9 change.

    def build(self, data):
        self.allocator = self.new_allocator()

    def new_allocator(self):
        return BlockAllocator(self.num_blocks)

    def new_table(self, name):
        return BlockTable(self.allocator, self.block_size)

    def new_tokens(self, data, count):
        """Every token is written once in the whole script, so that one which shows up elsewhere is seen."""
        self.num_written += count
        return list(range(self.num_written - count, self.num_written))

    def kept(self):
        """Blocks with contents that no table names."""
        return set()

    def wrote(self, name, start):
        """Contents were stored for the tokens from `start` on."""

    # The script.

    def new_name(self):
        """A, B, C, ... in the order in which their tables are made."""
        self.num_named += 1
        return chr(ord("A") + self.num_named - 1) if self.num_named <= 26 else f"s{self.num_named}"

    def draw_sequence(self, data, on_host=False):
        """One of the sequences, on the device if nothing else is asked."""
        return data.draw(st.sampled_from([n for n, s in self.sequences.items() if s.on_host <= on_host]), label="who")

    def draw_count(self, data):
        return data.draw(st.integers(0, 2 * self.block_size + 1), label="how many")

    def any_on_device(self):
        return any(not sequence.on_host for sequence in self.sequences.values())

    def there_is_a_place(self):
        return len(self.sequences) < 4

    @precondition(there_is_a_place)
    @rule(data=st.data())
    def arrive(self, data):
        """A request comes with its prompt, and stays if there is room for it."""
        name = self.new_name()
        self.sequences[name] = Sequence(self.new_table(name))
        if not self.grow(name, self.new_tokens(data, self.draw_count(data))):
            self.sequences.pop(name).table.release()

    @precondition(any_on_device)
    @rule(data=st.data())
    def append(self, data):
        self.grow(self.draw_sequence(data), self.new_tokens(data, self.draw_count(data)))

    def grow(self, name, tokens):
        """Append and write. Returns whether there was room."""
        sequence, count = self.sequences[name], len(tokens)
        table, before = sequence.table, sequence.table.blocks
        copied = self.must_copy(sequence, count)
        needed = self.blocks_for(table.num_tokens + count) - len(before) + copied
        said = table.blocks_needed(count)
        assert said == needed, (
            f"{count} more tokens behind {table.num_tokens} need {needed} blocks{', a copy too' * copied}, not {said}"
        )
        taken = self.named() | {block for block in range(self.num_blocks) if self.allocator.ref_count(block)}
        taken -= self.evictable()
        unchanged = state(self.allocator, *self.tables())
        try:
            copies = table.append_tokens(count)
        except OutOfBlocks:
            assert needed > unchanged[1], f"refused {needed} blocks although {unchanged[1]} are free"
            assert state(self.allocator, *self.tables()) == unchanged, "an append that failed changed something"
            return False
        assert needed <= unchanged[1], f"took {needed} blocks although {unchanged[1]} are free"
        kept = before[: len(before) - copied]
        assert table.blocks[: len(kept)] == kept, "an append moved tokens that were there"
        assert not taken & set(table.blocks[len(kept) :]), "a block was handed out while a table names it"
        due = [(before[-1], table.blocks[len(kept)])] if copied else []
        assert copies == due, f"append_tokens returns {copies}, and the copies to make are {due}" + (
            ": a last block that another table names is never written" * copied
        )
        self.pool.copy(copies)
        start = len(sequence.tokens)
        sequence.tokens += tokens
        self.pool.write(table, start, sequence.contents(start))
        self.wrote(name, start)
        return True

    @precondition(any_on_device)
    @rule(data=st.data())
    def truncate(self, data):
        sequence = self.sequences[self.draw_sequence(data)]
        count = data.draw(st.integers(0, len(sequence.tokens)), label="keep")
        before = sequence.table.blocks
        sequence.table.truncate(count)
        del sequence.tokens[count:]
        assert sequence.table.blocks == before[: self.blocks_for(count)], "what is kept must stay where it is"

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def leave(self, data):
        self.sequences.pop(self.draw_sequence(data, on_host=True)).table.release()

    # What must always hold.

    @invariant()
    def what_must_always_hold(self):
        """One invariant of many parts, so that a failing script is printed as steps, with the tables after each."""
        note(Tables(self.sequences))
        for part in self.parts:
            part(self)

    def a_table_has_the_blocks_of_its_tokens(self):
        for sequence in self.sequences.values():
            assert sequence.table.num_tokens == len(sequence.tokens)
            assert len(sequence.table.blocks) == self.blocks_for(len(sequence.tokens))

    def free_and_named_partition_the_pool(self):
        self.check_owners(self.allocator, self.num_blocks, on_host=False, kept=self.kept())

    def what_is_read_is_what_was_written(self):
        self.pool.poison(set(range(self.num_blocks)) - self.named() - self.kept())
        for name, sequence in self.sequences.items():
            read = self.memory_of(sequence).read(sequence.table)
            assert read == sequence.contents(), f"{name}, read through its table, is not what was written for it"

    parts = (a_table_has_the_blocks_of_its_tokens, free_and_named_partition_the_pool, what_is_read_is_what_was_written)

    # The model's own arithmetic.

    def memory_of(self, sequence):
        return self.pool

    def blocks_for(self, num_tokens):
        return len(range(0, num_tokens, self.block_size))

    def tables(self):
        return [sequence.table for sequence in self.sequences.values()]

    def owners(self, on_host=False):
        """The reference counts, counted: block -> entries of tables that name it."""
        return Counter(
            block
            for sequence in self.sequences.values()
            if sequence.on_host == on_host
            for block in sequence.table.blocks
        )

    def named(self):
        return set(self.owners())

    def evictable(self):
        """Kept blocks that an append may take."""
        return self.kept() - self.named()

    def must_copy(self, sequence, count):
        if count == 0 or len(sequence.tokens) % self.block_size == 0:
            return False
        last = sequence.table.blocks[-1]
        return self.owners()[last] > 1 or last in self.kept()

    def check_owners(self, allocator, num_blocks, on_host, kept=frozenset()):
        owners = self.owners(on_host)
        assert allocator.num_blocks == num_blocks
        assert allocator.num_free == num_blocks - len(owners), (
            f"tables name {len(owners)} of {num_blocks} blocks, and {allocator.num_free} are said to be free"
        )
        for block in range(num_blocks):
            if block not in kept:
                count = allocator.ref_count(block)
                assert count == owners[block], f"{owners[block]} tables name block {block}, and its count is {count}"
