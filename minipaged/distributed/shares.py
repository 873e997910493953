"""Chapter 13. Which rank holds what: heads, inner columns and words of the vocabulary, divided over ranks.

    SmolLM2 on 2 ranks     query heads  0 1 2 3 4 5 | 6 7 8        tiny on 3 ranks     0 | 1 | 2 3
                           KV heads     0     1     | 2                                0 | 0 |  1

Query heads of one group read the same K and V, so a group stays together as long as there are KV heads for all ranks.
Beyond that a group is divided, and its KV head is held by each of its ranks: it is replicated. Shares need not be
equal. The first ranks hold the larger ones, and a step takes as long as the largest.

A block has the same number on every rank, and holds the same tokens. Only its heads differ. So nothing of chapters 6
to 10 is divided: one allocator, one scheduler, one block table.

Sources: Shoeybi et al., "Megatron-LM" (2019), section 3 (columns, then rows, then one sum); the PagedAttention paper,
section 4.6 (one block table, a share of the heads on each GPU).
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from minipaged.cdiv import cdiv
from minipaged.model.transformer import ModelConfig

INNER_UNIT = 32  # columns; most quantised formats keep as many numbers in a block, and a cut through one is a loss


@dataclass(frozen=True)
class Share:
    """What one rank holds of the whole. Every range is of the whole model's numbers."""

    heads: range  # query heads
    kv_heads: range
    inner: range  # rows of W^gate and W^up, columns of W^down
    vocab: range  # rows of the embedding and of the output layer


def parts(total: int, size: int) -> list[range]:
    """0 to total - 1 in `size` runs, as equal as can be, the longer ones first."""
    ends = [i * (total // size) + min(i, total % size) for i in range(size + 1)]
    return [range(a, b) for a, b in pairwise(ends)]


def shares(config: ModelConfig, size: int) -> list[Share]:
    """The share of each of `size` ranks. Invariant: but for replicated KV heads, they partition the whole.

    Each kind is divided by `parts`: heads in whole groups, as long as there are KV heads for all ranks; inner columns
    in whole units of INNER_UNIT, where they divide into such units and there are enough for all. With more ranks than
    KV heads, `parts` of the ranks replicate each KV head, and its group of query heads is divided over them.

    Raises ValueError, with the numbers, where a rank would be left without a head, an inner column or a word.
    """
    if size < 1:
        raise ValueError(f"tensor_parallel_size must be at least 1, got {size}")
    for name, most in (("num_heads", config.num_heads), ("intermediate_size", config.intermediate_size)):
        if size > most:
            raise ValueError(
                f"tensor_parallel_size {size} does not fit the model: it has {name} = {most}, and each rank needs one "
                f"(num_heads {config.num_heads}, num_kv_heads {config.num_kv_heads})"
            )
    if size > config.vocab_size:
        raise ValueError(f"tensor_parallel_size {size} does not fit a vocabulary of {config.vocab_size}")
    unit = INNER_UNIT if config.intermediate_size % INNER_UNIT == 0 else 1
    unit = unit if config.intermediate_size // unit >= size else 1
    inner = [range(unit * p.start, unit * p.stop) for p in parts(config.intermediate_size // unit, size)]
    return [Share(*found) for found in zip(*_heads(config, size), inner, parts(config.vocab_size, size), strict=True)]


def _heads(config: ModelConfig, size: int) -> tuple[list[range], list[range]]:
    """Query heads and KV heads of each rank."""
    group = config.num_heads // config.num_kv_heads
    if size <= config.num_kv_heads:
        kv_heads = parts(config.num_kv_heads, size)
        return [range(group * kv.start, group * kv.stop) for kv in kv_heads], kv_heads
    heads, kv_heads = [], []
    for kv_head, ranks in enumerate(parts(size, config.num_kv_heads)):  # the ranks that replicate this KV head
        for part in parts(group, len(ranks)):
            heads.append(range(group * kv_head + part.start, group * kv_head + part.stop))
            kv_heads.append(range(kv_head, kv_head + 1))
    return heads, kv_heads


def local_config(config: ModelConfig, share: Share) -> ModelConfig:
    """The shape of one rank's part of the model. What is not divided (hidden size, layers, positions) stays."""
    return replace(
        config,
        num_heads=len(share.heads),
        num_kv_heads=len(share.kv_heads),
        intermediate_size=len(share.inner),
        vocab_size=len(share.vocab),
    )


def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of all weights of a model of this shape: of the whole one, or with `local_config` of a rank's part."""
    of_layer = 2 * config.num_heads + 2 * config.num_kv_heads  # Q and output, K and V: heads of head_dim rows each
    rows = config.num_layers * (of_layer * config.head_dim + 3 * config.intermediate_size + 2) + 1  # 2 norms, and 1
    rows += config.vocab_size * (1 if config.tie_embeddings else 2)
    biases = config.num_heads + 2 * config.num_kv_heads if config.qkv_bias else 0  # of head_dim numbers each
    of_heads = config.num_layers * (biases + 2 * config.qk_norm) * config.head_dim
    return (rows * config.hidden_size + of_heads) * dtype.itemsize


@dataclass(frozen=True)
class StepTraffic:
    """What ranks exchange in one step: see docs/tensor_parallel.md. Bytes are of the tensors, as one rank hands them
    over; an all-reduce by a ring sends 2 (size - 1) / size as many from every rank."""

    all_reduces: int
    all_reduce_bytes: int
    gathers: int
    gather_bytes: int


def step_traffic(config: ModelConfig, size: int, num_tokens: int, num_ends: int, dtype: torch.dtype) -> StepTraffic:
    """Of a step of num_tokens tokens, num_ends of them the last of a sequence. All 0 where there is one rank.

    all-reduces: one after the embedding, two in each layer, of [num_tokens, hidden_size].
    gather: one, where any logits are needed, of [num_ends, ceil(vocab_size / size)].
    """
    if size == 1:
        return StepTraffic(0, 0, 0, 0)
    number = 2 * config.num_layers + 1
    words = cdiv(config.vocab_size, size)
    return StepTraffic(
        number,
        number * num_tokens * config.hidden_size * dtype.itemsize,
        int(num_ends > 0),
        num_ends * words * dtype.itemsize,
    )
