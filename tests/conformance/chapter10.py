"""Chapter 14, the exercise: the scheduler and the block manager of chapter 10, for your adapter to drive.

    make conformance ENGINE=my_adapter.py                       the reference
    IMPL=exercises make conformance ENGINE=my_adapter.py        your own, from the folder of your exercises
    FAULT=1 make conformance ENGINE=my_adapter.py               with a fault in it that chapter 10's suite does not see
    FAULT=2 make conformance ENGINE=my_adapter.py               and another one

Find both from what the kit prints, and only then read on.
"""

import os
from pathlib import Path

if folder := os.environ.get("IMPL"):
    from minipaged.course import impl

    impl.install(impl.choose(Path(folder), {10}))

from minipaged.engine.scheduler import Scheduler
from minipaged.memory.block_manager import BlockManager

if os.environ.get("FAULT", "0") not in ("0", "1", "2"):
    raise ValueError(f"FAULT is 1 or 2, got {os.environ['FAULT']}")


class BlockManager1(BlockManager):
    """All salts are one: it is kept whether a request has one, and not which. Chapter 10's suite has a single salt."""

    def get_computed_blocks(self, tokens, cache_salt=None):
        return super().get_computed_blocks(tokens, cache_salt and "salted")

    def block_keys(self, tokens, cache_salt=None):
        return super().block_keys(tokens, cache_salt and "salted")

    def cache_blocks(self, seq_id, tokens, cache_salt=None):
        super().cache_blocks(seq_id, tokens, cache_salt and "salted")


class Scheduler2(Scheduler):
    """An abort may overtake its request, so its name is remembered, and never forgotten: the next request of that name
    is dropped. Chapter 10's suite gives each request a new name."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._aborted = set()

    def add(self, seqs):
        super().add([seq for seq in seqs if seq.request_id not in self._aborted])

    def finish(self, seq):
        super().finish(seq)
        if len(seq.outputs) < seq.params.max_tokens:
            self._aborted.add(seq.request_id)


if os.environ.get("FAULT") == "1":
    BlockManager = BlockManager1
if os.environ.get("FAULT") == "2":
    Scheduler = Scheduler2
