"""A trace replayed into plain dictionaries: the schema's words, taken literally, and each event held against the state.

minipaged/viz/state.py is the replay that the pictures are drawn from. This one is for tests, and knows no words.
"""

import pytest

from minipaged.cdiv import cdiv


class Replay:
    """Tables are dictionaries, sequence -> logical -> block, and each event changes an entry of one."""

    def __init__(self, block_size):
        self.block_size = block_size
        self.reset()

    def reset(self):
        self.tables, self.host_tables, self.cached = {}, {}, set()

    def whole_tables(self, on_host=False):
        """sequence -> blocks, without those that have none."""
        tables = self.host_tables if on_host else self.tables
        return {seq: [table[logical] for logical in range(len(table))] for seq, table in tables.items() if table}

    def apply(self, event):
        try:
            self._apply(event)
        except (AssertionError, KeyError) as error:
            why = f": {error}" if isinstance(error, AssertionError) and error.args and "\n" not in str(error) else ""
            raise AssertionError(
                f"the trace says what cannot be, or an event before it is missing: {event}{why}"
            ) from error

    def _apply(self, event):
        seq, logical, block = event.get("seq"), event.get("logical"), event.get("block")
        table, host_table = self.tables.setdefault(seq, {}), self.host_tables.setdefault(seq, {})
        in_use = [block for blocks in self.tables.values() for block in blocks.values()]
        match event["event"]:
            case "allocate":
                assert logical == len(table) and block not in in_use and block not in self.cached
                table[logical] = block
            case "share":
                assert logical == len(table) and (block in in_use or block in self.cached)
                table[logical] = block
            case "copy":
                assert table[logical] == event["source"] and logical == len(table) - 1
                assert event["target"] not in in_use and event["target"] not in self.cached
                table[logical] = event["target"]
            case "fork":
                assert table == self.tables.get(event["parent"], {}), "its shares come before it"
                assert len(table) == cdiv(event["count"], self.block_size)
            case "write":
                for position in range(event["start"], event["start"] + event["count"]):
                    written = table[position // self.block_size]
                    assert in_use.count(written) == 1 and written not in self.cached, "a shared block is never written"
            case "free":
                lies = host_table or table
                assert logical == len(lies) - 1, "the last block goes first"
                assert lies.pop(logical) == block
            case "cache":
                assert block in in_use and block not in self.cached
                self.cached.add(block)
            case "evict":
                assert block not in in_use
                self.cached.remove(block)
            case "swap_out":
                assert table.pop(logical) == block
                host_table[logical] = event["host_block"]
            case "swap_in":
                assert host_table.pop(logical) == event["host_block"]
                table[logical] = block
            case "reset":
                self.reset()
            case other:
                pytest.fail(f"the memory recorded {other}")
