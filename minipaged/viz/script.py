"""A request script: what sequences do to memory, with no model. It runs over the real block tables and gives a trace.

    {"num_blocks": 8, "block_size": 4, "ops": [
        {"op": "append", "seq": "A", "tokens": ["Four", "score", "and"]},      or "count": 3 for tokens without a word
        {"op": "fork", "seq": "A", "as": "B"},
        {"op": "truncate", "seq": "A", "keep": 2},
        {"op": "free", "seq": "A"}]}

Two keys at the top ask for more of chapter 9. "num_host_blocks": 4 gives a host pool, and with it two ops,
{"op": "swap_out", "seqs": ["A", "B"]} and "swap_in". "prefix_cache": true caches full blocks: the first append
of a sequence then names what another one has already written. Step n of the trace is op n, counted from 1.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minipaged.memory.block_allocator import BlockAllocator, OutOfBlocks
from minipaged.memory.block_table import BlockTable
from minipaged.memory.prefix_cache import PrefixCache
from minipaged.memory.swap import Swap
from minipaged.memory.trace import Trace

BLOCKS_UP_TO = 1_000_000  # blocks of a pool: a script is read from a file, and must not ask for all memory

# Op -> its fields, and beside each what it must be.
OPS: dict[str, dict[str, type]] = {
    "append": {"seq": str, "tokens": list, "count": int},  # one of tokens and count
    "fork": {"seq": str, "as": str},
    "truncate": {"seq": str, "keep": int},
    "free": {"seq": str},
    "swap_out": {"seqs": list},
    "swap_in": {"seqs": list},
}


def load_script(path: str | Path) -> dict[str, Any]:
    """Read a script from a JSON file. Raises ValueError with the place where it is not JSON, or not an object."""
    try:
        script = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(script, dict):
        raise ValueError(f"{path} holds {type(script).__name__}: a request script is an object with num_blocks and ops")
    return script


def run_script(script: dict[str, Any], on_op: Callable[[Mapping[str, BlockTable]], None] | None = None) -> Trace:
    """Run all ops and return the trace. Raises ValueError with the op's number at the first that cannot be done.

    `on_op` is called after each op with the tables by name, to look at and not to change.
    """
    runner = _Runner(script)
    for number, op in enumerate(script["ops"], start=1):
        runner.trace.step = number
        try:
            runner.run(op)
        except (ValueError, OutOfBlocks) as error:
            name = op.get("op") if isinstance(op, dict) else op
            raise ValueError(f"op {number} ({str(name)[:20]}): {error}") from error
        if on_op is not None:
            on_op(runner.tables)
    return runner.trace


class _Runner:
    """Sequences by name. A sequence is there from its first append or its fork until it is freed."""

    def __init__(self, script: dict[str, Any]):
        unknown = set(script) - {"num_blocks", "block_size", "num_host_blocks", "prefix_cache", "ops", "about"}
        if unknown:
            raise ValueError(f"the script has an unknown key {min(map(str, unknown))!r}")
        if not isinstance(script.get("ops"), list):
            raise ValueError(f"ops must be a list, got {script.get('ops')!r}")
        num_blocks = _size(script, "num_blocks", 1)
        block_size = _size(script, "block_size", 1)
        num_host_blocks = _size({"num_host_blocks": 0, **script}, "num_host_blocks", 0)
        cached = script.get("prefix_cache", False)
        if not isinstance(cached, bool):
            raise ValueError(f"prefix_cache must be true or false, got {cached!r}")
        self.trace = Trace(num_blocks, block_size, num_host_blocks)
        self.cache = PrefixCache(num_blocks, block_size, trace=self.trace) if cached else None
        self.allocator = self.cache or BlockAllocator(num_blocks)
        self.swap = Swap(self.allocator, BlockAllocator(num_host_blocks)) if num_host_blocks else None
        self.tables: dict[str, BlockTable] = {}
        self.tokens: dict[str, list[int]] = {}  # what the prefix cache tells blocks apart by
        self.token_ids: dict[str, int] = {}  # word -> id
        self.num_wordless = 0

    def run(self, op: Any) -> None:
        """One op, checked and carried out."""
        if not isinstance(op, dict) or not isinstance(op.get("op"), str) or op["op"] not in OPS:
            raise ValueError(f"an op is an object whose `op` is one of {', '.join(OPS)}, got {str(op)[:80]}")
        fields, name = OPS[op["op"]], op["op"]
        for key, value in op.items():
            if key not in {"op", *fields}:
                raise ValueError(f"unknown field {key!r}: {name} takes {', '.join(fields)}")
            if key != "op" and (not isinstance(value, fields[key]) or isinstance(value, bool)):
                raise ValueError(f"{key} must be of type {fields[key].__name__}, got {str(value)[:80]!r}")
        missing = [key for key in fields if key not in op and name != "append"] + ["seq"] * (
            not {"seq", "seqs"} & {*op}
        )
        if missing:
            raise ValueError(f"it needs {missing[0]}")
        getattr(self, f"_{name}")(op)

    def _append(self, op: dict[str, Any]) -> None:
        seq, words = op["seq"], op.get("tokens")
        if ("tokens" in op) == ("count" in op):
            raise ValueError("it needs either tokens or count")
        count = op["count"] if words is None else len(words)
        if count < 1:
            raise ValueError(f"it must append at least 1 token, got {count}")
        if words is not None and not all(isinstance(word, str) for word in words):
            raise ValueError(f"tokens must be strings, got {str(words)[:80]}")
        table = self.tables.get(seq) or BlockTable(self.allocator, self.trace.block_size, seq=seq, trace=self.trace)
        self._on_device(seq, table)
        needed, num_free = table.blocks_needed(count), self.allocator.num_free
        if words is None and needed > num_free:  # before a number is given to each token: there may be very many
            raise OutOfBlocks(f"{count} tokens need {needed} blocks, {num_free} are free")
        ids = self._ids(words, count)
        hits = self.cache.match(ids) if self.cache and table.num_tokens == 0 else []
        if hits:
            table.append_shared(hits)
        start = table.num_tokens
        skipped = len(hits) * self.trace.block_size
        table.append_tokens(count - skipped)
        extra = {} if words is None else {"tokens": words[skipped:]}
        self.trace.record("write", seq=seq, start=start, count=count - skipped, **extra)
        self.tables[seq] = table
        self.tokens[seq] = self.tokens.get(seq, []) + ids
        if self.cache:
            self.cache.cache_blocks(table, self.tokens[seq])

    def _fork(self, op: dict[str, Any]) -> None:
        parent, child = self._known(op["seq"]), op["as"]
        if child in self.tables:
            raise ValueError(f"{child!r} is there already: a fork needs a new name")
        self._on_device(op["seq"], parent)
        self.tables[child] = parent.fork(seq=child)
        self.tokens[child] = list(self.tokens[op["seq"]])

    def _truncate(self, op: dict[str, Any]) -> None:
        table, keep = self._known(op["seq"]), op["keep"]
        table.truncate(keep)
        del self.tokens[op["seq"]][keep:]
        if keep % self.trace.block_size:  # blocks that went say it else
            self.trace.record("write", seq=op["seq"], start=keep, count=0)

    def _free(self, op: dict[str, Any]) -> None:
        self._known(op["seq"]).release()
        del self.tables[op["seq"]], self.tokens[op["seq"]]

    def _swap_out(self, op: dict[str, Any]) -> None:
        self._swapper().swap_out([self._known(seq) for seq in op["seqs"]])

    def _swap_in(self, op: dict[str, Any]) -> None:
        self._swapper().swap_in([self._known(seq) for seq in op["seqs"]])

    def _swapper(self) -> Swap:
        if self.swap is None:
            raise ValueError("the script has no host pool: num_host_blocks is 0")
        return self.swap

    def _known(self, seq: Any) -> BlockTable:
        if not isinstance(seq, str) or seq not in self.tables:
            raise ValueError(f"there is no sequence {str(seq)[:40]!r}: there are {', '.join(self.tables) or 'none'}")
        return self.tables[seq]

    def _on_device(self, seq: str, table: BlockTable) -> None:
        if table.allocator is not self.allocator:
            raise ValueError(f"{seq!r} is swapped out: swap it in first")

    def _ids(self, words: list[str] | None, count: int) -> list[int]:
        """A number for each token: the same for the same word, and a new one for each token without a word."""
        if words is not None:
            return [self.token_ids.setdefault(word, len(self.token_ids)) for word in words]
        self.num_wordless += count
        return [-number for number in range(self.num_wordless - count + 1, self.num_wordless + 1)]


def _size(script: dict[str, Any], name: str, least: int) -> int:
    value = script.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= BLOCKS_UP_TO:
        raise ValueError(f"{name} must be an integer from {least} to {BLOCKS_UP_TO}, got {value!r}")
    return value
