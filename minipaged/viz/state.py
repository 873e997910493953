"""Tables over two pools, changed by one event at a time: what replay.py runs. Every event is checked against the state.

An event says what has happened. If it could not have happened (a block handed out twice, a free of what is not owned,
a write into a shared block), then the trace is of a memory with a mistake in it, and the event's number says where.
"""

from typing import Any

from minipaged.cdiv import cdiv
from minipaged.memory.trace import Event, Trace
from minipaged.viz.snapshot import NOWHERE, Snapshot


class Pool:
    """Blocks of one memory: how many entries of tables name each, and the words in it."""

    def __init__(self, num_blocks: int, name: str):
        self.num_blocks, self.name = num_blocks, name
        self.owners: dict[int, int] = {}  # block -> tables that name it
        self.cached: set[int] = set()
        self.words: dict[int, list[str]] = {}

    def take(self, block: int, words: list[str]) -> None:
        """A free block gets an owner."""
        if not 0 <= block < self.num_blocks:
            raise ValueError(f"{self.name} has no block {block}: it has {self.num_blocks}")
        if block in self.owners or block in self.cached:
            raise ValueError(f"block {block} of {self.name} is not free: it has {self.owners.get(block, 0)} owners")
        self.owners[block], self.words[block] = 1, words

    def share(self, block: int) -> None:
        if block not in self.owners and block not in self.cached:
            raise ValueError(f"block {block} of {self.name} is free: it cannot be shared")
        self.owners[block] = self.owners.get(block, 0) + 1

    def give_back(self, block: int) -> None:
        self.owners[block] -= 1
        if not self.owners[block]:
            del self.owners[block]
            if block not in self.cached:
                del self.words[block]


