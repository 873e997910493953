"""Chapter 2. Longer contexts than a model was first trained for: what its rotary frequencies are divided by.

    linear    position p is turned as position p / factor was
    llama3    fast pairs as they were, slow ones as in linear, and a ramp over their turns between the two
    yarn      the same with a ramp over the index of the pair, and cos and sin are multiplied by a number

Sources: Peng et al., "YaRN" (2023), section 3; transformers' modeling_rope_utils.py.
"""

import math
from typing import Any

from minipaged.model.gguf_file import ModelFileError


def rope_scaling(rope: dict[str, Any], theta: float, head_dim: int) -> tuple[tuple[float, ...], float]:
    """What each frequency is divided by (nothing where none is scaled), and what cos and sin are multiplied by.

    linear divides all by one factor. llama3 and yarn divide slow frequencies, which make less than some number of turns
    within the context of the first training, and leave fast ones; between them lies a ramp, over turns (llama3) or over
    the index of the pair (yarn).
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or kind not in ("default", "none", "linear", "llama3", "yarn"):
        raise ModelFileError(f"scaling {kind!r} of rotary positions is not supported, or not of a part: {rope}")
    if kind in ("default", "none"):
        return (), 1.0
    factor: float = float(rope["factor"])
    attention_factor: Any = 1.0
    if kind == "linear":
        return (factor,) * (head_dim // 2), 1.0
    context, pairs = rope["original_max_position_embeddings"], range(head_dim // 2)
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = [context * theta ** (-2 * i / head_dim) / (2 * math.pi) for i in pairs]
        kept = [(n - low) / (high - low) for n in turns]  # 1: as it is, 0: divided
    else:
        fast, slow = (
            head_dim * math.log(context / (n * 2 * math.pi)) / (2 * math.log(theta))  # the pair that makes n turns
            for n in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
        )
        if rope.get("truncate", True):
            fast, slow = math.floor(fast), math.ceil(slow)
        fast, slow = max(fast, 0), min(slow, head_dim - 1)
        kept = [1 - (i - fast) / (slow - fast or 0.001) for i in pairs]
        attention_factor = rope.get("attention_factor")
        if attention_factor is None:
            scales: list[Any] = [rope.get("mscale"), rope.get("mscale_all_dim")]
            above, below = scales if all(scales) else (1.0, 0.0)
            attention_factor = _mscale(factor, above) / _mscale(factor, below)
    kept = [min(1.0, max(0.0, share)) for share in kept]
    return tuple(1.0 / ((1.0 - share) / factor + share) for share in kept), attention_factor


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
