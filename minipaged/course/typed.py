"""A call as it can be typed: its arguments as Python, what it gave as a comment, and the imports that it needs.

    masked_attention(np.array([[[1.0]]]), np.array([[[nan]]]), ...)     small arrays whole, NaN where it is
    s0_0 = Sequence('0', 0, [0] * 30, SamplingParams(max_tokens=2))     requests with their lengths
    B = A.fork()                                                        what a call makes has a name

A large array cannot be typed: it is named by its shape, and by the places where it is NaN.
"""

import functools
import math
import re
import sys
from dataclasses import MISSING, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

ELEMENTS_UP_TO = 24  # of an array that is written out
NAN_UP_TO = 1_000_000  # elements of an array that is searched for NaN: a pool may have gigabytes
ITEMS_UP_TO = 60  # of a list
LENGTH_UP_TO = 400  # characters of any other value

# Where a name comes from: these, and the watched classes and functions, which may be a learner's.
_modules: dict[str, str] = {
    "Sequence": "minipaged.engine.sequence",
    "SamplingParams": "minipaged.engine.sequence",
    "Token": "minipaged.engine.sequence",
    "Trace": "minipaged.memory.trace",
    "make_batch": "minipaged.model.batch",
    "ModelConfig": "minipaged.model.transformer",
    "AddressLayout": "minipaged.memory.page_table",
}


@functools.cache
def remember(thing: Any) -> None:
    """A class or a function that a script uses. A learner's comes from their file."""
    module = sys.modules.get(thing.__module__)
    stem = Path(getattr(module, "__file__", None) or "").stem
    _modules[thing.__name__] = stem if re.match(r"ch\d\d_", stem) else thing.__module__


def imports(calls: list[str]) -> list[str]:
    """The lines that these calls need before them."""
    code = "\n".join(call.partition("  # ")[0] for call in calls)
    used: dict[str, list[str]] = {}
    for name in sorted(set(re.findall(r"(?<![\w.])[A-Za-z_]\w*(?=[(.,)])", code)) & set(_modules)):
        used.setdefault(_modules[name], []).append(name)
    lines = ["import numpy as np"] * ("np." in code) + ["import torch"] * ("torch." in code)
    return lines + [f"from {module} import {', '.join(names)}" for module, names in sorted(used.items())]


@functools.cache
def _kind(kind: Any, names: tuple[str, ...]) -> str:
    return next((base.__name__ for base in kind.__mro__ if base.__name__ in names), kind.__name__)


def kind_of(thing: Any, names: Any) -> str:
    """The name of the watched class that an object is of, or else of its own."""
    kind: Any = type(thing)
    return _kind(kind, ("BlockTable", "Sequence", "SchedulerOutput", *names))


def renamed(call: str, old: str, new: str) -> str:
    """The call with another name for an object; what stands behind it as a comment stays."""
    code, mark, said = call.partition("  # ")
    return re.sub(rf"(?<![\w.]){re.escape(old)}\b", new, code) + mark + said


def body_of_loop(call: str) -> str:
    """What a call that was made several times says each time."""
    return call.partition(": ")[2] if call.startswith("for _ in range(") else ""


def assigned(call: str, result: Any, log: Any) -> str:
    """The call, with a name for what it makes, and else with what it gave."""
    kind = kind_of(result, log.NAMES)
    if kind == "BlockTable":
        return f"{log.name(result)} = {call}"
    if kind == "SchedulerOutput":
        return f"{log.name(result)} = {call}  # {_step(result, log)}"
    return call + given(result, log)


def given(result: Any, log: Any) -> str:
    """What a call gave, as a comment."""
    return "" if result is None or type(result).__name__ == "generator" else f"  # -> {value(result, log)}"


def arguments(given: tuple[Any, ...], options: dict[str, Any], log: Any) -> str:
    named = (f"{name}={value(option, log)}" for name, option in options.items())
    return ", ".join([*(value(argument, log) for argument in given), *named])


def value(thing: Any, log: Any) -> str:
    """A value as it is typed. Never raises: a test may hand over anything, to be refused."""
    try:
        return _value(thing, log)
    except Exception:
        return f"{type(thing).__name__}(...)"


def _value(thing: Any, log: Any) -> str:
    if hasattr(thing, "shape") and hasattr(thing, "dtype"):
        return _array(thing)
    kind = kind_of(thing, log.NAMES)
    if kind == "Sequence":
        log.introduce(thing)
    if kind in ("BlockTable", "Sequence", "SchedulerOutput", *log.NAMES):
        return str(log.name(thing))
    if kind == "ForwardBatch":
        return _batch(thing)
    if kind == "Trace":
        return f"Trace({thing.num_blocks}, {thing.block_size}, {thing.num_host_blocks})"
    if is_dataclass(thing) and not isinstance(thing, type):
        return fields_of(thing, log)
    if isinstance(thing, tuple | list) and not hasattr(thing, "_fields"):
        return _items(thing, log)
    if isinstance(thing, float):
        return f"{thing:.4g}" if math.isfinite(thing) else f"float('{thing}')"
    text = re.sub(r"<[\w.]+\.(\w+) object at 0x[0-9a-f]+>", r"\1(...)", repr(thing))
    return text if len(text) <= LENGTH_UP_TO else text[: LENGTH_UP_TO - 3] + "..."


