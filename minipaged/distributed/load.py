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
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minipaged.distributed.shares import Share, local_config, shares
from minipaged.model import fetch
from minipaged.model.load import DTYPES, Model, checked, named_dtype, quicken, tiny_transformer
from minipaged.model.tokenizer import TextTokenizer, byte_tokenizer, tokenizer_from_folder, tokenizer_from_gguf
from minipaged.model.transformer import ModelConfig, Transformer
from minipaged.model.weights import (
    ModelFileError,
    build_transformer,
    config_from_gguf,
    config_from_json,
    halves_from_pairs,
    hugging_face_name,
    open_gguf,
)

ALL = slice(None)
Cut = tuple[slice, slice]  # rows, columns


class Source(NamedTuple):
    """Where weights come from: names and shapes at once, numbers when they are asked for."""

    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]  # Hugging Face's name -> shape of the whole tensor
    read: Callable[[str, Cut], Tensor]
    tokenizer: Callable[[], TextTokenizer]


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
    local = local_config(source.config, share)
    wanted = _cuts(source.config, share)
    tensors = {}
    for name, shape in source.shapes.items():
        kind = name.rpartition("layers.")[2].partition(".")[2] if ".layers." in name else name
        expected, cut = wanted.get(kind, (shape, (ALL, ALL)))
        if shape != expected:  # held against the whole: a slice of a tensor that is too large would look right
            raise ModelFileError(
                f"tensor {name} has shape {list(shape)}, the model's configuration asks for {list(expected)}"
            )
        tensors[name] = source.read(name, cut)
    transformer = build_transformer(local, tensors, dtype)
    # The batch has tokens of the whole vocabulary.
    transformer.config = replace(local, vocab_size=source.config.vocab_size)
    return transformer


def _cuts(config: ModelConfig, share: Share) -> dict[str, tuple[tuple[int, ...], Cut]]:
    """A tensor's name, without its layer -> the shape of the whole, and this rank's rows and columns of it."""
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
    words, part = slice(share.vocab.start, share.vocab.stop), slice(share.inner.start, share.inner.stop)
    q = slice(share.heads.start * head_dim, share.heads.stop * head_dim)
    kv = slice(share.kv_heads.start * head_dim, share.kv_heads.stop * head_dim)
    return {
        "model.embed_tokens.weight": ((config.vocab_size, hidden), (words, ALL)),
        "lm_head.weight": ((config.vocab_size, hidden), (words, ALL)),
        "self_attn.q_proj.weight": ((q_size, hidden), (q, ALL)),
        "self_attn.k_proj.weight": ((kv_size, hidden), (kv, ALL)),
        "self_attn.v_proj.weight": ((kv_size, hidden), (kv, ALL)),
        "self_attn.o_proj.weight": ((hidden, q_size), (ALL, q)),
        "mlp.gate_proj.weight": ((inner, hidden), (part, ALL)),
        "mlp.up_proj.weight": ((inner, hidden), (part, ALL)),
        "mlp.down_proj.weight": ((hidden, inner), (ALL, part)),
    }


# ---- the three kinds of source ---------------------------------------------------------------------------------------


def open_source(name: str | Path, seed: int = 0) -> Source:
    """Of "tiny", "smollm2-135m", a GGUF file or a folder with safetensors. Raises ValueError for anything else."""
    if name == "tiny":
        return from_transformer(tiny_transformer(torch.float64, seed), byte_tokenizer)
    path = fetch.fetch() if name == "smollm2-135m" else Path(name).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        return _from_folder(path)
    if path.is_file():
        return _from_gguf(path)
    raise ValueError(
        f"unknown model {str(name)!r}: take 'smollm2-135m', 'tiny', a GGUF file, or a folder with safetensors"
    )


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

    def read(name: str, cut: Cut) -> Tensor:
        return tensors[name].detach()[cut[: tensors[name].dim()]].clone()

    return Source(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, read, tokenizer)


def _from_gguf(path: Path) -> Source:
    file = open_gguf(path)
    try:
        config = config_from_gguf(file)
        names = {hugging_face_name(name): name for name in file.tensors}
    except ValueError as error:
        raise ModelFileError(f"{path}: {error}") from error

    def read(name: str, cut: Cut) -> Tensor:
        tensor = torch.from_numpy(file.tensor(names[name], *cut))
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # a whole number of heads, each permuted by itself
            tensor = halves_from_pairs(tensor, len(tensor) // config.head_dim, config.head_dim)
        return tensor

    # GGUF counts from the fastest dimension on.
    shapes = {name: tuple(int(n) for n in reversed(file.tensors[theirs].shape)) for name, theirs in names.items()}
    return Source(config, shapes, read, lambda: tokenizer_from_gguf(file))


def _from_folder(path: Path) -> Source:
    config = config_from_json(path / "config.json")
    shapes, slices = {}, {}
    for part in sorted(path.glob("*.safetensors")):
        try:
            file = safe_open(part, framework="pt")
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                slices[name] = file.get_slice(name)
                shapes[name] = tuple(slices[name].get_shape())
        except (SafetensorError, ValueError, TypeError) as error:
            raise ModelFileError(f"{part} ({part.stat().st_size:,} bytes) is damaged or cut short: {error}") from error
    if not shapes:
        raise ModelFileError(f"{path} holds no *.safetensors file")

    def read(name: str, cut: Cut) -> Tensor:
        numbers: Tensor = slices[name][cut[: len(shapes[name])]]
        return numbers.contiguous()

    return Source(config, shapes, read, lambda: tokenizer_from_folder(path))
