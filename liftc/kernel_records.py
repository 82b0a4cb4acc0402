"""Measurements of kernels, one JSON object a line, one file per device; only ever added to.

`liftc tune` and `liftc bench kernels` write them; codegen derives from them which knobs are best (never stored).
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from liftc.errors import FormatError, RecordError
from liftc.format import LiftFormat

STATUSES = ("ok", "wrong", "failed", "refused")
"""ok: exact and timed. wrong: exact check failed. failed: it crashed, hung or did not compile. refused: it
does not fit the device."""

Knobs = dict[str, Any]
_TEXTS = ("kernel", "arch", "device", "format", "status", "torch", "driver", "when")
_COUNTS = ("kernel_version", "out_features", "in_features", "batch")
_FIGURES = ("microseconds", "gigabytes_per_second", "read_ceiling_gbs", "fraction_of_ceiling")
_OPTIONAL = ("chain", "reason", "dtype")
_WHEN = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
_SHAPE = re.compile(r"[1-9]\d*x[1-9]\d*")
_LONGEST_LINE = 1 << 16


@dataclass(frozen=True)
class Record:
    """One measurement. Figures are None unless status is "ok".

    kernel: op of the function measured, or a name such as "lift+sign_matmul" of a benchmark row. arch: of its
    machine code ("sm_90a", "x86-64-v4"). out_features: 0 for a lift. gigabytes_per_second counts the bits of
    the signs (a lift: its factors and operands), fraction_of_ceiling is of the rate read_ceiling_gbs, measured in
    the same run. chain: "OCxIC+OCxIC*N", the products of one timing in order, N times over, microseconds then
    being of all of them; out_features and in_features are 0.
    """

    kernel: str
    kernel_version: int
    arch: str
    device: str
    format: str
    out_features: int
    in_features: int
    batch: int
    knobs: Knobs
    status: str
    microseconds: float | None
    gigabytes_per_second: float | None
    read_ceiling_gbs: float | None
    fraction_of_ceiling: float | None
    torch: str
    driver: str
    when: str
    chain: str = ""
    reason: str = ""
    dtype: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data in which optional fields appear only when they say something."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v for k, v in values.items() if v or k not in _OPTIONAL}

    def line(self) -> str:
        """The line of a records file, without its end."""
        return json.dumps(self.to_json(), sort_keys=True)

    def key(self) -> tuple[Any, ...]:
        """What was measured: equal for repetitions of one measurement on one kind of device."""
        knobs = json.dumps(self.knobs, sort_keys=True)
        return (self.kernel, self.kernel_version, self.arch, self.format, self.chain, self.out_features,
                self.in_features, self.batch, self.dtype, knobs)  # fmt: skip


def digits(value: float) -> float:
    """A figure to five digits."""
    return float(f"{value:.5g}")


def chain_shapes(chain: str) -> tuple[tuple[int, int], ...]:
    """(out_features, in_features) of the products in one round of a chain; ValueError for other text."""
    body, _, rounds = chain.partition("*")
    parts = body.split("+")
    if not all(map(_SHAPE.fullmatch, parts)) or not rounds.isdigit() or rounds.startswith("0"):
        raise ValueError(f"chain {chain!r} is not written as OCxIC+OCxIC*N")
    return tuple((int(a), int(b)) for a, _, b in (part.partition("x") for part in parts))


def parse_record(line: str) -> Record:
    """The record of one line; ValueError saying what is wrong with it."""
    if len(line) > _LONGEST_LINE:
        raise ValueError("the line is too long")
    values = json.loads(line)
    if not isinstance(values, dict):
        raise ValueError("it is not an object")
    required = {f.name for f in fields(Record)} - set(_OPTIONAL)
    if missing := sorted(required - set(values)):
        raise ValueError(f"{missing[0]} is missing")
    if unknown := sorted(set(values) - required - set(_OPTIONAL)):
        raise ValueError(f"there is no field {unknown[0]!r}")
    for name in (*_TEXTS, *(name for name in _OPTIONAL if name in values)):
        if not isinstance(values[name], str):
            raise ValueError(f"{name} is not text")
    for name in _COUNTS:
        if type(values[name]) is not int or values[name] < 0:
            raise ValueError(f"{name} is not a count")
    for name in _FIGURES:
        values[name] = _figure(name, values[name], values["status"] == "ok")
    _check_meaning(values)
    return Record(**values)


def _figure(name: str, value: Any, measured: bool) -> float | None:
    if value is None and not (measured and name == "microseconds"):
        return None
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is not a figure")
    return float(value)


def _check_meaning(values: dict[str, Any]) -> None:
    if values["status"] not in STATUSES:
        raise ValueError(f"status {values['status']!r} is none of {', '.join(STATUSES)}")
    if not _WHEN.fullmatch(values["when"]):
        raise ValueError("when is not written as 2026-01-31T12:00:00Z")
    if not values["kernel"] or not values["arch"] or not values["device"]:
        raise ValueError("kernel, arch and device must not be empty")
    if values["batch"] < 1:
        raise ValueError("batch is not at least 1")
    try:
        LiftFormat.parse(values["format"])
    except FormatError as error:
        raise ValueError(str(error)) from None
    if values.get("chain"):
        chain_shapes(values["chain"])
    elif not values["in_features"]:
        raise ValueError("in_features is 0 and there is no chain")
    if not isinstance(values["knobs"], dict) or not all(map(_is_knob, values["knobs"].values())):
        raise ValueError("knobs is not an object of numbers, texts and lists of whole numbers")


def _is_knob(value: Any) -> bool:
    if isinstance(value, list):
        return all(type(item) is int for item in value)
    return type(value) in (int, bool, str) or (type(value) is float and math.isfinite(value))


def read_records(path: Path) -> list[Record]:
    """Every record of a file, in its order; RecordError with file and line for the first bad one."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise RecordError(f"records: cannot read {path}: {reason}") from None
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(parse_record(line))
        except (ValueError, RecursionError) as error:
            reason = "it is not JSON" if isinstance(error, json.JSONDecodeError) else str(error)
            raise RecordError(f"records: {path}, line {number}: {reason}; mend or delete the line") from None
    return found


