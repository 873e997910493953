"""Chapter 2. Weights from a file: GGUF (llama.cpp's format), or safetensors beside a Hugging Face config.json.

Both are read into one dictionary under the names that Hugging Face gives, checked shape by shape against the
configuration, and then stacked as `Transformer` holds them. Pickled files are never opened: they can run code.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minipaged.model.gguf_file import GGUFFile
from minipaged.model.transformer import ModelConfig, Transformer

# GGUF's name of a tensor -> Hugging Face's. Those of layer i stand behind "blk.i." and "model.layers.i.".
_GGUF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GGUF_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


class ModelFileError(ValueError):
    """A model file is damaged, foreign, or says something else than its configuration."""


def open_gguf(path: Path) -> GGUFFile:
    """Read the header of a GGUF file. Raises ModelFileError where it is none, or is cut short."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelFileError(
                f"{path} ({size:,} bytes) is not a GGUF file: it does not begin with the letters GGUF "
                f"(safetensors are read from their folder, pickled weights never)"
            )
    try:
        return GGUFFile(path)
    except ValueError as error:
        raise ModelFileError(f"{path} ({size:,} bytes) is damaged or cut short: {error}") from error


def gguf_field(file: GGUFFile, name: str, default: Any = None) -> Any:
    """The value of a field. Raises ModelFileError where it is missing and no default is given."""
    value = file.field(name, default)
    if value is None:
        raise ModelFileError(f"the GGUF file has no field {name}")
    return value


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    architecture = gguf_field(file, "general.architecture")
    if architecture != "llama":
        raise ModelFileError(f"architecture {architecture!r} is not supported: only 'llama' is")

    def get(name: str, default: Any = None) -> Any:
        return gguf_field(file, f"llama.{name}", default)

    scaling = get("rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in file.tensors:
        raise ModelFileError(f"the model scales its rotary positions ({scaling}), which is not supported")
    tokens = gguf_field(file, "tokenizer.ggml.tokens")
    num_heads, hidden_size = get("attention.head_count"), get("embedding_length")
    for name, value in (("head_count", num_heads), ("embedding_length", hidden_size)):
        if not isinstance(value, int) or value < 1:
            raise ModelFileError(f"field {name} must be a whole number, at least 1, got {value!r}")
    head_dim = get("attention.key_length", hidden_size // num_heads)
    if (rotated := get("rope.dimension_count", head_dim)) != head_dim:
        raise ModelFileError(f"the model turns {rotated} of {head_dim} dimensions of a head: only all are supported")
    return ModelConfig(
        vocab_size=len(tokens) if isinstance(tokens, list) else 0,
        hidden_size=hidden_size,
        intermediate_size=get("feed_forward_length"),
        num_layers=get("block_count"),
        num_heads=num_heads,
        num_kv_heads=get("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_position=get("context_length"),
        rope_theta=get("rope.freq_base", 10_000.0),
        rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in file.tensors,
    )


def tensors_from_gguf(file: GGUFFile, config: ModelConfig) -> dict[str, Tensor]:
    """Every tensor, dequantised to float32, under its Hugging Face name."""
    tensors = {}
    for gguf_name in file.tensors:
        name = hugging_face_name(gguf_name)
        tensor = torch.from_numpy(file.tensor(gguf_name))
        if name.endswith("q_proj.weight"):
            tensor = halves_from_pairs(tensor, config.num_heads, config.head_dim)
        elif name.endswith("k_proj.weight"):
            tensor = halves_from_pairs(tensor, config.num_kv_heads, config.head_dim)
        tensors[name] = tensor
    return tensors


def config_from_json(path: Path) -> ModelConfig:
    """Read a Hugging Face config.json. Raises ModelFileError for another architecture, or where a number is missing."""
    fields = read_json(path)

    def get(name: str) -> Any:
        if name not in fields:
            raise ModelFileError(f"{path} has no {name!r}")
        return fields[name]

    if (kind := get("model_type")) != "llama":
        raise ModelFileError(f"{path}: model_type {kind!r} is not supported: only 'llama' is")
    if fields.get("attention_bias") or fields.get("mlp_bias") or fields.get("hidden_act", "silu") != "silu":
        raise ModelFileError(f"{path}: biases and activations other than silu are not supported")
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ModelFileError(f"{path}: the model scales its rotary positions, which is not supported: {rope}")
    try:
        heads, hidden = get("num_attention_heads"), get("hidden_size")
        return ModelConfig(
            vocab_size=get("vocab_size"),
            hidden_size=hidden,
            intermediate_size=get("intermediate_size"),
            num_layers=get("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=heads if (kv_heads := fields.get("num_key_value_heads")) is None else kv_heads,
            head_dim=hidden // heads if (head_dim := fields.get("head_dim")) is None else head_dim,
            max_position=get("max_position_embeddings"),
            rope_theta=rope.get("rope_theta", fields.get("rope_theta", 10_000.0)),
            rms_norm_eps=get("rms_norm_eps"),
            tie_embeddings=fields.get("tie_word_embeddings", False),
        )
    except ModelFileError:
        raise
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ModelFileError(f"{path} describes no model that could be built: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object. Raises ModelFileError where it does not."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number without end, brackets without end
        raise ModelFileError(f"{path} ({path.stat().st_size:,} bytes) is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ModelFileError(f"{path} must hold one JSON object, got a {type(fields).__name__}")
    return fields


def tensors_from_safetensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every *.safetensors file in the folder."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a dictionary)
        except (SafetensorError, ValueError, TypeError) as error:
            raise ModelFileError(f"{path} ({path.stat().st_size:,} bytes) is damaged or cut short: {error}") from error
    if not tensors:
        raise ModelFileError(f"{folder} holds no *.safetensors file")
    return tensors


def build_transformer(config: ModelConfig, tensors: dict[str, Tensor], dtype: torch.dtype) -> Transformer:
    """A Transformer over these weights. Raises ModelFileError naming a tensor that is missing, odd, or left over."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def take(name: str, *shape: int) -> Tensor:
        if name not in tensors:
            raise ModelFileError(f"the model has no tensor {name}, of shape {list(shape)}")
        if tuple(tensors[name].shape) != shape:
            got = list(tensors[name].shape)
            raise ModelFileError(f"tensor {name} has shape {got}, the model's configuration asks for {list(shape)}")
        unused.discard(name)
        return tensors[name].to(dtype)

    unused = set(tensors)
    state = {
        "embed_tokens.weight": take("model.embed_tokens.weight", config.vocab_size, hidden),
        "norm.weight": take("model.norm.weight", hidden),
    }
    if config.tie_embeddings:
        unused.discard("lm_head.weight")  # some files hold the embedding under both names
        state["lm_head.weight"] = state["embed_tokens.weight"]
    else:
        state["lm_head.weight"] = take("lm_head.weight", config.vocab_size, hidden)
    for i in range(config.num_layers):
        theirs, ours = f"model.layers.{i}.", f"layers.{i}."
        stacks: dict[str, list[tuple[str, tuple[int, ...]]]] = {
            "attention_norm": [("input_layernorm", (hidden,))],
            "qkv_proj": [
                ("self_attn.q_proj", (q_size, hidden)),
                ("self_attn.k_proj", (kv_size, hidden)),
                ("self_attn.v_proj", (kv_size, hidden)),
            ],
            "o_proj": [("self_attn.o_proj", (hidden, q_size))],
            "mlp_norm": [("post_attention_layernorm", (hidden,))],
            "gate_up_proj": [("mlp.gate_proj", (inner, hidden)), ("mlp.up_proj", (inner, hidden))],
            "down_proj": [("mlp.down_proj", (hidden, inner))],
        }
        for target, parts in stacks.items():
            rows = [take(f"{theirs}{name}.weight", *shape) for name, shape in parts]
            state[f"{ours}{target}.weight"] = torch.cat(rows) if len(rows) > 1 else rows[0]
    # What is left over says that the configuration is not that of these weights: fewer layers, or a bias, say.
    if unused := {name for name in unused if not name.endswith("rotary_emb.inv_freq")}:
        raise ModelFileError(f"the model has {len(unused)} tensors that its configuration does not name: {min(unused)}")
    return assemble(config, state)


def assemble(config: ModelConfig, state: dict[str, Tensor]) -> Transformer:
    """A Transformer that holds these very tensors, under its own names. Raises RuntimeError where one does not fit."""
    with torch.device("meta"):  # no storage and no random numbers for weights that are replaced in the next line
        model = Transformer(config, state["embed_tokens.weight"].dtype)
    model.load_state_dict(state, assign=True)
    if config.tie_embeddings:  # one parameter again, and not two that share their numbers until one is moved
        model.lm_head.weight = model.embed_tokens.weight
    return model.requires_grad_(False).eval()


def hugging_face_name(name: str) -> str:
    if name in _GGUF_NAMES:
        return _GGUF_NAMES[name]
    prefix, _, rest = name.partition(".")
    layer, _, leaf = rest.partition(".")
    if prefix == "blk" and leaf in _GGUF_LAYER_NAMES:
        return f"model.layers.{layer}.{_GGUF_LAYER_NAMES[leaf]}"
    raise ModelFileError(f"the GGUF file has a tensor that a Llama does not: {name}")


def halves_from_pairs(weight: Tensor, num_heads: int, head_dim: int) -> Tensor:
    """Undo llama.cpp's permutation of W^Q and W^K.

    llama.cpp turns neighbouring pairs (0, 1), (2, 3), ...; `rotate` turns (0, d/2), (1, d/2 + 1), ... So the even rows
    of a head become its first half and the odd rows its second.
    """
    if weight.dim() != 2 or len(weight) != num_heads * head_dim:
        return weight  # `build_transformer` is about to refuse it, with its name
    pairs = weight.view(num_heads, head_dim // 2, 2, -1)  # [heads, head_dim / 2, 2, hidden_size]
    return pairs.transpose(1, 2).reshape(weight.shape)
