"""Chapter 7. Paged attention for a processor: K and V are read where they lie, by numbers that the block tables give.

    pool        [  b0  |  b1  |  b2  |  b3  |  b4  ]        A's table [ 0 2 ], B's [ 1 4 ], b3 is free
    scores    A [ s0 s2 ]   B [ s1 s4 ]                     softmax of each sequence; scores are small beside K and V
    answer A =  sum of weight * value over the slots of b0 and b2, which are rows of the pool named by their numbers

No context is put together. V is read row by row: a weighted sum of rows chosen by their numbers is what an embedding
bag does, for which torch has one fast call. It also merges the blocks of a sequence, so nothing is rescaled
(`online_softmax.py`, and chapter 8's split-KV, must: they have no room for the scores). K is read in one of two ways.

By slot, in float32 and float64: of all products of a query with a slot of the pool, only those whose places are listed.
It is the sampled dense-dense matrix product (SDDMM) of graph networks; the list is the one that V is read by.

By block, in bfloat16, for which torch has no such product. The loop is turned inside out: each block meets its owner's
query in one batched product, and the scores are put in order afterwards.

    owner          A      B      A     free    B
    query          qA     qB     qA     -      qB
    scores         s0     s1     s2     -      s4

A block with several owners is read once, for all their queries (as in "Hydragen", Juravsky et al. 2024), and blocks
that lie far apart pass through a small workspace. What is read how, is worked out once a step: `plan.py`.
"""

import warnings
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from minipaged.attention.checks import check_paged_attention
from minipaged.attention.passes import Pass
from minipaged.attention.plan import Gathered, Plan, make_plan
from minipaged.attention.workspace import Workspace


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Causal attention of a ragged batch that reads K and V through each sequence's block table.

    query [num_tokens, num_heads, head_dim], the queries of sequence s in rows query_start_loc[s] to
    query_start_loc[s + 1] - 1, its last query at position seq_lens[s] - 1;
    key_cache, value_cache [num_blocks, num_kv_heads, block_size, head_dim];
    block_tables int32 [num_seqs, max_blocks]; seq_lens int32 [num_seqs]; query_start_loc int32 [num_seqs + 1].
    Entries of a table past the sequence's end, and slots past it in its last block, never reach the answer.
    Returns the shape of query. Raises ValueError for arguments that do not fit.

    A model has many layers and one batch: it makes the plan once and calls `attend` (`kvcache/paged.py`).
    """
    check_paged_attention(query, key_cache, value_cache, block_tables, seq_lens, query_start_loc, sliding_window)
    plan = make_plan(
        block_tables,
        seq_lens,
        query_start_loc,
        num_heads=query.shape[1],
        num_kv_heads=key_cache.shape[1],
        block_size=key_cache.shape[2],
        sliding_window=sliding_window,
        by_slot=can_read_by_slot(key_cache),
    )
    return attend(query, key_cache, value_cache, plan, Workspace(), scale=scale)


def attend(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, plan: Plan, workspace: Workspace, *, scale: float
) -> Tensor:
    """Attention of one layer by a step's plan. Nothing is checked: the plan was made from arguments that were."""
    if 0 < len(plan.decode_tokens) == plan.num_tokens:
        return _decode(query, key_cache, value_cache, plan, workspace, scale)
    out = torch.empty_like(query)
    if len(plan.decode_tokens):
        queries = query[plan.decode_tokens]
        out[plan.decode_tokens] = _decode(queries, key_cache, value_cache, plan, workspace, scale)
    for seq in plan.gathered:
        out[seq.tokens] = _gathered(query[seq.tokens], key_cache, value_cache, seq, workspace, scale)
    return out


def _decode(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, plan: Plan, workspace: Workspace, scale: float
) -> Tensor:
    """query [num_decodes, num_heads, head_dim], one for each sequence. Returns its shape."""
    num_decodes, num_heads, head_dim = query.shape
    block_size = key_cache.shape[2]
    # A line is the scores of one query head for the slots of one block; one more stands for a block that is not there.
    lines = workspace.take("lines", (plan.num_lines + 1, block_size), query)
    if plan.passes:
        _scores_by_block(query * scale, key_cache, plan, workspace, lines)
    else:
        _scores_by_slot(query, key_cache, plan, lines, scale)
    lines.view(-1).index_fill_(0, plan.hidden, -torch.inf)

    # In the order of their sequence, filled up to the longest, scores go through an ordinary softmax.
    padded = workspace.take("padded", (len(plan.padded_lines), block_size), query)
    torch.index_select(lines, 0, plan.padded_lines, out=padded)
    of_heads = padded.view(num_decodes * num_heads, -1)  # [num_decodes * num_heads, max_blocks * block_size]
    weights = torch.softmax(of_heads, -1, out=workspace.take("weights", of_heads.shape, query))
    # The weights of the places that were filled up are left out again, and each row of V is taken by its weight.
    in_bags = workspace.take("in_bags", (len(plan.bag_lines), block_size), query)
    torch.index_select(weights.view(-1, block_size), 0, plan.bag_lines, out=in_bags)
    values = value_cache.reshape(-1, head_dim)  # [num_blocks * num_kv_heads * block_size, head_dim]
    starts, weights = plan.bag_starts[:-1], in_bags.view(-1)
    return F.embedding_bag(plan.bag_slots, values, starts, mode="sum", per_sample_weights=weights).view_as(query)


