"""Chapter 7. Entries (a block that a query sees) sorted into passes: what one batched product reads.

    pool    [ A | B | . | A | B | A | . . . . . . | B ]
              ------- a run, in place ---------       a copy: alone, it is not worth a product over the gap

A block with several owners is read once, with all their queries as rows of its product. What a query must not see of
a block is computed too, and thrown away. See `plan.py` for the whole.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# A gap of at most this many blocks is computed and thrown away: a further product would take longer.
MAX_GAP_BLOCKS = 16
# A copied block takes about 1.1 times as long as one that is read in place, wanted or not: a product waits for memory
# that a copy reads in one go, and the copy is read from the processor's cache. So a run is read in place where at least
# nine tenths of its blocks are wanted.
MIN_RUN_BLOCKS, MIN_RUN_SHARE = 16, 0.9
# So many blocks are copied at a time: they stay in the processor's cache until they are read.
CHUNK_BLOCKS = 256

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Pass:
    """Blocks that are read by one product, each for `owners` queries. Its rows: [num_blocks, num_kv_heads, owners]."""

    first_row: int
    num_blocks: int
    owners: int
    run: slice | None  # a run of the pool, read in place; or
    chosen: Tensor | None  # int64 [num_blocks], blocks that are copied to the workspace


class Layout:
    """Sorts the entries into passes, and gives each its rows."""

    def __init__(self, num_kv_heads: int, device: torch.device):
        self.passes: list[Pass] = []
        self.num_rows = 0
        self._num_kv_heads, self._device = num_kv_heads, device

    def add(self, block: Ints) -> Ints:
        """The rows of entries of which the i-th meets block[i]: int64 [num_entries, num_kv_heads].

        Each block is read once, for all its owners.
        """
        rows = np.empty((len(block), self._num_kv_heads), dtype=np.int64)
        entries = np.argsort(block, kind="stable")
        blocks, first, counts = np.unique(block[entries], return_index=True, return_counts=True)
        place = np.repeat(np.arange(len(blocks)), counts)  # [num_entries]: the block of each entry
        owner = np.arange(len(entries)) - first[place]  # 0, 1, ... among the entries of its block
        in_run = np.zeros(len(blocks), dtype=bool)
        for low, high in runs(blocks[counts == 1]):
            mine = (blocks >= low) & (blocks < high) & (counts == 1)
            in_run |= mine
            run = slice(int(low), int(high))
            rows[entries[first[mine]]] = self._add(blocks[mine] - run.start, 0, run.stop - run.start, owners=1, run=run)
        # The number of owners is rounded up to a power of two: few products, and at most half of each in vain.
        width = 1 << np.ceil(np.log2(counts)).astype(np.int64)
        for owners in np.unique(width[~in_run]):
            chosen = np.flatnonzero(~in_run & (width == owners))
            for start in range(0, len(chosen), CHUNK_BLOCKS):
                chunk = chosen[start : start + CHUNK_BLOCKS]
                among = np.full(len(blocks), -1)
                among[chunk] = np.arange(len(chunk))
                mine = among[place] >= 0
                copied = torch.from_numpy(blocks[chunk]).to(self._device)
                rows[entries[mine]] = self._add(among[place[mine]], owner[mine], len(chunk), int(owners), chosen=copied)
        return rows

    def _add(
        self,
        place: Ints,
        owner: Ints | int,
        num_blocks: int,
        owners: int,
        run: slice | None = None,
        chosen: Tensor | None = None,
    ) -> Ints:
        tile = place[:, None] * self._num_kv_heads + np.arange(self._num_kv_heads)  # [num_entries, num_kv_heads]
        rows = self.num_rows + tile * owners + np.asarray(owner).reshape(-1, 1)
        self.passes.append(Pass(self.num_rows, num_blocks, owners, run, chosen))
        self.num_rows += num_blocks * self._num_kv_heads * owners
        return rows


def runs(blocks: Ints) -> Ints:
    """Runs of the pool that are worth reading in place, among these ascending blocks. What is left over is copied.

    Returns int64 [num_runs, 2]: where a run begins, and where it ends.
    """
    if not len(blocks):
        return np.empty((0, 2), dtype=np.int64)
    ends = np.flatnonzero(np.diff(blocks) > MAX_GAP_BLOCKS) + 1
    first, last = np.concatenate([[0], ends]), np.concatenate([ends, [len(blocks)]]) - 1
    low, high, count = blocks[first], blocks[last] + 1, last - first + 1
    worth = (count >= MIN_RUN_BLOCKS) & (count >= MIN_RUN_SHARE * (high - low))
    return np.stack([low, high], axis=1)[worth]
