"""Chapter 2. Weights from files: GGUF (llama.cpp's format), or safetensors beside a Hugging Face config.json.

Both come as a `Source`: configuration, names and shapes at once, and numbers tensor by tensor, under the names that
Hugging Face gives. Shapes are checked against the configuration. Then `build_transformer` stacks the numbers as
`Transformer` holds them, part after part, so that of no weight there are two copies for long. Pickled files are never
opened: they can run code.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minipaged.model.families import GGUF_ROPE_FACTORS, config_from_gguf, config_from_json
from minipaged.model.folder import INDEX, file_in, weight_files
from minipaged.model.gguf_file import ModelFileError, gguf_field, open_gguf
from minipaged.model.tokenizer import TextTokenizer
from minipaged.model.tokenizer_files import tokenizer_from_folder, tokenizer_from_gguf
from minipaged.model.transformer import ModelConfig, Transformer

# GGUF's name of a tensor -> Hugging Face's. Those of layer i stand behind "blk.i." and "model.layers.i.".
_GGUF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GGUF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PERMUTED = ("llama", "smollm3")  # families whose GGUF files hold rows of W^Q and W^K in another order
_FLOATS = ("F64", "F32", "F16", "BF16")  # what a tensor of a folder may hold
_ROWS = 4096  # of two tables that are compared at once

ALL = slice(None)
Cut = tuple[slice, slice]  # rows, columns


class Source(NamedTuple):
    """A model in files. `read` gives a part of a tensor, and touches no more of the file than it must (chapter 13)."""

    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]  # Hugging Face's name -> shape of the whole tensor
    read: Callable[[str, Cut], Tensor]
    tokenizer: Callable[[], TextTokenizer]


def source_from_gguf(path: Path) -> Source:
    """Raises ModelFileError where the file is damaged, or no model that we know."""
    file = open_gguf(path)
    try:
        config = config_from_gguf(file)
        names = {hugging_face_name(name): name for name in file.tensors if name != GGUF_ROPE_FACTORS}
    except (ValueError, TypeError, ArithmeticError, LookupError) as error:  # a field that is odd, or missing
        raise ModelFileError(f"{path}: {error}") from error
    is_permuted = gguf_field(file, "general.architecture") in _PERMUTED

    def read(name: str, cut: Cut) -> Tensor:
        tensor = torch.from_numpy(file.tensor(names[name], *cut))
        if is_permuted and name.endswith(("q_proj.weight", "k_proj.weight")):  # heads, each permuted by itself
            tensor = halves_from_pairs(tensor, config.head_dim)
        return tensor

    # GGUF counts from the fastest dimension on.
    shapes = {name: tuple(int(n) for n in reversed(file.tensors[theirs].shape)) for name, theirs in names.items()}
    return Source(config, shapes, read, lambda: tokenizer_from_gguf(file))


def source_from_folder(path: Path) -> Source:
    """Of config.json, safetensors and tokenizer.json. Raises ModelFileError as `source_from_gguf` does."""
    if file_in(path, "config.json") is None:
        raise ModelFileError(f"{path} holds no config.json: a model is config.json, safetensors and tokenizer.json")
    config = config_from_json(path / "config.json")
    shapes, slices = {}, {}
    for part, named in weight_files(path).items():
        try:
            file = safe_open(part, framework="pt")
            there = set(file.keys())
            for name in there if named is None else named:
                if name not in there:
                    raise ModelFileError(f"{part} lacks the tensor {name}, which {INDEX} says it holds")
                slices[name] = file.get_slice(name)
                shapes[name] = tuple(slices[name].get_shape())
                if (kind := slices[name].get_dtype()) not in _FLOATS:
                    raise ModelFileError(f"{part}: tensor {name} is {kind}: quantised weights are not supported")
        except ModelFileError:
            raise
        except (SafetensorError, ValueError, TypeError) as error:
            raise ModelFileError(f"{part} ({part.stat().st_size:,} bytes) is damaged or cut short: {error}") from error

    def read(name: str, cut: Cut) -> Tensor:
        numbers: Tensor = slices[name][cut[: len(shapes[name])]]
        return numbers.contiguous()

    tables = ["model.embed_tokens.weight", "lm_head.weight"]
    if config.tie_embeddings and set(tables) <= set(shapes):  # tied if they are equal, as in transformers
        is_whole = all(shapes[name] == (config.vocab_size, config.hidden_size) for name in tables)
        cuts = [(slice(first, first + _ROWS), ALL) for first in range(0, config.vocab_size, _ROWS)]
        is_tied = is_whole and all((read(tables[0], cut) == read(tables[1], cut)).all() for cut in cuts)
        config = replace(config, tie_embeddings=is_tied)
    return Source(config, shapes, read, lambda: tokenizer_from_folder(path))


def source_from_transformer(transformer: Transformer, tokenizer: Callable[[], TextTokenizer]) -> Source:
    """A model that is in memory, under the names of files."""
    state, tensors = transformer.state_dict(), dict[str, Tensor]()
    for part, stacks in layout(transformer.config):
        for ours, named in stacks.items():
            rows = state[f"{part}.{ours}"].split([shape[0] for _, shape in named])
            tensors |= {name: tensor for (name, _), tensor in zip(named, rows, strict=True)}

    def read(name: str, cut: Cut) -> Tensor:
        return tensors[name][cut[: tensors[name].dim()]].clone()

    return Source(transformer.config, {name: tuple(t.shape) for name, t in tensors.items()}, read, tokenizer)


def layout(config: ModelConfig) -> Iterator[tuple[str, dict[str, list[tuple[str, tuple[int, ...]]]]]]:
    """The parts of a Transformer, in order: name of the module, and of each of its weights the tensors that are stacked
    in it, with their shapes."""
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
    yield "embed_tokens", {"weight": [("model.embed_tokens.weight", (config.vocab_size, hidden))]}
    for i in range(config.num_layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        rows = {"q": q_size, "k": kv_size, "v": kv_size}
        stacks: dict[str, list[tuple[str, tuple[int, ...]]]] = {
            "attention_norm.weight": [(f"model.layers.{i}.input_layernorm.weight", (hidden,))],
            "qkv_proj.weight": [(f"{attention}.{c}_proj.weight", (rows[c], hidden)) for c in "qkv"],
            "o_proj.weight": [(f"{attention}.o_proj.weight", (hidden, q_size))],
            "mlp_norm.weight": [(f"model.layers.{i}.post_attention_layernorm.weight", (hidden,))],
            "gate_up_proj.weight": [(f"{mlp}.{name}_proj.weight", (inner, hidden)) for name in ("gate", "up")],
            "down_proj.weight": [(f"{mlp}.down_proj.weight", (hidden, inner))],
        }
        if config.qkv_bias:
            stacks["qkv_proj.bias"] = [(f"{attention}.{c}_proj.bias", (rows[c],)) for c in "qkv"]
        if config.qk_norm:
            stacks |= {f"{c}_norm.weight": [(f"{attention}.{c}_norm.weight", (head_dim,))] for c in "qk"}
        yield f"layers.{i}", stacks
    yield "norm", {"weight": [("model.norm.weight", (hidden,))]}
    if not config.tie_embeddings:
        yield "lm_head", {"weight": [("lm_head.weight", (config.vocab_size, hidden))]}


def check_shapes(config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ModelFileError naming a tensor that is missing, odd, or left over. No number is read."""
    unread = set(shapes)
    for _, stacks in layout(config):
        for name, shape in (part for parts in stacks.values() for part in parts):
            if name not in shapes:
                raise ModelFileError(f"the model has no tensor {name}, of shape {list(shape)}")
            if shapes[name] != shape:
                got, expected = list(shapes[name]), list(shape)
                raise ModelFileError(f"tensor {name} has shape {got}, the model's configuration asks for {expected}")
            unread.discard(name)
    if config.tie_embeddings:
        unread.discard("lm_head.weight")  # some files hold the embedding under both names
    # What is left over says that the configuration is not that of these weights: fewer layers, or a bias, say.
    if unread := {name for name in unread if not name.endswith("rotary_emb.inv_freq")}:
        raise ModelFileError(f"the model has {len(unread)} tensors that its configuration does not name: {min(unread)}")


