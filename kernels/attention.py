"""Chapter 8. The one signature, over two kernels.

    one query in every sequence?
        no   paged_prefill          prefill, chunked prefill, and any mix
        yes  paged_decode           split, where the programs (sequence, KV head) do not fill the GPU

With `max_query_len`, which a scheduler knows, neither question waits for the device.
"""

from typing import Any

from torch import Tensor

from minipaged.kernels.launch import check_attention
from minipaged.kernels.paged_decode import choose_num_splits, count_multiprocessors, paged_decode
from minipaged.kernels.paged_prefill import paged_prefill


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
    max_query_len: int | None = None,
    out: Tensor | None = None,
    check: bool = False,
) -> Tensor:
    """The arguments and the answer of `minipaged.attention.paged_attention`, and further:

    max_query_len   the most queries of one sequence; None: looked up on the device where it matters
    out             where to write the answer; None: a new tensor
    check           also look at the numbers *in* the tensors (block numbers, lengths), which waits for the device

    A query that sees no token (seq_lens 0: the padding of a batch) gives 0. Raises ValueError for arguments that do not
    fit, before anything is launched.
    """
    tensors = query, key_cache, value_cache, block_tables, seq_lens
    check_attention(*tensors, query_start_loc, sliding_window, out=out, numbers=check)
    options: dict[str, Any] = {"scale": scale, "sliding_window": sliding_window, "out": out}
    num_seqs, max_blocks = block_tables.shape
    if max_query_len is None and len(query) == num_seqs:
        max_query_len = int(query_start_loc.diff().max()) if num_seqs else 0
    # As many tokens as sequences, and none with two: then each has exactly one.
    if len(query) != num_seqs or max_query_len != 1:
        return paged_prefill(*tensors, query_start_loc, max_query_len=max_query_len, **options)
    _, num_kv_heads, block_size, _ = key_cache.shape
    longest = min(max_blocks * block_size, sliding_window or max_blocks * block_size)  # no sequence is longer
    num_splits = choose_num_splits(num_seqs, num_kv_heads, longest, count_multiprocessors(query.device))
    return paged_decode(*tensors, num_splits=num_splits, **options)
