"""What paged attention refuses before it reads or writes: each message names the argument and the numbers.

Shapes, dtypes and devices are known on the host. What is *in* a tensor (block numbers, lengths) may lie on a GPU, and
to look at it is to wait for the GPU: `numbers=False` leaves that out. (The kernels refuse more, strides among it, and
look at numbers only if asked: kernels/checks.py.)
"""

import torch
from torch import Tensor


def check_write_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    numbers: bool = True,
) -> None:
    """Raises ValueError for the first argument of write_kv that does not fit."""
    check_caches(key_cache, value_cache)
    num_blocks, num_kv_heads, block_size, head_dim = key_cache.shape
    for name, tensor in (("key", key), ("value", value)):
        expected = [key.shape[0] if key.dim() else 0, num_kv_heads, head_dim]
        check(list(tensor.shape) == expected, f"{name} must be {expected}, got {list(tensor.shape)}")
        check_like_cache(name, tensor, key_cache)
    check_integers("slot_mapping", slot_mapping, (key.shape[0],), key_cache)
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
    check(
        query.dim() == 3 and query.shape[2] == head_dim,
        f"query must be [num_tokens, num_heads, head_dim = {head_dim}], got {list(query.shape)}",
    )
    num_heads = query.shape[1]
    heads = f"query has {num_heads} heads, which is not a multiple of the cache's {num_kv_heads} KV heads"
    check(num_heads > 0 and num_heads % num_kv_heads == 0, heads)
    check_like_cache("query", query, key_cache)
    check(sliding_window is None or sliding_window >= 1, f"sliding_window must be at least 1, got {sliding_window}")

    check(block_tables.dim() == 2, f"block_tables must be [num_seqs, max_blocks], got {list(block_tables.shape)}")
    num_seqs, max_blocks = block_tables.shape
    check_integers("block_tables", block_tables, (num_seqs, max_blocks), key_cache)
    check_integers("seq_lens", seq_lens, (num_seqs,), key_cache)
    if query_start_loc is None:
        check(query.shape[0] == num_seqs, f"query must hold one token a sequence, got {query.shape[0]} for {num_seqs}")
    else:
        check_integers("query_start_loc", query_start_loc, (num_seqs + 1,), key_cache)
    if not numbers:
        return
    check_range("seq_lens", seq_lens, 0, max_blocks * block_size)
    if query_start_loc is not None:
        counts = query_start_loc.diff()
        check(
            int(query_start_loc[0]) == 0 and int(query_start_loc[-1]) == query.shape[0] and bool((counts >= 0).all()),
            f"query_start_loc must rise from 0 to num_tokens = {query.shape[0]}, got {query_start_loc.tolist()}",
        )
        check(
            bool((counts <= seq_lens).all()),
            f"a sequence has more queries than tokens: queries {counts.tolist()}, seq_lens {seq_lens.tolist()}",
        )
    first = torch.arange(max_blocks, device=block_tables.device) * block_size  # [max_blocks], each column's position
    used = first < seq_lens[:, None]  # [num_seqs, max_blocks]
    check_range("block_tables (within seq_lens)", block_tables[used], 0, num_blocks - 1)


def check_caches(key_cache: Tensor, value_cache: Tensor) -> None:
    layout = "[num_blocks, num_kv_heads, block_size, head_dim]"
    check(key_cache.dim() == 4, f"key_cache must be {layout}, got {list(key_cache.shape)}")
    check_value_cache(key_cache, value_cache)


def check_value_cache(key_cache: Tensor, value_cache: Tensor) -> None:
    """One shape, dtype and device for both."""
    check(
        value_cache.shape == key_cache.shape and value_cache.dtype == key_cache.dtype,
        f"value_cache must be as key_cache ({list(key_cache.shape)}, {key_cache.dtype}), "
        f"got {list(value_cache.shape)}, {value_cache.dtype}",
    )
    check_like_cache("value_cache", value_cache, key_cache)


def check_like_cache(name: str, tensor: Tensor, key_cache: Tensor) -> None:
    check(tensor.dtype == key_cache.dtype, f"{name} is {tensor.dtype}, key_cache {key_cache.dtype}")
    check(tensor.device == key_cache.device, f"{name} is on {tensor.device}, key_cache on {key_cache.device}")


def check_integers(name: str, tensor: Tensor, shape: tuple[int, ...], key_cache: Tensor) -> None:
    check(tensor.dtype in (torch.int32, torch.int64), f"{name} must hold int32 or int64, got {tensor.dtype}")
    check(tuple(tensor.shape) == shape, f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    check(tensor.device == key_cache.device, f"{name} is on {tensor.device}, key_cache on {key_cache.device}")


def check_range(name: str, tensor: Tensor, low: int, high: int) -> None:
    if tensor.numel() and (int(tensor.min()) < low or int(tensor.max()) > high):
        wrong = tensor[(tensor < low) | (tensor > high)]
        raise ValueError(f"{name} must lie in {low} to {high}, got {int(wrong[0])}")


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
