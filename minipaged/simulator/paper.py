"""Chapter 11. What the paper printed, and where. Kwon et al., SOSP 2023, arXiv 2309.06180.

Only what is printed as a number, on a bar or in the text. Nothing was read off a curve.
"""

from typing import NamedTuple

Value = float | tuple[float, float]  # a number, or from - to


class Bar(NamedTuple):
    """One bar of Figure 2: where the slots of the KV cache are, in %."""

    held: float
    reserved: float
    internal: float
    external: float


# Figure 2. For vLLM only the tokens are printed.
MEMORY = {
    "max": Bar(20.4, 13.3, 57.3, 8.9),
    "pow2": Bar(26.8, 17.9, 13.6, 41.6),
    "oracle": Bar(38.2, 25.2, 0.0, 36.6),
}
MEMORY_HELD = {"max": 20.4, "pow2": 26.8, "oracle": 38.2, "paged": 96.3}

# Figure 13, OPT-13B: mean number of requests in a batch, at so many requests a second.
BATCH_RATES = {"sharegpt": 2.0, "alpaca": 30.0}
BATCH = {
    "sharegpt": {"max": 7.00, "pow2": 9.81, "oracle": 13.62, "paged": 30.42},
    "alpaca": {"max": 7.00, "pow2": 43.24, "oracle": 72.75, "paged": 132.44},
}

# Section 6.2, ShareGPT, over three models: how much more requests a second vLLM sustains. Section 6.3, Alpaca, OPT-13B.
RATE_OVER_ORACLE = (1.7, 2.7)
RATE_OVER_MAX = (2.7, 8.0)
RATE_OVER_ORACLE_ALPACA = 1.3

# Figure 15, Alpaca, for 2, 4 and 6 sequences; section 6.3 for ShareGPT, where only the ends of the range are given.
SAVED_PARALLEL = {2: 6.09, 4: 8.53, 6: 9.79}
SAVED_BEAM = {2: 37.56, 4: 53.13, 6: 55.16}
SAVED_PARALLEL_SHAREGPT = (16.2, 30.5)
SAVED_BEAM_SHAREGPT = (44.3, 66.3)

# Section 6.4, LLaMA-13B, translation: throughput over Orca (Oracle), by the tokens of the shared prefix.
PREFIX_FACTOR = {80: 1.67, 341: 3.58}
