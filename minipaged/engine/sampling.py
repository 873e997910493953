"""Chapters 2 and 10. From logits to the next token: greedy, or drawn after temperature, top-k and top-p.

    logits / temperature -> keep the top_k likeliest -> keep the likeliest that make up top_p -> draw

Every sample draws from a random generator of its own. What it draws does not depend on who shares its batch.
Source for top-p: Holtzman et al., "The Curious Case of Neural Text Degeneration" (2020), section 3.1.
"""

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from minipaged.engine.sequence import SamplingParams, Sequence


def sample(logits: Tensor, seqs: Items[Sequence]) -> list[int]:
    """The next token of each sequence. logits [num_seqs, vocab_size], row i for seqs[i]."""
    tokens: list[int] = logits.argmax(-1).tolist()
    for i, seq in enumerate(seqs):
        if seq.params.temperature > 0.0:
            weights = probabilities(logits[i], seq.params)
            tokens[i] = int(torch.multinomial(weights, 1, generator=seq.generator))
    return tokens


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution that a token is drawn from: logits [vocab_size] -> probabilities [vocab_size], on the CPU.

    Invariant: they sum to 1, and the likeliest token is always kept.
    """
    logits = logits.double().cpu()
    scaled = (logits - logits.max()) / params.temperature  # the likeliest is 0: no temperature makes it infinite
    ordered, order = scaled.sort(descending=True, stable=True)
    weights = ordered.softmax(-1)
    keep = torch.ones_like(weights, dtype=torch.bool)
    if params.top_k != -1:
        keep[params.top_k :] = False
        weights = torch.where(keep, weights, 0.0)
        weights = weights / weights.sum()
    # Keep a token while those before it do not make up top_p yet: so the one that crosses it stays.
    if params.top_p < 1.0:
        keep &= weights.cumsum(-1) - weights < params.top_p
    weights = torch.where(keep, weights, 0.0)
    return torch.zeros_like(weights).scatter(0, order, weights / weights.sum())


def generator(seed: int, index: int) -> torch.Generator:
    """The random numbers of sample `index` of a request with this seed."""
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
