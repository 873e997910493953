"""Chapter 2. What differs between families of models: read from their files into one `ModelConfig`.

    family      what differs from Llama 2                       the line of transformer.py that reads it
    llama       3.1 divides its slow frequencies                frequency = ... / rope_factors
    mistral     v0.1 sees the last 4,096 tokens                 cache.attend(..., self.sliding_window)
    qwen2       biases of W^Q, W^K, W^V                         nn.Linear(..., bias=config.qkv_bias)
    qwen3       norms of queries and keys                       self.q_norm(query), self.k_norm(key)
    smollm3     every fourth layer has no positions             if self.has_rope

Hugging Face's config.json calls a family by its model_type, GGUF by its architecture. Mistral's GGUF files say llama.
Sources: Peng et al., "YaRN" (2023), section 3; llama.cpp's src/llama-model.cpp; transformers' modeling_rope_utils.py.
"""

import json
import math
from pathlib import Path
from typing import Any

from minipaged.model.gguf_file import GGUFFile, ModelFileError, gguf_field
from minipaged.model.transformer import MAX_POSITION, ModelConfig

FAMILIES: dict[str, dict[str, bool]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "smollm3": {},
}
# What is asked for often, and needs more than a field.
_NOT_SUPPORTED = {
    "gemma2": "it caps its scores",
    "gemma3": "it norms behind each branch",
    "phi3": "its weights are fused",
    "mixtral": "it has experts",
    "qwen2_moe": "it has experts",
    "qwen3_moe": "it has experts",
    "qwen3moe": "it has experts",
}
GGUF_ROPE_FACTORS = "rope_freqs.weight"  # a tensor of all layers, and no weight
_SMOLLM3_INTERVAL = 4  # each fourth layer has no positions; its GGUF files do not say so


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    family = gguf_field(file, "general.architecture")
    if family == "mistral":
        raise ModelFileError("architecture 'mistral' is not supported: Mistral's GGUF files say 'llama'")
    _check_family("architecture", family)

    def get(name: str, default: Any = None) -> Any:
        return gguf_field(file, f"{family}.{name}", default)

    if get("expert_count", 0):
        raise ModelFileError(f"architecture {family!r} with experts is not supported")
    tokens = gguf_field(file, "tokenizer.ggml.tokens")
    names = ("attention.head_count", "embedding_length", "block_count", "context_length")
    num_heads, hidden_size, num_layers, context = (_counted(name, get(name)) for name in names)
    head_dim = get("attention.key_length", hidden_size // num_heads)
    for name, dims in (("rope.dimension_count", "turns"), ("attention.value_length", "keeps as values")):
        if (found := get(name, head_dim)) != head_dim:
            raise ModelFileError(f"the model {dims} {found} of {head_dim} dimensions of a head: only all are supported")
    theta = get("rope.freq_base", 10_000.0)
    scaling = {
        "rope_type": get("rope.scaling.type", "none"),
        "factor": get("rope.scaling.factor", 1.0),
        "original_max_position_embeddings": get("rope.scaling.original_context_length", context),
        "beta_fast": get("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": get("rope.scaling.yarn_beta_slow", 1.0),
    }
    factors, attention_factor = rope_scaling(scaling, theta, head_dim)
    if GGUF_ROPE_FACTORS in file.tensors:
        factors = tuple(file.tensor(GGUF_ROPE_FACTORS).ravel().tolist())
    window = get("attention.sliding_window", 0)
    return ModelConfig(
        vocab_size=len(tokens) if isinstance(tokens, list) else 0,
        hidden_size=hidden_size,
        intermediate_size=get("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=get("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_position=context,
        rope_theta=theta,
        rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in file.tensors,
        rope_factors=factors,
        rope_attention_factor=attention_factor * get("rope.scaling.yarn_attn_factor", 1.0),
        no_rope_layers=_each_nth(num_layers, _SMOLLM3_INTERVAL) if family == "smollm3" else (),
        sliding_windows=(window,) * num_layers if window else (),
        **FAMILIES[family],
    )


def config_from_json(path: Path) -> ModelConfig:
    """Read a Hugging Face config.json. Raises ModelFileError for another family, or where a number is missing."""
    fields = read_json(path)

    def get(name: str) -> Any:
        if name not in fields:
            raise ModelFileError(f"{path} has no {name!r}")
        return fields[name]

    try:
        _check_family("model_type", family := get("model_type"))
        if fields.get("attention_bias") or fields.get("mlp_bias") or fields.get("hidden_act", "silu") != "silu":
            raise ModelFileError("further biases, and activations other than silu, are not supported")
        names = ("num_attention_heads", "hidden_size", "num_hidden_layers", "max_position_embeddings")
        heads, hidden, layers, context = (_counted(name, get(name)) for name in names)
        head_dim = hidden // heads if (head_dim := fields.get("head_dim")) is None else head_dim
        rope = {**(fields.get("rope_parameters") or {}), **(fields.get("rope_scaling") or {})}
        theta = rope.get("rope_theta", fields.get("rope_theta", 10_000.0))
        rope["original_max_position_embeddings"] = original = rope.get("original_max_position_embeddings") or context
        factors, attention_factor = rope_scaling(rope, theta, head_dim)
        if rope.get("rope_type", rope.get("type")) == "yarn":  # some files give the context without the scaling
            context = max(context, int(original * rope["factor"]))
        return ModelConfig(
            vocab_size=get("vocab_size"),
            hidden_size=hidden,
            intermediate_size=get("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=heads if (kv_heads := fields.get("num_key_value_heads")) is None else kv_heads,
            head_dim=head_dim,
            max_position=context,
            rope_theta=theta,
            rms_norm_eps=get("rms_norm_eps"),
            tie_embeddings=fields.get("tie_word_embeddings", family == "smollm3"),
            rope_factors=factors,
            rope_attention_factor=attention_factor,
            no_rope_layers=_no_rope_layers(fields, layers) if family == "smollm3" else (),
            sliding_windows=_sliding_windows(fields, family, layers),
            **FAMILIES[family],
        )
    except ModelFileError as error:
        raise error if str(path) in str(error) else ModelFileError(f"{path}: {error}") from error
    except (ValueError, TypeError, ArithmeticError, KeyError, AttributeError) as error:
        raise ModelFileError(f"{path} describes no model that could be built: {error}") from error


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


def _check_family(what: str, family: Any) -> None:
    if str(family) not in FAMILIES:
        why = f" ({_NOT_SUPPORTED[family]})" if str(family) in _NOT_SUPPORTED else ""
        raise ModelFileError(f"{what} {family!r} is not supported{why}: {', '.join(FAMILIES)} are")


def _counted(name: str, value: Any) -> int:
    if not isinstance(value, int) or not 1 <= value <= MAX_POSITION:
        raise ModelFileError(f"{name} must be a whole number, 1 to {MAX_POSITION:,}, got {value!r}")
    return value


def _no_rope_layers(fields: dict[str, Any], num_layers: int) -> tuple[int, ...]:
    turned = fields.get("no_rope_layers")  # a 1 for each layer that has positions, in spite of its name
    if turned is None:
        return _each_nth(num_layers, fields.get("no_rope_layer_interval", _SMOLLM3_INTERVAL))
    return tuple(i for i in range(num_layers) if not turned[i])


def _each_nth(num_layers: int, interval: int) -> tuple[int, ...]:
    return tuple(range(interval - 1, num_layers, interval))


def _sliding_windows(fields: dict[str, Any], family: str, num_layers: int) -> tuple[int | None, ...]:
    window = fields.get("sliding_window")
    if family == "llama" or window is None or not fields.get("use_sliding_window", family == "mistral"):
        return ()
    if family == "mistral":
        return (window,) * num_layers
    kinds = fields.get("layer_types")
    if kinds is None:
        first = fields.get("max_window_layers", num_layers)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object. Raises ModelFileError where it does not."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number without end, brackets without end
        raise ModelFileError(f"{path} ({path.stat().st_size:,} bytes) is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ModelFileError(f"{path} must hold one JSON object, got a {type(fields).__name__}")
    return fields
