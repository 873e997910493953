"""Chapter 2. Ready in a second or two: a GGUF file's weights, dequantised once, and mapped into memory from then on.

    SmolLM2-135M-Instruct.Q4_1.gguf                       98 MB, 4 bits a weight: what `minipaged fetch` brought
    SmolLM2-135M-Instruct.Q4_1.float32.safetensors        as `Transformer` holds them, one such file for each dtype

Reading a GGUF file takes seconds: its header in Python, its numbers through NumPy. The copy holds the same tensors,
stacked already, with configuration and tokenizer in its header. It is mapped, not read: pages of it come into memory
when they are touched, and the system may drop them again, since it knows where to find them.

Invariant: a copy is used only if it says it was made of exactly this source, by this version of ours, and everything in
it adds up to the checksum it carries. Any other is ignored and made again, and where none can be kept, all goes on
without. A copy is written beside its place and moved there in one step, so that there is never half of one.
"""

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from minipaged.model.fetch import sweep
from minipaged.model.tokenizer import TextTokenizer
from minipaged.model.transformer import ModelConfig, Transformer

FORMAT = "minipaged 2"  # raise the number when what a copy holds changes

Loaded = tuple[Transformer, TextTokenizer]


def load_through_cache(source: Path, digest: str, dtype: torch.dtype, build: Callable[[], Loaded]) -> Loaded:
    """What `build()` makes of the file `source`, from a copy beside it where there is a good one; else one is made.

    digest: the SHA-256 of the source, as it is now. What killed processes have left beside it is removed.
    """
    sweep(source.parent)
    path = source.with_name(f"{source.stem}.{str(dtype).removeprefix('torch.')}.safetensors")
    found = _read(path, digest)
    if found is not None:
        return found
    built = build()
    try:
        _write(path, digest, *built)
    except (OSError, SafetensorError):  # no room, or a folder that only others may write to
        return built
    return _read(path, digest) or built  # the mapped one: what was built need not stay in memory


def _write(path: Path, source_sha256: str, transformer: Transformer, tokenizer: TextTokenizer) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in transformer.state_dict().items()}
    if transformer.config.tie_embeddings:
        del tensors["lm_head.weight"]
    about = {
        "format": FORMAT,
        "source_sha256": source_sha256,
        "config": json.dumps(asdict(transformer.config)),
        "tokenizer": _tokenizer_to_json(tokenizer),
    }
    about["checksum"] = _checksum(tensors, about)
    # Of this name, because `sweep` removes what is left of those that were killed.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as folder:
        save_file(tensors, Path(folder) / path.name, about)
        os.replace(Path(folder) / path.name, path)


def _read(path: Path, source_sha256: str) -> Loaded | None:
    """The copy at `path`, or None where it is missing, damaged, or of another source."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT or about.get("source_sha256") != source_sha256:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        if about.pop("checksum", None) != _checksum(tensors, about):
            return None
        fields = json.loads(about["config"]).items()
        known: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in fields}  # JSON has lists
        config = ModelConfig(**known)
        return _assemble(config, tensors), _tokenizer_from_json(about["tokenizer"])
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, RuntimeError):
        return None


def _assemble(config: ModelConfig, state: dict[str, Tensor]) -> Transformer:
    """A Transformer that holds these very tensors, under its own names. Raises RuntimeError where one does not fit."""
    with torch.device("meta"):  # no storage and no random numbers for weights that are replaced in the next line
        model = Transformer(config, state["embed_tokens.weight"].dtype)
    if config.tie_embeddings:
        state = {**state, "lm_head.weight": state["embed_tokens.weight"]}
    model.load_state_dict(state, assign=True)
    if config.tie_embeddings:  # one parameter again, and not two that share their numbers until one is moved
        model.lm_head.weight = model.embed_tokens.weight
    return model.requires_grad_(False).eval()


def _checksum(tensors: dict[str, Tensor], about: dict[str, str]) -> str:
    """Of every number, name and word. CRC-32 finds what disks and cut copies do; it is no defence against people."""

    def of_tensor(name: str) -> str:
        numbers = tensors[name].flatten().view(torch.uint8).numpy()
        return f"{name} {list(tensors[name].shape)} {tensors[name].dtype} {zlib.crc32(numbers.data)}"

    with ThreadPoolExecutor() as pool:  # zlib leaves the interpreter to others while it counts
        parts = list(pool.map(of_tensor, sorted(tensors)))
    return hashlib.sha256(json.dumps([parts, sorted(about.items())]).encode()).hexdigest()


def _tokenizer_to_json(tokenizer: TextTokenizer) -> str:
    return json.dumps(
        {
            "tokenizer": tokenizer._tokenizer.to_str(),
            "eos_token_ids": sorted(tokenizer.eos_token_ids),
            "chat_template": tokenizer.chat_template,
            "bos_token_id": tokenizer.bos_token_id,
            "special_tokens": tokenizer.special_tokens,
        }
    )


def _tokenizer_from_json(text: str) -> TextTokenizer:
    fields = json.loads(text)
    return TextTokenizer(Tokenizer.from_str(fields.pop("tokenizer")), **fields)
