"""Read a trace back that `Trace.save` wrote: JSON Lines, a header and then one event a line (memory/trace.py)."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minipaged.memory.trace import SCHEMA, VERSION, Trace


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
                trace.step = fields.pop("step")
                trace.record(fields.pop("event"), **fields)
        except KeyError as error:
            raise ValueError(f"line {number} of the trace: it has no {error}") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"line {number} of the trace: {error}") from error
    if trace is None:
        raise ValueError("the trace is empty: not even a header")
    return trace


def _from_header(fields: dict[str, Any]) -> Trace:
    if fields.get("schema") != SCHEMA or fields.get("version") != VERSION:
        got = f"{fields.get('schema')!r} version {fields.get('version')!r}"
        raise ValueError(f"expected the header of {SCHEMA!r} version {VERSION}, got {got}")
    return Trace(fields["num_blocks"], fields["block_size"], fields["num_host_blocks"])
