"""Strict reader of a GGUF file: metadata and tensor table, every count checked against the file's size.

Layout (GGUF versions 2 and 3, little-endian): magic, version, tensor count, key count, the key-value pairs,
the tensor table, padding to `general.alignment`, the data. Decoding of blocks is left to the gguf package.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from liftc.errors import CheckpointError

CHUNK_ELEMENTS = 2**23
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


@dataclass(frozen=True)
class GgufTensor:
    """One row of the tensor table; `shape` in row-major order, `start` counted from the file's first byte."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """Metadata and tensor table of one file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Decode one tensor to `dtype`, a few million weights at a time; raises CheckpointError."""
        info = self.tensors[name]
        result = torch.empty(info.shape, dtype=dtype)
        flat = result.reshape(-1, info.shape[-1]) if info.shape else result.reshape(1, 1)
        stored = np.memmap(self.path, np.uint8, "r", info.start, (info.nbytes,)).reshape(flat.shape[0], -1)
        step = max(1, CHUNK_ELEMENTS // flat.shape[1])
        for row in range(0, flat.shape[0], step):
            try:
                values = _decode(stored[row : row + step], info.kind)
            except RuntimeError as error:
                raise CheckpointError(
                    f"{self.path}: cannot decode {name}, stored as {info.kind.name}; use another GGUF file"
                ) from error
            flat[row : row + step] = torch.from_numpy(values)
        return result


def _decode(stored: np.ndarray[Any, Any], kind: gguf.GGMLQuantizationType) -> np.ndarray[Any, Any]:
    if kind == gguf.GGMLQuantizationType.F64:
        return np.array(stored.view(np.float64))
    return np.asarray(gguf.dequantize(np.array(stored), kind))


def read_gguf(path: str | Path) -> GgufFile:
    """Read the header of a GGUF file; no tensor data is touched.

    Raises CheckpointError for a wrong magic or version, a truncated file, a malformed table, or a split file.
    """
    path = Path(path)
    try:
        data = np.memmap(path, np.uint8, "r")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such GGUF file") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as a GGUF file: {error}") from error
    cursor = _Cursor(path, data.data, 0)
    if bytes(data[:4]) != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file: its first bytes are not GGUF")
    cursor.offset = 4
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise CheckpointError(
            f"{path}: GGUF version {version} is not supported, only 2 and 3 in little-endian"
        )
    tensor_count, key_count = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.string()
        if key in metadata:
            raise CheckpointError(f"{path}: metadata key {key} occurs twice; download the file again")
        metadata[key] = cursor.value(cursor.scalar("I"))
    if (parts := metadata.get("split.count", 1)) not in (0, 1):
        raise CheckpointError(
            f"{path} is one of {parts} parts of a split GGUF file; join them with gguf-split --merge first"
        )
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment must be a power of two, got {alignment!r}")
    table = list(_read_table(cursor, tensor_count))
    base = -(-cursor.offset // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for info in table:
        placed = GgufTensor(info.name, info.shape, info.kind, base + info.start, info.nbytes)
        if placed.start + placed.nbytes > len(data):
            raise CheckpointError(
                f"{path} is truncated: {placed.name} needs {placed.start + placed.nbytes} bytes "
                f"and the file has {len(data)}; download it again"
            )
        if placed.name in tensors:
            raise CheckpointError(f"{path}: tensor {placed.name} occurs twice; download the file again")
        tensors[placed.name] = placed
    return GgufFile(path, metadata, tensors)


def _read_table(cursor: _Cursor, count: int) -> Iterator[GgufTensor]:
    """Rows of the tensor table, with `start` still relative to the data section."""
    for _ in range(count):
        name, dims = cursor.string(), cursor.scalar("I")
        if dims > _MAX_DIMS:
            raise CheckpointError(
                f"{cursor.path}: tensor {name} has {dims} dimensions; download the file again"
            )
        shape = tuple(reversed([cursor.scalar("Q") for _ in range(dims)]))
        raw_kind, start = cursor.scalar("I"), cursor.scalar("Q")
        try:
            kind = gguf.GGMLQuantizationType(raw_kind)
        except ValueError:
            raise CheckpointError(f"{cursor.path}: tensor {name} has unknown type {raw_kind}") from None
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if 0 in shape or (shape[-1] if shape else 1) % block:
            raise CheckpointError(f"{cursor.path}: shape {shape} of {name} does not fit its type {kind.name}")
        yield GgufTensor(name, shape, kind, start, math.prod(shape) // block * block_bytes)


@dataclass
class _Cursor:
    """A position in the file; every read checks that the bytes are there."""

    path: Path
    data: memoryview
    offset: int

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.offset:
            raise CheckpointError(f"{self.path} is truncated inside its header; download it again")
        self.offset += count
        return self.data[self.offset - count : self.offset]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        try:
            return bytes(self.take(self.scalar("Q"))).decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: a string at byte {self.offset} is not UTF-8") from None

    def value(self, kind: int, depth: int = 0) -> Any:
        """A metadata value: a number, a bool, a string or a list of them."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY and depth < 2:
            item, count = self.scalar("I"), self.scalar("Q")
            if item in _SCALARS:
                size = struct.calcsize("<" + _SCALARS[item])
                return list(struct.unpack(f"<{count}{_SCALARS[item]}", self.take(count * size)))
            return [self.value(item, depth + 1) for _ in range(count)]
        raise CheckpointError(f"{self.path}: metadata of unknown type {kind} at byte {self.offset}")
