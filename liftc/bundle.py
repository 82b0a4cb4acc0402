"""A bundle: candidates of `liftc tune` compiled on one machine, to be measured on another; a folder.

plan.json names every object with its sha256 and says which functions of it are which candidate. Nothing in it is
executed but the objects, and those only after their hashes agree.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from liftc.errors import LiftcError, RecordError
from liftc.format import LiftFormat
from liftc.kernel_object import TARGETS, file_sha256

SCHEMA = 1
PLAN = "plan.json"
_FILE = re.compile(r"[a-z0-9][a-z0-9_.-]{0,99}\.so")
_LARGEST = 1 << 31


@dataclass(frozen=True)
class Work:
    """One linear to measure, after row-group fusion."""

    format: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class BundleCandidate:
    """Knobs of an op; `symbols` are its functions in `file`. refused: why it is not to be measured, else ""."""

    op: str
    knobs: dict[str, Any]
    rank: int
    file: str
    symbols: tuple[str, ...]
    refused: str = ""


@dataclass(frozen=True)
class Bundle:
    """What to measure and with what. base: object with everything the candidates do not replace.

    sha256: of every object and descriptor. dtype: of activations ("bf16"). pool_bytes: distinct signs per timing.
    """

    target: str
    arch: str
    kernel_version: int
    dtype: str
    pool_bytes: int
    work: tuple[Work, ...]
    batches: tuple[int, ...]
    base: str
    candidates: tuple[BundleCandidate, ...]
    sha256: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain data of plan.json; "digest" is of everything else."""
        values = {"schema": SCHEMA, **asdict(self)}
        return {**values, "digest": _digest(values)}


def write_bundle(folder: Path, bundle: Bundle) -> None:
    """Write plan.json last and in one step; the objects are there already. Raises RecordError."""
    scratch = folder / (PLAN + ".tmp")
    try:
        scratch.write_text(json.dumps(bundle.to_json(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(scratch, folder / PLAN)
    except OSError as error:
        raise RecordError(f"bundle: cannot write {folder}: {error.strerror or error}") from None


def object_hashes(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """sha256 of these objects and their descriptors, by file name."""
    files = [name for so in names for name in (so, so.removesuffix(".so") + ".json")]
    return {name: file_sha256(folder / name) for name in sorted(files)}


def read_bundle(folder: Path) -> Bundle:
    """Read and check a bundle; RecordError for anything missing, altered or impossible."""
    path = folder / PLAN
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        bundle = _from_json(data)
    except OSError as error:
        raise RecordError(f"bundle: cannot read {path}: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, RecursionError, LiftcError) as error:
        raise RecordError(f"bundle: {path} is not a tuning plan ({error}); build it again") from None
    needed = {bundle.base, *(c.file for c in bundle.candidates if c.file)}
    for name in sorted(needed | {n.removesuffix(".so") + ".json" for n in needed}):
        file = folder / name
        if name not in bundle.sha256 or not file.is_file() or file_sha256(file) != bundle.sha256[name]:
            raise RecordError(f"bundle: {file} is missing or is not the file the plan names; copy it again")
    return bundle


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _from_json(data: Any) -> Bundle:
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"not schema {SCHEMA}")
    digest = data.pop("digest", None)
    if digest != _digest(data):
        raise ValueError("its digest differs")
    del data["schema"]
    data["work"] = tuple(_work(Work(**w)) for w in data["work"])
    data["batches"] = tuple(_whole(b, 1, 1 << 20, "batches") for b in data["batches"])
    data["candidates"] = tuple(_candidate(c) for c in data["candidates"])
    bundle = Bundle(**data)
    if bundle.target not in TARGETS or bundle.dtype not in ("f32", "f16", "bf16"):
        raise ValueError(f"target {bundle.target!r}, dtype {bundle.dtype!r}")
    if not bundle.work or not bundle.batches or not all(isinstance(v, str) for v in bundle.sha256.values()):
        raise ValueError("it holds no work")
    _whole(bundle.pool_bytes, 1 << 12, 1 << 40, "pool_bytes")
    _whole(bundle.kernel_version, 0, 1 << 30, "kernel_version")
    _file(bundle.base)
    return bundle


def _work(work: Work) -> Work:
    LiftFormat.parse(work.format)
    _whole(work.out_features, 1, _LARGEST, "out_features")
    _whole(work.in_features, 1, _LARGEST, "in_features")
    return work


def _candidate(values: dict[str, Any]) -> BundleCandidate:
    made = BundleCandidate(**{**values, "symbols": tuple(values["symbols"])})
    if not isinstance(made.op, str) or not isinstance(made.knobs, dict) or type(made.rank) is not int:
        raise ValueError("a candidate has no op, knobs or rank")
    if not all(isinstance(symbol, str) for symbol in made.symbols) or not isinstance(made.refused, str):
        raise ValueError("the symbols of a candidate are not texts")
    if made.file or not made.refused:
        _file(made.file)
    return made


def _file(name: Any) -> None:
    if not isinstance(name, str) or not _FILE.fullmatch(name):
        raise ValueError(f"object {name!r}")


def _whole(value: Any, least: int, most: int, what: str) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} is {value!r}")
    return value
