"""Chapter 8. What the launchers share: what they refuse, tensors as a kernel takes them, and how it cuts its work.

A kernel gets a tensor as a pointer, and its strides as a tuple, which leaves out the last stride: it is 1, and another
is refused. Triton compiles a kernel for each combination of constants: head size, block size, the query heads of a
group, and rows, tile, warps and stages, which the table below gives for a GPU and a head size.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from minipaged.attention.checks import check, check_paged_attention, check_tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256
MAX_GROUP = 128  # query heads that share a KV head
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Tiling:
    rows: int  # query rows of a program, at most; decode has one group
    tile: int  # keys of a step of the loop
    warps: int
    stages: int  # steps whose loads are under way at once, where the GPU loads asynchronously


@dataclass(frozen=True)
class Target:
    """What a kernel may take. Sources: CUDA C++ Programming Guide, compute capabilities; AMD's CDNA 3 guide."""

    shared: int  # bytes of shared memory a program may have
    decode: dict[int, Tiling]  # by head size, padded to 64, 128 or 256
    prefill: dict[int, Tiling]


# Decode: 16 KiB of K and as much of V a step. Two steps under way are 64 KiB and the scratch of the softmax. Three
# programs then fit a multiprocessor with 228 KiB, two one of 164 KiB.
_DECODE = {64: Tiling(16, 128, 4, 3), 128: Tiling(16, 64, 4, 3), 256: Tiling(16, 32, 4, 3)}
# Prefill: 128 rows are 8 warps of 16. 64 keys at head size 64; at 128, operands that come from registers leave room for
# 32. The accumulator of a head of 256 halves the rows.
_PREFILL = {64: Tiling(128, 64, 8, 3), 128: Tiling(128, 32, 8, 3), 256: Tiling(64, 32, 8, 2)}
# wgmma (sm_90) and tcgen05 (sm_100) read operands from shared memory: at head size 128, 64 keys fit as well.
_PREFILL_WGMMA = _PREFILL | {128: Tiling(128, 64, 8, 3)}
_PREFILL_TCGEN05 = _PREFILL_WGMMA | {64: Tiling(128, 32, 8, 3)}  # with 64 keys, 24 bytes of a thread spill
# Triton has no tensor-core code for sm_75: products are single multiply-adds, whose operands and sums stand in
# registers. 16 keys are what decode keeps in 128 of them, so that four programs of 4 warps fit; 64 rows of head size 64
# and 32 of 128, over 8 warps, are what prefill does. Its loads are not asynchronous: one stage.
_DECODE_FMA = {64: Tiling(16, 16, 4, 1), 128: Tiling(16, 16, 4, 1), 256: Tiling(16, 16, 8, 1)}
_PREFILL_FMA = {64: Tiling(64, 16, 8, 1), 128: Tiling(32, 16, 8, 1), 256: Tiling(16, 16, 8, 1)}

TARGETS = {
    "sm_75": Target(64 << 10, _DECODE_FMA, _PREFILL_FMA),  # T4
    "sm_80": Target(163 << 10, _DECODE, _PREFILL),  # A100
    "sm_86": Target(99 << 10, _DECODE, _PREFILL),  # RTX 30, A10
    "sm_89": Target(99 << 10, _DECODE, _PREFILL),  # RTX 40, L4
    "sm_90": Target(227 << 10, _DECODE, _PREFILL_WGMMA),  # H100
    "sm_100": Target(227 << 10, _DECODE, _PREFILL_TCGEN05),  # B200
    "sm_120": Target(99 << 10, _DECODE, _PREFILL),  # RTX 50
    "gfx942": Target(64 << 10, _DECODE, _PREFILL),  # MI300X
}


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
    numbers: bool = False,
) -> None:
    """Raises ValueError for what `check_paged_attention` refuses, and for what the kernels cannot do."""
    tables = block_tables, seq_lens, query_start_loc
    check_paged_attention(query, key_cache, value_cache, *tables, sliding_window, numbers=numbers)
    if out is not None:
        check_tensor("out", out, query.shape, key_cache)
    rest = dict(zip(("block_tables", "seq_lens", "query_start_loc"), tables, strict=True))
    check_memory(key_cache, value_cache, query=query, out=out, **rest)
    num_heads, num_kv_heads = query.shape[1], key_cache.shape[1]
    group, heads = num_heads // num_kv_heads, f"query has {num_heads} heads for {num_kv_heads} KV heads"
    check(group <= MAX_GROUP, f"{heads}; at most {MAX_GROUP} may share one")
    for name, number in (("tile", tile), ("rows", rows)):
        # The tensor cores take 16 at least. The interpreter would take less, and no GPU would.
        fits = number is None or (number >= 16 and number & (number - 1) == 0)
        check(fits, f"{name} must be a power of two from 16, got {number}")
    check(rows is None or rows >= group, f"rows must hold a group of {group} query heads, got {rows}")


