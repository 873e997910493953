"""Chapter 7. What a step's attention reads, worked out once for all layers: which blocks, for whose queries, and how.

    block tables   A [ 4 1 ]   B [ 4 2 7 ]         A holds 9 tokens in blocks of 8, B holds 20

    one owner        1 2 7   read where they lie, in one product over a run of the pool
    several owners   4       read once, for A's query and B's together
    in 1 and 7, slots past the end are computed with too, and what comes out is replaced by -inf

Every layer has the same tables, so this is done once a step, in NumPy and in bulk, with no loop over blocks.
A row is one KV head's query heads of one sequence, met with one block: `row_query` says whose, `padded_lines` where its
scores go in the softmax, `bag_values` which values its weights are for. Only sequences with one query (decode) are read
in this way. One with several queries computes so much with what it reads that a copy of its context costs nothing
beside it; where there are few blocks in all, the dozen operations of the other way take longer than a copy; and one
sequence that is much longer than all others would have their scores padded to its own length. Those are `Gathered`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minipaged.attention.contiguous import visible
from minipaged.attention.passes import Ints, Layout, Pass

# With fewer blocks in all, decodes are gathered too. (One sequence of 400 tokens, float32: 80 us against 104. From 8 of
# 200 tokens on, the other way is quicker: 490 us against 520 in float32, 370 against 460 in bfloat16. One thread.)
MIN_BLOCKS = 96
# Scores are padded to the longest sequence that is read inside out, to at most so many times what they are.
MAX_PADDING = 4


@dataclass(frozen=True)
class Gathered:
    """A sequence whose context is copied into one piece."""

    tokens: slice  # its rows of `query`
    seq_len: int
    source: Tensor  # int64 [num_kv_heads * num_logical_blocks], rows of the cache as [num_blocks * num_kv_heads, ...]
    mask: Tensor | None  # bool [num_queries, seq_len]; None where one query sees all, or where it is plainly causal


@dataclass(frozen=True)
class Plan:
    """Invariant: what a query may not see gets the score -inf, and no row of `bag_values`."""

    num_tokens: int
    passes: list[Pass]
    gathered: list[Gathered]
    decode_tokens: Tensor  # int64 [num_decodes], rows of `query`
    row_query: Tensor  # int64 [num_rows], decode * num_kv_heads + kv_head; 0 for a row that nobody wants
    hidden: Tensor  # int64 [num_hidden], among num_rows * group + 1 lines of block_size scores: what must become -inf
    padded_lines: Tensor  # int64 [num_decodes * num_heads * max_blocks], row * group + head of the group, filled up
    bag_lines: Tensor  # int64 [num_lines], which of the padded lines are of a block, in their order
    # int [num_lines * block_size], the slots of each line, as rows of the cache seen as [..., head_dim]
    bag_values: Tensor
    bag_starts: Tensor  # like bag_values, [num_decodes * num_heads], where each one's part of it begins


def make_plan(
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
    sliding_window: int | None = None,
) -> Plan:
    """Arguments as of `paged_attention`, checked before (`check_paged_attention`). Tensors lie on their device."""
    device = block_tables.device
    tables, lens, starts = (t.cpu().numpy().astype(np.int64) for t in (block_tables, seq_lens, query_start_loc))
    num_queries = np.diff(starts)
    decodes = np.flatnonzero(num_queries == 1)
    window = sliding_window or int(lens.max(initial=1))
    decodes = decodes[_alike(np.minimum(lens[decodes], window))]
    seen_from = np.maximum(lens[decodes] - window, 0)  # [num_decodes], the first position each query sees
    # One entry for each block that a query sees, sequence by sequence, in logical order.
    first, last = seen_from // block_size, (lens[decodes] - 1) // block_size
    counts = last - first + 1  # [num_decodes]
    decode = np.repeat(np.arange(len(decodes)), counts)  # [num_entries]
    nth = np.arange(len(decode)) - (counts.cumsum() - counts)[decode]  # 0, 1, ... within its sequence
    logical = nth + first[decode]
    block = tables[decodes[decode], logical]
    if len(block) < MIN_BLOCKS:
        decodes, counts, decode, nth, logical, block = (a[:0] for a in (decodes, counts, decode, nth, logical, block))
    low = np.maximum(seen_from[decode] - logical * block_size, 0)  # slots low to high - 1 of the block are seen
    high = np.minimum(lens[decodes][decode] - logical * block_size, block_size)

    layout = Layout(num_kv_heads, len(block), device)
    layout.add(block)
    group, num_rows = num_heads // num_kv_heads, layout.num_rows
    rows = layout.rows  # [num_entries, num_kv_heads]
    row_query = np.zeros(num_rows, dtype=np.int64)
    row_query[rows] = decode[:, None] * num_kv_heads + np.arange(num_kv_heads)
    # Slots that are not seen: before the window, past the end, and the line after the last, which stands for no block.
    slots, head = np.arange(block_size), np.arange(num_heads)
    is_ragged = (low > 0) | (high < block_size)
    ragged = np.flatnonzero(is_ragged)
    unseen = (slots < low[ragged, None]) | (slots >= high[ragged, None])  # [num_ragged, block_size]
    lines = rows[ragged][:, head // group] * group + head % group  # [num_ragged, num_heads]
    unseen_slots = (lines[:, :, None] * block_size + slots)[
        np.broadcast_to(unseen[:, None], (*lines.shape, block_size))
    ]
    # Where the scores of each query head are, block by block. Who has fewer blocks than the longest is filled up with
    # that line.
    padded_lines = np.full((len(decodes), num_heads, counts.max(initial=0)), num_rows * group)
    padded_lines[decode, :, nth] = rows[:, head // group] * group + head % group
    is_block = padded_lines < num_rows * group  # [num_decodes, num_heads, max_blocks]
    # And where its values are, in the same order.
    entry = np.zeros((len(decodes), 1, is_block.shape[2]), dtype=np.int64)
    entry[decode, 0, nth] = np.arange(len(block))
    tile = ((block * num_kv_heads)[entry] + (head // group)[:, None])[is_block]  # [num_lines]
    small = np.int32 if (tile.max(initial=0) + 1) * block_size < 2**31 else np.int64  # half to read, in every layer
    bag_values = (tile * block_size).astype(small)[:, None] + slots.astype(small)  # [num_lines, block_size]
    # A slot that is hidden has weight 0, but 0 * NaN is NaN: one of its block that is seen stands in for it.
    of_line = np.broadcast_to(entry, is_block.shape)[is_block]
    partly = np.flatnonzero(is_ragged[of_line])
    of_line = of_line[partly, None]
    bag_values[partly] = bag_values[partly, :1] + np.clip(slots, low[of_line], high[of_line] - 1)
    bag_starts = np.repeat(counts * block_size, num_heads).cumsum() - np.repeat(counts * block_size, num_heads)

    def tensor(array: Ints) -> Tensor:
        return torch.from_numpy(array).to(device)

    return Plan(
        num_tokens=int(starts[-1]),
        passes=layout.passes,
        gathered=[
            _gathered(
                tables[seq], starts[seq : seq + 2], int(lens[seq]), num_kv_heads, block_size, sliding_window, device
            )
            for seq in np.setdiff1d(np.flatnonzero(num_queries), decodes)
        ],
        decode_tokens=tensor(starts[decodes]),
        row_query=tensor(row_query),
        hidden=tensor(np.concatenate([unseen_slots, num_rows * group * block_size + slots])),
        padded_lines=tensor(padded_lines.reshape(-1)),
        bag_lines=tensor(np.flatnonzero(is_block)),
        bag_values=tensor(bag_values.reshape(-1)),
        bag_starts=tensor(bag_starts.astype(small)),
    )


def _alike(lengths: Ints) -> Ints:
    """Places of the lengths, in order, that are padded to the longest among them by MAX_PADDING times at most."""
    order = np.argsort(lengths, kind="stable")
    rising = lengths[order]
    alike = rising * np.arange(1, len(rising) + 1) <= MAX_PADDING * rising.cumsum()
    return np.sort(order[: np.flatnonzero(alike).max(initial=-1) + 1])


def _gathered(
    table: Ints,
    tokens: Ints,
    seq_len: int,
    num_kv_heads: int,
    block_size: int,
    window: int | None,
    device: torch.device,
) -> Gathered:
    num_queries = int(tokens[1] - tokens[0])
    # Blocks before the first query's window are left out: positions count from the end, so nothing else changes.
    skipped = max(0, seq_len - num_queries - window + 1) // block_size if window else 0
    blocks = table[skipped : -(-seq_len // block_size)]
    seq_len -= skipped * block_size
    source = blocks * num_kv_heads + np.arange(num_kv_heads)[:, None]  # [num_kv_heads, num_logical_blocks]
    whole = num_queries in (1, seq_len) and window is None
    return Gathered(
        tokens=slice(int(tokens[0]), int(tokens[1])),
        seq_len=seq_len,
        source=torch.from_numpy(source.reshape(-1)).to(device),
        mask=None if whole else visible(num_queries, seq_len, window, device),
    )
