"""Build one shared object of kernels: PrimFuncs -> schedules -> machine code -> file and descriptor.

CPU: LLVM object code plus codegen/parallel_launch.c, linked by the C compiler; loads with tvm_ffi alone.
CUDA: TVM writes one self-contained CUDA source (kernels and host wrappers), nvcc compiles it for every
architecture (codegen/build_cuda.py).
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from liftc.codegen import library, toolchain
from liftc.codegen.build_cuda import build_cuda
from liftc.codegen.build_files import EXPORTS, LINK_FLAGS, build_folder, finish, import_tvm
from liftc.codegen.default_knobs import CPU_KNOBS
from liftc.codegen.knobs import CpuKnobs, CudaKnobs
from liftc.errors import BuildError
from liftc.kernel_object import CPU_FEATURES, TARGETS, KernelObject, cpu_features, file_sha256, machine_flags


def build(
    target: str,
    archs: Sequence[str],
    out: Path,
    *,
    cpu: str = "native",
    knobs: CpuKnobs | CudaKnobs | None = None,
    chosen: library.Chosen | None = None,
) -> KernelObject:
    """Compile all kernels of `target` into OUT/kernels/<name>.so and write <name>.json beside it.

    target "llvm": one CPU level, the only entry of `archs` or else `cpu`: "native" for the highest psABI
    level of this machine, or "x86-64-v2" to "x86-64-v4". target "cuda": `archs` such as "sm_89", "sm_90a";
    PTX of the highest one is added for newer chips. knobs, chosen: instead of codegen/default_knobs.py's. Files
    appear under their names only when complete; the same input gives the same bytes. Raises BuildError.
    """
    if target not in TARGETS:
        raise BuildError(f"there is no target {target!r}: choose from {', '.join(TARGETS)}")
    if knobs is not None and not isinstance(knobs, CpuKnobs if target == "llvm" else CudaKnobs):
        raise BuildError(f"target {target} does not take {type(knobs).__name__}")
    folder = out / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    if target == "llvm":
        level = _cpu_level(archs or (cpu,))
        cpu_knobs = knobs if isinstance(knobs, CpuKnobs) else CPU_KNOBS[level]
        return build_cpu(
            level, list(library.cpu_templates(cpu_knobs)), folder, f"llvm-{level}", cpu_knobs.describe()
        )
    nvcc = toolchain.find_nvcc()
    accepted = toolchain.check_archs(archs, nvcc)
    import_tvm()
    cuda_knobs = knobs if isinstance(knobs, CudaKnobs) else CudaKnobs()
    units = library.cuda_units(accepted, cuda_knobs, chosen)
    texts = (*cuda_knobs.describe(), *(text for unit in units for text in unit.knobs))
    return build_cuda(nvcc, accepted, units, folder, f"cuda-{'-'.join(accepted)}", texts)


def build_cpu(
    level: str, templates: Sequence[library.KernelTemplate], folder: Path, name: str, knobs: tuple[str, ...]
) -> KernelObject:
    """Compile these kernels for a CPU level into FOLDER/<name>.so and .json; raises BuildError."""
    with build_folder(folder) as scratch:
        facts = _link_cpu(level, templates, scratch)
        return finish(scratch, KernelObject(
            path=folder / f"{name}.so", target="llvm", archs=(level,), ptx="", features=cpu_features(level),
            toolchain=facts, kernel_version=library.KERNEL_VERSION, knobs=knobs,
            functions=tuple(t.function for t in templates), sha256=file_sha256(scratch / "kernels.so"),
        ))  # fmt: skip


def check_toolchain(targets: Sequence[str], archs: Sequence[str] = (), cpu: str = "native") -> None:
    """Raise the BuildError that `build` would, before hours of quantizing: compilers, TVM, architectures."""
    for target in targets:
        if target not in TARGETS:
            raise BuildError(f"there is no target {target!r}: choose from {', '.join(TARGETS)}")
        if target == "cuda":
            toolchain.check_archs(archs, toolchain.find_nvcc())
        else:
            _cpu_level((cpu,))
        toolchain.find_c_compiler(cplusplus=target == "cuda")
    import_tvm()


def native_cpu_level() -> str:
    """Highest psABI level whose CPU flags this machine has; BuildError where the kernels do not run."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise BuildError(f"CPU kernels are built for x86-64, and this machine is {platform.machine()}")
    flags = machine_flags()
    levels = [level for level in CPU_FEATURES if flags.issuperset(cpu_features(level))]
    if not levels:
        raise BuildError("this CPU lacks SSE4.2, which the CPU kernels need at least (x86-64-v2)")
    return levels[-1]


def _cpu_level(archs: Sequence[str]) -> str:
    if len(archs) > 1:
        raise BuildError(
            f"target llvm takes one CPU level per object, got {', '.join(archs)}; build each in turn"
        )
    if archs[0] == "native":
        return native_cpu_level()
    if archs[0] not in CPU_FEATURES:
        raise BuildError(
            f"CPU level {archs[0]!r} is unknown: choose native or one of {', '.join(CPU_FEATURES)}"
        )
    return archs[0]


def _link_cpu(level: str, templates: Sequence[library.KernelTemplate], scratch: Path) -> str:
    """Leave kernels.so in `scratch`; returns what made it."""
    compiler = toolchain.find_c_compiler()
    tvm = import_tvm()
    target = tvm.target.Target({"kind": "llvm", "mcpu": level, "mtriple": "x86_64-linux-gnu"})
    module = tvm.tirx.build(tvm.IRModule({t.function.symbol: t.make() for t in templates}), target=target)
    module.write_to_file(str(scratch / "kernels.o"), "o")
    shutil.copyfile(Path(__file__).with_name("parallel_launch.c"), scratch / "parallel_launch.c")
    (scratch / "exports.map").write_text(EXPORTS)
    common = (str(compiler.path), "-O2", "-std=gnu11", "-fPIC", "-pthread")
    toolchain.run_compiler([*common, "-c", "parallel_launch.c", "-o", "launch.o"], scratch, "CPU kernels")
    toolchain.run_compiler(
        [*common, "-shared", "kernels.o", "launch.o", "-o", "kernels.so", *LINK_FLAGS, "-ldl"],
        scratch,
        "CPU kernels",
    )
    llvm = tvm.target.codegen.llvm_version_major()
    return f"apache-tvm {version('apache-tvm')}, LLVM {llvm}, {compiler.describe()}"
