"""Chapter 2. From a model's name to a transformer and its tokenizer."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minipaged.model import fetch
from minipaged.model.gguf_file import ModelFileError
from minipaged.model.linear import MIN_SIZE, Way, is_packable, is_packing, pack_linears
from minipaged.model.tokenizer import TextTokenizer
from minipaged.model.tokenizer_files import byte_tokenizer
from minipaged.model.transformer import ModelConfig, Transformer
from minipaged.model.trial import fastest_dtype, fastest_way
from minipaged.model.weight_cache import load_through_cache
from minipaged.model.weights import ALL, Source, build_transformer, check_shapes, source_from_folder, source_from_gguf

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
    dtype, device = "float32" if dtype is None else dtype, device or "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an unknown name, or a device that is not in this machine
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    torch_dtype = DTYPES[named_dtype(dtype, device)]
    if name == "tiny":
        model = Model(tiny_transformer(torch_dtype, seed).to(device), byte_tokenizer())
    elif name == "smollm2-135m":
        path = fetch.fetch()
        # Ours, in our own folder: a copy may lie beside it. Other people's files are read as they are.
        digest = fetch.verify(path)
        loaded = load_through_cache(path, digest, torch_dtype, lambda: read_model(source_from_gguf(path), torch_dtype))
        model = Model(loaded[0].to(device), loaded[1])
    else:
        source = open_source(name)
        try:
            model = read_model(source, torch_dtype, device, keep=False)
        except ValueError as error:
            raise ModelFileError(f"{name}: {error}") from error
    optimize_for_cpu(model.transformer)
    return model


def named_dtype(dtype: str, device: str) -> str:
    """The dtype that is asked for, "auto" decided. Raises ValueError for an unknown one."""
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype must be 'auto' or one of {', '.join(DTYPES)}, got {dtype!r}")
    return fastest_dtype(device) if dtype == "auto" else dtype


def optimize_for_cpu(transformer: Transformer) -> None:
    """Pack the linear layers and use the compiled operations, in place. Does nothing on another device."""
    weights = transformer.embed_tokens.weight
    if weights.device.type != "cpu":
        return
    if any(map(is_packable, transformer.modules())):
        pack_linears(transformer, fastest_way(weights.dtype))
    from minipaged.model.compiled_ops import use_compiled_ops  # Numba's import takes a while, and a GPU needs none

    use_compiled_ops(transformer)


def open_source(name: str | Path) -> Source:
    """A GGUF file or a folder with safetensors. Raises ValueError for anything else."""
    path = Path(name)
    try:
        path = path.expanduser()
        is_folder, is_file = path.is_dir() and bool(str(name)), path.is_file()
    except (OSError, RuntimeError):  # a name longer than a file's may be, or ~nobody: no file, then
        is_folder = is_file = False
    if is_folder:
        return source_from_folder(path)
    if is_file:
        return source_from_gguf(path)
    raise ValueError(
        f"unknown model {str(name)!r}: take 'smollm2-135m', 'tiny', a GGUF file, or a folder with safetensors"
    )


def read_model(source: Source, dtype: torch.dtype, device: str = "cpu", keep: bool = True) -> Model:
    """A model from its files. Arguments and errors as of `assemble`; also raises ModelFileError for a damaged file."""
    check_shapes(source.config, source.shapes)
    tokenizer = source.tokenizer()
    transformer = assemble(source.config, lambda name: source.read(name, (ALL, ALL)), dtype, device, keep)
    return checked(Model(transformer, tokenizer))


def assemble(
    config: ModelConfig, read: Callable[[str], Tensor], dtype: torch.dtype, device: str = "cpu", keep: bool = True
) -> Transformer:
    """A transformer on its device, whose weights `read` gives by their names, part after part.

    keep=False: its linear layers are packed as they are read, and not kept beside that. Raises ModelFileError where the
    device has no memory for it: then nothing was read.
    """
    with torch.device("meta"):
        empty = Transformer(config, dtype)
    is_on_cpu = torch.device(device).type == "cpu"
    way = fastest_way(dtype) if is_on_cpu and not keep else Way("plain", dtype)
    needed, there = bytes_in_memory(empty, way), memory_of(device)
    if needed > there:
        raise ModelFileError(
            f"the weights take {needed:,} bytes of memory in {str(dtype).removeprefix('torch.')}, and device "
            f"'{device}' has {there:,}: take a smaller model{'' if dtype.itemsize == 2 else ', or bfloat16'}"
        )

    def place(part: nn.Module) -> None:
        part.to(device)
        if is_on_cpu and not keep:
            pack_linears(part, way, keep=False)

    transformer = build_transformer(config, read, dtype, place)
    if not config.tie_embeddings:
        place(transformer)  # the output layer
    return transformer.to(device)


def bytes_in_memory(transformer: Transformer, way: Way) -> int:
    """Of the weights and tables of a model that is assembled with this way to multiply."""
    total = transformer.cos.nbytes + transformer.sin.nbytes + sum(p.nbytes for p in transformer.parameters())
    for module in transformer.modules():
        if isinstance(module, nn.Linear) and module.weight.numel() >= MIN_SIZE and is_packing(way, module.weight.dtype):
            is_kept = way.plain_rows or module.weight is transformer.embed_tokens.weight
            total += module.weight.numel() * way.dtype.itemsize - (0 if is_kept else module.weight.nbytes)
    return total


def memory_of(device: str) -> int:
    """Bytes that the device has, or that a container leaves to this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no such file, or "max" in it
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory


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


def checked(model: Model) -> Model:
    """Raises ModelFileError where the tokenizer could name a token that the model has no embedding for."""
    largest, vocab_size = model.tokenizer.largest_token_id, model.transformer.config.vocab_size
    if largest >= vocab_size:
        raise ModelFileError(f"the tokenizer has token {largest}, and the model embeds tokens 0 to {vocab_size - 1}")
    return model
