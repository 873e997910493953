"""The calls that led to a failure, and the memory after each: what a counterexample is drawn from.

    from ch06_block_allocator import BlockAllocator   the script is Python, and can be typed as it stands
    pool = BlockAllocator(2)                          the classes of memory/ and the learner's functions are watched
    A = BlockTable(pool, 2)                           from outside: only calls by a test are noted, not those that one
    A.append_tokens(3)  # -> []                       of our methods makes
    B = A.fork()
    B.append_tokens(1)  # -> [(1, 0)]                 state: tables {A: [0, 1], B: [0, 0]}, tokens {A: 3, B: 4}, and
    pool.num_free  # -> 0                             what the pool says: 0 blocks are free, counts [2, 1]

Hypothesis runs the smallest failing example last, so what is noted when the test ends is the smallest script.
Off unless MINIPAGED_COURSE_REPORT is set: `minipaged check` sets it for the pytest that it starts.
"""

import functools
import inspect
import os
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import Any

from minipaged.cdiv import cdiv
from minipaged.course import typed

REPORT = "MINIPAGED_COURSE_REPORT"  # an environment variable: the file to write the findings to
CALLS_UP_TO = 200  # of one example: of a longer one, the first and the last are kept
COUNTS_UP_TO = 64  # blocks of a pool whose reference counts are asked for after each call
FUNCTIONS = 3  # calls of a learner's functions that are shown, the last ones

# What only looks is noted too, but only the last of it is shown. Properties only look.
LOOKS = {
    "ref_count", "slot", "blocks_needed", "match", "num_tokens", "num_free_for", "reservation", "can_allocate",
    "account", "split", "indices", "table_bytes", "dense_bytes", "sparse_bytes", "is_mapped", "frame", "translate",
    "load", "num_mappings", "kv_bytes_per_token", "check", "is_evictable", "blocks", "blocks_for",
    "can_ever_fit", "get_computed_blocks", "prefix_of", "block_keys", "is_swapped", "check_unmapped",
}  # fmt: skip
# No events: an object is made; the second half of a step, which `schedule` counts; what the end of a text brings.
NO_EVENTS = {"__init__", "update_from_output", "finish"}
WATCHED = {  # classes whose methods and properties make a script
    "minipaged.memory.block_allocator": ("BlockAllocator",),
    "minipaged.memory.block_table": ("BlockTable",),
    "minipaged.memory.prefix_cache": ("PrefixCache",),
    "minipaged.memory.swap": ("Swap",),
    "minipaged.memory.block_manager": ("BlockManager",),
    "minipaged.memory.reservation": ("BuddyAllocator", "ReservationPool"),
    "minipaged.memory.page_table": ("AddressLayout", "FlatPageTable", "MultiLevelPageTable"),
    "minipaged.memory.address_space": ("PhysicalMemory", "Process"),
    "minipaged.engine.scheduler": ("Scheduler",),
    "minipaged.kvcache.contiguous": ("ContiguousCache",),
    "minipaged.kvcache.paged": ("PagedCache",),
}
NAMES = {  # how an object is called in a script; tables get letters
    "BlockAllocator": "pool", "PrefixCache": "cache", "Swap": "swap", "BuddyAllocator": "buddies",
    "ReservationPool": "pool", "AddressLayout": "layout", "FlatPageTable": "flat", "MultiLevelPageTable": "levels",
    "PhysicalMemory": "memory", "Process": "process", "ContiguousCache": "cache", "PagedCache": "cache",
    "BlockManager": "blocks", "Scheduler": "scheduler",
}  # fmt: skip
_MADE_AS = "_made_as"  # an attribute of each watched object: its id when it was made, which a copy of it has too


def is_on() -> bool:
    return REPORT in os.environ


