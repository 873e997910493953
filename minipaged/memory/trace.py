"""Every change of ownership as one event: the trace that the pictures, the tests and the site are drawn from.

A trace is JSON Lines. The first line is the header, each further line one event:

    {"schema": "minipaged.trace", "version": 2, "num_blocks": 8, "block_size": 4, "num_host_blocks": 0}
    {"event": "schedule", "step": 1, "seqs": {"A": 6}}                    this step computes 6 tokens of A
    {"event": "allocate", "step": 1, "seq": "A", "logical": 0, "block": 5}
    {"event": "allocate", "step": 1, "seq": "A", "logical": 1, "block": 2}
    {"event": "write", "step": 1, "seq": "A", "start": 0, "count": 6}

`block` is a physical block, `logical` its place in the table of `seq`. Replaying the events from an empty pool gives
the state after each of them: `allocate` and `share` append an entry to a table, `copy` and the swaps change one, `free`
removes the last one, and `reset` removes all tables.

Block tables, prefix cache, swap and block manager record what they change. The engine, or the script runner of
`minipaged trace`, records `write` after K and V are stored, and `schedule`, `preempt` and `finish`.
"""

import json
from pathlib import Path
from typing import Any

SCHEMA = "minipaged.trace"
VERSION = 2

# Event -> the fields it must have. `step` is added to each; further fields (tokens=[...], text=...) are allowed.
EVENTS: dict[str, tuple[str, ...]] = {
    "allocate": ("seq", "logical", "block"),  # a free block becomes the logical block of seq
    "share": ("seq", "logical", "block"),  # seq names a block that is in use, or cached, too
    "copy": ("seq", "logical", "source", "target"),  # copy-on-write: a free block, target, stands for source in seq
    "fork": ("seq", "parent", "count"),  # after its shares: seq has the first count tokens of parent
    "write": ("seq", "start", "count"),  # K and V of positions start .. start + count - 1 are stored; seq ends there
    "free": ("seq", "logical", "block"),  # seq names the block no more; with no owner left it is free, or cached
    "cache": ("block",),  # the block is full and found by its tokens, also with no owner, until it is evicted
    "evict": ("block",),  # a cached block with no owner is forgotten, and free
    "swap_out": ("seq", "logical", "block", "host_block"),  # seq names the host block, and the device block no more
    "swap_in": ("seq", "logical", "block", "host_block"),  # seq names the device block, and the host block no more
    "reset": (),  # no table is left, every block of both pools is free, and nothing is cached
    "schedule": ("seqs",),  # seqs: sequence -> tokens of it in this step
    "preempt": ("seq", "mode"),  # mode: recompute or swap
    "finish": ("seq", "reason"),  # reason: stop, length, abort or error
}
# A `free` of a sequence on the host gives its host block.

Event = dict[str, Any]


class Trace:
    """A list of events that is checked as it grows. Invariant: `step` never falls from one event to the next."""

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0):
        sizes = {"num_blocks": num_blocks, "block_size": block_size, "num_host_blocks": num_host_blocks}
        for name, value in sizes.items():
            least = 0 if name == "num_host_blocks" else 1
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        self.num_blocks, self.block_size, self.num_host_blocks = num_blocks, block_size, num_host_blocks
        self.step = 0  # the engine counts it up; script runners too
        self.events: list[Event] = []

    def record(self, event: str, /, **fields: Any) -> None:
        """Append one event, stamped with the current step. Raises ValueError where the schema is not met."""
        if event not in EVENTS:
            raise ValueError(f"unknown event {event!r}: the schema has {', '.join(EVENTS)}")
        missing = [name for name in EVENTS[event] if name not in fields]
        if missing:
            raise ValueError(f"event {event!r} needs {', '.join(missing)}")
        if "event" in fields or "step" in fields:
            raise ValueError(f"event {event!r}: the trace itself writes `event` and `step`")
        last = self.events[-1]["step"] if self.events else 0
        if not isinstance(self.step, int) or self.step < last:
            raise ValueError(f"event {event!r} in step {self.step!r}, after one in step {last}: steps only rise")
        self.events.append({"event": event, "step": self.step, **fields})

    def header(self) -> dict[str, Any]:
        sizes = {"num_blocks": self.num_blocks, "block_size": self.block_size, "num_host_blocks": self.num_host_blocks}
        return {"schema": SCHEMA, "version": VERSION, **sizes}

    def dumps(self) -> str:
        """The trace as JSON Lines: the header, then one line an event. viz/trace_file.py reads it back."""
        return "".join(json.dumps(line) + "\n" for line in [self.header(), *self.events])

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.dumps(), encoding="utf-8")
