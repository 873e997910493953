"""Chapters 2 and 3. The tensors of one forward pass: a ragged batch, all sequences end to end, no padding.

    token_ids        [ a3 | b0 b1 b2 | c7 ]     three sequences: a and c decode, b is a new prompt in one piece
    positions        [  3 |  0  1  2 |  7 ]     where each token stands in its own sequence
    query_start_loc  [  0    1         4    5 ]
    seq_lens         [  4    3         8 ]      tokens of context, those of this step included
    logits_rows      [  0        3        4 ]   the last token of each sequence whose next token is due

For the model a decode, a prompt and a chunk of a prompt are no different.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class ForwardBatch:
    """The input of one step, for the model and its cache. Names and shapes: docs/design.md, section 3."""

    token_ids: Tensor  # int64 [num_tokens]
    positions: Tensor  # int64 [num_tokens]
    query_start_loc: Tensor  # int32 [num_seqs + 1]
    seq_lens: Tensor  # int32 [num_seqs]
    block_tables: Tensor  # int32 [num_seqs, max_blocks], -1 past the end of a table
    slot_mapping: Tensor  # int64 [num_tokens], -1 where nothing is kept
    logits_rows: Tensor  # int64 [num_sampled], rows of the hidden states
    max_query_len: int  # the most tokens that one sequence brings, known here without asking the device


class KVCache(Protocol):
    """Where K and V live. The model calls `attend` and nothing else, so it cannot tell one cache from another."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, batch: ForwardBatch, sliding_window: int | None
    ) -> Tensor:
        """Store the batch's key and value; return causal attention of its queries over each sequence's whole context.

        query [num_tokens, num_heads, head_dim]; key, value [num_tokens, num_kv_heads, head_dim]. Returns query's shape.
        sliding_window: of the layer, the newest tokens that a query sees, itself among them; None: all.
        """
        ...


def make_batch(
    token_ids: Sequence[Sequence[int]],
    starts: Sequence[int],
    block_tables: Sequence[Sequence[int]] = (),
    block_size: int = 0,
    *,
    sampled: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
) -> ForwardBatch:
    """Lay the tokens of all sequences end to end and translate every position to its slot (chapter 6), in bulk.

    Sequence i brings token_ids[i], which stand at positions starts[i], starts[i] + 1, ...; block_tables[i] is its block
    table, and without tables nothing is kept. sampled: the sequences whose next token is due, all where it is None.
    Raises ValueError where a sequence brings no token, or has too few blocks for its tokens.
    """
    counts = np.array([len(tokens) for tokens in token_ids], dtype=np.int64)
    first = np.array(starts, dtype=np.int64)
    tables = [*block_tables] or [[]] * len(token_ids)
    for count, start, table in zip(counts, starts, tables, strict=True):
        if not count:
            raise ValueError(f"a scheduled sequence brings no token (start {start})")
        if block_tables and start + count > len(table) * block_size:
            raise ValueError(f"{start + count} tokens do not fit into {len(table)} blocks of {block_size}")
    query_start_loc = np.concatenate([[0], counts.cumsum()])
    row = np.repeat(np.arange(len(counts)), counts)  # [num_tokens]: which sequence each token belongs to
    positions = np.arange(counts.sum()) - query_start_loc[row] + first[row]  # [num_tokens]

    padded = np.full((len(counts), max([1, *map(len, tables)])), -1)
    for i, table in enumerate(tables):
        padded[i, : len(table)] = table
    slot_mapping = np.full(len(positions), -1)
    if block_tables:
        slot_mapping = padded[row, positions // block_size] * block_size + positions % block_size
    ends = query_start_loc[1:] - 1  # [num_seqs]: the row of each sequence's last token

    def tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(array).to(device=device, dtype=dtype)

    return ForwardBatch(
        token_ids=tensor(np.fromiter(chain.from_iterable(token_ids), np.int64), torch.int64),
        positions=tensor(positions, torch.int64),
        query_start_loc=tensor(query_start_loc, torch.int32),
        seq_lens=tensor(first + counts, torch.int32),
        block_tables=tensor(padded, torch.int32),
        slot_mapping=tensor(slot_mapping, torch.int64),
        logits_rows=tensor(ends if sampled is None else ends[np.array(sampled, dtype=np.int64)], torch.int64),
        max_query_len=int(counts.max(initial=0)),
    )
