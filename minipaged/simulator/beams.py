"""Chapter 11. A beam search over a made-up language: which beams go on, and how often they fork.

How much a beam search shares depends on how soon one beam's children push out the others. That is a property of the
model and of the text, and the paper does not print it. So we take a language with no parameter at all:

    at every step every beam draws u, uniform in (0, 1): its likeliest next token has probability u,
    the next one u (1 - u), then u (1 - u)^2, ...

Sometimes it is sure of its next token, sometimes it is not, and all degrees are equally frequent.
"""

import heapq
import math
import random


def choose(scores: list[float], width: int, rng: random.Random) -> list[tuple[int, float]]:
    """The `width` likeliest continuations of beams with these log-probabilities: (which beam it continues, its score).

    Beams that are not named end, and a beam that is named twice forks.
    """
    options = []
    for beam, score in enumerate(scores):
        sure = 1.0 - rng.random()  # in (0, 1]
        more, first = math.log1p(-sure) if sure < 1.0 else -math.inf, score + math.log(sure)
        options += [(first + rank * more if rank else first, beam) for rank in range(width)]
    return [(beam, score) for score, beam in heapq.nlargest(width, options)]
