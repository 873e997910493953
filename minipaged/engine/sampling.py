"""Chapters 2 and 10. From logits to the next token: greedy, or drawn from the likeliest.

    logits -> repetition penalty -> / temperature -> softmax -> min_p -> the top_k likeliest -> top_p -> draw

The rows of the tensors are the sequences of a step. The one random number of a draw is a function of the request's
seed, the sample's number and the token's position. So a draw depends neither on the rest of the batch nor on a
preemption, and a step that failed is repeated with the same outcome. (Counter-based random numbers: Salmon et al.,
"Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.)

Sources: top-k, Fan et al., "Hierarchical Neural Story Generation" (2018), section 5.4; top-p, Holtzman et al., "The
Curious Case of Neural Text Degeneration" (2020), section 3.1; min-p, Nguyen et al., "Turning Up the Heat" (2024);
repetition penalty, Keskar et al., "CTRL" (2019), section 4.1. The order is vLLM's.
"""

import time
from collections.abc import Sequence as Items

import numpy as np
import torch
from torch import Tensor

from minipaged.engine.sequence import SamplingParams, Sequence, Token

CANDIDATES = 1024  # tokens sorted at first: more are hardly ever needed, and sorting the vocabulary takes long


def sample(logits: Tensor, seqs: Items[Sequence]) -> list[Token | Exception]:
    """The next token of each sequence, or why it has none. logits [num_seqs, vocab_size], row i for seqs[i]. A sequence
    that fails fails alone: the others are then sampled one by one, which gives the same tokens."""
    try:
        return [*_sample(logits, seqs)]
    except Exception as error:
        if len(seqs) == 1:
            return [error]
        return [sample(logits[i : i + 1], [seq])[0] for i, seq in enumerate(seqs)]


def _sample(logits: Tensor, seqs: Items[Sequence]) -> list[Token]:
    adjusted = penalised(logits, seqs)
    likeliest = adjusted.max(-1)  # of equal ones the first, as argmax takes, in half the time
    if not (likeliest.values.isfinite() & adjusted.amin(-1).isfinite()).all():
        raise FloatingPointError("logits are not finite: the weights are damaged, or a value overflowed")
    token_ids: list[int] = likeliest.indices.tolist()
    drawn = [i for i, seq in enumerate(seqs) if seq.params.temperature > 0.0]
    if drawn:
        weights = probabilities(adjusted[drawn], [seqs[i].params for i in drawn])  # [num_drawn, vocab_size]
        numbers = [uniform(seqs[i].seed, seqs[i].index, len(seqs[i])) for i in drawn]
        for i, token_id in zip(drawn, draw(weights, numbers), strict=True):
            token_ids[i] = token_id
    kept: list[dict[int, float] | None] = [None] * len(seqs)
    if asked := [i for i, seq in enumerate(seqs) if seq.params.logprobs is not None]:
        counts = [seqs[i].params.logprobs or 0 for i in asked]
        for i, found in zip(asked, logprobs(logits[asked], [token_ids[i] for i in asked], counts), strict=True):
            kept[i] = found
    now = time.perf_counter()
    return [Token(token_id, found, now) for token_id, found in zip(token_ids, kept, strict=True)]


def uniform(seed: int, index: int, position: int) -> float:
    """The random number, in [0, 1), that decides the token at this position of sample `index`."""
    bits = np.random.Philox(key=np.array([seed % 2**64, index], np.uint64), counter=position)
    return float(np.random.Generator(bits).random())


def draw(weights: Tensor, numbers: Items[float]) -> list[int]:
    """A token for each row of probabilities [num_rows, vocab_size]: where the running sum passes the random number."""
    total = weights.cumsum(-1)  # [num_rows, vocab_size]
    below = torch.tensor(numbers, dtype=weights.dtype, device=weights.device)[:, None] * total[:, -1:]
    # Sums are rounded: never past the last token that has a probability at all.
    last = weights.shape[-1] - 1 - weights.gt(0).flip(-1).int().argmax(-1)
    tokens: list[int] = torch.searchsorted(total, below, right=True)[:, 0].minimum(last).tolist()
    return tokens


