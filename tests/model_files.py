"""Small models on disk, written as others write them: llama.cpp's converter (GGUF) and Hugging Face (safetensors).

    weights = random_weights(config, seed)          Hugging Face's names and shapes, NumPy float32
    write_gguf(path, config, weights)               one file
    write_folder(folder, config, weights)           config.json, *.safetensors, tokenizer.json

The tokenizer knows small letters, a full stop, a space, 1, 2, "12", "hi", and a token that ends a text. It is small
because the package gguf reads a file word by word.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from minipaged.model.rope_scaling import rope_scaling
from minipaged.model.transformer import ModelConfig, Transformer

TOKENS = [*"abcdefghijklmnopqrstuvwxyz.Ġ12", "12", "hi", "<|endoftext|>"]  # U+0120 stands for the space
MERGES = [("h", "i"), ("1", "2")]
EOS = len(TOKENS) - 1

SMALL = ModelConfig(
    vocab_size=len(TOKENS),
    hidden_size=8,
    intermediate_size=6,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_position=64,
    rms_norm_eps=2.0**-16,  # a float32, as GGUF keeps it, and a float64 alike
    tie_embeddings=False,
)

# The proportions of Llama 3.2 1B, a 16th as wide: large enough that its weights are nearly all of its memory.
WIDE = replace(
    SMALL,
    vocab_size=8016,
    hidden_size=128,
    intermediate_size=512,
    num_layers=16,
    num_heads=8,
    head_dim=16,
)


class Family(NamedTuple):
    """What a small model of a family (heads of 4 numbers, a context of 64 tokens) says otherwise than Llama 2."""

    config: dict  # in ModelConfig
    json: dict  # in config.json
    architecture: str | None = None  # in GGUF: None where GGUF cannot say it
    gguf: dict | None = None  # fields


_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_YARN_IN_GGUF = {"type": ("add_string", "yarn"), "factor": ("add_float32", 4.0)}
_YARN_IN_GGUF |= {"original_context_length": ("add_uint32", 16)}
_WINDOWS_OF_QWEN = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
_yarn_factors, _yarn_attention = rope_scaling(_YARN, 10_000.0, 4)

FAMILIES = {
    "llama 3.1": Family(  # of its two pairs one is slow
        {"rope_factors": (1.0, 8.0)},
        {"rope_scaling": {**_LLAMA3, "original_max_position_embeddings": 32}},
        "llama",  # its GGUF files hold the factors as a tensor
    ),
    "yarn": Family(
        {"rope_factors": _yarn_factors, "rope_attention_factor": _yarn_attention},
        {"rope_scaling": _YARN},
        "llama",
        {f"llama.rope.scaling.{name}": value for name, value in _YARN_IN_GGUF.items()},
    ),
    "mistral": Family(
        {"sliding_windows": (3, 3)},
        {"model_type": "mistral", "sliding_window": 3},
        "llama",
        {"llama.attention.sliding_window": ("add_uint32", 3)},
    ),
    "qwen2": Family({"qkv_bias": True}, {"model_type": "qwen2"}, "qwen2"),
    "qwen2, one window": Family(
        {"qkv_bias": True, "sliding_windows": (None, 3)}, {"model_type": "qwen2", **_WINDOWS_OF_QWEN}
    ),
    "qwen3": Family({"qk_norm": True}, {"model_type": "qwen3"}, "qwen3"),
    "qwen3, one window": Family(
        {"qk_norm": True, "sliding_windows": (None, 3)}, {"model_type": "qwen3", **_WINDOWS_OF_QWEN}
    ),
    "smollm3": Family({"num_layers": 4, "no_rope_layers": (3,)}, {"model_type": "smollm3"}, "smollm3"),
}

# Hugging Face's name of a tensor, and GGUF's.
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def shapes(config):
    """Hugging Face's name of every tensor -> its shape."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    found = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_embeddings:
        found["lm_head.weight"] = (config.vocab_size, hidden)
    for i in range(config.num_layers):
        for name, shape in {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (q_size, hidden),
            "self_attn.k_proj": (kv_size, hidden),
            "self_attn.v_proj": (kv_size, hidden),
            "self_attn.o_proj": (hidden, q_size),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items():
            found[f"model.layers.{i}.{name}.weight"] = shape
        of = f"model.layers.{i}.self_attn."
        if config.qkv_bias:
            found |= {f"{of}{c}_proj.bias": (size,) for c, size in (("q", q_size), ("k", kv_size), ("v", kv_size))}
        if config.qk_norm:
            found |= {f"{of}{c}_norm.weight": (config.head_dim,) for c in "qk"}
    return found


def random_weights(config, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes(config).items()}


def transformer_of(config, weights):
    """The source model: the weights put where `Transformer` keeps them, by hand."""
    take = {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}
    model = Transformer(config)
    model.embed_tokens.weight.data = take["model.embed_tokens.weight"]
    model.norm.weight.data = take["model.norm.weight"]
    model.lm_head.weight.data = take["model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"]
    for i, layer in enumerate(model.layers):
        of = f"model.layers.{i}."
        layer.attention_norm.weight.data = take[of + "input_layernorm.weight"]
        layer.qkv_proj.weight.data = torch.cat([take[f"{of}self_attn.{c}_proj.weight"] for c in "qkv"])
        layer.o_proj.weight.data = take[of + "self_attn.o_proj.weight"]
        layer.mlp_norm.weight.data = take[of + "post_attention_layernorm.weight"]
        layer.gate_up_proj.weight.data = torch.cat([take[f"{of}mlp.{c}_proj.weight"] for c in ("gate", "up")])
        layer.down_proj.weight.data = take[of + "mlp.down_proj.weight"]
    return model.requires_grad_(False)


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def gguf_name(name):
    layer, (rest, _, kind) = "", name.rpartition(".")
    if rest.startswith("model.layers."):
        number, _, rest = rest.removeprefix("model.layers.").partition(".")
        layer = f"blk.{number}."
    return f"{layer}{GGUF_NAMES.get(rest, rest)}.{kind}"


def permute(weights, num_heads):
    """What llama.cpp's convert_hf_to_gguf.py does to the rows of q_proj and k_proj, in its own words."""
    return (
        weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def gguf_fields(config):
    """name -> (method of GGUFWriter, value)"""
    return {
        "llama.block_count": ("add_uint32", config.num_layers),
        "llama.context_length": ("add_uint32", config.max_position),
        "llama.embedding_length": ("add_uint32", config.hidden_size),
        "llama.feed_forward_length": ("add_uint32", config.intermediate_size),
        "llama.attention.head_count": ("add_uint32", config.num_heads),
        "llama.attention.head_count_kv": ("add_uint32", config.num_kv_heads),
        "llama.attention.key_length": ("add_uint32", config.head_dim),
        "llama.rope.dimension_count": ("add_uint32", config.head_dim),
        "llama.rope.freq_base": ("add_float32", config.rope_theta),
        "llama.attention.layer_norm_rms_epsilon": ("add_float32", config.rms_norm_eps),
        "tokenizer.ggml.model": ("add_string", "gpt2"),
        "tokenizer.ggml.pre": ("add_string", "smollm"),
        "tokenizer.ggml.tokens": ("add_array", TOKENS),
        "tokenizer.ggml.token_type": ("add_array", [3 if token == TOKENS[EOS] else 1 for token in TOKENS]),
        "tokenizer.ggml.merges": ("add_array", [" ".join(pair) for pair in MERGES]),
        "tokenizer.ggml.eos_token_id": ("add_uint32", EOS),
        "tokenizer.ggml.add_bos_token": ("add_bool", False),
        "tokenizer.chat_template": ("add_string", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"),
    }


def write_gguf(path, config, weights, kind=gguf.GGMLQuantizationType.F32, architecture="llama", **changed):
    """`changed`: other fields, by name (with _ for . if one likes); a value of None leaves the field out."""
    fields = gguf_fields(config)
    for name, value in changed.items():
        fields[next((field for field in fields if field.replace(".", "_") == name), name)] = value
    writer = gguf.GGUFWriter(path, architecture)
    for name, field in fields.items():
        if field is not None:
            method, value = field
            of_family = f"{architecture}.{name.removeprefix('llama.')}" if name.startswith("llama.") else name
            getattr(writer, method)(of_family, value)
    is_permuted = architecture in ("llama", "smollm3")
    for name, array in weights.items():
        if (
            is_permuted
            and name.endswith("q_proj.weight")
            and array.ndim == 2
            and not len(array) % (2 * config.num_heads)
        ):
            array = permute(array, config.num_heads)
        elif (
            is_permuted
            and name.endswith("k_proj.weight")
            and array.ndim == 2
            and not len(array) % (2 * config.num_kv_heads)
        ):
            array = permute(array, config.num_kv_heads)
        of = kind if array.ndim > 1 else gguf.GGMLQuantizationType.F32  # norms are not quantised
        writer.add_tensor(gguf_name(name), gguf.quantize(array, of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- safetensors -----------------------------------------------------------------------------------------------------


def write_wide(folder, form, tied):
    """WIDE in a GGUF file of 8 bits, or in a folder in bfloat16. Returns its path, and how many numbers it has."""
    config, path = replace(WIDE, tie_embeddings=tied), folder / form
    weights = random_weights(config)
    if form == "folder":
        write_folder(path, config, weights, torch.bfloat16)
    else:
        tokens = [*TOKENS, *(f"<{i}>" for i in range(config.vocab_size - len(TOKENS)))]
        kinds = [3 if i == EOS else 1 for i in range(len(tokens))]
        more = {"tokens": ("add_array", tokens), "token_type": ("add_array", kinds)}
        more = {f"tokenizer_ggml_{name}": value for name, value in more.items()}
        write_gguf(path, config, weights, gguf.GGMLQuantizationType.Q8_0, **more)
    return path, sum(array.size for array in weights.values())


def json_fields(config):
    return {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }


def tokenizer():
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(TOKENS[:EOS])}, merges=MERGES))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(TOKENS[EOS], special=True)])
    return made


def write_folder(folder, config, weights, dtype=torch.float32, num_shards=1, fields=None):
    """fields: further ones of config.json, or others in the place of a Llama's."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**json_fields(config), "eos_token_id": EOS, **(fields or {})}))
    names, index = sorted(weights), {}
    for shard in range(num_shards):
        part = {name: torch.from_numpy(np.array(weights[name])).to(dtype) for name in names[shard::num_shards]}
        file = "model.safetensors" if num_shards == 1 else f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        if part:
            save_file(part, folder / file)
            index |= dict.fromkeys(part, file)
    if num_shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    tokenizer().save(str(folder / "tokenizer.json"))
