"""Chapter 11. How long prompts and outputs are: the one thing of the paper's traces that had to be guessed.

The paper prints the means (section 6.1, Figure 11) and draws histograms: many short, few long. The traces themselves
are not public. So we draw from the usual curve of that shape, a lognormal, cut where the authors cut:

    weight of length n     exp(-(ln n - mu)^2 / (2 sigma^2)) / n,    for integers n
    kept                   prompts up to 1,024 tokens; prompt and output together up to 2,048; both at least 4

`mu` follows from the mean. `sigma`, how far the lengths spread, is the one fitted parameter of the whole simulator,
and it is the same for prompts and outputs, for ShareGPT and Alpaca. See SPREAD for what it was fitted to.

The cuts are those of the authors' benchmark script (vLLM, benchmarks/benchmark_throughput.py, sample_requests).
"""

import math
import random
from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

MAX_MODEL_LEN = 2048  # tokens: OPT's context
MAX_PROMPT_LEN = 1024
MIN_LEN = 4

# Fitted, to one bar of the paper: in Figure 2, 13.3 % of the slots of Orca (Max) are reserved for tokens still to come.
# Seven requests have the 15,728 slots, and each waits for E[o^2] / (2 E[o]) tokens, o being the output's length, as an
# output that is twice as long is seen twice as often. So E[o^2] / E[o] = 2 * 0.133 * 15,728 / 7 = 598 tokens, beside a
# mean of 338. `fit_spread` finds this sigma again, and a test says so.
SPREAD = 0.866
RESERVED_SHARE_OF_MAX = 0.133
SLOTS_A_REQUEST_OF_MAX = 15_728 / 7


@dataclass(frozen=True)
class Lengths:
    """Prompt and output lengths of a trace, independent but for the cut of their sum. Both in tokens."""

    prompt_mean: float
    output_mean: float
    spread: float = SPREAD

    def __post_init__(self) -> None:
        for name, mean, most in (("prompt", self.prompt_mean, MAX_PROMPT_LEN), ("output", self.output_mean, 1024)):
            if not MIN_LEN < mean < most / 2:
                raise ValueError(f"{name}_mean must be above {MIN_LEN} and below {most // 2} tokens, got {mean}")
        if not 0.1 <= self.spread <= 2.0:
            raise ValueError(f"spread must be in [0.1, 2], got {self.spread}")

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """(prompt_len, output_len), prompt_len <= 1,024 and prompt_len + output_len <= 2,048."""
        prompts, outputs = _tables(self)
        while True:
            prompt_len = MIN_LEN + bisect(prompts, rng.random() * prompts[-1])
            output_len = MIN_LEN + bisect(outputs, rng.random() * outputs[-1])
            if prompt_len + output_len <= MAX_MODEL_LEN:
                return prompt_len, output_len

    def output_moment(self) -> float:
        """E[o^2] / E[o] of the outputs, in tokens: the mean length of the output that a running request will have."""
        prompt_weights, output_weights = _weights(self)
        first, second = _moments(output_weights, prompt_weights)
        return second / first


SHAREGPT = Lengths(prompt_mean=161.31, output_mean=337.99)  # the paper, Figure 11 (a)
ALPACA = Lengths(prompt_mean=19.31, output_mean=58.45)  # the paper, Figure 11 (b)


def fit_spread() -> float:
    """The spread at which Orca (Max) reserves as much as in Figure 2."""
    wanted = 2 * RESERVED_SHARE_OF_MAX * SLOTS_A_REQUEST_OF_MAX
    return _root(lambda spread: replace(SHAREGPT, spread=spread).output_moment() - wanted, 0.8, 1.0)


_MOST_OUTPUT = MAX_MODEL_LEN - MIN_LEN
_LOGARITHMS = [math.log(n) for n in range(MIN_LEN, MAX_MODEL_LEN)]


def _curve(mu: float, sigma: float, most: int) -> list[float]:
    """Weights of the lengths from MIN_LEN to `most`."""
    scale = 2 * sigma * sigma
    return [math.exp(-((x - mu) ** 2) / scale - x) for x in _LOGARITHMS[: most - MIN_LEN + 1]]


def _moments(weights: list[float], others: list[float]) -> tuple[float, float]:
    """Mean, and mean of squares, of lengths with these weights, where the sum with the other length is cut."""
    others_up_to = [0.0, *accumulate(others)]
    total = first = second = 0.0
    for n, weight in enumerate(weights, start=MIN_LEN):
        room = MAX_MODEL_LEN - n - MIN_LEN + 1  # lengths of the other one that still fit
        kept = weight * others_up_to[max(0, min(room, len(others)))]
        total += kept
        first += kept * n
        second += kept * n * n
    return first / total, second / total


@cache
def _weights(lengths: Lengths) -> tuple[list[float], list[float]]:
    """Weights of prompt and output lengths from MIN_LEN on, whose means are right after the cuts."""
    sigma = lengths.spread
    prompt_mu = math.log(lengths.prompt_mean) - sigma * sigma / 2
    output_mu = math.log(lengths.output_mean) - sigma * sigma / 2

    def fit(mean: float, most: int, others: list[float], guess: float) -> float:
        return _root(lambda mu: _moments(_curve(mu, sigma, most), others)[0] - mean, guess, guess + 0.1)

    for _ in range(3):  # the cut of the sum couples the two, weakly
        prompt_mu = fit(lengths.prompt_mean, MAX_PROMPT_LEN, _curve(output_mu, sigma, _MOST_OUTPUT), prompt_mu)
        output_mu = fit(lengths.output_mean, _MOST_OUTPUT, _curve(prompt_mu, sigma, MAX_PROMPT_LEN), output_mu)
    return _curve(prompt_mu, sigma, MAX_PROMPT_LEN), _curve(output_mu, sigma, _MOST_OUTPUT)


@cache
def _tables(lengths: Lengths) -> tuple[list[float], list[float]]:
    prompts, outputs = _weights(lengths)
    return [*accumulate(prompts)], [*accumulate(outputs)]


def _root(function: Callable[[float], float], before: float, now: float) -> float:
    """Where a smooth function is 0, by the secant method, from two guesses that are near."""
    at_before, at_now = function(before), function(now)
    for _ in range(50):
        if abs(at_now) < 1e-3 or at_now == at_before:
            return now
        before, now = now, now - at_now * (now - before) / (at_now - at_before)
        at_before, at_now = at_now, function(now)
    raise ValueError(f"no lognormal has these means: {at_now:+.3f} tokens off after 50 steps")
