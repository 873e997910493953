"""Chapter 2. What differs between families of models: read from their files into one `ModelConfig`.

    family      what differs from Llama 2                       the line of transformer.py that reads it
    llama       3.1 divides its slow frequencies                frequency = ... / rope_factors
    mistral     v0.1 sees the last 4,096 tokens                 cache.attend(..., self.sliding_window)
    qwen2       biases of W^Q, W^K, W^V                         nn.Linear(..., bias=config.qkv_bias)
    qwen3       norms of queries and keys                       self.q_norm(query), self.k_norm(key)
    smollm3     every fourth layer has no positions             if self.has_rope

Hugging Face's config.json calls a family by its model_type, GGUF by its architecture. Mistral's GGUF files say llama.
What a file asks for is applied as llama.cpp and transformers apply it, or refused by its name, and never passed over.
Sources: llama.cpp's src/llama-model.cpp; transformers' configuration_*.py of each family.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minipaged.model.folder import read_json
from minipaged.model.gguf_file import GGUFFile, ModelFileError, gguf_field
from minipaged.model.rope_scaling import rope_scaling
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
# Fields of other families that change what a model computes, in config.json and GGUF -> values that change nothing.
_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attention_bias", "mlp_bias", "expert_count", "attention.max_alibi_bias"), (0,)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "attention.clamp_kqv"), (0,)),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), (0, 1)),
    **dict.fromkeys(("embedding_scale", "residual_scale", "attention.output_scale"), (0, 1)),
    **dict.fromkeys(("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"), (0, 1)),
    "rope.scaling.yarn_log_multiplier": (0,),
    "partial_rotary_factor": (1,),
    "attention.causal": (1,),
    "hidden_act": ("silu",),
}
GGUF_ROPE_FACTORS = "rope_freqs.weight"  # a tensor of all layers, and no weight
_DEFAULT_WINDOW, _DEFAULT_FULL_LAYERS = 4096, 28  # of Mistral and Qwen, where config.json does not say
_QWEN3_HEAD_DIM = 128  # the same
_SMOLLM3_INTERVAL = 4  # each fourth layer has no positions; its GGUF files do not say so


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    family = gguf_field(file, "general.architecture")
    if family == "mistral":
        raise ModelFileError("architecture 'mistral' is not supported: Mistral's GGUF files say 'llama'")
    _check_family("architecture", family)

    def get(name: str, default: Any = None) -> Any:
        return gguf_field(file, f"{family}.{name}", default)

    if (count := gguf_field(file, "split.count", 0)) not in (0, 1):
        number = gguf_field(file, "split.no", 0)
        raise ModelFileError(f"it is part {number} (from 0) of {count}: join them first, with llama.cpp's gguf-split")
    _check_no_effect(lambda name: file.field(f"{family}.{name}"))
    tokens = gguf_field(file, "tokenizer.ggml.tokens")
    names = ("attention.head_count", "embedding_length", "block_count", "context_length")
    num_heads, hidden_size, num_layers, context = (_counted(name, get(name)) for name in names)
    head_dim = get("attention.key_length", hidden_size // num_heads)
    for name, dims in (("rope.dimension_count", "turns"), ("attention.value_length", "keeps as values")):
        if (found := get(name, head_dim)) != head_dim:
            raise ModelFileError(f"the model {dims} {found} of {head_dim} dimensions of a head: only all are supported")
    if (scale := get("attention.scale", 0.0)) and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-6):
        raise ModelFileError(f"attention.scale {scale} is not supported: {head_dim**-0.5} is")
    theta = get("rope.freq_base", 10_000.0)
    kind, factor = get("rope.scaling.type", "linear"), get("rope.scaling.factor", get("rope.scale_linear", 0.0)) or 1.0
    scaling = {
        "rope_type": "none" if factor == 1.0 and kind in ("linear", "yarn") else kind,
        "factor": factor,
        "original_max_position_embeddings": get("rope.scaling.original_context_length", context),
        "beta_fast": get("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": get("rope.scaling.yarn_beta_slow", 1.0),
    }
    factors, attention_factor = rope_scaling(scaling, theta, head_dim)
    if GGUF_ROPE_FACTORS in file.tensors:
        if factors:
            raise ModelFileError(f"{GGUF_ROPE_FACTORS} beside a scaling of type {kind!r} is not supported")
        factors = tuple(file.tensor(GGUF_ROPE_FACTORS).ravel().tolist())
    window = get("attention.sliding_window", 0) or None
    slides = get("attention.sliding_window_pattern", [True] * num_layers)  # of each layer, where not all do
    if not isinstance(slides, list) or len(slides) != num_layers:
        raise ModelFileError(f"attention.sliding_window_pattern must be {num_layers} flags, got {slides!r:.80}")
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
        rope_attention_factor=attention_factor,
        no_rope_layers=_each_nth(num_layers, _SMOLLM3_INTERVAL) if family == "smollm3" else (),
        sliding_windows=_windows(window, slides),
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
        if quantised := fields.get("quantization_config") or fields.get("quantization"):
            kind = quantised.get("quant_method", "MLX") if isinstance(quantised, dict) else quantised
            raise ModelFileError(f"the weights are quantised ({kind}): folders of floats are supported, and GGUF files")
        _check_no_effect(fields.get)
        names = ("num_attention_heads", "hidden_size", "num_hidden_layers", "max_position_embeddings")
        heads, hidden, layers, context = (_counted(name, get(name)) for name in names)
        head_dim = fields.get("head_dim", _QWEN3_HEAD_DIM if family == "qwen3" else None)
        head_dim = hidden // heads if head_dim is None else head_dim
        scaling, parameters = fields.get("rope_scaling"), fields.get("rope_parameters")
        if scaling and parameters and scaling != parameters:  # transformers would take the first, and its base alone
            raise ModelFileError(f"rope_scaling {scaling} and rope_parameters {parameters} differ: leave one of them")
        rope = dict(scaling or parameters or {})
        default_theta = 2_000_000.0 if family == "smollm3" else 10_000.0
        theta = rope.get("rope_theta", fields.get("rope_theta", default_theta))
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
    """Of each layer. Where a field is missing, it is what transformers' class of the family takes."""
    window = fields.get("sliding_window", _DEFAULT_WINDOW if family in ("mistral", "qwen2", "qwen3") else None)
    if family != "mistral" and not fields.get("use_sliding_window", False):
        window = None
    if family in ("llama", "mistral"):
        slides = [family == "mistral" and window is not None] * num_layers
    elif family == "smollm3":
        slides = [i in _no_rope_layers(fields, num_layers) for i in range(num_layers)]
    else:
        slides = [i >= fields.get("max_window_layers", _DEFAULT_FULL_LAYERS) for i in range(num_layers)]
    if (kinds := fields.get("layer_types")) is not None:
        if len(kinds) != num_layers or not {*kinds} <= {"sliding_attention", "full_attention"}:
            raise ModelFileError(f"layer_types must name {num_layers} layers, sliding_ or full_attention, got {kinds}")
        if family in ("llama", "mistral") and slides != [kind == "sliding_attention" for kind in kinds]:
            raise ModelFileError(f"layer_types {kinds} of a {family} model with a window of {window} are not supported")
        slides = [kind == "sliding_attention" for kind in kinds]
    return _windows(window, slides)


def _windows(window: int | None, slides: list[bool]) -> tuple[int | None, ...]:
    return tuple(window if slide else None for slide in slides) if window is not None and any(slides) else ()


def _check_no_effect(get: Callable[[str], Any]) -> None:
    for name, values in _NO_EFFECT.items():
        if (found := get(name)) is not None and found not in values:
            raise ModelFileError(f"{name} is {found!r}, which is not supported")
