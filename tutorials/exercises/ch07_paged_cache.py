"""Chapter 7. The paged cache: one pool of equal blocks for all requests, read through each one's block table.

    block 0 [ A0 A1 A2 A3 ]   block 1 [ B0 B1 B2 B3 ]   block 2 [ A4 A5 .. .. ]   block 3 [ free ]

    A: [0, 2]     B: [1]

memory/ decides, in plain Python, which sequence owns which block. `slot_mapping` then holds where to write, and
`block_tables` where to read. The compiled loop and Triton have the same two functions under the same names. All layers
of a step have the same tables, so the numbers in them are checked at the first layer only.
"""

# Exercise ch07_paged_cache, about 15 minutes. Write what raises
# NotImplementedError, in this order, and run `minipaged check 7` after each step:
#
#   1. PagedCache.attend
#   2. PagedCache.copy_blocks
#
# What is given may be changed too. Any way that keeps the docstrings' promises is right.
# A call that raises changes nothing. Bad input is a ValueError whose message has the numbers, in any words;
# where two errors are due, either is right.
#
# attend: compiled.write_kv, then compiled.paged_attention, on the caches of the layer, with the scale
# head_dim ** -0.5. Where the backend is Triton, self._kernels holds the two functions instead; else it is None.
# A step is refused before anything is written: call check_write_kv and check_paged_attention of this module,
# first and once for all layers of a step (self._checked is the batch that was checked last); then check=False.
#
# Given: ForwardBatch, in minipaged/model/batch.py.
#
#   token_ids: Tensor  # int64 [num_tokens]
#   positions: Tensor  # int64 [num_tokens]
#   query_start_loc: Tensor  # int32 [num_seqs + 1]
#   seq_lens: Tensor  # int32 [num_seqs]
#   block_tables: Tensor  # int32 [num_seqs, max_blocks], -1 past the end of a table
#   slot_mapping: Tensor  # int64 [num_tokens], -1 where nothing is kept
#   logits_rows: Tensor  # int64 [num_sampled], rows of the hidden states
#   max_query_len: int  # the most tokens that one sequence brings, known here without asking the device
#
# Given, in minipaged/attention/compiled.py:
#
#   write_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, *,
#       check: bool=True) -> None
#       Arguments and errors of `gathered.write_kv`. check=False: the caller has checked the arguments.
#
# Given, in minipaged/attention/compiled.py:
#
#   paged_attention(query: Tensor, key_cache: Tensor, value_cache: Tensor, block_tables: Tensor, seq_lens:
#       Tensor, query_start_loc: Tensor, *, scale: float, sliding_window: int | None=None, check: bool=True)
#       -> Tensor
#       Arguments, answer and errors of `paged_attention_gathered`. check=False: the caller has checked the
#       arguments.
#
# Made from minipaged/kvcache/paged.py by minipaged/course/generate.py.

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minipaged.attention import compiled
from minipaged.attention.checks import check_paged_attention, check_write_kv
from minipaged.model.batch import ForwardBatch
from minipaged.model.transformer import ModelConfig


class PagedCache:
    """`num_blocks` blocks of `block_size` tokens, in every layer; a block's number means the same block in all layers.

    Invariant: slot block * block_size + offset of a layer holds the K and V of one token of the block's owners.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        backend: str = "torch",
    ):
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks and block_size must be at least 1, got {num_blocks} and {block_size}")
        shape = (config.num_layers, num_blocks, config.num_kv_heads, block_size, config.head_dim)
        self._kernels = _triton_functions(backend, torch.device(device))
        self._checked: ForwardBatch | None = None  # the last step whose numbers were checked
        # Not zeroed: the system hands out pages of this memory when they are first written.
        self.key_cache = torch.empty(shape, dtype=dtype, device=device)
        self.value_cache = torch.empty(shape, dtype=dtype, device=device)
        # Views of each layer, made once: an index takes torch some microseconds, in each layer of each step.
        self._layers = list(zip(self.key_cache.unbind(), self.value_cache.unbind(), strict=True))

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, batch: ForwardBatch, sliding_window: int | None
    ) -> Tensor:
        """Write the new K and V to their slots, then attend through the block tables. Returns the shape of query."""
        raise NotImplementedError("ch07: PagedCache.attend")

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy whole blocks (source, target) in every layer, in this order (chapter 9: copy-on-write)."""
        raise NotImplementedError("ch07: PagedCache.copy_blocks")


def _triton_functions(backend: str, device: torch.device) -> tuple[Callable[..., None], Callable[..., Tensor]] | None:
    """write_kv and paged_attention of Triton, imported only if chosen; None for the backend torch."""
    if backend == "torch":
        return None
    if backend != "triton":
        raise ValueError(f"backend must be 'torch' or 'triton', got {backend!r}")
    # On a CPU Triton has only its interpreter, and a process has either that or the compiler, from triton's import on.
    if device.type == "cpu" and "triton" not in sys.modules:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if interpreted != (device.type == "cpu"):
        raise ValueError(
            f"backend 'triton' on device '{device.type}' needs TRITON_INTERPRET={int(device.type == 'cpu')} "
            f"from before triton is first imported; it is {os.environ.get('TRITON_INTERPRET', 'not set')}"
        )
    try:
        from minipaged.kernels import paged_attention, write_kv
    except ImportError as error:
        raise ValueError(f"backend 'triton' cannot be used: {error}") from error
    return write_kv, paged_attention
