"""What is kept of one example: its calls, the objects by their names, and the memory after each call."""

from collections.abc import Callable
from typing import Any

from minipaged.course import typed

CALLS_UP_TO = 200  # of a longer example, the first and the last are kept
COUNTS_UP_TO = 64  # blocks of a pool whose reference counts are asked for after each call
FUNCTIONS = 3  # calls of a learner's functions that are shown, the last ones
NAMES = {  # how an object is called in a script; tables get letters
    "BlockAllocator": "pool", "PrefixCache": "cache", "Swap": "swap", "BuddyAllocator": "buddies",
    "ReservationPool": "pool", "AddressLayout": "layout", "FlatPageTable": "flat", "MultiLevelPageTable": "levels",
    "PhysicalMemory": "memory", "Process": "process", "ContiguousCache": "cache", "PagedCache": "cache",
    "BlockManager": "blocks", "Scheduler": "scheduler",
}  # fmt: skip


class Log:
    """One example: the calls, and the objects by their names."""

    NAMES = NAMES

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.calls: list[dict[str, Any]] = []  # call, look, made, state
        self.looks: list[tuple[Callable[[], str], bool, dict[str, Any] | None]] = []  # text, of a function, state
        self.num_left_out = 0  # calls in the middle
        self.repeated = 1  # times that the last call was made
        self.depth = 0
        self.named: dict[int, str] = {}
        self.kept: list[Any] = []  # so that no id is used twice
        self.tables: dict[str, list[Any]] = {}  # a block manager makes a table anew under the name of its sequence
        self.owners: list[Any] = []  # of two pools, a device's and a host's: swaps and block managers
        self.held: dict[tuple[int, int], int] = {}  # (pool, block) -> references that the test itself took
        self.outputs: dict[int, tuple[Any, int]] = {}  # sequences of chapter 10, and how long their output was

    # ---- names -------------------------------------------------------------------------------------------------------

    def name(self, thing: Any, new: bool = False) -> str:
        """How a script calls an object; the name is given when the object is first met."""
        if (inside := self._inside(thing)) is not None:
            return inside
        if not new and id(thing) not in self.named and typed.kind_of(thing, NAMES) == "AddressLayout":
            return typed.fields_of(thing, self)  # made before the script begins
        if id(thing) not in self.named:
            kind = typed.kind_of(thing, NAMES)
            if kind == "BlockTable":
                name = self._table(thing)
            else:
                stem = "output" if kind == "SchedulerOutput" else NAMES.get(kind, kind.lower())
                taken = sum(other.rstrip("0123456789") == stem for other in self.named.values())
                name = stem if taken == 0 or stem == "output" else f"{stem}{taken + 1}"
                if kind == "Sequence":
                    name = f"s{thing.seq_id.replace('.', '_')}"
            self.named[id(thing)] = name
            self.kept.append(thing)
        return self.named[id(thing)]

    def _table(self, table: Any) -> str:
        own = getattr(table, "seq", None)  # a block manager names its sequences, a test of tables need not
        name = own if isinstance(own, str) else letter(len(self.tables))
        self.tables.setdefault(name, []).append(table)
        return name

    def _inside(self, thing: Any) -> str | None:
        """A pool or a table of a block manager."""
        for owner in self.owners:
            if typed.kind_of(owner, NAMES) == "BlockManager" and owner is not thing:
                for name in ("device", "host"):
                    if getattr(owner, name, None) is thing:
                        return f"{self.name(owner)}.{name}"
                seq = getattr(thing, "seq", None)
                if isinstance(seq, str) and getattr(owner, "tables", {}).get(seq) is thing:
                    return f"{self.name(owner)}.tables[{seq!r}]"
        return None

    def made(self, thing: Any, by_the_test: bool) -> None:
        """An object was made, by the test or by another one (which has a table that forks)."""
        kind = typed.kind_of(thing, NAMES)
        if by_the_test or kind == "BlockTable":
            self.name(thing)
        if kind == "BlockManager" or (kind == "Swap" and by_the_test):
            self.owners.append(thing)
        if kind == "Swap" and by_the_test:
            for role in ("device", "host"):
                old = self.named.get(id(getattr(thing, role, None)))
                if old is not None and role not in self.named.values():
                    self.named[id(getattr(thing, role))] = role
                    for call in self.calls:
                        call["call"] = typed.renamed(call["call"], old, role)

    # ---- calls -------------------------------------------------------------------------------------------------------

    def event(self, text: str, made: bool = False) -> None:
        """A call that changes something. `made`: it only made an object, which is no event."""
        self.looks = []
        last = self.calls[-1]["call"] if self.calls else ""
        if text in (last, typed.body_of_loop(last)):
            self.repeated += 1
            self.calls[-1] |= {"call": f"for _ in range({self.repeated}): {text}", "state": self.state()}
            return
        self.repeated = 1
        self.calls.append({"call": text, "look": False, "made": made, "state": self.state()})
        if len(self.calls) > CALLS_UP_TO:
            del self.calls[CALLS_UP_TO // 2]
            self.num_left_out += 1

    def look(self, text: Callable[[], str], of_function: bool, state: dict[str, Any] | None) -> None:
        """A call that changes nothing. What it says is asked for at the end, if it is among the last."""
        if self.looks and not (of_function and self.looks[-1][1]):
            self.looks = []
        self.looks = [*self.looks[1 - FUNCTIONS :], (text, of_function, state)]

    def introduce(self, seq: Any) -> None:
        """A sequence of chapter 10 is made by the test, and told of when it is first handed over."""
        if id(seq) not in self.outputs:
            self.outputs[id(seq)] = seq, len(seq.outputs)
            named = {"n": seq.params.n, "max_tokens": seq.params.max_tokens}
            said = ", ".join(f"{name}={number}" for name, number in named.items() if (name, number) != ("n", 1))
            said += ", temperature=1.0" * (seq.params.n > 1)
            salt = "" if seq.cache_salt is None else f", cache_salt={seq.cache_salt!r}"
            prompt = typed.value(seq.prompt_token_ids, self)
            made = f"Sequence({seq.request_id!r}, {seq.index}, {prompt}, SamplingParams({said}){salt})"
            self._line(f"{self.name(seq)} = {made}  # {len(seq.prompt_token_ids)} tokens of prompt")

    def appended(self) -> None:
        """The tokens that the test appended to these sequences since the last call."""
        for key, (seq, known) in self.outputs.items():
            for token in seq.outputs[known:]:
                self._line(f"{self.name(seq)}.outputs.append(Token({token.token_id}, None, 0.0))")
            self.outputs[key] = seq, len(seq.outputs)

    def _line(self, text: str) -> None:
        self.calls.append({"call": text, "look": False, "made": True, "state": None})

    def script(self) -> list[dict[str, Any]]:
        """What is to be typed: imports, calls, and the last looks."""
        self.depth += 1  # to describe is not part of it
        try:
            calls = list(self.calls)
            if self.num_left_out:
                said = f"# {self.num_left_out} calls are left out here"
                calls.insert(CALLS_UP_TO // 2, {"call": said, "look": False, "made": True, "state": None})
            for text, _, state in self.looks:
                calls.append({"call": text(), "look": True, "made": False, "state": state})
            lines = typed.imports([call["call"] for call in calls])
            return [{"call": line, "look": False, "made": True, "state": None} for line in lines] + calls
        finally:
            self.depth -= 1

    # ---- the memory --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any] | None:
        """The block tables now, and what their pools say, as far as they can be read. None where there are none."""
        if not 0 < len(self.tables) <= 26:
            return None
        tables: dict[str, list[int]] = {}
        tokens: dict[str, int] = {}
        lie: dict[str, Any] = {}  # name -> the pool of its table
        sizes: set[int] = set()
        self.depth += 1  # looking is not part of the script
        try:
            for name, all_of_name in self.tables.items():
                try:
                    table = next((each for each in reversed(all_of_name) if each.blocks), all_of_name[-1])
                    blocks, count, size = (
                        [int(block) for block in table.blocks],
                        int(table.num_tokens),
                        table.block_size,
                    )
                except Exception:  # a learner's object may be in any state
                    continue
                tables[name], tokens[name], lie[name] = blocks, count, table.allocator
                sizes.add(int(size))
            if not tables or len(sizes) != 1:
                return None
            here, there = self._device_and_host([*lie.values()][-1])
            pools = {}
            for role, pool in (("device", here), ("host", there)):
                if pool is not None:
                    pools[role] = self._pool(pool, [tables[name] for name in tables if lie[name] is pool])
        except Exception:
            return None
        finally:
            self.depth -= 1
        where = {
            name: role for name in tables for role, pool in (("device", here), ("host", there)) if lie[name] is pool
        }
        if len(where) > 4:  # of many, those that hold something
            where = {name: role for name, role in where.items() if tables[name]}
        return {
            "tables": {name: tables[name] for name in where},
            "num_tokens": {name: tokens[name] for name in where},
            "block_size": sizes.pop(),
            "on": where,
            "pools": pools,
        }

    def _device_and_host(self, pool: Any) -> tuple[Any, Any]:
        """The two pools, of which one is given; None for a host that there is not."""
        for owner in reversed(self.owners):
            device, host = getattr(owner, "device", None), getattr(owner, "host", None)
            if pool is device or pool is host:
                return device, host
        return pool, None

    def _pool(self, pool: Any, tables: list[list[int]]) -> dict[str, Any]:
        """What a pool says of itself: num_blocks and num_free; of each block that a table names or that is not free,
        [its count, references of tables, of the cache, of the test]."""
        num_blocks, num_free, blocks = int(pool.num_blocks), int(pool.num_free), dict[str, list[int]]()
        for block in range(num_blocks if num_blocks <= COUNTS_UP_TO else 0):
            named = sum(table.count(block) for table in tables)
            count, held = int(pool.ref_count(block)), self.held.get((id(pool), block), 0)
            cached = 0
            if typed.kind_of(pool, NAMES) == "PrefixCache":
                cached = int(count == named + held + 1 if named + held else bool(pool.is_evictable(block)))
            if count or named:
                blocks[str(block)] = [count, named, cached, held]
        known = num_blocks <= COUNTS_UP_TO
        return {"num_blocks": num_blocks, "num_free": num_free if known else None, "blocks": blocks}


def letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else f"s{index + 1}"
