"""Chapter 2. Generating without a cache: every step computes the whole of every text, and keeps nothing.

A text of n tokens then costs 1 + 2 + ... + n: O(n^2). The course measures and tests every cache against this loop:
nothing is kept, so nothing can be kept wrongly.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from minipaged.attention.contiguous import causal_attention
from minipaged.model.batch import ForwardBatch, make_batch
from minipaged.model.transformer import Transformer


class RecomputeCache:
    """Invariant: nothing is remembered between two calls."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, batch: ForwardBatch, sliding_window: int | None
    ) -> Tensor:
        """Causal attention of each sequence over itself. Raises ValueError where a sequence does not come whole."""
        starts, lens = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
        out = torch.empty_like(query)
        for seq, seq_len in enumerate(lens):
            rows = slice(starts[seq], starts[seq + 1])
            if rows.stop - rows.start != seq_len:
                raise ValueError(f"without a cache, all {seq_len} tokens must come; got {rows.stop - rows.start}")
            context = key[rows].transpose(0, 1), value[rows].transpose(0, 1)
            scale = query.shape[-1] ** -0.5
            out[rows] = causal_attention(query[rows], *context, scale=scale, sliding_window=sliding_window)
        return out


@torch.inference_mode()
def next_logits(transformer: Transformer, texts: Sequence[Sequence[int]]) -> Tensor:
    """Scores of the next token of each text, [num_texts, vocab_size]: all of their tokens are computed."""
    batch = make_batch(texts, [0] * len(texts), device=transformer.embed_tokens.weight.device)
    hidden = transformer(batch, RecomputeCache())  # [num_tokens, hidden_size]
    return transformer.logits(hidden[batch.logits_rows])


def generate(transformer: Transformer, prompts: Sequence[Sequence[int]], max_tokens: int) -> Iterator[list[int]]:
    """The likeliest tokens behind each prompt: yields the next token of every prompt, `max_tokens` times."""
    texts = [list(prompt) for prompt in prompts]
    for _ in range(max_tokens):
        tokens: list[int] = next_logits(transformer, texts).max(-1).indices.tolist()
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
        yield tokens
