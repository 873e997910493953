"""The calls that led to a failure, and the memory after each: what a counterexample is drawn from.

    pool = BlockAllocator(2)                          the classes of memory/ and the learner's functions are watched
    A = BlockTable(pool, 2)                           from outside: only calls by a test are noted, not those that one
    A.append_tokens(3)            -> []               of our methods makes
    B = A.fork()
    B.append_tokens(1)            -> [(1, 0)]         state: tables {A: [0, 1], B: [0, 0]}, tokens {A: 3, B: 4}

Hypothesis runs the smallest failing example last, so what is noted when the test ends is the smallest script.
Off unless MINIPAGED_COURSE_REPORT is set: `minipaged check` sets it for the pytest that it starts.
"""

import functools
import inspect
import math
import os
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

from minipaged.cdiv import cdiv

REPORT = "MINIPAGED_COURSE_REPORT"  # an environment variable: the file to write the findings to
CALLS_UP_TO = 200  # of one example: what is longer is no smallest script

# What only looks is noted too, but only the last of it is shown.
LOOKS = {
    "ref_count", "slot", "blocks_needed", "match", "num_tokens", "num_free_for", "reservation", "can_allocate",
    "account", "split", "indices", "table_bytes", "dense_bytes", "sparse_bytes", "is_mapped", "frame", "translate",
    "load", "num_mappings", "kv_bytes_per_token", "check", "finish", "is_evictable", "blocks", "blocks_for",
    "can_ever_fit", "get_computed_blocks", "prefix_of", "block_keys", "is_swapped", "check_unmapped",
}  # fmt: skip
NO_EVENTS = {"__init__", "update_from_output"}  # an object is made; the second half of a step, which `schedule` counts
WATCHED = {  # classes whose methods make a script
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
_NAMES = {  # how an object is called in a script; tables get letters
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
        self.last_look: dict[str, Any] | None = None
        self.depth = 0
        self.named: dict[int, str] = {}
        self.kept: list[Any] = []  # so that no id is used twice
        self.tables: dict[str, list[Any]] = {}  # a block manager makes a table anew under the name of its sequence

    def name(self, thing: Any) -> str:
        """The name of an object, given when it is first met."""
        if id(thing) not in self.named:
            kind = type(thing).__name__
            if kind == "BlockTable":
                own = getattr(thing, "seq", None)  # a block manager names its sequences, a test of tables need not
                name = own if isinstance(own, str) else _letter(len(self.tables))
                self.tables.setdefault(name, []).append(thing)
            else:
                stem = next((_NAMES[base.__name__] for base in type(thing).__mro__ if base.__name__ in _NAMES), kind)
                taken = sum(other.rstrip("0123456789") == stem for other in self.named.values())
                name = stem if taken == 0 else f"{stem}{taken + 1}"
            self.named[id(thing)] = name
            self.kept.append(thing)
        return self.named[id(thing)]

    def note(self, text: str, is_look: bool, made: bool = False, state: dict[str, Any] | None = None) -> None:
        """`made`: the call only made an object, which is no event. `state`: of a look, what it looked at."""
        if is_look:
            self.last_look = {"call": text, "look": True, "made": False, "state": state}
        elif len(self.calls) < CALLS_UP_TO:
            self.calls.append({"call": text, "look": False, "made": made, "state": self.state()})
            self.last_look = None

    def state(self) -> dict[str, Any] | None:
        """The block tables now, as far as they can be read. None where there are none."""
        tables: dict[str, list[int]] = {}
        tokens: dict[str, int] = {}
        pools: dict[str, tuple[str, int]] = {}
        sizes: set[int] = set()
        self.depth += 1  # looking is not part of the script
        try:
            for name, all_of_name in self.tables.items():
                try:
                    table = next((each for each in reversed(all_of_name) if each.blocks), all_of_name[-1])
                    pool = table.allocator
                    tables[name] = [int(block) for block in table.blocks]
                    tokens[name] = int(table.num_tokens)
                    sizes.add(int(table.block_size))
                    pools[name] = (self.name(pool), int(pool.num_blocks))
                except Exception:  # a learner's object may be in any state
                    tables.pop(name, None)
        finally:
            self.depth -= 1
        if len(tables) > 4:  # of many, those that hold something
            tables = {name: blocks for name, blocks in tables.items() if blocks}
        if not tables or len(sizes) != 1:
            return None
        return {"tables": tables, "num_tokens": tokens, "block_size": sizes.pop(), "pools": pools}

    def script(self) -> list[dict[str, Any]]:
        return [*self.calls, *([self.last_look] if self.last_look else [])]


log = Log()


def watch(module: ModuleType) -> None:
    """Look over the shoulder of a learner's module: its watched classes, and its public functions."""
    watch_classes(module)
    from minipaged.course.impl import public_functions

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
        kind._watched = True  # type: ignore[attr-defined]


def _watched_method(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        if name == "__init__":
            getattr(self, "__dict__", {})[_MADE_AS] = id(self)
            if log.depth:  # made by another method, such as fork: it has its turn in the order of names
                made = method(self, *arguments, **options)
                log.name(self)
                return made
            kind = type(self).__name__
            said = _arguments(arguments, options)
            return _run(method, (self, *arguments), options, lambda: f"{log.name(self)} = {kind}({said})", False)
        if getattr(self, "__dict__", {}).get(_MADE_AS, id(self)) != id(self):  # a copy, which a test looks into
            return method(self, *arguments, **options)
        own_name = log.name(self)
        said = _arguments(arguments, options)
        return _run(method, (self, *arguments), options, lambda: f"{own_name}.{name}({said})", name in LOOKS)

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
        said = _arguments((), named) if len(named) > 3 else _arguments(arguments, options)
        state = _paged_state(named)
        return _run(function, arguments, options, lambda: f"{function.__name__}({said})", True, state)

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
        "pools": dict.fromkeys(names, ("pool", num_blocks)),
    }


def _run(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    say: Callable[[], str],
    look: bool,
    state: dict[str, Any] | None = None,
) -> Any:
    if log.depth:
        return function(*arguments, **options)
    current = log.calls  # a new example may begin while a generator of the old one ends
    log.depth += 1
    try:
        result = function(*arguments, **options)
    except BaseException as error:
        log.depth -= 1
        if log.calls is current:
            log.note(f"{say()}  raises {type(error).__name__}: {str(error)[:160]}", look, state=state)
        raise
    log.depth = max(0, log.depth - 1)
    if log.calls is current:
        shown = "" if result is None else f"  -> {short(result)}"
        log.note(say() + shown, look, function.__name__ in NO_EVENTS, state)
    return result


def _arguments(arguments: tuple[Any, ...], options: dict[str, Any]) -> str:
    return ", ".join([*map(short, arguments), *(f"{name}={short(value)}" for name, value in options.items())])


def short(value: Any) -> str:
    """A value on one line: an array by its shape, or by its numbers if they are few."""
    try:
        return _short(value)
    except Exception:  # a tensor without memory, or whatever a learner's object does: what is noted changes nothing
        return f"{type(value).__name__}(...)"


def _short(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None and hasattr(value, "dtype"):
        if math.prod(shape) > 12 or len(shape) > 2:
            return f"array{list(shape)}"
        return str(_rounded(value.tolist()))
    if id(value) in log.named:
        return log.named[id(value)]
    kind = type(value).__name__
    if any(base.__name__ in _NAMES or base.__name__ == "BlockTable" for base in type(value).__mro__):
        return log.name(value)
    if kind == "Transformer":
        return "transformer"
    if kind == "ForwardBatch":
        return f"batch(seq_lens={value.seq_lens.tolist()}, query_start_loc={value.query_start_loc.tolist()})"
    if kind == "Sequence":
        return str(value.seq_id)
    if kind == "SchedulerOutput":
        chunks = [(seq.seq_id, seq.num_computed, count) for seq, count in value.num_scheduled_tokens.items()]
        said = [f"{seq_id} computes {start} to {start + count - 1}" for seq_id, start, count in chunks]
        moves = {name: getattr(value, name) for name in ("swap_out", "swap_in", "copies") if getattr(value, name)}
        return f"[{', '.join(said)}]" + "".join(f", {name} {pairs}" for name, pairs in moves.items())
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        inner = ", ".join(short(item) for item in value[:12]) + (", ..." if len(value) > 12 else "")
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = re.sub(r"<[\w.]+\.(\w+) object at 0x[0-9a-f]+>", r"\1(...)", repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


def _rounded(numbers: Any) -> Any:
    if isinstance(numbers, list):
        return [_rounded(number) for number in numbers]
    return float(f"{numbers:.3g}") if isinstance(numbers, float) else numbers


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else f"s{index + 1}"
