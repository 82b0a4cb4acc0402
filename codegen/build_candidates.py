"""Compile candidates of a tuning sweep into objects, several to an object, in processes of their own; no GPU."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liftc.bundle import BundleCandidate
from liftc.codegen import library, toolchain
from liftc.codegen.best_knobs import knobs_to_json
from liftc.codegen.build import build_cpu
from liftc.codegen.build_cuda import build_cuda
from liftc.codegen.search import Candidate
from liftc.errors import BuildError

CANDIDATES_PER_OBJECT = 12


@dataclass(frozen=True)
class _Job:
    target: str
    arch: str
    dtype: str
    folder: str
    name: str
    candidates: tuple[Candidate, ...]


def build_candidates(
    target: str,
    arch: str,
    dtype: str,
    candidates: Sequence[Candidate],
    folder: Path,
    *,
    processes: int,
    built: Callable[[int], None] = lambda count: None,
) -> list[BundleCandidate]:
    """Compile the candidates into FOLDER/c<number>.so; the answer has them in the same order.

    One that does not compile, or whose kernels spill registers, comes back refused, with the reason. built: told how
    many are done. The objects do not depend on the number of processes. Raises BuildError when no compiler is there.
    """
    if target == "cuda":
        toolchain.check_archs((arch,), toolchain.find_nvcc())
    size = CANDIDATES_PER_OBJECT if target == "cuda" else 1
    jobs = [
        _Job(
            target, arch, dtype, str(folder), f"c{start // size:03d}", tuple(candidates[start : start + size])
        )
        for start in range(0, len(candidates), size)
    ]
    found: dict[str, list[BundleCandidate]] = {}
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(max(1, processes), mp_context=context)
    try:
        waiting = {pool.submit(_compile, job): job for job in jobs}
        for future in as_completed(waiting):
            found[waiting[future].name] = future.result()
            built(sum(map(len, found.values())))
    except BrokenExecutor:
        raise BuildError(
            "tune: a compiling process died, perhaps of too little memory; give fewer --jobs"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return [candidate for job in jobs for candidate in found[job.name]]


def _compile(job: _Job) -> list[BundleCandidate]:
    """One object; where it does not compile, each candidate alone, so that one cannot spoil the others."""
    try:
        return _compile_together(job)
    except BuildError as error:
        if len(job.candidates) == 1:
            return [_refused(job.candidates[0], str(error))]
    alone = []
    for number, candidate in enumerate(job.candidates):
        name = f"{job.name}_{number}"
        alone += _compile(_Job(job.target, job.arch, job.dtype, job.folder, name, (candidate,)))
    return alone


def _compile_together(job: _Job) -> list[BundleCandidate]:
    folder = Path(job.folder)
    if job.target == "llvm":
        (candidate,) = job.candidates
        templates = [t for t in library.cpu_templates(candidate.knobs) if t.function.op == candidate.op]
        templates = [t for t in templates if t.function.dtype == job.dtype]
        build_cpu(job.arch, templates, folder, job.name, candidate.knobs.describe())
        return [_done(candidate, job.name, templates, "")]
    groups = [
        _templates(candidate, f"{job.name}_{i}", job.arch, job.dtype)
        for i, candidate in enumerate(job.candidates)
    ]
    units = (library.Unit(job.name, (job.arch,), tuple(t for group in groups for t in group), True),)
    made = build_cuda(toolchain.find_nvcc(), (job.arch,), units, folder, job.name, ())
    spilled = {r.symbol: r.spill_bytes for r in made.resources}
    return [
        _done(candidate, job.name, group, _spills(sum(spilled.get(t.function.symbol, 0) for t in group)))
        for candidate, group in zip(job.candidates, groups)
    ]


def _templates(candidate: Candidate, name: str, arch: str, dtype: str) -> list[library.KernelTemplate]:
    tuned = next(t for t in library.TUNED_TEMPLATES if t.op == candidate.op)
    made = tuned.make(name, (arch,), (candidate.knobs,))
    return [t for t in made if t.function.op == candidate.op and t.function.dtype in ("", dtype)]


def _spills(count: int) -> str:
    return f"its kernels spill {count} bytes of registers" if count else ""


def _done(
    candidate: Candidate, name: str, templates: Sequence[library.KernelTemplate], refused: str
) -> BundleCandidate:
    symbols = tuple(t.function.symbol for t in templates)
    return BundleCandidate(candidate.op, _knobs(candidate), candidate.rank, f"{name}.so", symbols, refused)


def _refused(candidate: Candidate, reason: str) -> BundleCandidate:
    return BundleCandidate(
        candidate.op, _knobs(candidate), candidate.rank, "", (), f"it does not compile: {reason}"
    )


def _knobs(candidate: Candidate) -> dict[str, Any]:
    return knobs_to_json(candidate.knobs)
