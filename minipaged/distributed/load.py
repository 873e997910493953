"""Chapter 13. One rank's slice of a model's weights, and no more than that of the file.

A row-parallel layer is cut by columns, every other by rows, norms not at all. safetensors are read by slices. A GGUF
file is mapped into memory, and a slice of a quantised tensor is dequantised by itself: rows always, columns where the
cut falls between blocks (32 numbers, for most formats), as it does for SmolLM2. Elsewhere the rank's rows are
dequantised whole, and cut then. `tiny` comes from a generator and is drawn whole.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minipaged.distributed.shares import Share, local_config, shares
from minipaged.model import fetch
from minipaged.model.gguf_file import ModelFileError
from minipaged.model.load import DTYPES, Model, assemble, checked, open_source, optimize_for_cpu, tiny_transformer
from minipaged.model.tokenizer import TextTokenizer
from minipaged.model.tokenizer_files import byte_tokenizer
from minipaged.model.transformer import ModelConfig, Transformer
from minipaged.model.weights import ALL, Cut, Source, check_shapes, source_from_transformer

WHOLE = (ALL, ALL)


class RankModel(NamedTuple):
    """One rank's part of a model: `transformer` has the shape `local_config`, not yet joined to the others."""

    transformer: Transformer
    tokenizer: TextTokenizer | None  # of rank 0: the others get tokens alone
    config: ModelConfig  # of the whole model
    share: Share


def load_slice(name: str | Path, rank: int, size: int, dtype: str, seed: int, device: str) -> RankModel:
    """Arguments as of `load_model`. Raises ValueError where the model, or its number of heads, does not fit."""
    if name == "tiny":
        source = source_from_transformer(tiny_transformer(torch.float64, seed), byte_tokenizer)
    else:
        if name == "smollm2-135m":
            name = fetch.fetch()
            fetch.verify(name)
        source = open_source(name)
    share = shares(source.config, size)[rank]
    try:
        transformer = slice_of(source, share, DTYPES[dtype], device, keep=False)
        optimize_for_cpu(transformer)
        tokenizer = checked(Model(transformer, source.tokenizer())).tokenizer if rank == 0 else None
    except ValueError as error:
        raise ModelFileError(f"{name}: {error}") from error
    return RankModel(transformer, tokenizer, source.config, share)


def slice_of(source: Source, share: Share, dtype: torch.dtype, device: str = "cpu", keep: bool = True) -> Transformer:
    """The part of a model that a share names. Raises ModelFileError for a tensor that is missing, odd, or left over,
    and where the device has no memory for the part. keep: see `assemble`."""
    check_shapes(source.config, source.shapes)  # of the whole: a slice of a tensor that is too large would look right
    local, cuts = local_config(source.config, share), _cuts(share, source.config.head_dim)

    def read(name: str) -> Tensor:
        return source.read(name, cuts.get(name.split(".")[-2], WHOLE))

    transformer = assemble(local, read, dtype, device, keep)
    transformer.config = replace(local, vocab_size=source.config.vocab_size)  # the batch has tokens of all words
    return transformer


def _cuts(share: Share, head_dim: int) -> dict[str, Cut]:
    """What is divided -> this rank's rows and columns of it."""
    words, inner = slice(share.vocab.start, share.vocab.stop), slice(share.inner.start, share.inner.stop)
    heads, kv_heads = (slice(h.start * head_dim, h.stop * head_dim) for h in (share.heads, share.kv_heads))
    by_rows = {"embed_tokens": words, "lm_head": words, "q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}
    by_rows |= {"gate_proj": inner, "up_proj": inner}
    by_columns = {"o_proj": heads, "down_proj": inner}
    return {name: (cut, ALL) for name, cut in by_rows.items()} | {name: (ALL, cut) for name, cut in by_columns.items()}
