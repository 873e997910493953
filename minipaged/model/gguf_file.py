"""Chapter 2. What lies in a GGUF file, through the package `gguf`: named values, and named tensors.

    GGUF | version | number of tensors | number of fields | fields ... | tensor infos ... | padding | numbers ...

The package maps the file into memory and reads its header when it is opened; the numbers of a tensor are dequantised
when they are asked for. One thing is added: whatever the header says should follow is held against what is left of
the file, at every step. So a file that was cut or damaged is refused at once, and no code looks for 2^60 numbers in it.
"""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

_MAX_DIMS = 4  # of a tensor
_TENSOR_INFO_BYTES = 24  # what the header says of a tensor takes as much, at the least
_PIECE = 1 << 22  # numbers that are dequantised at once: this takes several copies of them


class ModelFileError(ValueError):
    """A model file is damaged, foreign, or says something else than its configuration."""


def open_gguf(path: Path) -> "GGUFFile":
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


def gguf_field(file: "GGUFFile", name: str, default: Any = None) -> Any:
    """The value of a field. Raises ModelFileError where it is missing and no default is given."""
    value = file.field(name, default)
    if value is None:
        raise ModelFileError(f"the GGUF file has no field {name}")
    return value


class GGUFFile:
    """`tensors`: name -> the package's record of it. Raises ValueError where the file is not what its header says."""

    def __init__(self, path: Path):
        with path.open("rb") as file:
            version = file.read(8)[4:]
        # The package would try the other order of bytes, and dequantise in this one.
        if int.from_bytes(version, "little") not in (2, 3):
            if int.from_bytes(version, "big") in (2, 3):
                raise ValueError("it is big-endian, and only little-endian files are supported")
            raise ValueError(f"GGUF version {int.from_bytes(version, 'little')} is not supported: 2 and 3 are")
        try:
            self._reader = _CheckedReader(path)
        except (KeyError, IndexError, OverflowError, MemoryError, RecursionError) as error:  # a name comes twice, say
            raise ValueError(str(error)) from error
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def field(self, name: str, default: Any = None) -> Any:
        """The value of a field: a number, a string, or a list of them."""
        field = self._reader.get_field(name)
        return default if field is None else field.contents()

    def tensor(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> NDArray[np.float32]:
        """The numbers of a tensor, dequantised. Raises ValueError for a type that the package does not read.

        rows, columns: of a matrix, this part alone (chapter 13), and no more of the file is touched. Only a cut that
        falls inside a block of a quantised row has to read those rows whole.
        """
        entry = self.tensors[name]
        block, num_bytes = gguf.GGML_QUANT_SIZES[entry.tensor_type]  # numbers of a block, and bytes that hold them
        is_vector = entry.data.ndim == 1  # all its bytes are one row; it is small, and cut when it is read
        data, then = (entry.data[None], rows) if is_vector else (entry.data[rows], slice(None))
        if columns != slice(None):
            if data.dtype != np.uint8:
                data = data[:, columns]
            elif columns.start % block or columns.stop % block:
                then = columns
            else:
                data = data[:, columns.start // block * num_bytes : columns.stop // block * num_bytes]
        step = max(1, _PIECE // max(1, data[:1].size))  # rows
        try:
            pieces = (
                gguf.dequantize(np.ascontiguousarray(data[first : first + step]), entry.tensor_type)[..., then]
                for first in range(0, len(data), step)
            )
            out: NDArray[np.float32] | None = None
            for i, piece in enumerate(pieces):
                if out is None:
                    out = np.empty((len(data), *piece.shape[1:]), np.float32)
                out[i * step : i * step + len(piece)] = piece
        except (NotImplementedError, ValueError) as error:
            raise ValueError(f"tensor {name} cannot be read as {entry.tensor_type.name}: {error}") from error
        found = np.empty(data.shape, np.float32) if out is None else out
        return found[0] if is_vector else found


class _CheckedReader(gguf.GGUFReader):
    """The package reads past the end of the file without a word (a NumPy slice is then shorter), and would count on."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> NDArray[Any]:
        # A plain view of the map: slices of a memmap are several times as slow, and there are 300,000 of them.
        self.data = np.asarray(self.data)  # type: ignore[assignment]
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"bytes {int(offset):,} to {end:,} should follow, and the file has {len(self.data):,}")
        values: NDArray[Any] = super()._get(offset, dtype, count, override_order)
        return values

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        """The package takes an array item by item, as many as it says it has. Here numbers are taken in one piece."""
        if raw_type == gguf.GGUFValueType.ARRAY:
            kind, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            dtype = self.gguf_scalar_to_np.get(gguf.GGUFValueType(kind[0]))
            values = self._get(orig_offs + 12, dtype or np.uint64, length[0])  # a string takes 8 bytes, at the least
            if dtype is not None:
                types = [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(kind[0])]
                return 12 + values.nbytes, [kind, length, values], [2], types
        return super()._get_field_parts(orig_offs, raw_type)

    def _build_tensor_info(self, offs: int, count: int) -> tuple[int, list[gguf.ReaderField]]:
        self._get(offs, np.uint8, _TENSOR_INFO_BYTES * int(count))
        return super()._build_tensor_info(offs, count)

    def _build_tensors(self, start_offs: int, fields: list[gguf.ReaderField]) -> None:
        """The package adds 64-bit offsets, which wrap around, and lets two tensors lie in one place."""
        spans = []  # bytes, from the end of the header on
        for field in fields:
            *_, dims, kind, offset = field.parts
            if len(dims) > _MAX_DIMS:
                raise ValueError(f"tensor {field.name} has {len(dims):,} dimensions: at most {_MAX_DIMS} are supported")
            numbers, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind[0])]
            start = int(offset[0])
            spans.append((start, start + math.prod(map(int, dims)) // numbers * num_bytes, field.name))
            if start % int(self.alignment):
                raise ValueError(f"tensor {field.name} begins at byte {start:,}, no multiple of {self.alignment}")
        spans.sort()
        for (_, end, first), (start, _, second) in pairwise(spans):
            if start < end:
                raise ValueError(f"tensors {first} and {second} overlap at byte {start:,}")
        if spans and int(start_offs) + spans[-1][1] > len(self.data):
            raise ValueError(f"tensor {spans[-1][2]} ends at byte {spans[-1][1]:,} behind the header, past the file's")
        super()._build_tensors(start_offs, fields)
