"""The artifact folder: what is in it, how it is written in one step, how it is checked before use.

config.json  tokenizer files  generation_config.json     as in a Hugging Face folder
model-0000N-of-0000M.safetensors + model.safetensors.index.json
graph/<name>.json   kernels/<target>.so + .json   plan.json   program.txt   README.md
manifest.json       sha256 and size of every other file; written last, so nothing half-written loads
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import save_file

from liftc.errors import ArtifactError
from liftc.kernel_object import file_sha256

FORMAT_VERSION = 2
"""2: lifted_linear takes the factors of its transform one by one."""

MANIFEST = "manifest.json"
MANIFEST_KEYS = {
    "format_version", "liftc", "kind", "files", "run", "targets", "command", "options", "versions", "source",
}  # fmt: skip
SHARD_BYTES = 2 * 10**9


def write_json(path: Path, data: object) -> None:
    """Write JSON with sorted keys and a final newline."""
    path.write_text(json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def save_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], planned: Mapping[str, int]) -> int:
    """Write tensors as numbered safetensors shards of about 2 GB with an index; returns the files' bytes.

    `planned` maps every tensor name to its planned bytes; a tensor that is missing, unplanned or of another
    size raises ArtifactError, so that the plan is what is on disk. Only one shard is in memory at a time.
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in planned.items():
        if groups[-1] and filled + size > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    shard_of = {name: index for index, group in enumerate(groups) for name in group}
    pending: list[dict[str, torch.Tensor]] = [{} for _ in groups]
    weight_map: dict[str, str] = {}
    written: list[Path] = []
    for name, tensor in tensors:
        if planned.get(name) != tensor.numel() * tensor.element_size():
            raise ArtifactError(
                f"tensor {name} holds {tensor.numel() * tensor.element_size()} bytes, planned {planned.get(name)}"
            )
        shard = shard_of[name]
        pending[shard][name] = tensor.contiguous()
        if len(pending[shard]) == len(groups[shard]):
            file = f"model-{shard + 1:05d}-of-{len(groups):05d}.safetensors"
            save_file(pending[shard], folder / file, metadata={"format": "pt"})
            written.append(folder / file)
            weight_map.update(dict.fromkeys(groups[shard], file))
            pending[shard] = {}
    lacking = sorted(set(planned) - set(weight_map))
    if lacking:
        raise ArtifactError(f"planned tensor {lacking[0]} was never written")
    index = {"metadata": {"total_size": sum(planned.values())}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    for path in written:  # safetensors creates files that only their owner may read
        shutil.copymode(folder / "model.safetensors.index.json", path)
    return sum(path.stat().st_size for path in written)


def check_output(out: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists: always when it is not an artifact, and without `overwrite` when it is."""
    if not out.exists():
        return
    if not (out / MANIFEST).is_file():
        raise ArtifactError(f"{out} exists and is not a liftc artifact; choose another --output")
    if not overwrite:
        raise ArtifactError(f"{out} exists already; choose another --output or pass --overwrite")


def recover_replaced(out: Path, partial: Path) -> None:
    """Put back the artifact that a killed `staging` had moved aside but not yet replaced."""
    old = partial / "replaced"
    if not out.exists() and (old / MANIFEST).is_file():
        os.replace(old, out)


@contextmanager
def staging(out: Path, partial: Path, *, overwrite: bool) -> Iterator[Path]:
    """A fresh folder inside `partial` that becomes `out` when the block ends without an error.

    An existing `out` is replaced only with `overwrite`, and only after the new one is complete. Disk errors
    become ArtifactError; whatever happens, `out` is either the old folder or the finished new one.
    """
    check_output(out, overwrite=overwrite)
    stage = partial / "artifact"
    shutil.rmtree(stage, ignore_errors=True)
    try:
        stage.mkdir(parents=True)
        yield stage
        for path in sorted(p for p in stage.rglob("*") if p.is_file()):
            _flush(path)
        if out.exists():
            old = partial / "replaced"
            shutil.rmtree(old, ignore_errors=True)
            os.replace(out, old)
        os.replace(stage, out)
    except OSError as error:
        recover_replaced(out, partial)
        shutil.rmtree(stage, ignore_errors=True)
        raise ArtifactError(
            f"cannot write {out}: {error.strerror or error}; nothing was changed there"
        ) from error
    except Exception as error:
        shutil.rmtree(stage, ignore_errors=True)
        if type(error).__name__ == "SafetensorError":  # disk full surfaces as this one
            raise ArtifactError(f"cannot write {out}: {error}; nothing was changed there") from error
        raise


def _flush(path: Path) -> None:
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Hash every file below `folder` and write manifest.json with them and `facts` (see MANIFEST_KEYS)."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, "files": files, **facts})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ArtifactError when it is missing, unreadable or not an object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise ArtifactError(f"{path} must hold a JSON object")
    return data


def read_manifest(folder: Path, *, check: bool = True) -> dict[str, Any]:
    """The manifest of an artifact, after checking that every file it names has its size and sha256.

    `check=False` compares sizes only. Raises ArtifactError for a folder that is not a complete artifact, for
    another format version, unknown keys, paths that leave the folder, and altered or missing files.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder; give the output folder of `liftc compile`")
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(
            f"{folder} has no {MANIFEST}: it is not a finished liftc artifact; compile it again"
        )
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{folder} has artifact format {manifest.get('format_version')!r} and this liftc reads {FORMAT_VERSION}: "
            "compile the model again with this liftc, or load it with the one that wrote it"
        )
    unknown = sorted(set(manifest) - MANIFEST_KEYS)
    if unknown or not isinstance(manifest.get("files"), dict):
        raise ArtifactError(f"{folder / MANIFEST} is malformed ({unknown[0] if unknown else 'files'})")
    for name, entry in manifest["files"].items():
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or not isinstance(entry, dict):
            raise ArtifactError(f"{folder / MANIFEST} names a file outside the artifact: {name!r}")
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing; the artifact is incomplete")
        if path.stat().st_size != entry.get("bytes"):
            raise ArtifactError(
                f"{path} has {path.stat().st_size} bytes, the manifest says {entry.get('bytes')}"
            )
        if check and file_sha256(path) != entry.get("sha256"):
            raise ArtifactError(f"{path} was altered: its sha256 differs from the manifest")
    return manifest
