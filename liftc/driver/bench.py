"""bench kernels: time the kernels of an artifact or object beside what they replace; a table, JSON, a plot."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from liftc.bundle import Work
from liftc.driver.bench_fused import FusedRows
from liftc.driver.bench_many import ManyRows
from liftc.driver.bench_rows import Rows, Shape
from liftc.driver.bench_text import line_text, table_text, what_text
from liftc.driver.shapes import artifact_work, find_work
from liftc.errors import LiftcError, TargetError
from liftc.format import LiftFormat
from liftc.kernel_object import TARGETS, read_kernel_object
from liftc.kernel_records import Record, append_records, read_records, records_file
from liftc.runtime import peers
from liftc.runtime.kernels import Kernels, load_kernels, runs_on

CHAIN_ROUNDS = {"llama-2-70b": 6, "llama-2-7b": 8}
"""Layers in the chain of a shape set; other chains repeat until their signs fill the pool."""

KINDS = ("chains", "shapes", "fused", "peers", "prefill", "decode")

DEFAULT_SHAPES = {"cuda": ("llama-2-70b@77/32,64/32,96/32", "llama-2-7b"), "cpu": ("smollm2-135m",)}
"""Shape sets, with formats of their own after an @."""

POOL_BYTES = {"cuda": 2_000_000_000, "cpu": 256_000_000}


@dataclass(frozen=True)
class BenchOptions:
    """Arguments of `liftc bench kernels`. only: kinds of rows (of KINDS), all by default. prefill: tokens of the
    many-token rows, 0 for none. peers: also time what the kernels replace. shared_bytes: use only kernels whose
    blocks ask for at most that. pool_bytes: distinct signs per timing, 0 for operands in cache, None for the usual.
    """

    shapes: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    peers: bool = True
    prefill: int = 2048
    shared_bytes: int | None = None
    pool_bytes: int | None = None
    json: Path | None = None
    plot: Path | None = None
    records: Path | None = None
    threads: int | None = None
    progress: bool = True


def bench_kernels(path: Path, options: BenchOptions) -> dict[str, Any]:
    """{"device", "read_ceiling_gbs", "records", "text", ...} of an artifact folder or a kernel object.

    Raises LiftcError when this machine cannot run it, or when a kernel gave a wrong result.
    """
    if options.plot is not None:
        from liftc.driver.bench_plot import check_matplotlib

        check_matplotlib(options.plot)
    file = find_object(path)
    device = torch.device(TARGETS[read_kernel_object(file).target])
    kernels = load_kernels(file, device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
        kernels.set_num_threads(options.threads)
    if options.shared_bytes is not None:
        kernels = within_shared(kernels, options.shared_bytes)
    pool = POOL_BYTES[device.type] if options.pool_bytes is None else options.pool_bytes
    rows = Rows(kernels, device, pool)
    records: list[Record] = []
    for record in _measure(rows, path, options):
        records.append(record)
        if options.progress:
            print(line_text(record), file=sys.stderr, flush=True)
        if options.records is not None:
            append_records(records_file(options.records, record.device), [record])
    answer = {
        "device": rows.facts["device"], "kernels": file.name, "read_ceiling_gbs": round(rows.ceiling, 1),
        "not_installed": peers.missing() if options.peers else [],
        "largest_shared_bytes": max((f.shared_bytes for f in kernels.object.functions), default=0),
        "records": [r.to_json() for r in records],
    }  # fmt: skip
    _write(options, records)
    if options.plot is not None:
        from liftc.driver.bench_plot import roofline

        roofline(records, options.plot)
    if wrong := [r for r in records if r.status == "wrong"]:
        raise LiftcError(
            f"bench: {wrong[0].kernel} of {file.name} is not exact at {what_text(wrong[0])}, batch "
            f"{wrong[0].batch}, and {len(wrong) - 1} more rows; nothing else of these rows was timed"
        )
    return {**answer, "text": table_text(answer, records)}


def bench_records(path: Path, options: BenchOptions) -> dict[str, Any]:
    """The fastest "ok" record of a file per kernel, size, format, batch and newest version: a table and a plot.

    Measures nothing. Raises RecordError for a bad file, LiftcError when no record is left.
    """
    found = [r for r in read_records(path) if r.status == "ok"]
    newest = max((r.kernel_version for r in found), default=0)
    best: dict[tuple[Any, ...], Record] = {}
    for r in found:
        formats = [str(LiftFormat.parse(text)) for text in options.formats]
        if r.kernel_version != newest or r.batch not in (options.batches or (r.batch,)):
            continue
        if r.format not in (formats or (r.format,)):
            continue
        key = (r.kernel, r.format, r.chain, r.out_features, r.in_features, r.batch, r.knobs.get("form"))
        before = best[key].microseconds if key in best else None
        if (r.microseconds or 0.0) < (math.inf if before is None else before):
            best[key] = r
    records = sorted(
        best.values(), key=lambda r: (not r.chain, r.chain, r.out_features, r.in_features, r.batch)
    )
    if not records:
        raise LiftcError(f"{path} has no such measurement of kernel version {newest}")
    if options.plot is not None:
        from liftc.driver.bench_plot import check_matplotlib, roofline

        check_matplotlib(options.plot)
        roofline(records, options.plot)
    ceilings = [r.read_ceiling_gbs for r in records if r.read_ceiling_gbs]
    answer: dict[str, Any] = {
        "device": records[0].device, "kernels": f"version {newest}, {path.name}", "not_installed": [],
        "read_ceiling_gbs": max(ceilings, default=0.0), "records": [r.to_json() for r in records],
    }  # fmt: skip
    return {**answer, "text": table_text(answer, records)}


def find_object(path: Path) -> Path:
    """The object to measure: `path` itself, or that of an artifact for this machine, a GPU first; LiftcError."""
    if path.suffix == ".so":
        return path
    found = sorted((path / "kernels").glob("*.so"))
    if not found:
        raise LiftcError(f"{path} is neither a kernel object (.so) nor a folder with kernels/*.so")
    for kind in ("cuda", "llvm"):
        for file in found:
            kernels = read_kernel_object(file)
            if kernels.target != kind or (kind == "cuda" and not torch.cuda.is_available()):
                continue
            if kind == "llvm" or runs_on(kernels, torch.cuda.get_device_capability()):
                return file
    raise TargetError(f"{path} has no kernels for this machine, only {', '.join(f.name for f in found)}")


def within_shared(kernels: Kernels, most: int) -> Kernels:
    """The same without functions that ask for more than `most` bytes of shared memory a block."""
    kept = tuple(f for f in kernels.object.functions if f.shared_bytes <= most)
    functions = {f.symbol: kernels.functions[f.symbol] for f in kept if f.symbol in kernels.functions}
    return replace(kernels, object=replace(kernels.object, functions=kept), functions=functions)


def _measure(rows: Rows, path: Path, options: BenchOptions) -> Iterator[Record]:
    batches = options.batches or (1, 4, 8, 16)
    kinds = set(options.only or KINDS) - (set() if options.peers else {"peers"})
    many, fused = ManyRows(rows), FusedRows(rows)
    for name, work in _sources(rows, path, options):
        formats: dict[str, list[Shape]] = {}
        for w in work:
            formats.setdefault(w.format, []).append((w.out_features, w.in_features))
        compared: set[Shape] = set()  # peers do not depend on the format
        for text, shapes in formats.items():
            fmt = LiftFormat.parse(text)
            if len(shapes) > 1 and "chains" in kinds:
                for batch in batches:
                    yield from rows.chain(shapes, CHAIN_ROUNDS.get(name, 0), fmt, batch)
            for shape in shapes:
                for batch in batches:
                    if "shapes" in kinds:
                        yield from rows.shape(shape, fmt, batch)
                    if "fused" in kinds:
                        yield from fused.shape(shape, fmt, batch)
                    if "peers" in kinds and shape not in compared:
                        yield from rows.others(shape, fmt, batch)
                compared.add(shape)
            if options.prefill and "prefill" in kinds:
                for some in [*([shape] for shape in shapes), *([shapes] if len(shapes) > 1 else [])]:
                    yield from many.prefill(some, fmt, options.prefill)
            if "decode" in kinds:
                for shape in shapes:
                    yield from many.decode(shape, fmt)


def _sources(rows: Rows, path: Path, options: BenchOptions) -> list[tuple[str, Sequence[Work]]]:
    """(name, linears): those asked for, else those of the artifact, else what such machines usually run."""
    if not options.shapes and path.is_dir() and not options.formats:
        return [(path.name, artifact_work(path))]
    found: list[tuple[str, Sequence[Work]]] = []
    for text in options.shapes or DEFAULT_SHAPES[rows.device.type]:
        name, _, own = (text, "", "") if Path(text).exists() else text.partition("@")
        formats = own.split(",") if own and (options.shapes or not options.formats) else options.formats
        found.append((name.lower(), find_work(name, formats)))
    return found


def _write(options: BenchOptions, records: Sequence[Record]) -> None:
    if options.json is None:
        return
    try:
        options.json.write_text(json.dumps([r.to_json() for r in records], indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise LiftcError(f"cannot write {options.json}: {error.strerror or error}") from None
