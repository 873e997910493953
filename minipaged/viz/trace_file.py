"""Read a trace back that `Trace.save` wrote: JSON Lines, a header and then one event a line (memory/trace.py).

A file may come from anywhere: its numbers and the lengths of its names are bounded. What draws it makes them printable.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minipaged.memory.trace import SCHEMA, VERSION, Trace

MOST = 10_000_000  # of any number: blocks, tokens, steps
LONGEST = 100  # characters of a name
_NUMBERS = ("logical", "block", "source", "target", "start", "count", "host_block")
_NAMES = ("seq", "parent", "mode", "reason")


def load_trace(path: str | Path) -> Trace:
    """Raises ValueError with the line's number where it is no trace, or one of another version."""
    return read_trace(Path(path).read_text(encoding="utf-8").splitlines())


def read_trace(lines: Iterable[str]) -> Trace:
    """The trace of these lines; empty ones are skipped. Raises as `load_trace`."""
    trace: Trace | None = None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict):
                raise ValueError(f"expected an object, got {line.strip()[:40]}")
            if trace is None:
                trace = _from_header(fields)
            else:
                trace.step = _number("step", fields.pop("step"))
                trace.record(fields.pop("event"), **_checked(fields))
        except KeyError as error:
            raise ValueError(f"line {number} of the trace: it has no {error}") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"line {number} of the trace: {error}") from error
    if trace is None:
        raise ValueError("the trace is empty: not even a header")
    return trace


def _from_header(fields: dict[str, Any]) -> Trace:
    if fields.get("schema") != SCHEMA or fields.get("version") != VERSION:
        got = f"{fields.get('schema')!r} version {fields.get('version')!r}"
        raise ValueError(f"expected the header of {SCHEMA!r} version {VERSION}, got {got}")
    return Trace(*(_number(name, fields[name]) for name in ("num_blocks", "block_size", "num_host_blocks")))


def _checked(fields: dict[str, Any]) -> dict[str, Any]:
    for name, value in fields.items():
        if name in _NUMBERS:
            _number(name, value)
        elif name in _NAMES:
            _name(name, value)
    scheduled = fields.get("seqs", {})
    if not isinstance(scheduled, dict):
        raise ValueError(f"seqs must be an object, got {scheduled!r:.40}")
    for seq, count in scheduled.items():
        _name("seqs", seq)
        _number("seqs", count)
    return fields


def _number(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST:
        raise ValueError(f"{name} must be a whole number from 0 to {MOST:,}, got {value!r:.40}")
    return value


def _name(name: str, value: object) -> None:
    if not isinstance(value, str) or len(value) > LONGEST:
        raise ValueError(f"{name} must be a text of at most {LONGEST} characters, got {value!r:.40}")
