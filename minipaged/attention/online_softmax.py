"""Chapter 7. Paged attention, block by block: no copy of the context, because softmax can be computed in one pass.

Softmax needs the maximum and the sum of a whole row, and a block shows only block_size scores of it. So keep, for each
query, the maximum m so far, the sum l of exp(score - m) so far, and the unnormalised output acc. A new block with
scores s and values v moves the maximum to m', and the sums under the old maximum are rescaled:

    m'   = max(m, max_j s_j)
    l'   = l * exp(m - m')   +  sum_j exp(s_j - m')
    acc' = acc * exp(m - m') +  sum_j exp(s_j - m') v_j            output = acc / l

Sources: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Dao et al., "FlashAttention"
(2022), section 3.1. The Triton kernels of chapter 8 are this loop, with one program for each (sequence, KV head).
"""

import torch
from torch import Tensor

from minipaged.attention.checks import check_paged_attention
from minipaged.attention.contiguous import first_seen, visible
from minipaged.cdiv import cdiv


def paged_attention_online(
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
    """Arguments, answer and errors of `paged_attention_gathered`; each block is read where it lies."""
    check_paged_attention(query, key_cache, value_cache, block_tables, seq_lens, query_start_loc, sliding_window)
    _, num_kv_heads, block_size, head_dim = key_cache.shape
    out = torch.empty_like(query)
    starts, lens = query_start_loc.tolist(), seq_lens.tolist()
    for seq, seq_len in enumerate(lens):
        rows = slice(starts[seq], starts[seq + 1])
        num_queries = rows.stop - rows.start
        if num_queries == 0:
            continue
        # A KV head's group of query heads becomes one axis: [num_kv_heads, group, num_queries, head_dim]
        q = query[rows].transpose(0, 1).reshape(num_kv_heads, -1, num_queries, head_dim)
        mask = visible(num_queries, seq_len, sliding_window, query.device)  # [num_queries, seq_len]
        maximum = q.new_full((*q.shape[:3], 1), -torch.inf)
        total, accumulator = torch.zeros_like(maximum), torch.zeros_like(q)
        before = first_seen(seq_len, num_queries, sliding_window) // block_size  # blocks that no query sees
        for logical in range(before, cdiv(seq_len, block_size)):
            block = int(block_tables[seq, logical])
            first = logical * block_size
            last = min(first + block_size, seq_len)  # the last block may be partly full
            key = key_cache[block, :, None, : last - first]  # [num_kv_heads, 1, tokens, head_dim], a view
            value = value_cache[block, :, None, : last - first]
            scores = q @ key.transpose(-1, -2) * scale  # [num_kv_heads, group, num_queries, tokens]
            scores = scores.masked_fill(~mask[:, first:last], -torch.inf)
            new_maximum = torch.maximum(maximum, scores.amax(-1, keepdim=True))
            # A query whose window starts later sees nothing of this block nor of those before it. Its maximum is still
            # -inf, and -inf - (-inf) is NaN: subtract 0 instead, so that exp gives 0.
            finite = new_maximum.masked_fill(new_maximum == -torch.inf, 0.0)
            weights, rescale = torch.exp(scores - finite), torch.exp(maximum - finite)
            total = total * rescale + weights.sum(-1, keepdim=True)
            accumulator = accumulator * rescale + weights @ value
            maximum = new_maximum
        out[rows] = (accumulator / total).reshape(-1, num_queries, head_dim).transpose(0, 1)
    return out
