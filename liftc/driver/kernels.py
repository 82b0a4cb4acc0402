"""Kernel objects of an artifact, built once per machine: they do not depend on the model."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import liftc.codegen
from liftc import env
from liftc.codegen.build import build, native_cpu_level
from liftc.codegen.toolchain import find_nvcc
from liftc.errors import ArtifactError, BuildError
from liftc.kernel_object import KernelObject, read_kernel_object


def place_kernels(target: str, archs: Sequence[str], cpu: str, folder: Path) -> KernelObject:
    """Put the kernels of a target into FOLDER/kernels, from the cache folder when they were built before.

    The cache key covers the kernel sources, the versions of TVM and nvcc, the target and its architectures.
    Raises BuildError.
    """
    level = native_cpu_level() if target == "llvm" and cpu == "native" else cpu
    kept = env.cache_dir() / "kernels" / _key(target, archs, level)
    for descriptor in sorted(kept.glob("kernels/*.json")):
        try:
            found = read_kernel_object(descriptor.with_suffix(".so"))
        except ArtifactError:
            shutil.rmtree(kept, ignore_errors=True)  # damaged: build again
            break
        return _copy(found, folder)
    if target == "cuda":
        return _copy(build(target, archs, kept), folder)
    return _copy(build(target, (), kept, cpu=level), folder)


def _copy(kernels: KernelObject, folder: Path) -> KernelObject:
    place = folder / "kernels"
    try:
        place.mkdir(parents=True, exist_ok=True)
        for path in (kernels.path, kernels.descriptor):
            shutil.copyfile(path, place / path.name)
    except OSError as error:
        raise BuildError(f"cannot write {place}: {error.strerror or error}") from error
    return read_kernel_object(place / kernels.path.name)


def _key(target: str, archs: Sequence[str], cpu: str) -> str:
    digest = hashlib.sha256()
    room = Path(liftc.codegen.__file__).parent
    for path in sorted([*room.glob("*.py"), *room.glob("*.c")]):
        digest.update(path.name.encode() + path.read_bytes())
    facts = [
        target,
        *(archs if target == "cuda" else [cpu]),
        version("apache-tvm"),
        version("apache-tvm-ffi"),
    ]
    if target == "cuda":
        facts.append(str(find_nvcc()))
    digest.update("|".join(facts).encode())
    return digest.hexdigest()[:32]
