"""Load a shared object of kernels onto a device, after checking that the device can run it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from liftc import env
from liftc.errors import ArtifactError, LiftcError, TargetError
from liftc.kernel_object import TARGETS, KernelFunction, KernelObject, machine_flags, read_kernel_object

OLDEST_CUDA_KERNELS = 8
"""Version of the kernels from which on they take the arguments that the runtime passes on a GPU."""


@dataclass(frozen=True)
class Kernels:
    """Loaded kernels. `functions` maps an exported symbol to a callable that takes tensors, outputs last.

    The module stays loaded for the life of the process (the object is linked so), so a callable may outlive
    this record.
    """

    object: KernelObject
    device_type: str
    functions: dict[str, Callable[..., None]]
    library: Any

    def of(self, op: str) -> list[KernelFunction]:
        """Functions that serve `op` on this device, in the order of preference."""
        return [f for f in self.object.functions if f.op == op and f.symbol in self.functions]

    def set_num_threads(self, count: int) -> int:
        """Threads of every later CPU kernel of this object, 1 to 256; returns the number in force."""
        if self.device_type != "cpu":
            raise LiftcError(f"set_num_threads: these kernels run on {self.device_type}, not on CPU threads")
        if count < 1:
            raise LiftcError(f"set_num_threads: need at least one thread, got {count}")
        return int(self.library.liftc_set_num_threads(count))


def load_kernels(path: Path, device: torch.device) -> Kernels:
    """Load `path` (a .so with its .json) for `device`; needs torch and tvm_ffi, not TVM.

    The descriptor is checked before any code of the file is opened. Raises ArtifactError when the file or its
    descriptor is missing, damaged or inconsistent, TargetError when the object has no code for the device.
    """
    kernel_object = read_kernel_object(path)
    if TARGETS[kernel_object.target] != device.type:
        raise TargetError(
            f"kernels {path.name} are built for {TARGETS[kernel_object.target]}, the device is {device.type}"
            f": {_alternative(path, device.type)}"
        )
    if kernel_object.target == "llvm":
        _check_cpu(kernel_object)
    else:
        _check_cuda(kernel_object, device)
    import tvm_ffi

    try:
        module = tvm_ffi.load_module(str(path.resolve()))
        library = ctypes.CDLL(str(path.resolve()))
    except (OSError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or ["unknown reason"])[-1]
        raise ArtifactError(
            f"kernels: {path} cannot be loaded ({reason}); compile again on this system"
        ) from None
    absent = [f.symbol for f in kernel_object.functions if not module.implements_function(f.symbol)]
    if absent:
        raise ArtifactError(f"kernels: {path} lacks {absent[0]}, which its descriptor names; compile again")
    usable = kernel_object.functions
    if device.type == "cuda":
        usable = tuple(f for f in usable if launchable(f, kernel_object, device))
    functions = {f.symbol: module.get_function(f.symbol) for f in usable}
    kernels = Kernels(kernel_object, device.type, functions, library)
    if device.type == "cpu":
        library.liftc_use_openmp(1)
        kernels.set_num_threads(env.num_threads())
    return kernels


def runs_on(kernel_object: KernelObject, capability: tuple[int, int]) -> bool:
    """Whether a CUDA object has machine code or PTX for a GPU of this compute capability.

    Machine code of sm_XY runs on the same X with a minor number of at least Y; with the letter a on exactly
    XY; PTX runs on everything from its own number on.
    """
    return _covers(kernel_object.archs, kernel_object.ptx, capability)


def launchable(function: KernelFunction, kernel_object: KernelObject, device: torch.device) -> bool:
    """Whether a function of a CUDA object has code for the GPU and fits the shared memory of its blocks."""
    properties: Any = torch.cuda.get_device_properties(device)
    if function.shared_bytes > properties.shared_memory_per_block_optin:
        return False
    if not function.archs:
        return True
    archs = tuple(function.archs.split(","))
    kept = kernel_object.ptx.replace("compute_", "sm_")
    ptx = kernel_object.ptx if kept and kept == archs[-1] else ""  # none where the last has the letter a
    return _covers(archs, ptx, (properties.major, properties.minor))


def _covers(archs: tuple[str, ...], ptx: str, capability: tuple[int, int]) -> bool:
    number = 10 * capability[0] + capability[1]
    for arch in archs:
        built, exact = int(arch[3:].rstrip("a")), arch.endswith("a")
        if built == number or (not exact and built // 10 == capability[0] and built <= number):
            return True
    return bool(ptx) and int(ptx.removeprefix("compute_")) <= number


def _check_cpu(kernel_object: KernelObject) -> None:
    missing = sorted(set(kernel_object.features) - machine_flags())
    if missing:
        raise TargetError(
            f"kernels {kernel_object.path.name} need the CPU features {', '.join(missing)}, which this machine "
            "lacks: compile with --target llvm on this machine, or for a lower level such as x86-64-v3"
        )


def _check_cuda(kernel_object: KernelObject, device: torch.device) -> None:
    if kernel_object.kernel_version < OLDEST_CUDA_KERNELS:
        raise ArtifactError(
            f"kernels {kernel_object.path.name} are of version {kernel_object.kernel_version}, this liftc calls "
            f"version {OLDEST_CUDA_KERNELS} and newer on a GPU: compile again"
        )
    if not torch.cuda.is_available():
        raise TargetError(
            f"kernels {kernel_object.path.name} need a CUDA GPU, and torch finds none on this machine: "
            f"{_alternative(kernel_object.path, 'cpu')}"
        )
    capability = torch.cuda.get_device_capability(device)
    if not runs_on(kernel_object, capability):
        arch = f"sm_{capability[0]}{capability[1]}"
        raise TargetError(
            f"kernels {kernel_object.path.name} hold code for {', '.join(kernel_object.archs)}, the GPU "
            f"{torch.cuda.get_device_name(device)} is {arch}: compile with --target cuda -arch={arch}"
        )


def _alternative(path: Path, device_type: str) -> str:
    """What to do instead: name an object of the same folder that fits, else the command that makes one."""
    target = {kind: name for name, kind in TARGETS.items()}.get(device_type)
    if target is None:
        return "use device cpu or cuda"
    fitting = sorted(path.parent.glob(f"{target}-*.so"))
    if fitting:
        return f"load on device {device_type}, for which the folder has {fitting[0].name}"
    return f"compile with --target {target}"
