"""Chapter 10. The kind and size of an engine's cache, checked before anything is built."""

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from minipaged.cdiv import cdiv
from minipaged.engine.arguments import choice, flag, whole
from minipaged.model.transformer import Transformer

DEFAULT_POOL_BYTES = 1 << 30  # K and V of all layers; the system commits a page of it when it is first written
CACHES = ("contiguous", "paged")


@dataclass(frozen=True)
class CacheConfig:
    """The arguments of `LLM` about memory, checked and complete. A contiguous cache has blocks as long as the longest
    request: slabs."""

    cache: str
    backend: str  # "torch" or "triton"
    block_size: int  # tokens
    num_blocks: int
    num_host_blocks: int  # 0 where nothing is swapped
    max_model_len: int
    enable_prefix_caching: bool


def check_cache(cache: str) -> None:
    """Raises ValueError for a cache that an engine cannot have."""
    if isinstance(cache, str) and cache == "recompute":  # an array answers == with an array
        raise ValueError(
            "cache 'recompute' keeps nothing, and an engine needs a cache: chapter 2's loop runs without one "
            "(minipaged.model.recompute), and `minipaged demo` shows it beside the two caches"
        )
    choice("cache", cache, CACHES)


def make_cache_config(
    transformer: Transformer,
    *,
    cache: str,
    backend: str,
    block_size: int,
    num_blocks: int | None,
    num_host_blocks: int | None,
    max_model_len: int | None,
    max_num_seqs: int,
    enable_prefix_caching: bool,
    preemption: str,
) -> CacheConfig:
    """Fill in what was left open. Raises ValueError for an argument that does not fit the others or the model."""
    choice("backend", backend, ("auto", "torch", "triton"))
    choice("preemption", preemption, ("recompute", "swap"))
    config, weights = transformer.config, transformer.embed_tokens.weight
    for name, value, of_paged in (("backend", backend, "triton"), ("preemption", preemption, "swap")):
        if value == of_paged and cache != "paged":
            raise ValueError(f"{name} {value!r} is of the paged cache, and cache is {cache!r}")
    block_size = whole("block_size", block_size, least=1)
    num_blocks = None if num_blocks is None else whole("num_blocks", num_blocks, least=1)
    num_host_blocks = None if num_host_blocks is None else whole("num_host_blocks", num_host_blocks, least=1)
    enable_prefix_caching = flag("enable_prefix_caching", enable_prefix_caching)
    if num_host_blocks is not None and preemption != "swap":
        raise ValueError(f"num_host_blocks is for preemption 'swap', and preemption is {preemption!r}")
    max_model_len = config.max_position if max_model_len is None else whole("max_model_len", max_model_len)
    if not 2 <= max_model_len <= config.max_position:
        raise ValueError(f"max_model_len must be 2 to {config.max_position}, got {max_model_len}")
    if num_blocks is None:
        most = max(1, max_num_seqs) * cdiv(max_model_len, block_size)  # more could never be in use at once
        num_blocks = max(1, min(most, DEFAULT_POOL_BYTES // (config.kv_bytes_per_token(weights.dtype) * block_size)))
    if cache == "contiguous":
        num_slots = num_blocks * block_size
        if num_slots < max_model_len:
            raise ValueError(
                f"the pool of {num_blocks} * {block_size} = {num_slots} slots holds no slab of max_model_len = "
                f"{max_model_len}: give it more blocks, or a smaller max_model_len"
            )
        num_blocks, block_size = num_slots // max_model_len, max_model_len
    if backend == "auto":
        backend = "triton" if weights.device.type == "cuda" and find_spec("triton") else "torch"
    if backend == "triton" and weights.device.type == "cpu" and weights.dtype == torch.bfloat16:
        raise ValueError("backend 'triton' on a CPU is an interpreter, which computes bfloat16 wrongly: take float32")
    host = (num_host_blocks or num_blocks) if preemption == "swap" else 0
    caching = enable_prefix_caching and cache == "paged"
    return CacheConfig(cache, backend, block_size, num_blocks, host, max_model_len, caching)
