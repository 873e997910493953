"""Chapter 13. One rank's slice of a model's weights, and no more than that of the file.

    embed_tokens, lm_head     rows     words of this rank           a row-parallel layer is cut by columns,
    q_proj, k_proj, v_proj    rows     its heads                    every other by rows, norms not at all
    o_proj                    columns  its query heads
    gate_proj, up_proj        rows     its part of the inner size
    down_proj                 columns  the same

safetensors are read by slices. A GGUF file is mapped into memory, and a slice of a quantised tensor is dequantised by
itself: rows always, columns where the cut falls between blocks (32 numbers, for most formats), as it does for SmolLM2.
Elsewhere the rank's rows are dequantised whole, and cut then. `tiny` comes from a generator and is drawn whole.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minipaged.distributed.shares import Share, local_config, shares
from minipaged.model import fetch
from minipaged.model.gguf_file import ModelFileError
from minipaged.model.load import DTYPES, Model, checked, named_dtype, quicken, tiny_transformer
from minipaged.model.load import open_source as open_files
from minipaged.model.tokenizer import TextTokenizer
from minipaged.model.tokenizer_files import byte_tokenizer
from minipaged.model.transformer import ModelConfig, Transformer
from minipaged.model.weights import ALL, Cut, Source, build_transformer, check_shapes


class RankModel(NamedTuple):
    """One rank's part of a model: `transformer` has the shape `local_config`, not yet joined to the others."""

    transformer: Transformer
    tokenizer: TextTokenizer | None  # of rank 0: the others get tokens alone
    config: ModelConfig  # of the whole model
    share: Share


def load_slice(name: str | Path, rank: int, size: int, dtype: str, seed: int, device: str) -> RankModel:
    """Arguments as of `load_model`. Raises ValueError where the model, or its number of heads, does not fit."""
    dtype = named_dtype(dtype, device)
    source = open_source(name, seed)
    share = shares(source.config, size)[rank]
    try:
        transformer = slice_of(source, share, DTYPES[dtype])
        transformer = transformer.to(device)
        quicken(transformer)
        tokenizer = checked(Model(transformer, source.tokenizer())).tokenizer if rank == 0 else None
    except ValueError as error:
        raise ModelFileError(f"{name}: {error}") from error
    return RankModel(transformer, tokenizer, source.config, share)


def slice_of(source: Source, share: Share, dtype: torch.dtype) -> Transformer:
    """The part of a model that a share names. Raises ModelFileError for a tensor that is missing, odd, or left over."""
    check_shapes(source.config, source.shapes)  # of the whole: a slice of a tensor that is too large would look right
    local, cuts = local_config(source.config, share), _cuts(source.config, share)

    def read(name: str) -> Tensor:
        kind = name.rpartition("layers.")[2].partition(".")[2] if ".layers." in name else name
        return source.read(name, cuts.get(kind, (ALL, ALL)))

    transformer = build_transformer(local, read, dtype)
    # The batch has tokens of the whole vocabulary.
    transformer.config = replace(local, vocab_size=source.config.vocab_size)
    return transformer


def _cuts(config: ModelConfig, share: Share) -> dict[str, Cut]:
    """A tensor's name, without its layer -> this rank's rows and columns of it. Others are not divided."""
    head_dim = config.head_dim
    words, part = slice(share.vocab.start, share.vocab.stop), slice(share.inner.start, share.inner.stop)
    q = slice(share.heads.start * head_dim, share.heads.stop * head_dim)
    kv = slice(share.kv_heads.start * head_dim, share.kv_heads.stop * head_dim)
    rows = {"q": q, "k": kv, "v": kv}
    return {
        "model.embed_tokens.weight": (words, ALL),
        "lm_head.weight": (words, ALL),
        **{f"self_attn.{c}_proj.{kind}": (rows[c], ALL) for c in "qkv" for kind in ("weight", "bias")},
        "self_attn.o_proj.weight": (ALL, q),
        "mlp.gate_proj.weight": (part, ALL),
        "mlp.up_proj.weight": (part, ALL),
        "mlp.down_proj.weight": (ALL, part),
    }


# ---- the three kinds of source ---------------------------------------------------------------------------------------


def open_source(name: str | Path, seed: int = 0) -> Source:
    """Of "tiny", "smollm2-135m", a GGUF file or a folder with safetensors. Raises ValueError for anything else."""
    if name == "tiny":
        return from_transformer(tiny_transformer(torch.float64, seed), byte_tokenizer)
    return open_files(fetch.fetch() if name == "smollm2-135m" else name)


def from_transformer(transformer: Transformer, tokenizer: Callable[[], TextTokenizer]) -> Source:
    """A model that is in memory, under Hugging Face's names."""
    config = transformer.config
    sizes = [config.num_heads * config.head_dim, *[config.num_kv_heads * config.head_dim] * 2]
    tensors = {
        "model.embed_tokens.weight": transformer.embed_tokens.weight,
        "model.norm.weight": transformer.norm.weight,
    }
    if not config.tie_embeddings:
        tensors["lm_head.weight"] = transformer.lm_head.weight
    state = transformer.state_dict()
    for i in range(config.num_layers):
        theirs, ours = f"model.layers.{i}.", f"layers.{i}."
        query, key, value = state[f"{ours}qkv_proj.weight"].split(sizes)
        gate, up = state[f"{ours}gate_up_proj.weight"].chunk(2)
        tensors |= {
            f"{theirs}input_layernorm.weight": state[f"{ours}attention_norm.weight"],
            f"{theirs}self_attn.q_proj.weight": query,
            f"{theirs}self_attn.k_proj.weight": key,
            f"{theirs}self_attn.v_proj.weight": value,
            f"{theirs}self_attn.o_proj.weight": state[f"{ours}o_proj.weight"],
            f"{theirs}post_attention_layernorm.weight": state[f"{ours}mlp_norm.weight"],
            f"{theirs}mlp.gate_proj.weight": gate,
            f"{theirs}mlp.up_proj.weight": up,
            f"{theirs}mlp.down_proj.weight": state[f"{ours}down_proj.weight"],
        }

        if config.qkv_bias:
            biases = state[f"{ours}qkv_proj.bias"].split(sizes)
            tensors |= {f"{theirs}self_attn.{c}_proj.bias": bias for c, bias in zip("qkv", biases, strict=True)}
        if config.qk_norm:
            tensors |= {f"{theirs}self_attn.{c}_norm.weight": state[f"{ours}{c}_norm.weight"] for c in "qk"}

    def read(name: str, cut: Cut) -> Tensor:
        return tensors[name].detach()[cut[: tensors[name].dim()]].clone()

    return Source(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, read, tokenizer)