def build_transformer(
    config: ModelConfig,
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    place: Callable[[nn.Module], object] = lambda part: None,
) -> Transformer:
    """A Transformer over these weights, whose shapes were checked.

    place: called with the embedding, each layer, the last norm and the output layer, once its weights are there and
    before the next one's are read: to move it, or to pack it.
    """
    with torch.device("meta"):  # no storage and no random numbers for weights that are replaced below
        model = Transformer(config, dtype).requires_grad_(False).eval()
    for part, stacks in layout(config):
        state = {}
        for ours, parts in stacks.items():
            rows = [read(name).to(dtype) for name, _ in parts]
            state[ours] = torch.cat(rows) if len(rows) > 1 else rows[0]
            del rows
        module = model.get_submodule(part)
        module.load_state_dict(state, assign=True)
        del state  # `place` may give up what it has packed
        place(module.requires_grad_(False))
    if config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model


def hugging_face_name(name: str) -> str:
    if name in _GGUF_NAMES:
        return _GGUF_NAMES[name]
    prefix, _, rest = name.partition(".")
    layer, _, leaf = rest.partition(".")
    stem, _, kind = leaf.rpartition(".")
    if prefix == "blk" and stem in _GGUF_LAYER_NAMES and kind in ("weight", "bias"):
        return f"model.layers.{layer}.{_GGUF_LAYER_NAMES[stem]}.{kind}"
    raise ModelFileError(f"the GGUF file has a tensor that none of our models has: {name}")


def halves_from_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Undo llama.cpp's permutation of whole heads of W^Q and W^K.

    llama.cpp turns neighbouring pairs (0, 1), (2, 3), ...; `rotate` turns (0, d/2), (1, d/2 + 1), ... So the even rows
    of a head become its first half and the odd rows its second.
    """
    if weight.dim() != 2 or len(weight) % head_dim:
        return weight  # `build_transformer` is about to refuse it, with its name
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[1])  # [heads, head_dim / 2, 2, hidden_size]
    return pairs.transpose(1, 2).reshape(weight.shape)
