"""One safetensors file: a strictly checked header, and a writer that holds one tensor in memory at a time."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from liftc.errors import CheckpointError
from liftc.spec import DTYPE_NAMES, DTYPES, TensorSpec

MAX_HEADER_BYTES = 100 * 2**20
SAFETENSORS_DTYPES = {
    "F64": "f64", "F32": "f32", "F16": "f16", "BF16": "bf16",
    "I64": "i64", "I32": "i32", "I16": "i16", "I8": "i8", "U8": "u8", "BOOL": "bool",
}  # fmt: skip
_SAFETENSORS_NAMES = {ours: theirs for theirs, ours in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: file, dtype as the file spells it, shape, first byte, length in bytes."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    """TensorSpec of a tensor; raises CheckpointError for a dtype that liftc does not know."""
    if tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(
            f"tensor {name} has dtype {tensor.dtype}, which liftc does not know; convert it first"
        )
    return TensorSpec(tuple(tensor.shape), DTYPE_NAMES[tensor.dtype])


def write_safetensors(
    path: str | Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file with one tensor in memory at a time: the header first, then the data.

    `tensors` yields every name of `specs` once, in the order of `specs`, with exactly that shape and dtype;
    raises CheckpointError otherwise, and when the disk refuses.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, spec in specs.items():
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    expected = iter(specs.items())
    try:
        with Path(path).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name, tensor in tensors:
                if (name, spec_of(name, tensor)) != next(expected, None):
                    raise CheckpointError(f"{path}: tensor {name} does not match the planned layout")
                if tensor.numel():
                    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                    file.write(data.numpy().data)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror}; free some disk space and retry"
        ) from error
    if (missing := next(expected, None)) is not None:
        raise CheckpointError(f"{path}: no data for tensor {missing[0]}")


def read_header(path: Path) -> dict[str, Entry]:
    """Entries of one safetensors file, its data section checked to be covered exactly once."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise CheckpointError(f"{path} is not a safetensors file (bad header length); download it again")
        if 8 + length > size:
            raise CheckpointError(f"{path} is truncated inside its header ({size} bytes); download it again")
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise CheckpointError(f"{path}: its safetensors header is not JSON; download it again") from cause
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its safetensors header is not a JSON object; download it again")
    entries = {
        name: _parse_entry(path, name, value, 8 + length)
        for name, value in header.items()
        if name != "__metadata__"
    }
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].length)):
        if entry.start != end:
            raise CheckpointError(f"{path}: the data of {name} overlaps or leaves a gap; download it again")
        end += entry.length
    if end > size:
        raise CheckpointError(f"{path} is truncated: it needs {end} bytes but has {size}; download it again")
    if end < size:
        raise CheckpointError(f"{path} has {size - end} bytes after its last tensor; download it again")
    return entries


_ITEM_BITS = {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "U16": 16, "U32": 32, "U64": 64, "C64": 64}


def _parse_entry(path: Path, name: str, value: object, base: int) -> Entry:
    """One header entry, with a size that agrees with shape and dtype; raises CheckpointError."""
    if isinstance(value, dict):
        dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
        if isinstance(dtype, str) and _is_counts(shape) and _is_counts(offsets) and len(offsets) == 2:
            if dtype in SAFETENSORS_DTYPES:
                bits = DTYPES[SAFETENSORS_DTYPES[dtype]].itemsize * 8
            else:
                bits = _ITEM_BITS.get(dtype, 0)
            start, end = offsets
            if bits and end - start == math.prod(shape) * bits // 8:
                return Entry(path, dtype, tuple(shape), base + start, end - start)
    raise CheckpointError(f"{path}: the header entry of {name} is malformed; download the file again")


def _is_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)