def probabilities(logits: Tensor, params: Items[SamplingParams]) -> Tensor:
    """The distributions that tokens are drawn from: logits -> probabilities, both [num_rows, vocab_size].

    Invariant: each row sums to 1, and its likeliest token is always kept.
    """
    logits = logits.double()
    # The likeliest becomes 0: no temperature makes it infinite.
    scaled = (logits - logits.amax(-1, keepdim=True)) / _column([p.temperature for p in params], logits)
    weights = scaled.softmax(-1)
    if any(p.min_p for p in params):
        least = _column([p.min_p for p in params], weights) * weights.amax(-1, keepdim=True)
        weights = torch.where(weights >= least, weights, 0.0)
    if any(p.top_k != -1 or p.top_p < 1.0 for p in params):
        weights = _likeliest(weights, params)
    return weights / weights.sum(-1, keepdim=True)


def _likeliest(weights: Tensor, params: Items[SamplingParams]) -> Tensor:
    """weights [num_rows, vocab_size] with all but the top_k likeliest, and of these all past top_p, set to 0."""
    vocab_size = weights.shape[-1]
    top_k = _column([vocab_size if p.top_k == -1 else min(p.top_k, vocab_size) for p in params], weights)
    top_p = _column([p.top_p for p in params], weights)
    num_sorted = min(CANDIDATES, vocab_size)
    while True:
        ordered, order = weights.topk(num_sorted)  # [num_rows, num_sorted], the likeliest first
        kept = torch.where(torch.arange(num_sorted, device=weights.device) < top_k, ordered, 0.0)
        # What top_p is a share of: all that top_k has left.
        total = torch.where(top_k < vocab_size, kept.sum(-1, keepdim=True), weights.sum(-1, keepdim=True))
        before = kept.cumsum(-1) - kept
        # Keep a token while those before it do not make up top_p yet: so the one that crosses it stays.
        # Where top_k reaches past the sorted tokens, `total` is not known yet.
        reached = (top_p < 1.0) & (top_k == vocab_size) & (kept.sum(-1, keepdim=True) >= top_p * total)
        enough = (top_k <= num_sorted) | reached
        if num_sorted == vocab_size or bool(enough.all()):
            # The likeliest always stays, also where its share of so small a top_p is rounded to 0.
            kept[:, 1:] = torch.where((top_p == 1.0) | (before < top_p * total), kept, 0.0)[:, 1:]
            return torch.zeros_like(weights).scatter(-1, order, kept)
        num_sorted = vocab_size


def penalised(logits: Tensor, seqs: Items[Sequence]) -> Tensor:
    """Logits [num_seqs, vocab_size] with those of tokens seen before made smaller, where a sequence asks for it."""
    rows = [i for i, seq in enumerate(seqs) if seq.params.repetition_penalty != 1.0]
    if rows:
        logits = logits.clone()
    for i in rows:
        seen = torch.from_numpy(np.unique(seqs[i].tokens(0, len(seqs[i])))).to(logits.device)
        penalty, old = seqs[i].params.repetition_penalty, logits[i, seen]
        logits[i, seen] = torch.where(old > 0, old / penalty, old * penalty)  # both make it less likely
    return logits


def logprobs(logits: Tensor, tokens: Items[int], numbers: Items[int]) -> list[dict[int, float]]:
    """For each row, the chosen token's and the `numbers[i]` likeliest tokens' logarithms of probability.

    logits [num_rows, vocab_size], as the model gave them: before penalty and temperature, like vLLM's.
    """
    scores = logits.double().log_softmax(-1)  # [num_rows, vocab_size]
    found = []
    for row, token, number in zip(scores, tokens, numbers, strict=True):
        best, ids = row.topk(min(number, len(row)))
        found.append({token: float(row[token]), **dict(zip(ids.tolist(), best.tolist(), strict=True))})
    return found


def _column(numbers: Items[float], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device=like.device)[:, None]  # [num_rows, 1]