class Log:
    """One example: the calls, and the objects by their names."""

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

    def name(self, thing: Any) -> str:
        """How a script calls an object; the name is given when the object is first met."""
        if (inside := self._inside(thing)) is not None:
            return inside
        if id(thing) not in self.named:
            kind = typed.kind_of(thing, NAMES)
            if kind == "BlockTable":
                name = self._table(thing)
            else:
                stem = "seq" if kind == "Sequence" else "output" if kind == "SchedulerOutput" else NAMES[kind]
                taken = sum(other.rstrip("0123456789") == stem for other in self.named.values())
                name = stem if taken == 0 or stem == "output" else f"{stem}{taken + 1}"
            self.named[id(thing)] = name
            self.kept.append(thing)
        return self.named[id(thing)]

    def _table(self, table: Any) -> str:
        own = getattr(table, "seq", None)  # a block manager names its sequences, a test of tables need not
        name = own if isinstance(own, str) else _letter(len(self.tables))
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
        if kind in ("Swap", "BlockManager"):
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

    def appended(self) -> None:
        """Tokens that the test appended to the sequences of chapter 10 since the last call."""
        for key, (seq, known) in self.outputs.items():
            for token in seq.outputs[known:]:
                self.calls.append(
                    {
                        "call": f"{self.name(seq)}.outputs.append(Token({token.token_id}, None, 0.0))",
                        "look": False,
                        "made": True,
                        "state": None,
                    }
                )
            self.outputs[key] = seq, len(seq.outputs)

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
                    blocks, count, size = [int(block) for block in table.blocks], int(table.num_tokens), table.block_size
                except Exception:  # a learner's object may be in any state
                    continue
                tables[name], tokens[name], lie[name] = blocks, count, table.allocator
                sizes.add(int(size))
            if not tables or len(sizes) != 1:
                return None
            hosts = [getattr(owner, "host", None) for owner in self.owners]
            devices = [getattr(owner, "device", None) for owner in self.owners]
            devices += [pool for pool in lie.values() if not any(pool is host for host in hosts)]
            here = next((pool for pool in devices if pool is not None), None)
            there = next((pool for pool in hosts if pool is not None), None)
            pools = {}
            for role, pool in (("device", here), ("host", there)):
                if pool is not None:
                    pools[role] = self._pool(pool, [tables[name] for name in tables if lie[name] is pool])
        except Exception:
            return None
        finally:
            self.depth -= 1
        where = {name: "host" if lie[name] is there else "device" for name in tables if lie[name] in (here, there)}
        if len(where) > 4:  # of many, those that hold something
            where = {name: role for name, role in where.items() if tables[name]}
        return {
            "tables": {name: tables[name] for name in where},
            "num_tokens": {name: tokens[name] for name in where},
            "block_size": sizes.pop(),
            "on": where,
            "pools": pools,
        }

    def _pool(self, pool: Any, tables: list[list[int]]) -> dict[str, Any]:
        """What a pool says of itself: num_blocks and num_free; of each block that a table names or that is not free,
        [its count, references of tables, of the cache, of the test]."""
        num_blocks, num_free = int(pool.num_blocks), int(pool.num_free)
        said: dict[str, Any] = {"num_blocks": num_blocks, "num_free": num_free, "blocks": {}}
        if num_blocks > COUNTS_UP_TO:
            return said
        for block in range(num_blocks):
            named = sum(blocks.count(block) for blocks in tables)
            count, held = int(pool.ref_count(block)), self.held.get((id(pool), block), 0)
            cached = 0
            if typed.kind_of(pool, NAMES) == "PrefixCache":
                cached = int(bool(pool.is_evictable(block)) or count == named + held + 1)
            if count or named:
                said["blocks"][str(block)] = [count, named, cached, held]
        return said


log = Log()


# ---- watching ------------------------------------------------------------------------------------------------------------


def watch(module: ModuleType, chapters: Collection[int] | None = None) -> None:
    """Look over the shoulder of a learner's module: its watched classes, and its public functions.

    Functions only of the chapters that are checked: of another one, such as the oracle's, a call is not the learner's
    failing one.
    """
    watch_classes(module)
    from minipaged.course.impl import public_functions

    number = Path(module.__file__ or "").name[2:4]
    if chapters is not None and number.isdigit() and int(number) not in chapters:
        return
    for name, function in public_functions(module):
        setattr(module, name, _watched_function(function))


def watch_classes(module: ModuleType) -> None:
    for class_name in WATCHED.get(module.__name__, ()):
        kind = getattr(module, class_name, None)
        if not isinstance(kind, type) or "_watched" in vars(kind):
            continue
        for name, value in list(vars(kind).items()):
            if inspect.isfunction(value) and (not name.startswith("_") or name == "__init__"):
                setattr(kind, name, _watched_method(value, name))
            elif isinstance(value, property) and value.fget is not None and not name.startswith("_"):
                setattr(kind, name, value.getter(_watched_method(value.fget, name, read=True)))
        kind._watched = True  # type: ignore[attr-defined]