def fields_of(thing: Any, log: Any) -> str:
    """A dataclass, without what is at its default."""
    said = (f"{f.name}={value(getattr(thing, f.name), log)}" for f in fields(thing) if _differs(thing, f))
    return f"{type(thing).__name__}({', '.join(said)})"


def _differs(thing: Any, field: Any) -> bool:
    """Whether a field is not at its default."""
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    return bool(field.init and (default is MISSING or getattr(thing, field.name) != default))


def _items(items: Any, log: Any) -> str:
    """A list or a tuple: what is long and regular, in a short form."""
    if isinstance(items, list) and len(items) > 8 and all(type(item) is int for item in items):
        if len(set(items)) == 1:
            return f"[{items[0]}] * {len(items)}"
        if items == [*range(items[0], items[0] + len(items))]:
            return f"[*range({items[0]}, {items[-1] + 1})]"
    inner = ", ".join(value(item, log) for item in items[:ITEMS_UP_TO]) + (", ..." if len(items) > ITEMS_UP_TO else "")
    return f"[{inner}]" if isinstance(items, list) else f"({inner}{',' if len(items) == 1 else ''})"


def _array(array: Any) -> str:
    """An array by its numbers where they are few, and else by its shape and its NaN."""
    library, shape = ("torch" if type(array).__module__.startswith("torch") else "np"), tuple(array.shape)
    make = "torch.tensor" if library == "torch" else "np.array"
    if str(getattr(array, "device", "cpu")) == "meta":
        return f"torch.empty({shape}, device='meta')"
    if not shape:
        return str(_rounded(array.tolist()))
    if math.prod(shape) > ELEMENTS_UP_TO:
        return f"<array {shape}{_nan(array, library)}>"
    numbers = re.sub(r"\b(nan|inf)\b", rf"{library}.\1", str(_rounded(array.tolist())))
    plain = ("torch.float32", "torch.int64", "float64", "int64", "bool", "torch.bool")
    dtype = "" if str(array.dtype) in plain else f", dtype={'' if library == 'torch' else 'np.'}{array.dtype}"
    return f"{make}({numbers}{dtype})"


def _nan(array: Any, library: str) -> str:
    if math.prod(array.shape) > NAN_UP_TO:
        return ""
    wrong = array != array
    if not bool(wrong.any()):
        return ""
    places = [tuple(place) for place in (wrong.nonzero() if library == "torch" else _argwhere(wrong)).tolist()]
    more = f" and {len(places) - 2} more" if len(places) > 2 else ""
    return f", NaN at {' and '.join(map(str, places[:2]))}{more}"


def _argwhere(flags: Any) -> Any:
    import numpy as np

    return np.argwhere(flags)


def _rounded(numbers: Any) -> Any:
    if isinstance(numbers, list):
        return [_rounded(number) for number in numbers]
    return float(f"{numbers:.3g}") if isinstance(numbers, float) else numbers


def _batch(batch: Any) -> str:
    """The call of make_batch that gives this batch, as far as its numbers say."""
    edges, lens, tokens = batch.query_start_loc.tolist(), batch.seq_lens.tolist(), batch.token_ids.tolist()
    each = [tokens[a:b] for a, b in pairwise(edges)]
    starts = [length - len(of) for length, of in zip(lens, each, strict=True)]
    tables = [[block for block in row if block >= 0] for row in batch.block_tables.tolist()]
    if not any(tables):
        return f"make_batch({each}, {starts})"
    places = [(table, start + i) for table, start, of in zip(tables, starts, each, strict=True) for i in range(len(of))]
    slots = batch.slot_mapping.tolist()
    for size in range(1, max(lens) + 1):
        if all(
            p // size < len(t) and t[p // size] * size + p % size == s for (t, p), s in zip(places, slots, strict=True)
        ):
            return f"make_batch({each}, {starts}, {tables}, {size})"
    return f"make_batch({each}, {starts}, {tables}, ...)  with slot_mapping {slots}"


def _step(output: Any, log: Any) -> str:
    """What a step computes, and the copies before it."""
    chunks = [(log.name(seq), seq.num_computed, count) for seq, count in output.num_scheduled_tokens.items()]
    said = [f"{name} computes {start} to {start + count - 1}" for name, start, count in chunks] or ["nothing"]
    said += [f"{log.name(seq)} is preempted ({mode})" for seq, mode in output.preempted.items()]
    said += [f"{name} {pairs}" for name in ("swap_out", "swap_in", "copies") if (pairs := getattr(output, name))]
    return ", ".join(said)
