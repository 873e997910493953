"""The trace as one JSON document for the site: what happened in words, and what changed in the picture.

    {"schema": "minipaged.site", "version": 1,
     "trace": {"num_blocks": 8, ...},                             the header of the trace
     "sequences": [{"name": "A", "label": "A", "colour": "#77AADD"}, ...],          in order of arrival
     "events": [{"event": {...}, "words": "A takes physical block 5 for ...", "changes": {...}}, ...]}

A page keeps five maps, empty at first, and draws them after each event. `changes` holds the new value of each entry
that the event changed, and null for an entry that is gone:

    tables        sequence -> physical block of each logical block; -1: not in this pool
    host_tables   the same for the host pool
    num_tokens    sequence -> tokens written
    texts         sequence -> a text a position, made fit to be seen; left out where nothing has a text
    cached        block -> its texts: in the prefix cache, and kept with no owner until it is evicted

    for (const [map, entries] of Object.entries(event.changes))
        for (const [key, value] of Object.entries(entries))
            if (value === null) delete state[map][key]; else state[map][key] = value;

Whole snapshots would be simpler still, and grow with events times sequences; an event changes the entries of one.
An arrow is drawn at a `copy` event, from its `source` to its `target`. The text is ASCII, with `<`, `>` and `&`
written as \\u003c, \\u003e and \\u0026, so that it may also stand inside a <script> element.
"""

import json
from typing import Any

from minipaged.memory.trace import Trace
from minipaged.viz.colours import colours
from minipaged.viz.replay import replay
from minipaged.viz.snapshot import Snapshot
from minipaged.viz.words import in_words, visible

SCHEMA = "minipaged.site"
VERSION = 1
MAPS = ("tables", "host_tables", "num_tokens", "texts", "cached")

_ESCAPES = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}


def to_json(trace: Trace) -> str:
    """The document for a trace. Raises ValueError at an event that contradicts the state, as replay does."""
    state: dict[str, dict[str, Any]] = {name: {} for name in MAPS}
    events, sequences = [], list[dict[str, str]]()
    for snapshot in replay(trace):
        following, (event,) = maps_of(snapshot), snapshot.events
        events.append({"event": event, "words": in_words(event), "changes": _changes(state, following)})
        state = following
        if not sequences:
            shades = colours(snapshot)
            sequences = [{"name": seq, "label": snapshot.labels[seq], "colour": shades[seq]} for seq in shades]
    document = {"schema": SCHEMA, "version": VERSION, "trace": trace.header(), "sequences": sequences, "events": events}
    return json.dumps(document, separators=(",", ":"), allow_nan=False).translate(_ESCAPES)


def maps_of(snapshot: Snapshot) -> dict[str, dict[str, Any]]:
    """The five maps of a snapshot, as a page holds them after its event."""
    return {
        "tables": {seq: list(blocks) for seq, blocks in snapshot.tables.items()},
        "host_tables": {seq: list(blocks) for seq, blocks in snapshot.host_tables.items()},
        "num_tokens": dict(snapshot.num_tokens),
        "texts": {seq: [visible(text) for text in texts] for seq, texts in snapshot.texts.items()},
        "cached": {
            str(block): [visible(text) for text in snapshot.cached_texts.get(block, ())]
            for block in sorted(snapshot.cached)
        },
    }


def apply_changes(state: dict[str, dict[str, Any]], changes: dict[str, dict[str, Any]]) -> None:
    """What a page does at one event, in Python: brings the five maps up to date, in place."""
    for name, entries in changes.items():
        for key, value in entries.items():
            if value is None:
                del state[name][key]
            else:
                state[name][key] = value


def _changes(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    changes = {}
    for name in MAPS:
        gone = {key: None for key in before[name] if key not in after[name]}
        new = {key: value for key, value in after[name].items() if before[name].get(key) != value}
        if gone or new:
            changes[name] = {**gone, **new}
    return changes
