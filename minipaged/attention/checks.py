"""What paged attention refuses before it reads or writes: each message names the argument and the numbers.

Shapes, dtypes and devices are known on the host. The numbers *in* a tensor (blocks, lengths) may lie on a GPU, and
reading them waits for the GPU: `numbers=False` leaves them unchecked. `kernels/launch.py` refuses more.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

INTEGERS = (torch.int32, torch.int64)


def check_write_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, *, numbers: bool = True
) -> None:
    """Raises ValueError for the first argument of write_kv that does not fit."""
    check_caches(key_cache, value_cache)
    num_blocks, num_kv_heads, block_size, head_dim = key_cache.shape
    check_tensor("key", key, (*key.shape[:1], num_kv_heads, head_dim), key_cache)
    check_tensor("value", value, key.shape, key_cache)
    check_tensor("slot_mapping", slot_mapping, key.shape[:1], key_cache, INTEGERS)
    if numbers:
        check_range("slot_mapping", slot_mapping, -1, num_blocks * block_size - 1)


def check_paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor | None,
    sliding_window: int | None,
    *,
    numbers: bool = True,
) -> None:
    """Raises ValueError for the first argument of paged_attention that does not fit. query_start_loc: None where every
    sequence has one query."""
    check_caches(key_cache, value_cache)
    num_blocks, num_kv_heads, block_size, head_dim = key_cache.shape
    check_tensor("query", query, (*query.shape[:2], head_dim), key_cache)
    num_tokens, num_heads, _ = query.shape
    heads = f"query has {num_heads} heads, which is not a multiple of the cache's {num_kv_heads} KV heads"
    check(num_heads > 0 and num_heads % num_kv_heads == 0, heads)
    check(sliding_window is None or sliding_window >= 1, f"sliding_window must be at least 1, got {sliding_window}")
    check(block_tables.dim() == 2, f"block_tables must be [num_seqs, max_blocks], got {list(block_tables.shape)}")
    num_seqs, max_blocks = block_tables.shape
    check_tensor("block_tables", block_tables, block_tables.shape, key_cache, INTEGERS)
    check_tensor("seq_lens", seq_lens, (num_seqs,), key_cache, INTEGERS)
    if query_start_loc is None:
        check(num_tokens == num_seqs, f"query must hold one token a sequence, got {num_tokens} for {num_seqs}")
    else:
        check_tensor("query_start_loc", query_start_loc, (num_seqs + 1,), key_cache, INTEGERS)
    if numbers:
        check_range("seq_lens", seq_lens, 0, max_blocks * block_size)
        if query_start_loc is not None:
            starts, lens = query_start_loc.tolist(), seq_lens.tolist()
            counts = [end - start for start, end in pairwise(starts)]
            rises = starts[0] == 0 and starts[-1] == num_tokens and min(counts, default=0) >= 0
            check(rises, f"query_start_loc must rise from 0 to num_tokens = {num_tokens}, got {starts}")
            enough = all(count <= length for count, length in zip(counts, lens, strict=True))
            check(enough, f"a sequence has more queries than tokens: queries {counts}, seq_lens {lens}")
        used = torch.arange(0, max_blocks * block_size, block_size, device=block_tables.device) < seq_lens[:, None]
        check_range("block_tables (within seq_lens)", block_tables[used], 0, num_blocks - 1)


def check_caches(key_cache: Tensor, value_cache: Tensor) -> None:
    fits = key_cache.dim() == 4 and min(key_cache.shape[1:]) >= 1
    check(fits, f"key_cache must be [num_blocks, num_kv_heads, block_size, head_dim], got {list(key_cache.shape)}")
    check_tensor("value_cache", value_cache, key_cache.shape, key_cache)


def check_tensor(
    name: str, tensor: Tensor, shape: Sequence[int], key_cache: Tensor, dtypes: tuple[torch.dtype, ...] = ()
) -> None:
    """A tensor of this shape, of one of these dtypes (by default the cache's), on the device of the cache."""
    dtypes = dtypes or (key_cache.dtype,)
    check(list(tensor.shape) == list(shape), f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    check(tensor.dtype in dtypes, f"{name} must hold {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    check(tensor.device == key_cache.device, f"{name} is on {tensor.device}, key_cache on {key_cache.device}")


def check_range(name: str, tensor: Tensor, low: int, high: int) -> None:
    if tensor.numel() and (int(tensor.min()) < low or int(tensor.max()) > high):
        wrong = tensor[(tensor < low) | (tensor > high)]
        raise ValueError(f"{name} must lie in {low} to {high}, got {int(wrong[0])}")


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
