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

# Exercise ch13_shares, about 40 minutes. Write what raises
# NotImplementedError, in this order, and run `minipaged check 13` after each step:
#
#   1. parts
#   2. shares
#   3. local_config
#   4. weight_bytes
#   5. step_traffic
#
# What is given may be changed too. Any way that keeps the docstrings' promises is right.
# A call that raises changes nothing. Bad input is a ValueError whose message has the numbers, in any words;
# where two errors are due, either is right.
#
# Made from minipaged/distributed/shares.py by minipaged/course/generate.py.

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
    raise NotImplementedError("ch13: parts")


def shares(config: ModelConfig, size: int) -> list[Share]:
    """The share of each of `size` ranks. Invariant: but for replicated KV heads, they partition the whole.

    Each kind is divided by `parts`: heads in whole groups, as long as there are KV heads for all ranks; inner columns
    in whole units of INNER_UNIT, where they divide into such units and there are enough for all. With more ranks than
    KV heads, `parts` of the ranks replicate each KV head, and its group of query heads is divided over them.

    Raises ValueError, with the numbers, where a rank would be left without a head, an inner column or a word.
    """
    raise NotImplementedError("ch13: shares")


def local_config(config: ModelConfig, share: Share) -> ModelConfig:
    """The shape of one rank's part of the model. What is not divided (hidden size, layers, positions) stays."""
    raise NotImplementedError("ch13: local_config")


def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of all weights of a model of this shape: of the whole one, or with `local_config` of a rank's part."""
    raise NotImplementedError("ch13: weight_bytes")


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
    raise NotImplementedError("ch13: step_traffic")