def check_memory(key_cache: Tensor, value_cache: Tensor, **tensors: Tensor | None) -> None:
    """Raises ValueError where a kernel cannot read the caches, or a tensor as it lies in memory."""
    head_dim = key_cache.shape[-1]
    check(key_cache.dtype in DTYPES, f"key_cache must hold one of {DTYPES}, got {key_cache.dtype}")
    check(head_dim <= MAX_HEAD_DIM, f"key_cache has head_dim {head_dim}; the kernels take 1 to {MAX_HEAD_DIM}")
    for name, tensor in {"key_cache": key_cache, **tensors}.items():
        if tensor is not None and tensor.numel() > 0 and tensor.shape[-1] > 1:
            check(tensor.stride(-1) == 1, f"{name} must have stride 1 in its last dimension, got {tensor.stride(-1)}")
    # One address is computed for both: half the arithmetic and half the registers.
    lies = f"value_cache must lie as key_cache (strides {list(key_cache.stride())}), got {list(value_cache.stride())}"
    check(value_cache.stride() == key_cache.stride(), lies)


def strides(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tensor.stride()[:-1] for tensor in tensors)


def decode_constants(query: Tensor, key_cache: Tensor, sliding_window: int | None, tile: int | None) -> dict[str, Any]:
    """The constexprs and options of the decode kernel."""
    constants = _constants(query, key_cache, sliding_window)
    rows = max(16, triton.next_power_of_2(constants["GROUP"]))
    tiling = _pick(target(query.device).decode, _DECODE_FMA, constants, query)
    return constants | {"ROWS": rows} | _options(tiling, tile)


def prefill_constants(
    query: Tensor, key_cache: Tensor, sliding_window: int | None, max_query_len: int, tile: int | None, rows: int | None
) -> dict[str, Any]:
    """The constexprs and options of the prefill kernel."""
    constants = _constants(query, key_cache, sliding_window)
    tiling, group = _pick(target(query.device).prefill, _PREFILL_FMA, constants, query), constants["GROUP"]
    needed = triton.next_power_of_2(max_query_len * group)  # no rows for queries that are not there
    rows = rows or max(16, triton.next_power_of_2(group), min(tiling.rows, needed))
    return constants | {"ROWS": rows} | _options(tiling, tile)


def target(device: torch.device) -> Target:
    """The entry of the GPU that is there; one that the table does not name, and the interpreter, are taken as sm_80."""
    if device.type == "cpu":
        return TARGETS["sm_80"]
    gpu = driver.active.get_current_target()
    return TARGETS.get(f"sm_{gpu.arch}" if gpu.backend == "cuda" else str(gpu.arch), TARGETS["sm_80"])


def _pick(tilings: dict[int, Tiling], fma: dict[int, Tiling], constants: dict[str, Any], query: Tensor) -> Tiling:
    """float32, which is not rounded here, and float64 are multiply-adds on every GPU."""
    on_tensor_cores = query.dtype.itemsize == 2 or query.device.type == "cpu"
    return (tilings if on_tensor_cores else fma)[min(256, max(64, constants["HEAD_DIM_PADDED"]))]


def _options(tiling: Tiling, tile: int | None) -> dict[str, int]:
    return {"TILE": tile or tiling.tile, "num_warps": tiling.warps, "num_stages": tiling.stages}


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