class State:
    """Tables over two pools. An entry of a table is (pool, block)."""

    def __init__(self, trace: Trace):
        self.trace = trace
        self.names = tuple(dict.fromkeys(seq for event in trace.events for seq in _named_by(event)))
        self._empty()

    def _empty(self) -> None:
        self.device = Pool(self.trace.num_blocks, "the pool")
        self.host = Pool(self.trace.num_host_blocks, "the host pool")
        self.tables: dict[str, list[tuple[Pool, int]]] = {}
        self.num_tokens: dict[str, int] = {}

    def apply(self, number: int) -> None:
        event = self.trace.events[number]
        try:
            getattr(self, f"_{event['event']}")(event)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"it has no field {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"event {number} ({event.get('event')}, step {event.get('step')}): {reason}") from error

    def snapshot(self, start: int, end: int) -> Snapshot:
        """The state now, said to come from the events start .. end - 1."""
        events = tuple(self.trace.events[start:end])
        texts = {seq: self.words(seq) for seq in self.tables}
        return Snapshot(
            num_blocks=self.trace.num_blocks,
            block_size=self.trace.block_size,
            tables=self._tables(self.device),
            num_tokens={seq: self.num_tokens[seq] for seq in self.tables},
            texts={seq: words for seq, words in texts.items() if any(words)},
            num_host_blocks=self.trace.num_host_blocks,
            host_tables=self._tables(self.host),
            cached=frozenset(self.device.cached),
            cached_texts={block: list(self.device.words[block]) for block in sorted(self.device.cached)},
            copies=tuple((event["source"], event["target"]) for event in events if event["event"] == "copy"),
            events=events,
            step=events[-1]["step"] if events else self.trace.step,
            names=self.names,
        )

    def _tables(self, pool: Pool) -> dict[str, list[int]]:
        """The part of each table that lies in one pool; a sequence with nothing there is left out."""
        return {seq: part for seq in self.tables if (part := self.part(seq, pool))}

    def part(self, seq: str, pool: Pool) -> list[int]:
        """The part of one table that lies in a pool; empty where nothing does."""
        table = self.tables.get(seq, [])
        if not any(lies is pool for lies, _ in table):
            return []
        return [block if lies is pool else NOWHERE for lies, block in table]

    def words(self, seq: str) -> list[str]:
        """The words of a sequence, read through its table."""
        words: list[str] = []
        for pool, block in self.tables[seq]:
            words += pool.words[block]
        return words[: self.num_tokens[seq]]

    # One method an event, named after it.

    def _allocate(self, event: Event) -> None:
        self.device.take(_int(event, "block"), [""] * self.trace.block_size)
        self._set(event, self.device)

    def _share(self, event: Event) -> None:
        block, logical = _int(event, "block"), _int(event, "logical")
        fill = self.trace.block_size if block in self.device.cached else 0
        for seq, table in self.tables.items():
            if logical < len(table) and table[logical] == (self.device, block):
                fill = max(fill, min(self.trace.block_size, self.num_tokens[seq] - logical * self.trace.block_size))
        self.device.share(block)
        self._set(event, self.device)
        # What a prefix cache finds is full. Of a fork's last block this is a guess until its `fork` says where it ends.
        self.num_tokens[event["seq"]] = max(self.num_tokens[event["seq"]], logical * self.trace.block_size + fill)

    def _copy(self, event: Event) -> None:
        source = _int(event, "source")
        self._expect(event, self.device, source)
        self.device.take(_int(event, "target"), list(self.device.words[source]))
        self.device.give_back(source)
        self.tables[event["seq"]][event["logical"]] = (self.device, event["target"])

    def _fork(self, event: Event) -> None:
        seq, parent, count = _seq(event), event["parent"], _int(event, "count")
        table, written = self.tables.get(seq, []), self.num_tokens.get(parent, 0)
        if table != self.tables.get(parent, []):
            raise ValueError(f"{seq} does not name the blocks of {parent}")
        if count > written or cdiv(count, self.trace.block_size) != len(table):
            raise ValueError(f"{parent} holds {written} tokens in {len(table)} blocks, and {seq} has {count} of them")
        if table:
            self.num_tokens[seq] = count

    def _write(self, event: Event) -> None:
        seq, start, count = _seq(event), _int(event, "start"), _int(event, "count")
        table, held = self.tables.get(seq, []), self.num_tokens.get(seq, 0)
        room = len(table) * self.trace.block_size
        if start > held or start + count > room:
            raise ValueError(f"{seq} holds {held} tokens in room for {room}: positions {start} to {start + count}")
        words = _words(event)
        for position in range(start, start + count):
            pool, block = table[position // self.trace.block_size]
            if pool is not self.device:
                raise ValueError(f"position {position} of {seq} is not in the pool")
            if self.device.owners[block] > 1 or block in self.device.cached:
                others = "a hash finds" if block in self.device.cached else f"{self.device.owners[block]} tables name"
                raise ValueError(f"{seq} writes position {position} into block {block}, which {others}")
            self.device.words[block][position % self.trace.block_size] = words[position - start]
        if table:
            self.num_tokens[seq] = start + count

    def _free(self, event: Event) -> None:
        seq, logical, block = _seq(event), _int(event, "logical"), _int(event, "block")
        table = self.tables.get(seq, [])
        pool = table[logical][0] if logical < len(table) else self.device
        self._expect(event, pool, block)
        if logical != len(table) - 1:
            raise ValueError(f"{seq} has {len(table)} blocks: its last one is given back first")
        pool.give_back(block)
        table.pop()
        self.num_tokens[seq] = min(self.num_tokens[seq], len(table) * self.trace.block_size)
        if not table:
            del self.tables[seq], self.num_tokens[seq]

    def _cache(self, event: Event) -> None:
        block = _int(event, "block")
        if block not in self.device.owners:
            raise ValueError(f"block {block} is free: nothing in it can be found")
        self.device.cached.add(block)

    def _evict(self, event: Event) -> None:
        block = _int(event, "block")
        if block not in self.device.cached or block in self.device.owners:
            owners = self.device.owners.get(block, 0)
            raise ValueError(f"block {block} is not a cached block with no owner: it has {owners} owners")
        self.device.cached.remove(block)
        del self.device.words[block]

    def _swap_out(self, event: Event) -> None:
        self._swap(event, (self.device, _int(event, "block")), (self.host, _int(event, "host_block")))

    def _swap_in(self, event: Event) -> None:
        self._swap(event, (self.host, _int(event, "host_block")), (self.device, _int(event, "block")))

    def _swap(self, event: Event, source: tuple[Pool, int], target: tuple[Pool, int]) -> None:
        self._expect(event, *source)
        seq, logical = event["seq"], event["logical"]
        words = source[0].words[source[1]]
        # A block that two tables share moves once: the second table finds it on the other side.
        if any(table[logical : logical + 1] == [target] for table in self.tables.values()):
            target[0].share(target[1])
        else:
            target[0].take(target[1], list(words))
        source[0].give_back(source[1])
        self.tables[seq][logical] = target

    def _reset(self, event: Event) -> None:
        self._empty()

    def _schedule(self, event: Event) -> None:
        if not isinstance(event["seqs"], dict):
            raise ValueError(f"seqs must map a sequence to its tokens, got {event['seqs']!r}")

    def _preempt(self, event: Event) -> None:
        _seq(event)

    def _finish(self, event: Event) -> None:
        _seq(event)

    def _set(self, event: Event, pool: Pool) -> None:
        """A table gets its next entry."""
        seq, logical = _seq(event), _int(event, "logical")
        table = self.tables.setdefault(seq, [])
        if logical != len(table):
            raise ValueError(f"logical block {logical} of {seq} cannot be set: it has {len(table)} blocks")
        table.append((pool, event["block"]))
        self.num_tokens.setdefault(seq, 0)

    def _expect(self, event: Event, pool: Pool, block: int) -> None:
        seq, logical = _seq(event), _int(event, "logical")
        table = self.tables.get(seq, [])
        if logical >= len(table) or table[logical] != (pool, block):
            raise ValueError(f"{seq} does not name block {block} of {pool.name} as its logical block {logical}")


def _named_by(event: Event) -> list[str]:
    seqs = event.get("seqs")
    return [name for name in (event.get("seq"), *(seqs if isinstance(seqs, dict) else ())) if isinstance(name, str)]


def _seq(event: Event) -> str:
    if not isinstance(event["seq"], str):
        raise ValueError(f"seq must be a string, got {event['seq']!r}")
    return event["seq"]


def _int(event: Event, name: str) -> int:
    value: Any = event[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
    return value


def _words(event: Event) -> list[str]:
    """A text for each position of a write: its field `tokens` (ids or words), or nothing."""
    tokens = event.get("tokens", [""] * event["count"])
    if not isinstance(tokens, list) or len(tokens) != event["count"]:
        raise ValueError(f"tokens must be a list of {event['count']}, got {tokens!r}")
    return [str(token) for token in tokens]