def can_read_by_slot(cache: Tensor) -> bool:
    """Whether torch has a sampled product for such a cache that reads it where it lies."""
    return cache.device.type == "cpu" and cache.dtype in (torch.float32, torch.float64)


def _scores_by_slot(query: Tensor, key_cache: Tensor, plan: Plan, lines: Tensor, scale: float) -> None:
    """Of query [num_decodes, num_heads, head_dim] times all keys, what stands in the plan's list, into `lines`."""
    _quiet_about_sparse_tensors()
    queries = query.reshape(-1, query.shape[-1])  # [num_decodes * num_heads, head_dim]
    keys = key_cache.reshape(-1, query.shape[-1])  # [num_blocks * num_kv_heads * block_size, head_dim]
    scores = lines[:-1].view(-1).zero_()  # the product is added to 0 times what was there, and 0 * NaN is NaN
    places = torch.sparse_csr_tensor(
        plan.bag_starts, plan.bag_slots, scores, size=(len(queries), len(keys)), check_invariants=False
    )
    torch.sparse.sampled_addmm(places, queries, keys.t(), beta=0.0, alpha=scale, out=places)


@cache
def _quiet_about_sparse_tensors() -> None:
    """torch says once in a process that its sparse tensors may still change: let it say so here, to nobody."""
    with warnings.catch_warnings(action="ignore"):
        torch.sparse_csr_tensor([0, 0], [], torch.empty(0), size=(1, 1), check_invariants=False)


def _scores_by_block(query: Tensor, key_cache: Tensor, plan: Plan, workspace: Workspace, lines: Tensor) -> None:
    """The products of each block with its owners' queries [num_decodes, num_heads, head_dim], into `lines`."""
    num_decodes, num_heads, head_dim = query.shape
    num_kv_heads, num_rows = key_cache.shape[1], len(plan.row_query)
    group = num_heads // num_kv_heads
    by_kv_head = query.reshape(num_decodes * num_kv_heads, group * head_dim)
    queries = workspace.take("queries", (num_rows, group, head_dim), query)
    torch.index_select(by_kv_head, 0, plan.row_query, out=queries.view(num_rows, -1))
    scores = lines[:-1].view(num_rows, group, -1)
    for part in plan.passes:
        keys = _blocks(key_cache, part, workspace)  # [num_blocks * num_kv_heads, block_size, head_dim]
        mine = _rows(scores, part, len(keys))  # [num_blocks * num_kv_heads, owners * group, block_size]
        torch.bmm(_rows(queries, part, len(keys)), keys.transpose(1, 2), out=mine)


def _rows(tensor: Tensor, part: Pass, num_tiles: int) -> Tensor:
    """The rows of a pass, all queries of a (block, KV head) together: [num_tiles, owners * group, width]."""
    rows = tensor[part.first_row : part.first_row + num_tiles * part.owners]
    return rows.view(num_tiles, -1, tensor.shape[-1])


def _blocks(cache: Tensor, part: Pass, workspace: Workspace) -> Tensor:
    """The blocks of a pass, [num_blocks * num_kv_heads, block_size, head_dim]: a view of the pool, or a small copy."""
    if part.run is not None:
        blocks = cache[part.run]
    else:
        assert part.chosen is not None
        copied = workspace.take("blocks", (part.num_blocks, *cache.shape[1:]), cache)
        blocks = torch.index_select(cache, 0, part.chosen, out=copied)
    return blocks.flatten(0, 1)


def _gathered(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, seq: Gathered, workspace: Workspace, scale: float
) -> Tensor:
    """query [num_queries, num_heads, head_dim] of one sequence. Returns its shape."""
    num_queries, num_heads, head_dim = query.shape
    _, num_kv_heads, block_size, _ = key_cache.shape

    def context(name: str, cache: Tensor) -> Tensor:  # [num_kv_heads, 1, seq_len, head_dim], in logical order
        rows = cache.reshape(-1, block_size * head_dim)  # a row is one KV head's tile of a block
        copied = workspace.take(name, (len(seq.source), rows.shape[1]), cache)
        torch.index_select(rows, 0, seq.source, out=copied)
        return copied.view(num_kv_heads, 1, -1, head_dim)[:, :, : seq.seq_len]

    key, value = context("key", key_cache), context("value", value_cache)
    if num_queries == 1:  # the heads of a group become the rows of one product, as if they were queries
        heads = query.reshape(num_kv_heads, 1, -1, head_dim)  # [num_kv_heads, 1, group, head_dim]
        out = F.scaled_dot_product_attention(heads, key, value, attn_mask=seq.mask, scale=scale)
        return out.reshape(1, num_heads, head_dim)
    heads = query.transpose(0, 1).reshape(num_kv_heads, -1, num_queries, head_dim)
    shape = (-1, heads.shape[1], -1, -1)  # K and V are viewed once per query head of the group
    out = F.scaled_dot_product_attention(
        heads,
        key.expand(shape),
        value.expand(shape),
        attn_mask=seq.mask,
        is_causal=seq.mask is None,
        scale=scale,
    )
    return out.reshape(num_heads, num_queries, head_dim).transpose(0, 1)