def _watched_method(method: Callable[..., Any], name: str, read: bool = False) -> Callable[..., Any]:
    @functools.wraps(method)
    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        if name == "__init__":
            getattr(self, "__dict__", {})[_MADE_AS] = id(self)
            if log.depth:  # made by another method
                made = method(self, *arguments, **options)
                log.made(self, by_the_test=False)
                return made
        elif log.depth or getattr(self, "__dict__", {}).get(_MADE_AS, id(self)) != id(self):  # a copy: a test looks
            return method(self, *arguments, **options)
        typed.remember(type(self))
        shown = log.name(self) if name != "__init__" else ""
        if read:
            return _run(method, (self,), {}, f"{shown}.{name}", look=True)
        said = typed.arguments(arguments, options, log)
        if name == "__init__":
            return _run(method, (self, *arguments), options, f"{type(self).__name__}({said})", new=self)
        return _run(method, (self, *arguments), options, f"{shown}.{name}({said})", look=name in LOOKS)

    return watched


def _watched_function(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def watched(*arguments: Any, **options: Any) -> Any:
        if log.depth:
            return function(*arguments, **options)
        try:
            named = signature.bind(*arguments, **options).arguments
        except TypeError:
            named = dict(options)
        typed.remember(function)
        said = typed.arguments((), named, log) if len(named) > 3 else typed.arguments(arguments, options, log)
        call = f"{function.__name__}({said})"
        return _run(function, arguments, options, call, look=True, of_function=True, state=_paged_state(named))

    signature = inspect.signature(function)
    return watched


def _paged_state(named: dict[str, Any]) -> dict[str, Any] | None:
    """The block tables of a call of paged attention, to be drawn like any others."""
    try:
        tables, lens, cache = named["block_tables"], named["seq_lens"].tolist(), named["key_cache"]
        num_blocks, _, block_size, _ = cache.shape
        if num_blocks > 40 or len(lens) > 6:
            return None
        names = [_letter(index) for index in range(len(lens))]
        blocks = [row[: cdiv(length, block_size)] for row, length in zip(tables.tolist(), lens, strict=True)]
    except Exception:  # whatever a test hands over to be refused
        return None
    return {
        "tables": dict(zip(names, blocks, strict=True)),
        "num_tokens": dict(zip(names, lens, strict=True)),
        "block_size": block_size,
        "on": dict.fromkeys(names, "device"),
        "pools": {"device": {"num_blocks": num_blocks, "num_free": None, "blocks": {}}},
    }


def _run(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    call: str,
    *,
    look: bool = False,
    of_function: bool = False,
    new: Any = None,
    state: dict[str, Any] | None = None,
) -> Any:
    """Make the call, and note it with what it gave. `new`: the object that it makes."""
    current = log.calls  # a new example may begin while a generator of the old one ends
    log.appended()
    log.depth += 1
    try:
        result = function(*arguments, **options)
    except BaseException as error:
        log.depth -= 1
        if log.calls is current:
            _note(f"{call}  # raises {type(error).__name__}: {str(error)[:160]}", look, of_function, state)
        raise
    log.depth = max(0, log.depth - 1)
    if log.calls is not current:
        return result
    if new is not None:
        log.made(new, by_the_test=True)
        log.event(f"{log.name(new)} = {call}", made=True)
    elif look:
        shown = typed.result(result, log) if of_function else None  # a test may change an array in place
        log.look(lambda: call + (typed.result(result, log) if shown is None else shown), of_function, state)
    else:
        _hold(function.__name__, arguments, result)
        log.event(typed.assigned(call, result, log), made=function.__name__ in NO_EVENTS)
    return result


def _note(text: str, look: bool, of_function: bool, state: dict[str, Any] | None) -> None:
    if look:
        log.look(lambda: text, of_function, state)
    else:
        log.event(text)


def _hold(name: str, arguments: tuple[Any, ...], result: Any) -> None:
    """References that a test takes and gives back by itself, with no table."""
    if name not in ("allocate", "share", "free") or typed.kind_of(arguments[0], NAMES) not in (
        "BlockAllocator",
        "PrefixCache",
    ):
        return
    block = result if name == "allocate" else arguments[-1]
    if isinstance(block, int):
        key = id(arguments[0]), block
        log.held[key] = max(0, log.held.get(key, 0) + (-1 if name == "free" else 1))


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else f"s{index + 1}"
