"""Generated CUDA kernels, compiled for the CPU with an emulator of warps (cuda_warp_emulator.h)."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import torch

from liftc.codegen import toolchain

KERNEL = re.compile(r'extern "C" __global__ void __\w+__\([^)]*\) (\w+)\(([^)]*)\) \{')
WAIT = re.compile(r"tvm_builtin_ptx_cp_async_wait_group_async_wait_group_(\d+)\(\)")
INCLUDE = re.compile(r"#include <cuda_\w+\.h>\n")
POOL = re.compile(r"extern __shared__ __align__\(\d+\) uchar pool_buf_ptr\[\];")


class Emulated:
    """Kernels by name, compiled for the CPU. Blocks of a grid run together, as a grid-wide barrier needs."""

    def __init__(self, folder: Path, source: str, header: str, helpers: str) -> None:
        """The kernels of a generated source. `header` and `helpers` (device functions that are plain C++) have what
        they need.
        """
        kernels = list(KERNEL.finditer(source))
        text = source[kernels[0].start() : source.index("#include <tvm/ffi/c_api.h>")]
        text = WAIT.sub(r"cp_async_wait_group(\1)", POOL.sub("", text)).replace(
            "__shared__ alignas(64)", "static"
        )
        self.parameters: dict[str, list[str]] = {}
        launchers = ""
        for kernel in kernels:
            declared = kernel[2].replace("__restrict__ ", "")
            names = [p.strip().rsplit(" ", 1)[1] for p in declared.split(",")]
            self.parameters[kernel[1]] = names
            launchers += (
                f'extern "C" long run_{kernel[1]}(int grid_size, int threads, void* first, long bytes, '
                f"void* second, long second_bytes, {declared}) {{\n"
                "  warp::bad_reads = 0;\n"
                "  warp::tiles_begin = (const uchar*)first; warp::tiles_end = warp::tiles_begin + bytes;\n"
                "  warp::begin = (const uchar*)second; warp::end = warp::begin + second_bytes;\n"
                "  warp::begin_blocks(grid_size);\n  std::vector<Index3> all;\n"
                "  for (int b = 0; b < grid_size; ++b) all.push_back({b, 0, 0});\n"
                f"  block::run_together(all, {{threads, 1, 1}}, [=] {{ {kernel[1]}({', '.join(names)}); }});\n"
                "  return warp::bad_reads;\n}\n"
            )
        helpers = INCLUDE.sub("", helpers)
        (folder / "kernels.cpp").write_text(f'#include "{header}"\n' + helpers + text + launchers)
        compiler = toolchain.find_c_compiler(cplusplus=True)
        flags = [
            "-O1",
            "-std=c++17",
            "-fPIC",
            "-shared",
            "-w",
            "-fno-strict-aliasing",
            f"-I{Path(__file__).parent}",
        ]
        command = [str(compiler.path), *flags, "kernels.cpp", "-o", "kernels.so"]
        subprocess.run(command, cwd=folder, check=True, timeout=120)
        self.library = ctypes.CDLL(str(folder / "kernels.so"))

    def landing(self, early: bool) -> Emulated:
        """The same kernels, from now on with asynchronous work that lands at once, or else as late as waits allow."""
        self.library.set_early(int(early))
        return self

    def __call__(
        self, symbol: str, grid: int, threads: int, streamed: tuple[torch.Tensor, torch.Tensor],
        /, **arguments: torch.Tensor | int | float,
    ) -> None:  # fmt: skip
        """Run; `streamed` are the tensors that asynchronous copies and vector loads may read."""
        values: list[object] = [ctypes.c_int(grid), ctypes.c_int(threads)]
        for tensor in streamed:
            values += [ctypes.c_void_p(tensor.data_ptr()), ctypes.c_long(tensor.nbytes)]
        for parameter in self.parameters[f"{symbol}_kernel"]:
            value = arguments[parameter.removesuffix("_ptr")]
            if isinstance(value, torch.Tensor):
                values.append(ctypes.c_void_p(value.data_ptr()))
            elif isinstance(value, float):
                values.append(ctypes.c_float(value))
            else:
                values.append(ctypes.c_int(value))
        run = getattr(self.library, f"run_{symbol}_kernel")
        run.restype = ctypes.c_long
        bad = run(*values)
        assert bad == 0, f"{bad} reads outside the arguments"
