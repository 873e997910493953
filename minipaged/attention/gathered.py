"""Chapter 7. Paged attention, the plain form: store through the slot mapping; gather a sequence's blocks, then attend.

    block table of a sequence     [ 7, 1, 3 ]
    key_cache                     [ 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 ]     blocks of block_size tokens
    gathered                      [ 7 | 1 | 3 ] -> cut to seq_len -> causal attention of chapter 3

The gather copies the context once a step. `online_softmax.py` works without the copy, and `compiled.py` is that loop at
full speed, which the engine runs. This form is the one to read first, and a second oracle.
Source: the PagedAttention paper, section 4.1.
"""

import torch
from torch import Tensor

from minipaged.attention.checks import check_paged_attention, check_write_kv
from minipaged.attention.contiguous import causal_attention, first_seen
from minipaged.cdiv import cdiv


def write_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """Store each new token's K and V in its slot: block = slot // block_size, offset = slot % block_size.

    key, value [num_tokens, num_kv_heads, head_dim]; caches [num_blocks, num_kv_heads, block_size, head_dim];
    slot_mapping int64 [num_tokens], -1 for a token that is not stored. No slot may appear twice.
    Raises ValueError for arguments that do not fit, before anything is written.
    """
    check_write_kv(key, value, key_cache, value_cache, slot_mapping)
    stored = slot_mapping >= 0
    slots, block_size = slot_mapping[stored], key_cache.shape[2]
    block, offset = slots // block_size, slots % block_size  # [num_stored] each
    key_cache[block, :, offset] = key[stored]
    value_cache[block, :, offset] = value[stored]


def paged_attention_gathered(
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
    Entries of a table past the sequence's end, and slots past it in its last block, are never read; nor is what lies
    before the window of the sequence's first query.
    Returns the shape of query. Raises ValueError for arguments that do not fit.
    """
    check_paged_attention(query, key_cache, value_cache, block_tables, seq_lens, query_start_loc, sliding_window)
    out = torch.empty_like(query)
    starts, lens = query_start_loc.tolist(), seq_lens.tolist()
    for seq, seq_len in enumerate(lens):
        rows = slice(starts[seq], starts[seq + 1])
        if rows.start < rows.stop:
            first = first_seen(seq_len, rows.stop - rows.start, sliding_window)
            context = (gather(cache, block_tables[seq], seq_len, first) for cache in (key_cache, value_cache))
            out[rows] = causal_attention(query[rows], *context, scale=scale, sliding_window=sliding_window)
    return out


def gather(cache: Tensor, block_table: Tensor, seq_len: int, first: int = 0) -> Tensor:
    """K or V of a sequence from position `first` on, in one piece: [num_kv_heads, seq_len - first, head_dim]."""
    _, num_kv_heads, block_size, head_dim = cache.shape
    skipped = first // block_size
    blocks = cache.index_select(0, block_table[skipped : cdiv(seq_len, block_size)])  # twice as fast as cache[...]
    tokens = blocks.transpose(0, 1).reshape(num_kv_heads, -1, head_dim)
    return tokens[:, first - skipped * block_size : seq_len - skipped * block_size]
