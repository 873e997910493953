"""Chapters 2 and 3. What one forward pass is told, and the one thing that it asks of a cache.

    token_ids        [ a3 | b0 b1 b2 | c7 ]     three sequences, end to end, no padding
    positions        [  3 |  0  1  2 |  7 ]     where each token stands in its own sequence
    query_start_loc  [  0    1         4    5 ]
    seq_lens         [  4    3         8 ]      tokens of context, those of this step included

Sequence a decodes one token, b is a new prompt in one piece, c decodes too: for the model these are no different.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor


class Scheduled(NamedTuple):
    """The tokens of one sequence that a step computes: they stand at positions start, start + 1, ..."""

    token_ids: Sequence[int]
    start: int
    blocks: Sequence[int] = ()  # the sequence's block table; empty where nothing is kept


@dataclass(frozen=True)
class Step:
    """One forward pass over a ragged batch, as tensors. The names and shapes are vLLM's (see docs/design.md)."""

    token_ids: Tensor  # int64 [num_tokens]
    positions: Tensor  # int64 [num_tokens]
    query_start_loc: Tensor  # int32 [num_seqs + 1]
    seq_lens: Tensor  # int32 [num_seqs]
    block_tables: Tensor  # int32 [num_seqs, max_blocks], -1 past the end of a table
    slot_mapping: Tensor  # int64 [num_tokens], -1 where nothing is kept
    max_query_len: int  # the most tokens that one sequence brings, known here without asking the device


class KVCache(Protocol):
    """Where K and V live. The model calls this and nothing else, so it cannot tell one cache from another."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, step: Step) -> Tensor:
        """Store the step's key and value; return causal attention of its queries over each sequence's whole context.

        query [num_tokens, num_heads, head_dim]; key, value [num_tokens, num_kv_heads, head_dim]. Returns query's shape.
        """
        ...


def make_step(batch: Sequence[Scheduled], block_size: int, device: str | torch.device = "cpu") -> Step:
    """Lay the scheduled tokens end to end and translate every position to its slot, in bulk, with NumPy.

    Slot of position p: blocks[p // block_size] * block_size + p % block_size, the address translation of chapter 6.
    Raises ValueError where a sequence brings no token, or has blocks but too few for its tokens.
    """
    for item in batch:
        end = item.start + len(item.token_ids)
        if end == item.start:
            raise ValueError(f"a scheduled sequence brings no token (start {item.start})")
        if len(item.blocks) and end > len(item.blocks) * block_size:
            raise ValueError(f"{end} tokens do not fit into {len(item.blocks)} blocks of {block_size}")
    counts = np.array([len(item.token_ids) for item in batch], dtype=np.int64)
    starts = np.array([item.start for item in batch], dtype=np.int64)
    query_start_loc = np.concatenate([[0], counts.cumsum()])
    row = np.repeat(np.arange(len(batch)), counts)  # [num_tokens]: which sequence each token belongs to
    positions = np.arange(counts.sum()) - query_start_loc[row] + starts[row]  # [num_tokens]

    block_tables = np.full((len(batch), max([1, *(len(item.blocks) for item in batch)])), -1)
    for i, item in enumerate(batch):
        block_tables[i, : len(item.blocks)] = item.blocks
    if block_size:
        column = np.minimum(positions // block_size, block_tables.shape[1] - 1)  # a row without blocks is -1 everywhere
        block = block_tables[row, column]  # [num_tokens]
        slot_mapping = np.where(block < 0, -1, block * block_size + positions % block_size)
    else:
        slot_mapping = np.full(len(positions), -1)

    def tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(array).to(device=device, dtype=dtype)

    return Step(
        token_ids=tensor(np.fromiter(chain.from_iterable(item.token_ids for item in batch), np.int64), torch.int64),
        positions=tensor(positions, torch.int64),
        query_start_loc=tensor(query_start_loc, torch.int32),
        seq_lens=tensor(starts + counts, torch.int32),
        block_tables=tensor(block_tables, torch.int32),
        slot_mapping=tensor(slot_mapping, torch.int64),
        max_query_len=int(counts.max(initial=0)),
    )
