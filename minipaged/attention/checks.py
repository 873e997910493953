"""What paged attention refuses before it reads or writes: each message names the argument and the numbers.

Shapes, dtypes and devices are known on the host. The numbers *in* a tensor (blocks, lengths) may lie on a GPU, and to
read them is to wait for the GPU: `numbers=False` leaves them unchecked. The kernels of chapter 8 read them only if
asked, and refuse more (strides, sizes): `check_kernel_memory` and the functions above it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256  # of the kernels
MAX_GROUP = 128  # query heads that share a KV head in the kernels


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
    shape = list(query.shape)
    query_layout = f"[num_tokens, num_heads, head_dim = {head_dim}]"
    check(len(shape) == 3 and shape[2] == head_dim, f"query must be {query_layout}, got {shape}")
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


def check_write_kernel(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, *, numbers: bool
) -> None:
    check_write_kv(key, value, key_cache, value_cache, slot_mapping, numbers=numbers)
    check_kernel_memory(key_cache, value_cache, key=key, value=value, slot_mapping=slot_mapping)


def check_attention_kernel(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor | None,
    sliding_window: int | None,
    *,
    out: Tensor | None,
    tile: int | None = None,
    rows: int | None = None,
    numbers: bool,
) -> None:
    tables = block_tables, seq_lens, query_start_loc
    check_paged_attention(query, key_cache, value_cache, *tables, sliding_window, numbers=numbers)
    if out is not None:
        check(out.shape == query.shape, f"out must be {list(query.shape)} as query, got {list(out.shape)}")
        check_like_cache("out", out, key_cache)
    rest = dict(zip(("block_tables", "seq_lens", "query_start_loc"), tables, strict=True))
    check_kernel_memory(key_cache, value_cache, query=query, out=out, **rest)
    num_heads, num_kv_heads = query.shape[1], key_cache.shape[1]
    group, heads = num_heads // num_kv_heads, f"query has {num_heads} heads for {num_kv_heads} KV heads"
    check(group <= MAX_GROUP, f"{heads}; at most {MAX_GROUP} may share one")
    for name, number in (("tile", tile), ("rows", rows)):
        # The tensor cores take 16 at least. The interpreter would take less, and no GPU would.
        fits = number is None or (number >= 16 and number & (number - 1) == 0)
        check(fits, f"{name} must be a power of two from 16, got {number}")
    check(rows is None or rows >= group, f"rows must hold a group of {group} query heads, got {rows}")


def check_copy_blocks(
    key_cache: Tensor, value_cache: Tensor, copies: Sequence[tuple[int, int]] | Tensor, *, numbers: bool
) -> None:
    """The numbers of a list are looked at in any case: they are on the host."""
    layers = "[num_layers, num_blocks, num_kv_heads, block_size, head_dim]"
    check(key_cache.dim() in (4, 5), f"key_cache must be {layers} or one layer of it, got {list(key_cache.shape)}")
    check_value_cache(key_cache, value_cache)
    check_kernel_memory(key_cache, value_cache)
    block = key_cache.flatten(0, -4)[0]
    extent = 1 + sum((size - 1) * stride for size, stride in zip(block.shape, block.stride(), strict=True))
    check(
        extent == block.numel() and min(block.stride()) >= 1,
        f"key_cache must hold a block in one piece, got strides {list(key_cache.stride())}",
    )
    if isinstance(copies, Tensor):
        check_integers("copies", copies, (len(copies), 2), key_cache)
        check_kernel_memory(key_cache, value_cache, copies=copies)
        if not numbers:
            return
    pairs = [(int(source), int(target)) for source, target in copies]
    num_blocks = key_cache.shape[-4]
    for block_id in (number for pair in pairs for number in pair):
        check(0 <= block_id < num_blocks, f"copies must lie in 0 to {num_blocks - 1}, got {block_id}")
    targets = [target for _, target in pairs]
    for target in targets:
        check(targets.count(target) == 1, f"copies must name a target once, got {target} twice")
    for source, _ in pairs:
        check(source not in targets, f"copies must not read a block that they write, got source {source} in {pairs}")


def check_kernel_memory(key_cache: Tensor, value_cache: Tensor, **tensors: Tensor | None) -> None:
    """What the kernels ask of the caches, and of how all tensors lie in memory."""
    check(key_cache.dtype in KERNEL_DTYPES, f"key_cache must hold one of {KERNEL_DTYPES}, got {key_cache.dtype}")
    head_dim = key_cache.shape[-1]
    check(head_dim <= MAX_HEAD_DIM, f"key_cache has head_dim {head_dim}; the kernels take 1 to {MAX_HEAD_DIM}")
    # Kernels step through the last dimension by 1; the others may have any stride.
    for name, tensor in {"key_cache": key_cache, **tensors}.items():
        if tensor is not None and tensor.numel() > 0 and tensor.shape[-1] > 1:
            check(tensor.stride(-1) == 1, f"{name} must have stride 1 in its last dimension, got {tensor.stride(-1)}")
    # One address is computed for both: half the arithmetic and half the registers.
    check(
        value_cache.stride() == key_cache.stride(),
        f"value_cache must lie as key_cache (strides {list(key_cache.stride())}), got {list(value_cache.stride())}",
    )


def check_caches(key_cache: Tensor, value_cache: Tensor) -> None:
    layout = "[num_blocks, num_kv_heads, block_size, head_dim]"
    fits = key_cache.dim() == 4 and min(key_cache.shape[1:]) >= 1
    check(fits, f"key_cache must be {layout}, got {list(key_cache.shape)}")
    check_value_cache(key_cache, value_cache)


def check_value_cache(key_cache: Tensor, value_cache: Tensor) -> None:
    """One shape, dtype and device for both."""
    shape = list(key_cache.shape)
    check(list(value_cache.shape) == shape, f"value_cache must be {shape} as key_cache, got {list(value_cache.shape)}")
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
