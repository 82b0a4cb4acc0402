"""tune: compile candidates of kernels (no GPU), measure them (no TVM), merge records, say which knobs are best."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liftc import env
from liftc.bundle import Bundle, Work, object_hashes, read_bundle, write_bundle
from liftc.driver.tune_run import Sweep, run_bundle
from liftc.errors import LiftcError, RecordError, TargetError
from liftc.kernel_records import Record, merge_records, read_folders
from liftc.runtime.timing import has_gpu

POOL_BYTES = {"cuda": 1_500_000_000, "llvm": 256_000_000}
"""Distinct signs walked through in one timing, so that no cache holds them."""

DTYPES = {"cuda": "bf16", "llvm": "f32"}
"""Activations the sweep is made in: what these machines usually run."""


@dataclass(frozen=True)
class TuneOptions:
    """Arguments of `liftc tune`. batches: tokens per call. candidates: most per op and batch size of a kernel.

    ops: only these. shared_bytes: limit of a block's shared memory. budget: seconds of measuring. records: folder the
    measurements go to (default: the user's). pool_bytes: distinct signs per timing.
    """

    target: str = "cuda"
    archs: tuple[str, ...] = ()
    cpu: str = "native"
    batches: tuple[int, ...] = (1, 4, 8, 16)
    formats: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    candidates: int = 12
    shared_bytes: int | None = None
    pool_bytes: int | None = None
    budget: float = 600.0
    records: Path | None = None
    again: bool = False
    processes: int = 0
    progress: bool = True


def build_bundle(source: str, folder: Path, options: TuneOptions) -> Bundle:
    """Compile candidates for the linears that `source` names into a bundle; needs TVM, not a GPU.

    An existing bundle is replaced; any other folder that is not empty is refused. Raises LiftcError.
    """
    from liftc.codegen.build_candidates import build_candidates
    from liftc.codegen.search import cpu_candidates, cuda_candidates
    from liftc.driver.kernels import place_kernels
    from liftc.driver.shapes import find_work

    target, arch = _target(options)
    work = find_work(source, options.formats)
    batches = tuple(sorted(set(options.batches)))
    if target == "cuda":
        found = cuda_candidates(
            arch, batches, options.candidates, ops=options.ops, shared_bytes=options.shared_bytes,
            known_good=_known_good(work, arch, options.records),
        )  # fmt: skip
    else:
        found = cpu_candidates(arch, options.candidates, ops=options.ops)
    if not found:
        raise LiftcError(f"tune: {arch} has no kernel to tune for batches {', '.join(map(str, batches))}")
    _check_folder(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    started = time.monotonic()
    try:
        base = place_kernels(target, (arch,) if target == "cuda" else (), arch, partial)
        for path in (base.path, base.descriptor):
            os.replace(path, partial / path.name)
        (partial / "kernels").rmdir()
        made = build_candidates(
            target, arch, DTYPES[target], found, partial,
            processes=options.processes or min(8, len(os.sched_getaffinity(0))),
            built=lambda count: _count(options, f"compiled {count} of {len(found)} candidates"),
        )  # fmt: skip
        objects = [base.path.name, *sorted({c.file for c in made if c.file})]
        bundle = Bundle(
            target=target, arch=arch, kernel_version=base.kernel_version, dtype=DTYPES[target],
            pool_bytes=options.pool_bytes or POOL_BYTES[target], work=work, batches=batches, base=base.path.name,
            candidates=tuple(made), sha256=object_hashes(partial, objects),
        )  # fmt: skip
        write_bundle(partial, bundle)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    except OSError as error:
        raise RecordError(f"bundle: cannot write {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _say(
        options,
        f"{folder}: {len(made)} candidates in {len(objects)} objects, {time.monotonic() - started:.0f} s",
    )
    return bundle


def tune(source: str, options: TuneOptions) -> dict[str, Any]:
    """Build and measure on this machine; the answer has the best knobs. Raises LiftcError."""
    if options.target == "cuda" and not has_gpu():
        raise TargetError(
            "tune: torch finds no CUDA GPU here; use --build-only -o BUNDLE and --run it where one is"
        )
    with tempfile.TemporaryDirectory(prefix="liftc-tune-") as scratch:
        folder = Path(scratch) / "bundle"
        build_bundle(source, folder, options)
        return tune_run(folder, options)


def tune_build(source: str, folder: Path, options: TuneOptions) -> dict[str, Any]:
    """Build only: what is in the bundle."""
    bundle = build_bundle(source, folder, options)
    refused = [c for c in bundle.candidates if c.refused]
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {
        "output": str(folder), "arch": bundle.arch, "candidates": len(bundle.candidates), "refused": len(refused),
        "objects": len({c.file for c in bundle.candidates if c.file}) + 1, "bytes": size,
        "linears": [f"{w.out_features}x{w.in_features} {w.format}" for w in bundle.work],
        "batches": list(bundle.batches),
    }  # fmt: skip


def tune_run(folder: Path, options: TuneOptions) -> dict[str, Any]:
    """Measure a bundle on this machine and say what was best; imports no TVM. Raises LiftcError."""
    bundle = read_bundle(folder)
    place = options.records or env.records_dir()
    sweep = run_bundle(
        folder, place, budget=options.budget, again=options.again, say=lambda text: _say(options, text)
    )
    return sweep_answer(bundle, sweep)


def tune_merge(paths: Sequence[Path], output: Path) -> dict[str, Any]:
    """Merge records files into `output`; raises RecordError for any bad line of any of them."""
    written, repeated = merge_records(paths, output)
    return {"output": str(output), "records": written, "repeated": repeated}


def sweep_answer(bundle: Bundle, sweep: Sweep) -> dict[str, Any]:
    """What a sweep did and what was best in it, with the text to print."""
    statuses: dict[str, int] = {}
    for record in sweep.records:
        statuses[record.status] = statuses.get(record.status, 0) + 1
    best = [
        _best(sweep.records, op, batch)
        for op, batch in dict.fromkeys((r.kernel, r.batch) for r in sweep.records)
    ]
    answer: dict[str, Any] = {
        "device": sweep.device, "arch": bundle.arch, "read_ceiling_gbs": round(sweep.ceiling, 1),
        "file": str(sweep.file), "measured": sweep.measured, "skipped": sweep.skipped, "left": sweep.left,
        "statuses": statuses, "seconds": round(sweep.seconds, 1), "best": [b for b in best if b],
    }  # fmt: skip
    lines = [
        f"{sweep.device}, {bundle.arch}: {sweep.measured} candidates measured, {sweep.skipped} known before, "
        f"{sweep.left} left, {sweep.seconds:.0f} s; {len(sweep.records)} records added to {sweep.file}",
        *(f"{count} records {status}" for status, count in sorted(statuses.items())),
    ]
    for b in answer["best"]:
        knobs = " ".join(f"{k}={v}" for k, v in b["knobs"].items())
        lines.append(f"{b['kernel']} batch {b['batch']}: {b['microseconds']:.1f} us {b['what']}, {knobs}")
    return {**answer, "text": "\n".join(lines)}


def _best(records: Sequence[Record], op: str, batch: int) -> dict[str, Any] | None:
    """The fastest of this run over the whole chain, or over the first shape where there is only one."""
    mine = [r for r in records if r.kernel == op and r.batch == batch and r.microseconds]
    chains = [r for r in mine if r.chain]
    if not mine:
        return None
    first = (chains or mine)[0]
    same = [r for r in (chains or mine) if (r.format, r.chain, r.out_features, r.in_features)
            == (first.format, first.chain, first.out_features, first.in_features)]  # fmt: skip
    best = min(same, key=lambda r: r.microseconds or 0.0)
    what = best.chain or f"{best.out_features}x{best.in_features}"
    return {"kernel": op, "batch": batch, "microseconds": best.microseconds, "knobs": best.knobs,
            "what": f"{what} {best.format}"}  # fmt: skip


def _known_good(work: Sequence[Work], arch: str, given: Path | None) -> dict[tuple[str, int], list[Any]]:
    """(op, tokens) -> the best knobs of all records so far."""
    from liftc.codegen.best_knobs import cuda_choices, requests_of
    from liftc.driver.kernels import record_folders

    chosen, _ = cuda_choices(read_folders(record_folders(given)), (arch,), requests_of(work))
    return {(op, k.tokens): [k] for (_, op), knobs in chosen.items() for k in knobs}


def _target(options: TuneOptions) -> tuple[str, str]:
    if options.target == "llvm":
        from liftc.codegen.build import native_cpu_level

        return "llvm", native_cpu_level() if options.cpu == "native" else options.cpu
    if len(options.archs) != 1:
        raise LiftcError("tune: a sweep is for one architecture; name it, for example -arch=sm_90a")
    return "cuda", options.archs[0]


def _check_folder(folder: Path) -> None:
    if (
        folder.exists()
        and not (folder / "plan.json").is_file()
        and (not folder.is_dir() or any(folder.iterdir()))
    ):
        raise RecordError(f"bundle: {folder} exists and is not a bundle; choose another --output")


def _say(options: TuneOptions, text: str) -> None:
    if options.progress:
        print(text, file=sys.stderr, flush=True)


def _count(options: TuneOptions, text: str) -> None:
    """A line that the next one overwrites, on a terminal only."""
    if options.progress and sys.stderr.isatty():
        print(f"{text}   ", end="\r", file=sys.stderr, flush=True)
