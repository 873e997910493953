"""What `attention.py` measures beside ours: memory that is not paged, and PyTorch's own attention through a page table.

Each is a function without arguments over a `Batch`, set up outside the measurement, that returns
[num_seqs, num_heads, head_dim].
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minipaged.attention.gathered import gather, paged_attention_gathered
from minipaged.bench.timing import in_turn
from minipaged.cdiv import cdiv

Run = Callable[[], Tensor]


@dataclass
class Batch:
    """One decode step of one layer: a query a sequence."""

    query: Tensor  # [num_seqs, num_heads, head_dim]
    key_cache: Tensor  # [num_blocks, num_kv_heads, block_size, head_dim]
    value_cache: Tensor
    block_tables: Tensor  # int32 [num_seqs, max_blocks]
    seq_lens: Tensor  # int32 [num_seqs]
    query_start_loc: Tensor  # int32 [num_seqs + 1]

    @property
    def scale(self) -> float:
        return float(self.query.shape[-1] ** -0.5)

    def context(self, cache: Tensor, seq: int) -> Tensor:
        """K or V of a sequence in one piece: [num_kv_heads, seq_len, head_dim]."""
        seq_len = int(self.seq_lens[seq])
        return gather(cache, self.block_tables[seq], seq_len).contiguous()

    def folded(self) -> Tensor:
        """The heads of a group as rows of one product: 5 times as fast on a CPU in bfloat16 as `enable_gqa`."""
        num_seqs, _, head_dim = self.query.shape
        return self.query.view(num_seqs, self.key_cache.shape[1], -1, head_dim)


def gathered(batch: Batch) -> Run:
    """The form that a reader meets first: copy a sequence's blocks, then attend (`gathered.py`)."""
    tables = (batch.block_tables, batch.seq_lens, batch.query_start_loc)
    return lambda: paged_attention_gathered(batch.query, batch.key_cache, batch.value_cache, *tables, scale=batch.scale)


def one_by_one(batch: Batch) -> Run:
    """scaled_dot_product_attention of each sequence, on contiguous memory."""
    seqs = range(len(batch.seq_lens))
    keys = [batch.context(batch.key_cache, seq)[None] for seq in seqs]
    values = [batch.context(batch.value_cache, seq)[None] for seq in seqs]

    def run() -> Tensor:
        query = batch.folded()
        outs = [
            F.scaled_dot_product_attention(query[seq : seq + 1], keys[seq], values[seq], scale=batch.scale)
            for seq in seqs
        ]
        return torch.cat(outs).view_as(batch.query)

    return run


def padded(batch: Batch) -> Run:
    """One scaled_dot_product_attention of all, on contiguous memory padded to the longest, with a mask: in whichever of
    two forms is faster on this processor."""
    longest = int(batch.seq_lens.max())
    _, num_kv_heads, _, head_dim = batch.key_cache.shape
    key = batch.key_cache.new_zeros(len(batch.seq_lens), num_kv_heads, longest, head_dim)
    value = torch.zeros_like(key)
    for seq, seq_len in enumerate(batch.seq_lens.tolist()):
        key[seq, :, :seq_len] = batch.context(batch.key_cache, seq)
        value[seq, :, :seq_len] = batch.context(batch.value_cache, seq)
    mask = (torch.arange(longest) < batch.seq_lens[:, None])[:, None, None]  # [num_seqs, 1, 1, longest]

    def folded() -> Tensor:  # the heads of a group as rows of one product
        out = F.scaled_dot_product_attention(batch.folded(), key, value, attn_mask=mask, scale=batch.scale)
        return out.view_as(batch.query)

    def grouped() -> Tensor:
        query = batch.query[:, :, None]  # [num_seqs, num_heads, 1, head_dim]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=batch.scale, enable_gqa=True)
        return out[:, :, 0]

    forms: dict[str, Run] = {"folded": folded, "grouped": grouped}
    seconds = in_turn(forms, 3)
    return forms[min(seconds, key=lambda name: min(seconds[name]))]


def flex(batch: Batch) -> Run:
    """torch's flex_attention through a page table of its experimental PagedAttention, compiled (needs a C++ compiler).

    It needs the pool as [1, num_kv_heads, num_blocks * block_size, head_dim], hence a copy, made beforehand.
    """
    from torch.nn.attention.experimental._paged_attention import PagedAttention
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    num_blocks, num_kv_heads, block_size, head_dim = batch.key_cache.shape
    num_seqs, max_blocks = batch.block_tables.shape
    pages = PagedAttention(num_blocks, block_size, num_seqs, device="cpu")
    pages.page_table[:, :max_blocks] = batch.block_tables
    for seq, seq_len in enumerate(batch.seq_lens.tolist()):
        count = cdiv(seq_len, block_size)
        pages.physical_to_logical[seq, batch.block_tables[seq, :count].long()] = torch.arange(count)

    def within(seq: Tensor, head: Tensor, query: Tensor, position: Tensor) -> Tensor:
        return position < batch.seq_lens[seq]

    logical = create_block_mask(
        within, num_seqs, 1, 1, max_blocks * block_size, device="cpu", BLOCK_SIZE=(block_size, block_size)
    )
    mask, score = pages.convert_logical_block_mask(logical), pages.get_score_mod(None)
    key, value = (
        cache.transpose(0, 1).reshape(1, num_kv_heads, num_blocks * block_size, head_dim)
        for cache in (batch.key_cache, batch.value_cache)
    )
    compiled = torch.compile(flex_attention)

    def run() -> Tensor:
        query = batch.query[:, :, None]  # [num_seqs, num_heads, 1, head_dim]
        out = compiled(query, key, value, block_mask=mask, score_mod=score, enable_gqa=True, scale=batch.scale)
        return out[:, :, 0]

    run()  # compiles
    return run


def bandwidth_floor(batch: Batch) -> Run:
    """No attention: reading the K and V that are in use, once, in one piece. Nothing that reads them is quicker."""
    in_use = batch.block_tables[batch.block_tables >= 0].unique().long()
    words = [cache[in_use].view(torch.int32).flatten() for cache in (batch.key_cache, batch.value_cache)]
    return lambda: torch.stack([tensor.max() for tensor in words])
