"""Chapter 8. Who is timed beside our kernels: each in the layout that it likes best, all with the same numbers.

    minipaged            blocks of 16 tokens, anywhere in the pool
    torch SDPA           contiguous K and V: no table to read, and the memory that chapter 4 counts
    torch flex           pages of 128, which is flex_attention's block, through a page table in its block mask
    flash-attn 2 and 3   pages of 256
    flashinfer           pages of 16, HND
    vLLM's flash-attn    pages of 16, NHD

A peer is a function prepare(problem, seed) -> call() -> out [num_tokens, num_heads, head_dim]. It imports its package
itself, so that one that is not there is an ImportError at its turn, and copies K and V in sequence by sequence, so that
they never exist twice.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Shape:
    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Problem:
    """num_seqs sequences of `context` tokens; the last num_queries of each are queries."""

    shape: Shape
    num_seqs: int
    context: int
    dtype: torch.dtype
    device: str
    num_queries: int = 1

    @property
    def scale(self) -> float:
        return self.shape.head_dim**-0.5

    @property
    def kv_bytes(self) -> int:
        """The floor of a decode: K and V of every context, once."""
        return 2 * self.num_seqs * self.context * self.shape.num_kv_heads * self.shape.head_dim * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """Two matrix products; query i of n at the end of a context of c sees c - n + 1 + i keys."""
        seen = self.num_queries * (self.context - self.num_queries) + self.num_queries * (self.num_queries + 1) // 2
        return 4 * self.num_seqs * self.shape.num_heads * self.shape.head_dim * seen

    def query(self, seed: int) -> Tensor:
        """[num_seqs * num_queries, num_heads, head_dim]"""
        return self._random(seed, -1, self.num_seqs * self.num_queries, self.shape.num_heads)

    def sequences(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """K and V of one sequence after another, [context, num_kv_heads, head_dim]."""
        for seq in range(self.num_seqs):
            both = self._random(seed, seq, 2 * self.context, self.shape.num_kv_heads)
            yield both[: self.context], both[self.context :]

    def _random(self, seed: int, seq: int, tokens: int, heads: int) -> Tensor:
        rng = torch.Generator(self.device).manual_seed(seed * 1_000_003 + seq + 1)
        return torch.randn(tokens, heads, self.shape.head_dim, dtype=self.dtype, device=self.device, generator=rng)

    def lengths(self) -> tuple[Tensor, Tensor]:
        """seq_lens and query_start_loc, int32."""
        seq_lens = torch.full((self.num_seqs,), self.context, dtype=torch.int32, device=self.device)
        starts = torch.arange(self.num_seqs + 1, dtype=torch.int32, device=self.device) * self.num_queries
        return seq_lens, starts

    def tables(self, seed: int, page: int) -> Tensor:
        """int64 [num_seqs, pages]: every page of the pool once, in any order."""
        if self.context % page:
            raise ValueError(f"a context of {self.context} tokens is no whole number of pages of {page}")
        pages = self.context // page
        rng = torch.Generator().manual_seed(seed)
        return torch.randperm(self.num_seqs * pages, generator=rng).view(self.num_seqs, pages).to(self.device)

    def paged(self, seed: int, page: int, layout: str) -> tuple[Tensor, Tensor, Tensor]:
        """Key cache, value cache and int32 tables [num_seqs, pages]. Layout HND or NHD."""
        tables, heads, head_dim = self.tables(seed, page), self.shape.num_kv_heads, self.shape.head_dim
        inner = (heads, page, head_dim) if layout == "HND" else (page, heads, head_dim)
        caches = torch.empty(2, tables.numel(), *inner, dtype=self.dtype, device=self.device)
        for table, both in zip(tables, self.sequences(seed), strict=True):
            for cache, new in zip(caches, both, strict=True):
                blocks = new.view(-1, page, heads, head_dim)
                cache[table] = blocks.transpose(1, 2) if layout == "HND" else blocks
        return caches[0], caches[1], tables.to(torch.int32)


def minipaged(problem: Problem, seed: int) -> Call:
    from minipaged.kernels import paged_attention

    query, (seq_lens, starts) = problem.query(seed), problem.lengths()
    key_cache, value_cache, tables = problem.paged(seed, 16, "HND")
    arguments = query, key_cache, value_cache, tables, seq_lens, starts
    known = {"scale": problem.scale, "max_query_len": problem.num_queries}
    out = torch.empty_like(query)
    return lambda: paged_attention(*arguments, out=out, **known)


def torch_sdpa(problem: Problem, seed: int) -> Call:
    shape, tokens = problem.shape, problem.num_queries
    kv = torch.empty(
        2, problem.num_seqs, shape.num_kv_heads, problem.context, shape.head_dim,
        dtype=problem.dtype, device=problem.device,
    )  # fmt: skip
    for seq, both in enumerate(problem.sequences(seed)):
        for target, new in zip(kv, both, strict=True):
            target[seq] = new.transpose(0, 1)
    query = problem.query(seed)
    if tokens == 1:  # the heads of a group as the rows of one product, which is the fastest form of decode
        rows = query.view(problem.num_seqs, shape.num_kv_heads, -1, shape.head_dim)
        return lambda: F.scaled_dot_product_attention(rows, kv[0], kv[1], scale=problem.scale).view_as(query)
    if tokens != problem.context:
        raise NotImplementedError("its causal mask is aligned at the start, so a chunk behind a prefix is not one call")
    rows = query.view(problem.num_seqs, tokens, shape.num_heads, shape.head_dim).transpose(1, 2)
    causal: dict[str, Any] = {"is_causal": True, "enable_gqa": True, "scale": problem.scale}
    return lambda: F.scaled_dot_product_attention(rows, kv[0], kv[1], **causal).transpose(1, 2).reshape(query.shape)


def torch_flex(problem: Problem, seed: int) -> Call:
    """As torch.nn.attention.experimental._paged_attention: one pool as a batch of 1, and physical pages in the mask."""
    from torch.nn.attention.flex_attention import BlockMask

    _only_decode(problem)
    page = 128
    tables, shape = problem.tables(seed, page), problem.shape
    num_pages, per_seq = tables.numel(), tables.shape[1]
    slots = (tables[:, :, None] * page + torch.arange(page, device=problem.device)).flatten(1)  # [num_seqs, context]
    pool = (2, 1, shape.num_kv_heads, num_pages * page, shape.head_dim)
    key, value = kv = torch.empty(pool, dtype=problem.dtype, device=problem.device)
    for where, both in zip(slots, problem.sequences(seed), strict=True):
        for target, new in zip(kv, both, strict=True):
            target[0, :, where] = new.transpose(0, 1)
    ids = torch.zeros(problem.num_seqs, 1, 1, num_pages, dtype=torch.int32, device=problem.device)
    ids[:, 0, 0, :per_seq] = tables
    whole = torch.full((problem.num_seqs, 1, 1), per_seq, dtype=torch.int32, device=problem.device)
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(whole), torch.zeros_like(ids), whole, ids, BLOCK_SIZE=page, seq_lengths=(1, num_pages * page)
    )
    query = problem.query(seed)[:, :, None]  # [num_seqs, num_heads, 1, head_dim]
    if seed == 0:
        torch._dynamo.reset()  # one compilation for each problem, so that their number meets no limit
    compiled = _compiled_flex()
    return lambda: compiled(query, key, value, block_mask=mask, scale=problem.scale, enable_gqa=True)[:, :, 0]


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flash_attn(version: int) -> Callable[[Problem, int], Call]:
    package, table = {2: ("flash_attn", "block_table"), 3: ("flash_attn_interface", "page_table")}[version]

    def prepare(problem: Problem, seed: int) -> Call:
        attend = import_module(package).flash_attn_with_kvcache
        _only_decode(problem)
        key_cache, value_cache, tables = problem.paged(seed, 256, "NHD")
        query, (seq_lens, _) = problem.query(seed)[:, None], problem.lengths()
        known = {"cache_seqlens": seq_lens, table: tables, "softmax_scale": problem.scale, "causal": True}
        return lambda: attend(query, key_cache, value_cache, **known)[:, 0]

    return prepare


def flashinfer(problem: Problem, seed: int) -> Call:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper  # type: ignore[import-not-found]

    _only_decode(problem)
    page, shape = 16, problem.shape
    key_cache, value_cache, tables = problem.paged(seed, page, "HND")
    starts = torch.arange(problem.num_seqs + 1, dtype=torch.int32, device=problem.device) * tables.shape[1]
    last = torch.full((problem.num_seqs,), page, dtype=torch.int32, device=problem.device)
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=problem.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    wrapper.plan(
        starts, tables.flatten(), last, shape.num_heads, shape.num_kv_heads, shape.head_dim, page,
        q_data_type=problem.dtype, kv_data_type=problem.dtype, sm_scale=problem.scale,
    )  # fmt: skip
    query = problem.query(seed)
    return lambda: wrapper.run(query, (key_cache, value_cache))


def vllm_flash_attn(problem: Problem, seed: int) -> Call:
    from vllm.vllm_flash_attn import flash_attn_varlen_func, is_fa_version_supported

    key_cache, value_cache, tables = problem.paged(seed, 16, "NHD")
    query, (seq_lens, starts) = problem.query(seed), problem.lengths()
    known = {
        "cu_seqlens_q": starts, "max_seqlen_q": problem.num_queries, "seqused_k": seq_lens,
        "max_seqlen_k": problem.context, "block_table": tables, "softmax_scale": problem.scale, "causal": True,
        "fa_version": 3 if is_fa_version_supported(3) else 2,
    }  # fmt: skip
    return lambda: flash_attn_varlen_func(q=query, k=key_cache, v=value_cache, **known)


def _only_decode(problem: Problem) -> None:
    if problem.num_queries != 1:
        raise NotImplementedError("timed for decode alone")


PEERS: dict[str, Callable[[Problem, int], Call]] = {
    "torch SDPA": torch_sdpa,
    "torch flex": torch_flex,
    "flash-attn 2": flash_attn(2),
    "flash-attn 3": flash_attn(3),
    "flashinfer": flashinfer,
    "vLLM flash-attn": vllm_flash_attn,
}
