r"""Chapter 13. Linear layers over several ranks: divide the columns, then the rows, and add up once.

    Y = X W^T with W [out, in].  Two layers in a row, with something elementwise between them, on two ranks:

    column-parallel    W = [ W_1 ]     X W^T   = [ X W_1^T | X W_2^T ]     each rank has some outputs; nothing is sent
                           [ W_2 ]
    row-parallel       V = [ V_1 V_2 ] Y V^T   = Y_1 V_1^T + Y_2 V_2^T     each rank has some inputs; one all-reduce

(The names are those of the transposed matrix that Megatron-LM multiplies with from the right.) Attention is such a
pair: heads are outputs of W^Q, W^K, W^V and inputs of W^O, and a head is attended to by itself. SwiGLU is one too. So
a layer needs two all-reduces, and everything between a column-parallel layer and its row-parallel one is the code of
one device, with fewer heads.

A column-parallel layer that keeps its outputs to itself is an `nn.Linear` with some of the rows. It needs no class.
"""

# Exercise ch13_layers, about 40 minutes. Write what raises
# NotImplementedError, in this order, and run `minipaged check 13` after each step:
#
#   1. RowParallelLinear.forward
#   2. VocabParallelEmbedding.forward
#   3. VocabParallelHead.forward
#   4. parallelise
#
# What is given may be changed too. Any way that keeps the docstrings' promises is right.
# A call that raises changes nothing. Bad input is a ValueError whose message has the numbers, in any words;
# where two errors are due, either is right.
#
# `parts` of ch13_shares.py comes first. In this suite ranks are threads: all_reduce adds up
# in place and returns the sum, gather returns all tensors on rank 0, and [] elsewhere.
#
# Given: Group, in minipaged/distributed/group.py.
#
#   all_reduce(tensor: Tensor) -> Tensor
#       The sum over ranks, in place. Raises CollectiveError.
#   gather(tensor: Tensor) -> list[Tensor]
#       At rank 0 the tensors of all ranks, by rank; elsewhere nothing. Raises CollectiveError.
#
# Made from minipaged/distributed/layers.py by minipaged/course/generate.py.

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipaged.distributed.group import Group
from minipaged.distributed.shares import Share, parts
from minipaged.model.transformer import Transformer


class RowParallelLinear(nn.Module):
    """`linear` holds some of the columns, and gets those inputs. Returns the product of all ranks, on every rank."""

    def __init__(self, linear: nn.Module, group: Group):
        super().__init__()
        self.linear, self.group = linear, group

    def forward(self, input: Tensor) -> Tensor:
        """input [num_tokens, this rank's columns]. Returns [num_tokens, out_features]. One all-reduce."""
        raise NotImplementedError("ch13: RowParallelLinear.forward")


class VocabParallelEmbedding(nn.Module):
    """Rows start, start + 1, ... of the table. A token has its row on one rank, and zeros elsewhere: they add up."""

    def __init__(self, weight: nn.Parameter, start: int, group: Group):
        super().__init__()
        self.weight, self.start, self.group = weight, start, group

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids [num_tokens] of the whole vocabulary. Returns [num_tokens, hidden_size], the same on every rank.

        One all-reduce. Invariant: for each token exactly one rank brings its row, and the others bring zeros.
        """
        raise NotImplementedError("ch13: VocabParallelEmbedding.forward")


class VocabParallelHead(nn.Module):
    """Column-parallel: each rank scores its own words. Rank 0 chooses tokens, so rank 0 alone gets all scores.

    Other ranks get their own. Shares differ by a word at most, and are sent at the length of the longest.
    """

    def __init__(self, linear: nn.Module, vocab_size: int, group: Group):
        super().__init__()
        self.linear, self.group = linear, group
        self.lengths = [len(part) for part in parts(vocab_size, group.size)]

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [num_rows, hidden_size]. Returns [num_rows, vocab_size] on rank 0, words in their order.

        One gather; none where there is no row, or one rank.
        """
        raise NotImplementedError("ch13: VocabParallelHead.forward")


def parallelise(transformer: Transformer, share: Share, vocab_size: int, group: Group) -> None:
    """Make one rank's part of a model (of shape `local_config`) one that works together with the others, in place.

    transformer: its embedding, output layer and linear layers hold what `share` names. vocab_size: of the whole model.
    Afterwards hidden states are the same on every rank, and `logits` of rank 0 are those of the whole model.

    Attention, norms, rotary positions and SwiGLU are untouched: the file of chapter 2 runs on every rank as it is.
    """
    raise NotImplementedError("ch13: parallelise")
