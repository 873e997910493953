"""Chapter 8. What the kernels refuse before a launch, beyond what all paged attention refuses (attention/checks.py).

Shapes, dtypes, strides and devices are known on the host and are always checked. What is *in* a tensor (block numbers,
lengths) lies on the device, and to look at it is to wait for it: that is done only with check=True.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minipaged.attention import checks
from minipaged.attention.checks import check as require
from minipaged.attention.checks import check_integers, check_like_cache, check_value_cache

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256
MAX_GROUP = 128  # query heads that share a KV head


def check_write_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, check: bool
) -> None:
    _check_caches(key_cache, value_cache)
    for name, tensor in (("key", key), ("value", value)):
        require(tensor.dim() == 3, f"{name} must be [num_tokens, num_kv_heads, head_dim], got {list(tensor.shape)}")
    checks.check_write_kv(key, value, key_cache, value_cache, slot_mapping, numbers=check)
    _check_last_strides(key=key, value=value, slot_mapping=slot_mapping)


def check_copy_blocks(
    key_cache: Tensor, value_cache: Tensor, copies: Sequence[tuple[int, int]] | Tensor, check: bool
) -> None:
    layers = "[num_layers, num_blocks, num_kv_heads, block_size, head_dim]"
    require(key_cache.dim() in (4, 5), f"key_cache must be {layers} or one layer of it, got {list(key_cache.shape)}")
    _check_dtype_and_strides(key_cache, value_cache)
    block = key_cache[0] if key_cache.dim() == 4 else key_cache[0, 0]
    extent = 1 + sum((size - 1) * stride for size, stride in zip(block.shape, block.stride(), strict=True))
    require(
        extent == block.numel() and min(block.stride()) >= 1,
        f"key_cache must hold a block in one piece, got strides {list(key_cache.stride())}",
    )
    if isinstance(copies, Tensor):
        check_integers("copies", copies, (len(copies), 2), key_cache)
        _check_last_strides(copies=copies)
        if not check:
            return
    pairs = [(int(source), int(target)) for source, target in copies]
    num_blocks = key_cache.shape[-4]
    for block_id in (number for pair in pairs for number in pair):
        require(0 <= block_id < num_blocks, f"copies must lie in 0 to {num_blocks - 1}, got {block_id}")
    targets = [target for _, target in pairs]
    for target in targets:
        require(targets.count(target) == 1, f"copies must name a target once, got {target} twice")
    for source, _ in pairs:
        require(source not in targets, f"copies must not read a block that they write, got source {source} in {pairs}")


def check_attention(
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
    check: bool,
) -> None:
    """query_start_loc: None where every sequence has one query, as decode needs it."""
    _check_caches(key_cache, value_cache)
    tables = block_tables, seq_lens, query_start_loc
    checks.check_paged_attention(query, key_cache, value_cache, *tables, sliding_window, numbers=check)
    _check_last_strides(query=query, block_tables=block_tables, seq_lens=seq_lens)
    if query_start_loc is not None:
        _check_last_strides(query_start_loc=query_start_loc)
    if out is not None:
        require(out.shape == query.shape, f"out must be {list(query.shape)} as query, got {list(out.shape)}")
        check_like_cache("out", out, key_cache)
        _check_last_strides(out=out)
    num_heads, num_kv_heads = query.shape[1], key_cache.shape[1]
    group = num_heads // num_kv_heads
    require(
        group <= MAX_GROUP,
        f"query has {num_heads} heads for {num_kv_heads} KV heads; at most {MAX_GROUP} may share one",
    )
    for name, number in (("tile", tile), ("rows", rows)):
        # The tensor cores take 16 at least. The interpreter would take less, and no GPU would.
        fits = number is None or (number >= 16 and number & (number - 1) == 0)
        require(fits, f"{name} must be a power of two from 16, got {number}")
    require(rows is None or rows >= group, f"rows must hold a group of {group} query heads, got {rows}")


def _check_caches(key_cache: Tensor, value_cache: Tensor) -> None:
    if key_cache.dim() == 4:
        head_dim = key_cache.shape[3]
        require(
            1 <= head_dim <= MAX_HEAD_DIM, f"key_cache has head_dim {head_dim}; the kernels take 1 to {MAX_HEAD_DIM}"
        )
        require(min(key_cache.shape[1:3]) >= 1, f"key_cache must have no dimension of 0, got {list(key_cache.shape)}")
    checks.check_caches(key_cache, value_cache)
    _check_last_strides(key_cache=key_cache)
    _check_dtype_and_strides(key_cache, value_cache)


def _check_dtype_and_strides(key_cache: Tensor, value_cache: Tensor) -> None:
    require(key_cache.dtype in DTYPES, f"key_cache must hold one of {[str(d) for d in DTYPES]}, got {key_cache.dtype}")
    check_value_cache(key_cache, value_cache)
    # One address is computed for both: half the arithmetic and half the registers.
    require(
        value_cache.stride() == key_cache.stride(),
        f"value_cache must lie as key_cache (strides {list(key_cache.stride())}), got {list(value_cache.stride())}",
    )


def _check_last_strides(**tensors: Tensor) -> None:
    """The last dimension must lie in one piece, since kernels step through it by 1; the others may have any stride."""
    for name, tensor in tensors.items():
        stride = tensor.stride(-1)
        fits = stride == 1 or tensor.shape[-1] == 1 or tensor.numel() == 0
        require(fits, f"{name} must have stride 1 in its last dimension, got {stride}")
