"""Weights on disk, read one tensor at a time and never trusted: headers, sizes and dtypes are checked first.

    checkpoint = open_checkpoint(folder)              # model.safetensors, or many shards with an index
    checkpoint.spec("model.norm.weight")              # TensorSpec, nothing is read
    checkpoint.tensor("model.norm.weight")            # reads the bytes of this tensor only

Pickled weights are never opened.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from liftc.errors import CheckpointError
from liftc.safetensors_file import SAFETENSORS_DTYPES, Entry, read_header, spec_of
from liftc.spec import DTYPES, TensorSpec

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint(ABC):
    """Named tensors. `spec` costs nothing; `tensor` may read from disk, on the CPU, one tensor per call."""

    @abstractmethod
    def names(self) -> Sequence[str]:
        """Every tensor name, sorted. An alias (a tied weight) is not listed but can be asked for."""

    @abstractmethod
    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor; raises CheckpointError when there is no such tensor."""

    @abstractmethod
    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU for weights that come from disk; raises CheckpointError."""

    def __contains__(self, name: str) -> bool:
        try:
            self.spec(name)
        except CheckpointError:
            return False
        return True

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(self.spec(name).nbytes for name in self.names())


class SafetensorsCheckpoint(Checkpoint):
    """A folder with `model.safetensors`, or with shards named by `model.safetensors.index.json`.

    All headers are read and checked when the object is built; raises CheckpointError for a missing folder,
    a missing or truncated shard, a malformed header, or an index that names a tensor its shard lacks.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: no such model folder; give a folder with {_SINGLE}")
        if (self.folder / _INDEX).is_file():
            self._entries = _read_sharded(self.folder)
        elif (self.folder / _SINGLE).is_file():
            self._entries = read_header(self.folder / _SINGLE)
        else:
            raise CheckpointError(_explain_missing(self.folder))

    def names(self) -> Sequence[str]:
        return sorted(self._entries)

    def spec(self, name: str) -> TensorSpec:
        entry = self._entry(name)
        if entry.dtype not in SAFETENSORS_DTYPES:
            raise CheckpointError(
                f"{entry.path}: tensor {name} is stored as {entry.dtype}, which liftc does not read; "
                "use the checkpoint in bf16, fp16 or fp32"
            )
        return TensorSpec(entry.shape, SAFETENSORS_DTYPES[entry.dtype])

    def tensor(self, name: str) -> torch.Tensor:
        entry, spec = self._entry(name), self.spec(name)
        result = torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
        if entry.length:
            buffer = result.reshape(-1).view(torch.uint8).numpy().data
            try:
                with entry.path.open("rb") as file:
                    file.seek(entry.start)
                    count = file.readinto(buffer)
            except OSError as error:
                raise CheckpointError(f"{entry.path}: cannot read tensor {name}: {error.strerror}") from error
            if count != entry.length:
                raise CheckpointError(
                    f"{entry.path} has changed on disk while reading {name}; download it again"
                )
        return result

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise CheckpointError(f"{self.folder}: the checkpoint has no tensor {name}")
        return self._entries[name]


class StateDictCheckpoint(Checkpoint):
    """Tensors of a live module (its parameters and all its buffers) or of a dict; nothing is copied."""

    def __init__(self, source: torch.nn.Module | Mapping[str, torch.Tensor]) -> None:
        if isinstance(source, torch.nn.Module):
            found: dict[str, torch.Tensor] = dict(source.named_parameters(remove_duplicate=False))
            found.update(source.named_buffers(remove_duplicate=False))
            self._tensors = {name: tensor.detach() for name, tensor in found.items()}
        else:
            self._tensors = dict(source)

    def names(self) -> Sequence[str]:
        return sorted(self._tensors)

    def spec(self, name: str) -> TensorSpec:
        return spec_of(name, self.tensor(name))

    def tensor(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            raise CheckpointError(f"the model has no tensor {name}")
        return self._tensors[name]


@dataclass(frozen=True)
class OverlayCheckpoint(Checkpoint):
    """`base` with `extra` tensors on top of it and `aliases` (other name -> real name) for tied weights."""

    base: Checkpoint
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    def names(self) -> Sequence[str]:
        return sorted({*self.base.names(), *self.extra})

    def spec(self, name: str) -> TensorSpec:
        name = self.aliases.get(name, name)
        return spec_of(name, self.extra[name]) if name in self.extra else self.base.spec(name)

    def tensor(self, name: str) -> torch.Tensor:
        name = self.aliases.get(name, name)
        return self.extra[name] if name in self.extra else self.base.tensor(name)


@dataclass(frozen=True)
class CastCheckpoint(Checkpoint):
    """`base` with some tensors converted on reading: name -> dtype name; the others stay as stored."""

    base: Checkpoint
    dtypes: Mapping[str, str]

    def names(self) -> Sequence[str]:
        return self.base.names()

    def spec(self, name: str) -> TensorSpec:
        spec = self.base.spec(name)
        return TensorSpec(spec.shape, self.dtypes.get(name, spec.dtype))

    def tensor(self, name: str) -> torch.Tensor:
        return self.base.tensor(name).to(DTYPES[self.spec(name).dtype])


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """The weights of a model folder; raises CheckpointError with one sentence for anything unreadable."""
    return SafetensorsCheckpoint(folder)


def load_json(path: Path, error: type[CheckpointError] = CheckpointError) -> dict[str, Any]:
    """A JSON object from a file of a model folder; raises `error` when it is missing or is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: no such file; the model folder is incomplete") from None
    except (OSError, ValueError, RecursionError) as cause:
        raise error(f"{path} is not readable JSON ({_first_line(cause)}); download it again") from cause
    if not isinstance(value, dict):
        raise error(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _explain_missing(folder: Path) -> str:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        return (
            f"{folder} holds pickled weights only ({pickles[0]}), which liftc never opens; "
            f"convert them to {_SINGLE} first"
        )
    if ggufs := sorted(p.name for p in folder.iterdir() if p.suffix == ".gguf"):
        return f"{folder} holds a GGUF file; give the file itself: {folder / ggufs[0]}"
    return f"{folder} has no weights: neither {_SINGLE} nor {_INDEX} is there"


def _read_sharded(folder: Path) -> dict[str, Entry]:
    index = folder / _INDEX
    weight_map = load_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; download it again")
    entries: dict[str, Entry] = {}
    shards: dict[str, dict[str, Entry]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: the shard of {name} is not a file name of this folder: {shard!r}"
            )
        if shard not in shards:
            if not (folder / shard).is_file():
                raise CheckpointError(
                    f"{folder / shard} is missing although {_INDEX} names it; download it again"
                )
            shards[shard] = read_header(folder / shard)
        if name not in shards[shard]:
            raise CheckpointError(f"{folder / shard} lacks tensor {name}, which {_INDEX} places there")
        entries[name] = shards[shard][name]
    return entries
