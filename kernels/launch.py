"""Chapter 8. What the launchers share: tensors as a kernel takes them, and how an attention kernel cuts its work.

A kernel gets a tensor as a pointer, and its strides as a tuple, which leaves out the last stride: it is 1 (checks.py of
`minipaged.attention` refuses another). Triton compiles a kernel anew for other constants: head size, block size, the
query heads of a group, and the tile, rows, warps and stages that follow from them here.
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

LOG2_E = math.log2(math.e)


def strides(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tensor.stride()[:-1] for tensor in tensors)


def decode_constants(query: Tensor, key_cache: Tensor, sliding_window: int | None, tile: int | None) -> dict[str, Any]:
    """The constexprs and options of the decode kernels, split or not."""
    constants = _constants(query, key_cache, sliding_window)
    # 16 KiB of K and as much of V a step: two steps in flight and three programs on a multiprocessor fit in 228 KiB.
    tile = tile or min(128, max(16, 16_384 // (constants["HEAD_DIM_PADDED"] * query.dtype.itemsize)))
    rows = max(16, triton.next_power_of_2(constants["GROUP"]))
    return constants | {"ROWS": rows, "TILE": tile, "num_warps": 4, "num_stages": 3}


def prefill_constants(
    query: Tensor,
    key_cache: Tensor,
    sliding_window: int | None,
    max_query_len: int,
    tile: int | None,
    rows: int | None,
) -> dict[str, Any]:
    """The constexprs and options of the prefill kernel."""
    constants = _constants(query, key_cache, sliding_window)
    group, head_dim_padded, itemsize = constants["GROUP"], constants["HEAD_DIM_PADDED"], query.dtype.itemsize
    # 128 rows are two warpgroups of wgmma on Hopper. The accumulator of a larger head, or of float32, leaves less room.
    most = 32 if itemsize > 2 else 64 if head_dim_padded > 128 else 128
    needed = triton.next_power_of_2(max_query_len * group)  # no rows for queries that are not there
    rows = rows or max(16, triton.next_power_of_2(group), min(most, needed))
    # Where operands come from registers, 128 rows by 64 keys of head_dim 128 do not fit into 255 of them.
    short = itemsize > 2 or head_dim_padded > (128 if multiplies_from_shared_memory(query.device) else 64)
    return constants | {
        "ROWS": rows,
        "TILE": tile or (32 if short else 64),
        "num_warps": 8 if rows >= 128 or head_dim_padded > 128 else 4,
        "num_stages": 3 if head_dim_padded <= 128 else 2,
    }


def multiplies_from_shared_memory(device: torch.device) -> bool:
    """wgmma of Hopper (sm_90) and tcgen05 of Blackwell (sm_100) do; every other tensor core takes registers."""
    return device.type != "cpu" and driver.active.get_current_target().arch in (90, 100)


def _constants(query: Tensor, key_cache: Tensor, sliding_window: int | None) -> dict[str, Any]:
    num_heads, head_dim = query.shape[1:]
    _, num_kv_heads, block_size, _ = key_cache.shape
    return {
        "GROUP": num_heads // num_kv_heads,
        "HEAD_DIM": head_dim,
        "HEAD_DIM_PADDED": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_SIZE": block_size,
        "WINDOW": sliding_window or 0,
    }
