"""Build one shared object of kernels: PrimFuncs -> schedules -> machine code -> file and descriptor.

CPU: LLVM object code plus codegen/parallel_launch.c, linked by the C compiler; loads with tvm_ffi alone.
CUDA: TVM writes one self-contained CUDA source (kernels and host wrappers), nvcc compiles it for every
architecture; the result is opened again and checked to hold machine code of each kernel for each of them.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from liftc.codegen import fatbin, library, toolchain
from liftc.codegen.knobs import CPU_KNOBS, CpuKnobs, CudaKnobs
from liftc.errors import BuildError
from liftc.kernel_object import CPU_FEATURES, TARGETS, KernelObject, cpu_features, file_sha256, machine_flags

_EXPORTS = "{ global: __tvm_ffi_*; liftc_*; local: *; };\n"
_LINK_FLAGS = ("-Wl,--version-script=exports.map", "-Wl,--build-id=none", "-Wl,-z,nodelete", "-Wl,-s")


def build(
    target: str,
    archs: Sequence[str],
    out: Path,
    *,
    cpu: str = "native",
    knobs: CpuKnobs | CudaKnobs | None = None,
) -> KernelObject:
    """Compile all kernels of `target` into OUT/kernels/<name>.so and write <name>.json beside it.

    target "llvm": one CPU level, the only entry of `archs` or else `cpu`: "native" for the highest psABI
    level of this machine, or "x86-64-v2" to "x86-64-v4". target "cuda": `archs` such as "sm_89", "sm_90a";
    PTX of the highest one is added for newer chips. Files appear under their names only when
    complete; the same input gives the same bytes. Raises BuildError.
    """
    if target not in TARGETS:
        raise BuildError(f"there is no target {target!r}: choose from {', '.join(TARGETS)}")
    if knobs is not None and not isinstance(knobs, CpuKnobs if target == "llvm" else CudaKnobs):
        raise BuildError(f"target {target} does not take {type(knobs).__name__}")
    folder = out / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as scratch:
        if target == "llvm":
            level = _cpu_level(archs or (cpu,))
            cpu_knobs = knobs if isinstance(knobs, CpuKnobs) else CPU_KNOBS[level]
            record = _build_cpu(level, cpu_knobs, Path(scratch), folder)
        else:
            cuda_knobs = knobs if isinstance(knobs, CudaKnobs) else CudaKnobs()
            record = _build_cuda(archs, cuda_knobs, Path(scratch), folder)
        descriptor = Path(scratch) / "descriptor.json"
        descriptor.write_text(record.to_json())
        record.descriptor.unlink(missing_ok=True)  # never an old descriptor beside a new object
        os.replace(Path(scratch) / "kernels.so", record.path)
        os.replace(descriptor, record.descriptor)
    return record


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
    _import_tvm()


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


def _build_cpu(level: str, knobs: CpuKnobs, scratch: Path, folder: Path) -> KernelObject:
    compiler = toolchain.find_c_compiler()
    tvm = _import_tvm()
    templates = list(library.cpu_templates(knobs))
    target = tvm.target.Target({"kind": "llvm", "mcpu": level, "mtriple": "x86_64-linux-gnu"})
    module = tvm.tirx.build(tvm.IRModule({t.function.symbol: t.make() for t in templates}), target=target)
    module.write_to_file(str(scratch / "kernels.o"), "o")
    shutil.copyfile(Path(__file__).with_name("parallel_launch.c"), scratch / "parallel_launch.c")
    (scratch / "exports.map").write_text(_EXPORTS)
    common = (str(compiler.path), "-O2", "-std=gnu11", "-fPIC", "-pthread")
    toolchain.run_compiler([*common, "-c", "parallel_launch.c", "-o", "launch.o"], scratch, "CPU kernels")
    toolchain.run_compiler(
        [*common, "-shared", "kernels.o", "launch.o", "-o", "kernels.so", *_LINK_FLAGS, "-ldl"],
        scratch,
        "CPU kernels",
    )
    llvm = tvm.target.codegen.llvm_version_major()
    return KernelObject(
        path=folder / f"llvm-{level}.so",
        target="llvm",
        archs=(level,),
        ptx="",
        features=cpu_features(level),
        toolchain=f"apache-tvm {version('apache-tvm')}, LLVM {llvm}, {compiler.describe()}",
        kernel_version=library.KERNEL_VERSION,
        knobs=knobs.describe(),
        functions=tuple(t.function for t in templates),
        sha256=file_sha256(scratch / "kernels.so"),
    )


def _build_cuda(archs: Sequence[str], knobs: CudaKnobs, scratch: Path, folder: Path) -> KernelObject:
    nvcc = toolchain.find_nvcc()
    chosen = toolchain.check_archs(archs, nvcc)
    compiler = toolchain.find_c_compiler(cplusplus=True)
    units = library.cuda_units(chosen, knobs)
    ptx = f"compute_{toolchain.arch_number(chosen[-1])}"
    objects = [f"{unit.name}.o" for unit in units]
    for unit in units:
        templates = unit.templates
        source = tirx_source if unit.tirx else cuda_source
        (scratch / f"{unit.name}.cu").write_text(source(templates))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda unit: _compile_unit(nvcc, unit, ptx, scratch), units))
    (scratch / "exports.map").write_text(_EXPORTS)
    command = [str(nvcc.path), *link_flags(), *objects, "-o", "kernels.so", *_library_flags()]
    toolchain.run_compiler(command, scratch, "CUDA kernels")
    _check_device_code((scratch / "kernels.so").read_bytes(), ptx, units)
    return KernelObject(
        path=folder / f"cuda-{'-'.join(chosen)}.so",
        target="cuda",
        archs=chosen,
        ptx=ptx,
        features=(),
        toolchain=f"apache-tvm {version('apache-tvm')}, {nvcc.describe()}, {compiler.describe()}",
        kernel_version=library.KERNEL_VERSION,
        knobs=(*knobs.describe(), *(text for unit in units for text in unit.knobs)),
        functions=tuple(t.function for unit in units for t in unit.templates),
        sha256=file_sha256(scratch / "kernels.so"),
    )


def _compile_unit(nvcc: toolchain.Tool, unit: library.Unit, ptx: str, scratch: Path) -> None:
    """One source to one host object."""
    kept = ptx if unit.archs[-1].rstrip("a") == ptx.replace("compute_", "sm_") else ""
    command = [
        str(nvcc.path),
        *compile_flags(unit.archs, kept),
        "-w",
        "-c",
        f"{unit.name}.cu",
        "-o",
        f"{unit.name}.o",
    ]
    toolchain.run_compiler(command, scratch, "CUDA kernels")


def cuda_source(templates: Sequence[library.KernelTemplate]) -> str:
    """One CUDA C++ file of scheduled kernels and their tvm_ffi host wrappers."""
    return _source(templates, "default")


def tirx_source(templates: Sequence[library.KernelTemplate]) -> str:
    """One CUDA C++ file of hand-written TIRx kernels and their tvm_ffi host wrappers."""
    return _source(templates, "tirx")


def _source(templates: Sequence[library.KernelTemplate], pipeline: str) -> str:
    tvm = _import_tvm()
    target = tvm.target.Target({"kind": "cuda", "arch": f"sm_{toolchain.OLDEST_SM}"}, host="cuda_host")
    module = tvm.IRModule({t.function.symbol: t.make() for t in templates})
    with _source_only(), target:
        built = tvm.tirx.build(module, target=target, pipeline=pipeline)
    return str(tvm.backend.cuda.export_cuda_host(built))


def compile_flags(archs: Sequence[str], ptx: str) -> list[str]:
    """Flags that turn a source into an object with machine code for `archs` and PTX `ptx` ("" for none)."""
    import tvm_ffi.libinfo

    flags = ["-O3", "-std=c++17", "-Xcompiler=-fPIC"]
    flags += [f"-I{path}" for path in tvm_ffi.libinfo.include_paths()]
    for arch in archs:
        flags += ["-gencode", f"arch={arch.replace('sm_', 'compute_')},code={arch}"]
    if ptx:
        flags += ["-gencode", f"arch={ptx},code={ptx}"]
    return flags


def link_flags() -> list[str]:
    """Flags that make the objects one shared object."""
    # TVM gives every source the same helper functions, entry name and context: the first definition serves all.
    flags = (*_LINK_FLAGS, "-Wl,-z,muldefs")
    return ["-shared", "-cudart=static", *(f"-Xlinker={flag.removeprefix('-Wl,')}" for flag in flags)]


def _library_flags() -> list[str]:
    import tvm_ffi.libinfo

    return [f"-L{Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent}", "-ltvm_ffi"]


def _check_device_code(data: bytes, ptx: str, units: Sequence[library.Unit]) -> None:
    """BuildError unless every kernel has machine code for its architectures (never a source-only object)."""
    codes = list(fatbin.device_code(data))
    for unit in units:
        for arch in unit.archs:
            machine = b"".join(c.payload for c in codes if c.kind == "machine code" and c.arch == arch)
            for template in unit.templates:
                if f".text.{template.function.symbol}_kernel".encode() not in machine:
                    raise BuildError(
                        f"CUDA kernels: the object nvcc made has no machine code of {template.function.symbol} "
                        f"for {arch}; report this with the nvcc version"
                    )
    if not any(c.kind == "ptx" and c.arch == ptx.replace("compute_", "sm_") for c in codes):
        raise BuildError(
            f"CUDA kernels: the object nvcc made has no PTX {ptx}; report this with the nvcc version"
        )


@contextmanager
def _source_only() -> Iterator[None]:
    """Keep TVM from compiling device code itself: it would do so, or not, depending on the machine."""
    name = "TVM_COMPILE_FORCE_FALLBACK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _import_tvm() -> Any:
    try:
        import tvm
    except ImportError:
        raise BuildError("building kernels needs TVM: run pip install 'liftc[quantize]'") from None
    return tvm
