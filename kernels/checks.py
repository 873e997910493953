"""Chapter 8. What the kernels refuse before a launch: each message names the argument and the numbers.

Shapes, dtypes, strides and devices are known on the host and are always checked. What is *in* a tensor (block numbers,
lengths) lies on the device, and to look at it is to wait for it: that is done only with check=True.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256
MAX_GROUP = 128  # query heads that share a KV head


def check_write_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, check: bool
) -> None:
    _check_caches(key_cache, value_cache)
    num_blocks, num_kv_heads, block_size, head_dim = key_cache.shape
    for name, tensor in (("key", key), ("value", value)):
        _check(tensor.dim() == 3, f"{name} must be [num_tokens, num_kv_heads, head_dim], got {list(tensor.shape)}")
        expected = (key.shape[0], num_kv_heads, head_dim)
        _check(tensor.shape == expected, f"{name} must be {list(expected)}, got {list(tensor.shape)}")
        _check_like_cache(name, tensor, key_cache)
    _check_integers("slot_mapping", slot_mapping, (key.shape[0],), key_cache)
    if check:
        _check_range("slot_mapping", slot_mapping, -1, num_blocks * block_size - 1)


def check_copy_blocks(
    key_cache: Tensor, value_cache: Tensor, copies: Sequence[tuple[int, int]] | Tensor, check: bool
) -> None:
    layers = "[num_layers, num_blocks, num_kv_heads, block_size, head_dim]"
    _check(key_cache.dim() in (4, 5), f"key_cache must be {layers} or one layer of it, got {list(key_cache.shape)}")
    _check_value_cache(key_cache, value_cache)
    block = key_cache[0] if key_cache.dim() == 4 else key_cache[0, 0]
    extent = 1 + sum((size - 1) * stride for size, stride in zip(block.shape, block.stride(), strict=True))
    _check(
        extent == block.numel() and min(block.stride()) >= 1,
        f"key_cache must hold a block in one piece, got strides {list(key_cache.stride())}",
    )
    if isinstance(copies, Tensor):
        _check_integers("copies", copies, (len(copies), 2), key_cache)
        if not check:
            return
    pairs = [(int(source), int(target)) for source, target in copies]
    num_blocks = key_cache.shape[-4]
    for block_id in (number for pair in pairs for number in pair):
        _check(0 <= block_id < num_blocks, f"copies must lie in 0 to {num_blocks - 1}, got {block_id}")
    targets = [target for _, target in pairs]
    for target in targets:
        _check(targets.count(target) == 1, f"copies must name a target once, got {target} twice")
    for source, _ in pairs:
        _check(source not in targets, f"copies must not read a block that they write, got source {source} in {pairs}")


def check_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    sliding_window: int | None,
    logits_soft_cap: float | None,
    out: Tensor | None,
    tile: int | None,
    check: bool,
) -> None:
    _check_attention(query, key_cache, value_cache, block_tables, seq_lens, sliding_window, logits_soft_cap, out, tile)
    num_seqs = len(seq_lens)
    _check(query.shape[0] == num_seqs, f"query must hold one token a sequence, got {query.shape[0]} for {num_seqs}")
    if check:
        _check_context(key_cache, block_tables, seq_lens)


def check_prefill(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    sliding_window: int | None,
    logits_soft_cap: float | None,
    out: Tensor | None,
    tile: int | None,
    rows: int | None,
    check: bool,
) -> None:
    _check_attention(query, key_cache, value_cache, block_tables, seq_lens, sliding_window, logits_soft_cap, out, tile)
    _check_integers("query_start_loc", query_start_loc, (len(seq_lens) + 1,), key_cache)
    _check_power_of_two("rows", rows)
    group = query.shape[1] // key_cache.shape[1]
    _check(rows is None or rows >= group, f"rows must hold a group of {group} query heads, got {rows}")
    if check:
        _check_context(key_cache, block_tables, seq_lens)
        starts, lens = query_start_loc.tolist(), seq_lens.tolist()
        counts = [after - before for before, after in pairwise(starts)]
        _check(
            starts[0] == 0 and starts[-1] == query.shape[0] and min(counts, default=0) >= 0,
            f"query_start_loc must rise from 0 to num_tokens = {query.shape[0]}, got {starts}",
        )
        _check(
            all(count <= seq_len for count, seq_len in zip(counts, lens, strict=True)),
            f"a sequence has more queries than tokens: queries {counts}, seq_lens {lens}",
        )


def _check_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    sliding_window: int | None,
    logits_soft_cap: float | None,
    out: Tensor | None,
    tile: int | None,
) -> None:
    _check_caches(key_cache, value_cache)
    _, num_kv_heads, _, head_dim = key_cache.shape
    _check(
        query.dim() == 3 and query.shape[2] == head_dim,
        f"query must be [num_tokens, num_heads, head_dim = {head_dim}], got {list(query.shape)}",
    )
    num_heads = query.shape[1]
    _check(
        num_heads > 0 and num_heads % num_kv_heads == 0,
        f"query has {num_heads} heads, which is not a multiple of the cache's {num_kv_heads} KV heads",
    )
    _check(
        num_heads // num_kv_heads <= MAX_GROUP,
        f"query has {num_heads} heads for {num_kv_heads} KV heads; at most {MAX_GROUP} may share one",
    )
    _check_like_cache("query", query, key_cache)
    if out is not None:
        _check(out.shape == query.shape, f"out must be {list(query.shape)} as query, got {list(out.shape)}")
        _check_like_cache("out", out, key_cache)
    _check(sliding_window is None or sliding_window >= 1, f"sliding_window must be at least 1, got {sliding_window}")
    _check(logits_soft_cap is None or logits_soft_cap > 0, f"logits_soft_cap must be above 0, got {logits_soft_cap}")
    _check_power_of_two("tile", tile)
    _check(block_tables.dim() == 2, f"block_tables must be [num_seqs, max_blocks], got {list(block_tables.shape)}")
    num_seqs, max_blocks = block_tables.shape
    _check_integers("block_tables", block_tables, (num_seqs, max_blocks), key_cache)
    _check_integers("seq_lens", seq_lens, (num_seqs,), key_cache)


def _check_context(key_cache: Tensor, block_tables: Tensor, seq_lens: Tensor) -> None:
    """Lengths within the table, and within the lengths block numbers within the pool. Waits for the device."""
    num_blocks, _, block_size, _ = key_cache.shape
    max_blocks = block_tables.shape[1]
    _check_range("seq_lens", seq_lens, 0, max_blocks * block_size)
    used = torch.arange(max_blocks, device=seq_lens.device) * block_size < seq_lens[:, None]  # [num_seqs, max_blocks]
    _check_range("block_tables (within seq_lens)", block_tables[used], 0, num_blocks - 1)


def _check_caches(key_cache: Tensor, value_cache: Tensor) -> None:
    layout = "[num_blocks, num_kv_heads, block_size, head_dim]"
    _check(key_cache.dim() == 4, f"key_cache must be {layout}, got {list(key_cache.shape)}")
    _check(
        1 <= key_cache.shape[3] <= MAX_HEAD_DIM,
        f"key_cache has head_dim {key_cache.shape[3]}; the kernels take 1 to {MAX_HEAD_DIM}",
    )
    _check(min(key_cache.shape[1:3]) >= 1, f"key_cache must be {layout}, none of them 0, got {list(key_cache.shape)}")
    _check_last_stride("key_cache", key_cache)
    _check_value_cache(key_cache, value_cache)


def _check_value_cache(key_cache: Tensor, value_cache: Tensor) -> None:
    _check(key_cache.dtype in DTYPES, f"key_cache must hold one of {[str(d) for d in DTYPES]}, got {key_cache.dtype}")
    _check(
        value_cache.shape == key_cache.shape and value_cache.dtype == key_cache.dtype,
        f"value_cache must be as key_cache ({list(key_cache.shape)}, {key_cache.dtype}), "
        f"got {list(value_cache.shape)}, {value_cache.dtype}",
    )
    # One address is computed for both: half the arithmetic and half the registers.
    _check(
        value_cache.stride() == key_cache.stride() and value_cache.device == key_cache.device,
        f"value_cache must lie as key_cache (strides {list(key_cache.stride())}, {key_cache.device}), "
        f"got strides {list(value_cache.stride())}, {value_cache.device}",
    )


def _check_like_cache(name: str, tensor: Tensor, key_cache: Tensor) -> None:
    _check(tensor.dtype == key_cache.dtype, f"{name} is {tensor.dtype}, key_cache {key_cache.dtype}")
    _check(tensor.device == key_cache.device, f"{name} is on {tensor.device}, key_cache on {key_cache.device}")
    _check_last_stride(name, tensor)


def _check_last_stride(name: str, tensor: Tensor) -> None:
    """The last dimension must lie in one piece, since kernels step through it by 1; the others may have any stride."""
    stride = tensor.stride(-1)
    fits = stride == 1 or tensor.shape[-1] == 1 or tensor.numel() == 0
    _check(fits, f"{name} must have stride 1 in its last dimension, got {stride}")


def _check_integers(name: str, tensor: Tensor, shape: tuple[int, ...], key_cache: Tensor) -> None:
    _check(tensor.dtype in (torch.int32, torch.int64), f"{name} must hold int32 or int64, got {tensor.dtype}")
    _check(tuple(tensor.shape) == shape, f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    _check(tensor.device == key_cache.device, f"{name} is on {tensor.device}, key_cache on {key_cache.device}")
    _check_last_stride(name, tensor)


def _check_range(name: str, tensor: Tensor, low: int, high: int) -> None:
    wrong = tensor[(tensor < low) | (tensor > high)]
    if wrong.numel():
        raise ValueError(f"{name} must lie in {low} to {high}, got {int(wrong[0])}")


def _check_power_of_two(name: str, number: int | None) -> None:
    # The tensor cores take 16 at least. The interpreter would take less, and no GPU would.
    fits = number is None or (number >= 16 and number & (number - 1) == 0)
    _check(fits, f"{name} must be a power of two from 16, got {number}")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