def read_folders(folders: Iterable[Path]) -> list[Record]:
    """Records of every .jsonl file of these folders; folders that do not exist are left out."""
    return [
        record
        for folder in folders
        for path in sorted(folder.glob("*.jsonl"))
        for record in read_records(path)
    ]


def records_file(folder: Path, device: str) -> Path:
    """File of a device's records: its name with everything but letters, digits and dots as hyphens."""
    return folder / (re.sub(r"[^A-Za-z0-9.]+", "-", device).strip("-.") + ".jsonl")


def append_records(path: Path, records: Sequence[Record]) -> None:
    """Add lines to the end of a file and flush them to disk; creates folder and file. Raises RecordError.

    Half a line at the end, left by a machine that died while writing, is cut off first.
    """
    data = "".join(record.line() + "\n" for record in records).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as stream:
            _cut_half_line(stream)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise RecordError(f"records: cannot write {path}: {error.strerror or error}") from None


def _cut_half_line(stream: Any) -> None:
    end = stream.seek(0, os.SEEK_END)
    start = max(0, end - _LONGEST_LINE)
    stream.seek(start)
    tail = stream.read(end - start)
    if tail and not tail.endswith(b"\n"):
        stream.truncate(start + tail.rfind(b"\n") + 1)
    stream.seek(0, os.SEEK_END)


def merge_records(paths: Sequence[Path], out: Path) -> tuple[int, int]:
    """Write every record of `paths`, each once, in a fixed order, to `out` (which may be one of them).

    Returns (records written, repetitions left out). The file is replaced in one step, or not at all when any
    line of any file is bad. Raises RecordError.
    """
    read = [record for path in paths for record in read_records(path)]
    lines = {record.line(): record for record in read}
    ordered = sorted(lines, key=lambda line: (lines[line].device, *map(str, lines[line].key()), line))
    scratch = ""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=out.parent, delete=False, encoding="utf-8") as stream:
            scratch = stream.name
            stream.writelines(line + "\n" for line in ordered)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, out)
    except OSError as error:
        if scratch:
            Path(scratch).unlink(missing_ok=True)
        raise RecordError(f"records: cannot write {out}: {error.strerror or error}") from None
    return len(ordered), len(read) - len(ordered)
