"""Chapter 2. What lies in a model's folder, and which of its files are read.

    config.json                       the shape of the model
    model.safetensors                 its weights; or
    model.safetensors.index.json      {"weight_map": {tensor: file, ...}} and the files that it names
    tokenizer.json                    its tokenizer, with the names of special tokens and a chat template beside it

Older copies, adapters and other forms of the weights may lie there too. What the index does not name is not read.
"""

import json
from pathlib import Path
from typing import Any

from minipaged.model.gguf_file import ModelFileError

INDEX = "model.safetensors.index.json"


def file_in(folder: Path, name: str) -> Path | None:
    """A file of a folder, or None where there is none. Raises ModelFileError for what is no regular file: the end of a
    pipe or of a device may never come."""
    path = folder / name
    if not path.exists():
        return None
    if not path.is_file():
        raise ModelFileError(f"{path} is no regular file")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object. Raises ModelFileError where it does not."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number without end, brackets without end
        raise ModelFileError(f"{path} ({path.stat().st_size:,} bytes) is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ModelFileError(f"{path} must hold one JSON object, got a {type(fields).__name__}")
    return fields


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """Files of the weights, and the tensors to read of each (None: all). Raises ModelFileError where one is missing."""
    if (index := file_in(folder, INDEX)) is None:
        if (single := file_in(folder, "model.safetensors")) is None:
            raise ModelFileError(f"{folder} holds neither model.safetensors nor {INDEX}")
        return {single: None}
    parts = read_json(index).get("weight_map")
    if not isinstance(parts, dict) or not parts or not all(isinstance(part, str) for part in parts.values()):
        raise ModelFileError(f"{index} names no parts: its weight_map is {parts!r:.80}")
    named: dict[Path, list[str] | None] = {}
    for part in sorted(set(parts.values())):
        if (file := file_in(folder, Path(part).name)) is None:
            raise ModelFileError(f"{folder} lacks {part}, which {INDEX} names")
        named[file] = [name for name in parts if parts[name] == part]
    return named
