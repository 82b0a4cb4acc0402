"""The CUDA half of the build: one source per unit, nvcc, one object, and a look at what is in it.

TVM writes self-contained CUDA sources (kernels and host wrappers), nvcc compiles each for its architectures. The
finished object is opened again and checked to hold machine code of every kernel for every architecture. The
assembler's report of registers and spills becomes part of the descriptor.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from liftc.codegen import fatbin, library, toolchain
from liftc.codegen.build_files import EXPORTS, LINK_FLAGS, build_folder, finish, import_tvm
from liftc.errors import BuildError
from liftc.kernel_object import KernelObject, KernelResources, file_sha256

_ENTRY = re.compile(r"Compiling entry function '(\w+)_kernel' for '(sm_\d+a?)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def build_cuda(
    nvcc: toolchain.Tool,
    archs: tuple[str, ...],
    units: Sequence[library.Unit],
    folder: Path,
    name: str,
    knobs: tuple[str, ...],
) -> KernelObject:
    """Compile the units into FOLDER/<name>.so and .json, with PTX of the last architecture; raises BuildError.

    archs: accepted by toolchain.check_archs; at least one unit is compiled for the last of them.
    """
    compiler = toolchain.find_c_compiler(cplusplus=True)
    ptx = f"compute_{toolchain.arch_number(archs[-1])}"
    with build_folder(folder) as scratch:
        for unit in units:
            source = tirx_source if unit.tirx else cuda_source
            (scratch / f"{unit.name}.cu").write_text(source(unit.templates))
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda unit: _compile_unit(nvcc, unit, ptx, scratch), units))
        (scratch / "exports.map").write_text(EXPORTS)
        objects = [f"{unit.name}.o" for unit in units]
        command = [str(nvcc.path), *link_flags(), *objects, "-o", "kernels.so", *_library_flags()]
        toolchain.run_compiler(command, scratch, "CUDA kernels")
        _check_device_code((scratch / "kernels.so").read_bytes(), ptx, units)
        return finish(scratch, KernelObject(
            path=folder / f"{name}.so", target="cuda", archs=archs, ptx=ptx, features=(),
            toolchain=f"apache-tvm {version('apache-tvm')}, {nvcc.describe()}, {compiler.describe()}",
            kernel_version=library.KERNEL_VERSION, knobs=knobs,
            functions=tuple(t.function for unit in units for t in unit.templates),
            sha256=file_sha256(scratch / "kernels.so"),
            resources=tuple(entry for part in found for entry in part),
        ))  # fmt: skip


def assembler_resources(output: str) -> tuple[KernelResources, ...]:
    """One entry per kernel and architecture of what `ptxas -v` printed, in order of symbol and architecture."""
    found: dict[tuple[str, str], KernelResources] = {}
    entry, spilled = ("", ""), 0
    for line in output.splitlines():
        if match := _ENTRY.search(line):
            entry, spilled = (match[1], match[2]), 0
        elif match := _SPILLS.search(line):
            spilled = int(match[1]) + int(match[2])
        elif (match := _USED.search(line)) and entry[0]:
            shared = _SHARED.search(line)
            found[entry] = KernelResources(*entry, int(match[1]), spilled, int(shared[1]) if shared else 0)
            entry = ("", "")
    return tuple(found[key] for key in sorted(found))


def keeps_ptx(unit: library.Unit, ptx: str) -> bool:
    """Whether a source is also kept as this PTX; hand-written ones for a chip with the letter a serve it only."""
    last = unit.archs[-1]
    return last.rstrip("a") == ptx.replace("compute_", "sm_") and not (unit.tirx and last.endswith("a"))


def _compile_unit(
    nvcc: toolchain.Tool, unit: library.Unit, ptx: str, scratch: Path
) -> tuple[KernelResources, ...]:
    """One source to one host object; what the assembler says of its kernels."""
    kept = ptx if keeps_ptx(unit, ptx) else ""
    command = [
        str(nvcc.path),
        *compile_flags(unit.archs, kept),
        "-w",
        "-Xptxas=-v",
        "-c",
        f"{unit.name}.cu",
        "-o",
        f"{unit.name}.o",
    ]
    return assembler_resources(toolchain.run_compiler(command, scratch, "CUDA kernels"))


def cuda_source(templates: Sequence[library.KernelTemplate]) -> str:
    """One CUDA C++ file of scheduled kernels and their tvm_ffi host wrappers."""
    return _source(templates, "default")


def tirx_source(templates: Sequence[library.KernelTemplate]) -> str:
    """One CUDA C++ file of hand-written TIRx kernels and their tvm_ffi host wrappers."""
    return _source(templates, "tirx")


def _source(templates: Sequence[library.KernelTemplate], pipeline: str) -> str:
    tvm = import_tvm()
    target = tvm.target.Target({"kind": "cuda", "arch": f"sm_{toolchain.OLDEST_SM}"}, host="cuda_host")
    module = tvm.IRModule({t.function.symbol: t.make() for t in templates})
    with _source_only(), target:
        built = tvm.tirx.build(module, target=target, pipeline=pipeline)
    return registers_at_launch(_most_shared_memory(str(tvm.backend.cuda.export_cuda_host(built))))


SHARED_LIMIT = re.compile(
    r"if \(::tvm_cuda_host_check\(cudaFuncSetAttribute\(::(\w+), cudaFuncAttributeMaxDynamicSharedMemorySize, \w+\)\)"
    r" != 0\) return -1;"
)


def _most_shared_memory(source: str) -> str:
    """Host wrappers that also ask for the division of a processor's memory with the most shared memory.

    A processor changes its division only when it is empty: without this, a small kernel that starts on an empty one
    keeps the blocks of a large kernel away until it ends, although there is room for both.
    """
    carveout = "cudaFuncSetAttribute(::{}, cudaFuncAttributePreferredSharedMemoryCarveout, 100)"
    return SHARED_LIMIT.sub(
        lambda found: (
            f"{found[0]}\n    if (::tvm_cuda_host_check({carveout.format(found[1])}) != 0) return -1;"
        ),
        source,
    )


_BOUNDS = re.compile(r"__launch_bounds__\([^)]*\) (\w+)(?=\()")
_REGISTERS = re.compile(r"liftc_launch_registers\((\d+)\);")


def registers_at_launch(source: str) -> str:
    """Kernels limited to the registers a thread at launch that they ask for (warpgroup_calls.launch_registers).

    TVM knows bounds of threads only, which round to fewer numbers of registers.
    """
    wanted: dict[str, str] = {}
    for part in source.split('extern "C" __global__ void ')[1:]:
        bounds, asked = _BOUNDS.match(part), _REGISTERS.search(part)
        if bounds and asked:
            wanted[bounds[1]] = asked[1]
    return _BOUNDS.sub(
        lambda found: f"__maxnreg__({wanted[found[1]]}) {found[1]}" if found[1] in wanted else found[0],
        source,
    )


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
    flags = (*LINK_FLAGS, "-Wl,-z,muldefs")
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
    if any(keeps_ptx(unit, ptx) for unit in units) and not any(
        c.kind == "ptx" and c.arch == ptx.replace("compute_", "sm_") for c in codes
    ):
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
