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
from minipaged.course.log import NAMES, Log, letter

REPORT = "MINIPAGED_COURSE_REPORT"  # an environment variable: the file to write the findings to

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
_MADE_AS = "_made_as"  # an attribute of each watched object: its id when it was made, which a copy of it has too


log = Log()


def is_on() -> bool:
    return REPORT in os.environ


# ---- watching ------------------------------------------------------------


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
        kind: Any = type(self)
        typed.remember(kind)
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
        names = [letter(index) for index in range(len(lens))]
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
            said = " ".join(str(error).split())[:160]
            _note(f"{call}  # raises {type(error).__name__}: {said}", look, of_function, state)
        raise
    log.depth = max(0, log.depth - 1)
    if log.calls is not current:
        return result
    if new is not None:
        log.event(f"{log.name(new, new=True)} = {call}", made=True)
        log.made(new, by_the_test=True)
    elif look:
        at_once = typed.given(result, log) if of_function else None  # a test may change an array in place
        kept = list(result) if type(result) is list else result
        log.look(lambda: call + (typed.given(kept, log) if at_once is None else at_once), of_function, state)
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
