"""Kernel objects of an artifact: which knobs, from records of the same architecture; built once per machine."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import liftc.codegen
from liftc import env
from liftc.bundle import Work
from liftc.codegen.best_knobs import cpu_choice, cuda_choices, requests_of
from liftc.codegen.build import build, native_cpu_level
from liftc.codegen.knobs import CpuKnobs
from liftc.codegen.library import Chosen
from liftc.codegen.toolchain import find_nvcc
from liftc.errors import ArtifactError, BuildError
from liftc.kernel_object import KernelObject, read_kernel_object
from liftc.kernel_records import read_folders


@dataclass(frozen=True)
class KernelChoices:
    """Knobs to build a target with. said: one sentence per kernel on where they come from."""

    cpu: CpuKnobs | None = None
    chosen: Chosen | None = None
    said: tuple[str, ...] = ()


def record_folders(given: Path | None = None) -> list[Path]:
    """Where records are read from: those that come with liftc, the user's, and a folder named by an option."""
    packaged = Path(liftc.codegen.__file__).parent / "records"
    return [packaged, env.records_dir(), *([given] if given is not None else [])]


def choose_kernels(
    target: str, archs: Sequence[str], cpu: str, work: Sequence[Work], records: Path | None = None
) -> KernelChoices:
    """The best knobs that records of these architectures know for these linears; BuildError, RecordError."""
    measured = read_folders(record_folders(records))
    if target == "llvm":
        level = native_cpu_level() if cpu == "native" else cpu
        knobs, said = cpu_choice(measured, level, requests_of(work))
        return KernelChoices(cpu=knobs, said=said)
    chosen, said = cuda_choices(measured, archs, requests_of(work))
    return KernelChoices(chosen=chosen, said=said)


def place_kernels(
    target: str, archs: Sequence[str], cpu: str, folder: Path, choices: KernelChoices | None = None
) -> KernelObject:
    """Put the kernels of a target into FOLDER/kernels, from the cache folder when they were built before.

    The cache key covers the kernel sources, the versions of TVM and nvcc, the target, its architectures and the
    knobs. Raises BuildError.
    """
    level = native_cpu_level() if target == "llvm" and cpu == "native" else cpu
    picked = choices or KernelChoices()
    kept = env.cache_dir() / "kernels" / _key(target, archs, level, picked)
    for descriptor in sorted(kept.glob("kernels/*.json")):
        try:
            found = read_kernel_object(descriptor.with_suffix(".so"))
        except ArtifactError:
            shutil.rmtree(kept, ignore_errors=True)  # damaged: build again
            break
        return _copy(found, folder)
    if target == "cuda":
        return _copy(build(target, archs, kept, chosen=picked.chosen), folder)
    return _copy(build(target, (), kept, cpu=level, knobs=picked.cpu), folder)


def _copy(kernels: KernelObject, folder: Path) -> KernelObject:
    place = folder / "kernels"
    try:
        place.mkdir(parents=True, exist_ok=True)
        for path in (kernels.path, kernels.descriptor):
            shutil.copyfile(path, place / path.name)
    except OSError as error:
        raise BuildError(f"cannot write {place}: {error.strerror or error}") from error
    return read_kernel_object(place / kernels.path.name)


def _key(target: str, archs: Sequence[str], cpu: str, choices: KernelChoices) -> str:
    digest = hashlib.sha256()
    room = Path(liftc.codegen.__file__).parent
    for path in sorted([*room.glob("*.py"), *room.glob("*.c")]):
        digest.update(path.name.encode() + path.read_bytes())
    facts = [
        target,
        *(archs if target == "cuda" else [cpu]),
        version("apache-tvm"),
        version("apache-tvm-ffi"),
        repr(choices.cpu),
        repr(sorted((choices.chosen or {}).items())),
    ]
    if target == "cuda":
        facts.append(str(find_nvcc()))
    digest.update("|".join(facts).encode())
    return digest.hexdigest()[:32]
