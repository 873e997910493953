"""Chapter 7. What a step's attention reads, worked out once for all layers: which blocks, for whose queries, and how.

    block tables   A [ 4 1 ]   B [ 4 2 7 ]         A holds 9 tokens in blocks of 8, B holds 20

    by slot      every slot of 4, 1 and 4, 2, 7, by its number, for each query head
    by block     1 2 7   read where they lie, in one product over a run of the pool
                 4       has two owners: read once, for A's query and B's together
    in 1 and 7, slots past the end are computed with too, and what comes out is replaced by -inf

Every layer has the same tables, so this is done once a step, in NumPy and in bulk, with no loop over blocks.
A line is the scores of one query head for the slots of one block: `padded_lines` says where they go in the softmax,
`bag_slots` for which values their weights are. Only sequences with one query (decode) are read in this way. One with
several queries computes so much with what it reads that a copy of its context costs nothing beside it; one alone is
copied sooner than the dozen operations of the other way are begun; and one that is much longer than all others would
have their scores padded to its own length. Those are `Gathered`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minipaged.attention.contiguous import visible
from minipaged.attention.passes import Ints, Layout, Pass

# Fewer decodes than this are gathered too: a copy and a product each, against a dozen operations for all of them. (Each
# layer on two CPU cores, in float32: one sequence of 400 tokens 73 us against 87, two of 200 tokens 108 against 81, and
# 8 of 100 361 against 122. In bfloat16 82 against 143, 117 against 130, and 366 against 175.)
MIN_DECODES = 2
# Scores are padded to the longest sequence that is not gathered, to at most so many times what they are.
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
    """Invariant: what a query may not see gets the score -inf, and no place in `bag_slots`."""

    num_tokens: int
    gathered: list[Gathered]
    decode_tokens: Tensor  # int64 [num_decodes], rows of `query`
    # By block: what each product reads, and whose queries its rows are. By slot there are none.
    passes: list[Pass]
    row_query: Tensor  # int64 [num_rows], decode * num_kv_heads + kv_head; 0 for a row that nobody wants
    num_lines: int  # of block_size scores; one more stands for a block that is not there
    hidden: Tensor  # int64 [num_hidden], among the scores of all lines and of that one: what must become -inf
    padded_lines: Tensor  # int64 [num_decodes * num_heads * max_blocks], the line of each block, filled up
    bag_lines: Tensor  # int64 [num_bag_lines], which of the padded lines are of a block, in their order
    # int [num_bag_lines * block_size], the slots of each of those, as rows of a cache seen as [..., head_dim]
    bag_slots: Tensor
    bag_starts: (
        Tensor  # like bag_slots, [num_decodes * num_heads + 1], where the part of each query head begins, and the end
    )


def make_plan(
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
    sliding_window: int | None = None,
    by_slot: bool = False,
) -> Plan:
    """Arguments as of `paged_attention`, checked before (`check_paged_attention`). Tensors lie on their device.

    by_slot: keys are read slot by slot, and not block by block (`blockwise.py` says when).
    """
    device = block_tables.device
    tables, lens, starts = (t.cpu().numpy().astype(np.int64) for t in (block_tables, seq_lens, query_start_loc))
    num_queries = np.diff(starts)
    decodes = np.flatnonzero(num_queries == 1)
    window = sliding_window or int(lens.max(initial=1))
    decodes = decodes[_alike(np.minimum(lens[decodes], window))]
    if len(decodes) < MIN_DECODES:
        decodes = decodes[:0]
    seen_from = np.maximum(lens[decodes] - window, 0)  # [num_decodes], the first position each query sees
    # One entry for each block that a query sees, sequence by sequence, in logical order.
    first, last = seen_from // block_size, (lens[decodes] - 1) // block_size
    counts = last - first + 1  # [num_decodes]
    decode = np.repeat(np.arange(len(decodes)), counts)  # [num_entries]
    before = counts.cumsum() - counts  # [num_decodes], entries of the sequences before
    nth = np.arange(len(decode)) - before[decode]  # 0, 1, ... within its sequence
    logical = nth + first[decode]
    block = tables[decodes[decode], logical]
    low = np.maximum(seen_from[decode] - logical * block_size, 0)  # slots low to high - 1 of the block are seen
    high = np.minimum(lens[decodes][decode] - logical * block_size, block_size)

    group, head, slots = num_heads // num_kv_heads, np.arange(num_heads), np.arange(block_size)
    layout = Layout(num_kv_heads, device)
    if by_slot:  # one after the other: query head by query head, and block by block
        line = (before * num_heads)[decode, None] + counts[decode, None] * head + nth[:, None]
        row_query, num_lines = np.empty(0, dtype=np.int64), len(block) * num_heads
    else:
        rows = layout.add(block)  # [num_entries, num_kv_heads]
        line = rows[:, head // group] * group + head % group  # [num_entries, num_heads]
        row_query, num_lines = np.zeros(layout.num_rows, dtype=np.int64), layout.num_rows * group
        row_query[rows] = decode[:, None] * num_kv_heads + np.arange(num_kv_heads)
    # Slots that are not seen: before the window, past the end, and the line after the last, which stands for no block.
    is_ragged = (low > 0) | (high < block_size)
    ragged = np.flatnonzero(is_ragged)
    unseen = (slots < low[ragged, None]) | (slots >= high[ragged, None])  # [num_ragged, block_size]
    of_ragged = line[ragged, :, None] * block_size + slots  # [num_ragged, num_heads, block_size]
    unseen_slots = of_ragged[np.broadcast_to(unseen[:, None], of_ragged.shape)]
    # Where the scores of each query head are, block by block. Who has fewer blocks than the longest is filled up with
    # that line.
    padded_lines = np.full((len(decodes), num_heads, counts.max(initial=0)), num_lines)
    padded_lines[decode, :, nth] = line
    is_block = padded_lines < num_lines  # [num_decodes, num_heads, max_blocks]
    # And where its values are, in the same order.
    entry = np.zeros((len(decodes), 1, is_block.shape[2]), dtype=np.int64)
    entry[decode, 0, nth] = np.arange(len(block))
    tile = ((block * num_kv_heads)[entry] + (head // group)[:, None])[is_block]  # [num_bag_lines]
    small = np.int32 if (tile.max(initial=0) + 1) * block_size < 2**31 else np.int64  # half to read, in every layer
    bag_slots = (tile * block_size).astype(small)[:, None] + slots.astype(small)  # [num_bag_lines, block_size]
    # A slot that is hidden has weight 0, but 0 * NaN is NaN: one of its block that is seen stands in for it.
    of_line = np.broadcast_to(entry, is_block.shape)[is_block]
    partly = np.flatnonzero(is_ragged[of_line])
    of_line = of_line[partly, None]
    bag_slots[partly] = bag_slots[partly, :1] + np.clip(slots, low[of_line], high[of_line] - 1)
    bag_starts = np.concatenate([[0], np.repeat(counts * block_size, num_heads).cumsum()])

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
        num_lines=num_lines,
        hidden=tensor(np.concatenate([unseen_slots, num_lines * block_size + slots])),
        padded_lines=tensor(padded_lines.reshape(-1)),
        bag_lines=tensor(np.flatnonzero(is_block)),
        bag_slots=tensor(bag_slots.reshape(-1)),
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
