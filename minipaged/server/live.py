"""What the page is fed: the state of the pool when it asks, and then each event of the trace with what it changed.

The form is the site's (viz/export.py), with four differences, since a server's trace has no end. `base` holds the five
maps as they are and `queues` says who waits and runs; each message adds events, and the sequences that arrived; and a
`write` gives the new words alone, {"at": position, "words": [...]}.

The trace is emptied at each step, so that memory does not grow: `State` keeps what its events add up to.
"""

import json
from collections import deque
from collections.abc import Iterable
from itertools import count
from typing import Any

from minipaged.engine.llm import LLM
from minipaged.memory.trace import Event
from minipaged.viz.colours import PALETTE
from minipaged.viz.export import SCHEMA, VERSION, maps_of
from minipaged.viz.state import State
from minipaged.viz.words import in_words, visible

BACKLOG = 1_000  # messages that a page may be behind, before it is given the state again
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Watcher:
    """One page: the messages that it has still to get. `put` and `take` are called in the event loop."""

    def __init__(self, wake: Any):
        self.messages: deque[str] = deque()
        self.wake, self.behind = wake, False  # asyncio.Event; messages were dropped

    def put(self, message: str) -> None:
        if len(self.messages) == BACKLOG:
            self.messages.clear()
            self.behind = True
        self.messages.append(message)
        self.wake.set()

    def take(self) -> list[str]:
        self.wake.clear()
        messages, self.messages = list(self.messages), deque()
        return messages


class Feed:
    """Reads the trace of an engine; its methods are called in the engine's thread."""

    def __init__(self, llm: LLM):
        assert llm.trace is not None, "the page is drawn from the trace"
        self.llm, self.trace, self.state = llm, llm.trace, State(llm.trace)
        self.sequences: dict[str, dict[str, str]] = {}  # those that have not finished
        self.watchers: dict[Watcher, None] = {}
        self._arrived: list[dict[str, str]] = []
        self._numbers = count()
        self._first: list[tuple[Watcher, str]] = []  # messages that come before those of the next `drain`

    def arrived(self, names: Iterable[str]) -> None:
        """Sequences that wait from now on. The letters come again after the last one, as the colours do."""
        for name, number in zip(names, self._numbers, strict=False):
            shown = {"name": name, "label": LETTERS[number % 26], "colour": PALETTE[number % len(PALETTE)]}
            self.sequences[name] = shown
            self._arrived.append(shown)

    def watch(self, watcher: Watcher, **more: Any) -> None:
        """Give a page the state as it is now, and then what changes. `more` goes into the document."""
        before = self.drain()
        self.watchers[watcher] = None
        self._first = [*before, (watcher, self._document(more))]

    def leave(self, watcher: Watcher) -> None:
        self.watchers.pop(watcher, None)

    def drain(self) -> list[tuple[Watcher, str]]:
        """Read and empty the trace. Returns the messages, in their order, and for which page each is."""
        events: list[dict[str, Any]] = []
        for number, event in enumerate(self.trace.events):
            try:
                self.state.apply(number)
            except ValueError:  # a step was interrupted between a change and its event: a `reset` follows
                continue
            if event["event"] == "finish":
                self.sequences.pop(event["seq"], None)
            if self.watchers:
                events.append({"event": event, "words": in_words(event), "changes": self._changes(event)})
        self.trace.events.clear()
        messages, self._first = self._first, []
        arrived, self._arrived = self._arrived, []
        if self.watchers and (events or arrived):
            update = {"sequences": arrived, "events": events, "counters": self.counters()}
            text = json.dumps(update, separators=(",", ":"))
            messages += [(watcher, text) for watcher in self.watchers]
        return messages

    def _changes(self, event: Event) -> dict[str, dict[str, Any]]:
        """What the event changed in the five maps of viz/export.py; None is an entry that is gone."""
        kind, seq, state = event["event"], event.get("seq"), self.state
        if kind == "reset":
            return {"": {}}  # all of it
        if kind in ("cache", "evict"):
            words = [visible(word) for word in state.device.words[event["block"]]] if kind == "cache" else None
            return {"cached": {str(event["block"]): words}}
        if seq is None or kind in ("preempt", "finish"):
            return {}
        changes: dict[str, dict[str, Any]] = {"num_tokens": {seq: state.num_tokens.get(seq)}}
        if kind == "write":
            changes["texts"] = {seq: {"at": event["start"], "words": [visible(word) for word in event["tokens"]]}}
            return changes
        changes["tables"] = {seq: state.part(seq, state.device) or None}
        if self.trace.num_host_blocks:
            changes["host_tables"] = {seq: state.part(seq, state.host) or None}
        if seq not in state.tables:
            changes["texts"] = {seq: None}
        elif kind in ("share", "fork"):
            changes["texts"] = {seq: [visible(word) for word in state.words(seq)]}
        return changes

    def _document(self, more: dict[str, Any]) -> str:
        running = {seq.seq_id for seq in self.llm.scheduler.running}
        document = {
            "schema": SCHEMA,
            "version": VERSION,
            "trace": self.trace.header(),
            "step": self.trace.step,
            "sequences": list(self.sequences.values()),
            "queues": {name: "running" if name in running else "waiting" for name in self.sequences},
            "base": maps_of(self.state.snapshot(0, 0)),
            "events": [],
            "counters": self.counters(),
            **more,
        }
        return json.dumps(document, separators=(",", ":"))

    def counters(self) -> dict[str, int]:
        now = self.llm.metrics()
        return {
            "steps": now.num_steps,
            "tokens computed": now.num_tokens_computed,
            "tokens generated": now.num_tokens_generated,
            "tokens found in the prefix cache": now.prefix_tokens_found,
            "preemptions": sum(now.preemptions.values()),
            "requests finished": now.num_finished,
            "aborted": now.num_aborted,
        }
