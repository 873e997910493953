"""Chapter 2. From a model's name to a transformer and its tokenizer."""

from pathlib import Path
from typing import NamedTuple

import torch

from minipaged.model import fetch
from minipaged.model.linear import is_packable, pack_linears
from minipaged.model.tokenizer import TextTokenizer, byte_tokenizer, tokenizer_from_folder, tokenizer_from_gguf
from minipaged.model.transformer import ModelConfig, Transformer
from minipaged.model.trial import fastest_dtype, fastest_way
from minipaged.model.weight_cache import load_through_cache
from minipaged.model.weights import (
    ModelFileError,
    build_transformer,
    config_from_gguf,
    config_from_json,
    open_gguf,
    tensors_from_gguf,
    tensors_from_safetensors,
)

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# Two layers, four query heads on two KV heads: small enough for a property test, odd enough to catch a wrong stride.
TINY = ModelConfig(
    vocab_size=257,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=512,
)


class Model(NamedTuple):
    transformer: Transformer
    tokenizer: TextTokenizer


def default_device() -> str:
    """ "cuda" where there is such a device, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(name: str | Path | Model, dtype: str | None = None, seed: int = 0, device: str | None = None) -> Model:
    """`name`: "smollm2-135m", "tiny", a GGUF file, or a folder with config.json, *.safetensors and tokenizer.json.

    dtype: one of DTYPES, or "auto": float32 or bfloat16, whichever is the faster here (`trial.py`); by default float32.
    device: by default the CPU. `seed` draws the weights of "tiny". A model that is loaded already is returned as it is.
    Raises ValueError (ModelFileError, where a file is to blame) with what is wrong, or where a loaded model has another
    dtype or device than is asked for; FetchError where SmolLM2 is not here and cannot be brought.
    """
    if isinstance(name, Model):
        weights = name.transformer.embed_tokens.weight
        dtype = None if dtype == "auto" else dtype
        for what, wanted, has in (("dtype", dtype, str(weights.dtype)[6:]), ("device", device, str(weights.device))):
            if wanted not in (None, has, has.partition(":")[0]):
                raise ValueError(f"{what} {wanted!r} was asked for, and the loaded model has {has!r}")
        return name
    dtype, device = dtype or "float32", device or "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an unknown name, or a device that is not in this machine
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    transformer, tokenizer = _load(name, DTYPES[named_dtype(dtype, device)], seed)
    transformer = transformer.to(device)
    quicken(transformer)
    return Model(transformer, tokenizer)


def named_dtype(dtype: str, device: str) -> str:
    """The dtype that is asked for, "auto" decided. Raises ValueError for an unknown one."""
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype must be 'auto' or one of {', '.join(DTYPES)}, got {dtype!r}")
    return fastest_dtype(device) if dtype == "auto" else dtype


def quicken(transformer: Transformer) -> None:
    """Put the quicker forms of its parts in their places, once its weights lie where they will be used."""
    weights = transformer.embed_tokens.weight
    if weights.device.type != "cpu":
        return
    if any(map(is_packable, transformer.modules())):
        pack_linears(transformer, fastest_way(weights.dtype))
    from minipaged.model.compiled_ops import use_compiled_ops  # Numba's import takes a while, and a GPU needs none

    use_compiled_ops(transformer)


def _load(name: str | Path, dtype: torch.dtype, seed: int) -> Model:
    if name == "tiny":
        return Model(tiny_transformer(dtype, seed), byte_tokenizer())
    if name == "smollm2-135m":
        path = fetch.fetch()
        # Ours, in our own folder: a copy may lie beside it. Other people's files are read as they are.
        return Model(*load_through_cache(path, dtype, lambda: _load_gguf(path, dtype)))
    path = Path(name)
    try:
        path = path.expanduser()
        is_folder, is_file = path.is_dir() and bool(str(name)), path.is_file()
    except (OSError, RuntimeError):  # a name longer than a file's may be, or ~nobody: no file, then
        is_folder = is_file = False
    if is_folder:
        return _load_folder(path, dtype)
    if is_file:
        return _load_gguf(path, dtype)
    raise ValueError(
        f"unknown model {str(name)!r}: take 'smollm2-135m', 'tiny', a GGUF file, or a folder with safetensors"
    )


def tiny_transformer(dtype: torch.dtype = torch.float32, seed: int = 0, config: ModelConfig = TINY) -> Transformer:
    """Random weights of a known seed, strong enough that the greedy token depends on tokens far before it.

    Another token in place of one of the 23 before the last changes the greedy token almost every second time (47%).

    (With the usual small weights the residual stream would carry the last token through, and a model with tied
    embeddings would repeat it for ever: a test of caches would then pass whatever attention did.)
    """
    generator = torch.Generator().manual_seed(seed)
    transformer = Transformer(config, torch.float64)
    for name, parameter in transformer.named_parameters():
        if parameter.dim() == 2:  # the norms stay at 1
            std = 0.2 if name.startswith("embed_tokens") else 4.0 * parameter.shape[1] ** -0.5
            parameter.data.normal_(0.0, std, generator=generator)
    return transformer.to(dtype).requires_grad_(False).eval()


def _load_gguf(path: Path, dtype: torch.dtype) -> Model:
    file = open_gguf(path)
    try:
        config = config_from_gguf(file)
        transformer = build_transformer(config, tensors_from_gguf(file, config), dtype)
        return checked(Model(transformer, tokenizer_from_gguf(file)))
    except ValueError as error:
        raise ModelFileError(f"{path}: {error}") from error


def _load_folder(path: Path, dtype: torch.dtype) -> Model:
    if not (path / "config.json").is_file():
        raise ModelFileError(f"{path} holds no config.json: a model is config.json, *.safetensors and tokenizer.json")
    config = config_from_json(path / "config.json")
    try:
        transformer = build_transformer(config, tensors_from_safetensors(path), dtype)
        return checked(Model(transformer, tokenizer_from_folder(path)))
    except ValueError as error:
        raise ModelFileError(f"{path}: {error}") from error


def checked(model: Model) -> Model:
    """Raises ModelFileError where the tokenizer could name a token that the model has no embedding for."""
    largest, vocab_size = model.tokenizer.largest_token_id, model.transformer.config.vocab_size
    if largest >= vocab_size:
        raise ModelFileError(f"the tokenizer has token {largest}, and the model embeds tokens 0 to {vocab_size - 1}")
    return model
