"""One moment of the memory: which sequence names which block. Every picture is drawn from this and from nothing else.

    tables       A -> [5, 1]   B -> [5, 2]         physical block of each logical block
    num_tokens   A -> 6        B -> 7              the rest is derived:
                                                   block 5 has 2 owners, block 1 holds 2 tokens of A, block 0 is free

A Snapshot is made from live block tables (a demo, a failing test) or by replaying a trace (minipaged/viz/replay.py).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, product

from minipaged.memory.trace import Event

NOWHERE = -1
"""In a table: this logical block is not in this pool, but in the other one."""

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Owner:
    """One entry of one block table: logical block `logical` of `seq`, which holds `fill` tokens of it."""

    seq: str
    logical: int
    fill: int


@dataclass(frozen=True)
class Snapshot:
    """The state of a pool of `num_blocks` blocks of `block_size` tokens each.

    Raises ValueError where a block lies outside its pool. What is wrong in another way (a block that is too much, a
    token without a block) is drawn as it is: a picture of a counterexample must show it.
    """

    num_blocks: int
    block_size: int
    tables: Mapping[str, Sequence[int]]  # sequence -> physical block of each logical block
    num_tokens: Mapping[str, int]  # sequence -> tokens written, on whichever pool
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)  # sequence -> a short text per position
    num_host_blocks: int = 0
    host_tables: Mapping[str, Sequence[int]] = field(default_factory=dict)  # swapped: block of the host pool
    cached: Collection[int] = frozenset()  # in the prefix cache; one with no owner is kept until it is evicted
    cached_texts: Mapping[int, Sequence[str]] = field(default_factory=dict)  # words of cached blocks, owned or not
    copies: Sequence[tuple[int, int]] = ()  # (source, target) made last: drawn as arrows
    taken: Mapping[int, str] = field(default_factory=dict)  # no table names them, and they are not free: why not
    events: Sequence[Event] = ()  # what led here since the picture before
    step: int = 0
    names: Sequence[str] = ()  # every sequence there is to be, in order of arrival: keeps letters and colours the same

    def __post_init__(self) -> None:
        if self.num_blocks < 1 or self.block_size < 1 or self.num_host_blocks < 0:
            sizes = f"{self.num_blocks} blocks of {self.block_size} tokens and {self.num_host_blocks} host blocks"
            raise ValueError(f"a pool needs at least one block of at least one token, got {sizes}")
        for pool, size, tables in (
            ("the pool", self.num_blocks, self.tables),
            ("the host pool", self.num_host_blocks, self.host_tables),
        ):
            for seq, blocks in tables.items():
                outside = [block for block in blocks if not NOWHERE <= block < size]
                if outside:
                    raise ValueError(f"sequence {seq!r} names block {outside[0]}, but {pool} has {size} blocks")
        unknown = [block for block in self.cached if not 0 <= block < self.num_blocks]
        if unknown:
            raise ValueError(f"block {unknown[0]} is cached, but the pool has {self.num_blocks} blocks")

    @property
    def sequences(self) -> list[str]:
        """Sequences with a block in either pool, in order of arrival."""
        here = {*self.tables, *self.host_tables}
        order = dict.fromkeys([*self.names, *self.tables, *self.host_tables])
        return [seq for seq in order if seq in here]

    @property
    def labels(self) -> dict[str, str]:
        """A short label of each sequence: its own name if that is one letter, else the next letter that is free."""
        known = list(dict.fromkeys([*self.names, *self.sequences]))
        taken = {seq for seq in known if len(seq) == 1 and seq in _LETTERS}
        fresh = (label for label in _all_labels() if label not in taken)
        return {seq: seq if seq in taken else next(fresh) for seq in known}

    def num_logical(self, seq: str) -> int:
        """How many logical blocks the sequence has."""
        return max(len(self.tables.get(seq, ())), len(self.host_tables.get(seq, ())))

    def place(self, seq: str, logical: int) -> str:
        """Where a logical block lies: "5" in the pool, "h5" in the host pool, "?" in neither."""
        for prefix, tables in (("", self.tables), ("h", self.host_tables)):
            table = tables.get(seq, ())
            if logical < len(table) and table[logical] != NOWHERE:
                return f"{prefix}{table[logical]}"
        return "?"

    def fill(self, seq: str, logical: int) -> int:
        """Tokens of the sequence in one of its logical blocks."""
        return max(0, min(self.block_size, self.num_tokens.get(seq, 0) - logical * self.block_size))

    def words(self, seq: str, logical: int) -> list[str]:
        """The texts of one logical block, as many as its fill; [] where the snapshot has no text of the sequence."""
        texts = self.texts.get(seq)
        if not texts:
            return []
        start = logical * self.block_size
        return [texts[i] if i < len(texts) else "" for i in range(start, start + self.fill(seq, logical))]

    def owners(self, block: int) -> list[Owner]:
        """Who names a block of the pool; its reference count is how many."""
        return self._named.get(block, [])

    def by_block(self) -> dict[int, list[Owner]]:
        """Blocks of the pool that a table names, or that are cached with no owner (-> []), by number."""
        return {block: self.owners(block) for block in sorted({*self._named, *self.cached})}

    def by_host_block(self) -> dict[int, list[Owner]]:
        """Blocks of the host pool that a table names, by number."""
        return dict(sorted(self._owners(self.host_tables).items()))

    def block_fill(self, block: int) -> int:
        """Tokens in a block of the pool: what the owner with most of them sees; a cached block is full."""
        if block in self.cached:
            return self.block_size
        return max((owner.fill for owner in self.owners(block)), default=0)

    def block_words(self, block: int) -> list[str]:
        """The texts of a block of the pool, through whichever owner sees most of it."""
        owners = self.owners(block)
        if block in self.cached_texts or not owners:
            return list(self.cached_texts.get(block, ()))
        most = max(owners, key=lambda owner: owner.fill)
        return self.words(most.seq, most.logical)

    @property
    def num_free(self) -> int:
        """Blocks of the pool that no table names, that the prefix cache does not hold, and that are not taken else."""
        return self.num_blocks - len(self.by_block()) - len(self.taken)

    @cached_property
    def _named(self) -> dict[int, list[Owner]]:
        return self._owners(self.tables)

    def _owners(self, tables: Mapping[str, Sequence[int]]) -> dict[int, list[Owner]]:
        named: dict[int, list[Owner]] = {}
        for seq in self.sequences:
            for logical, block in enumerate(tables.get(seq, ())):
                if block != NOWHERE:
                    named.setdefault(block, []).append(Owner(seq, logical, self.fill(seq, logical)))
        return named


def _all_labels() -> Iterator[str]:
    """A, B, ..., z, then AA, AB, ...: as many as a trace has sequences."""
    for length in count(1):
        yield from ("".join(letters) for letters in product(_LETTERS, repeat=length))
