"""The tensor-core sign_matmul, run on the CPU by an emulator of warps, against liftc/reference.py; its tiles.

What a GPU adds (real mma, launches, float16 results) is in test_kernels_gpu.py.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
import torch

from liftc import reference
from liftc.packing import pack_signs, unpack_signs
from liftc.spec import Z_MAX

pytest.importorskip("tvm", reason="kernels are built with TVM")
from liftc.codegen import library, tensorcore_device, toolchain
from liftc.codegen.build import tirx_source
from liftc.codegen.knobs import TensorCoreKnobs

KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\(\d+\) (\w+)\(([^)]*)\) \{')
WAIT = re.compile(r"tvm_builtin_ptx_cp_async_wait_group_async_wait_group_(\d+)\(\)")
POOL = re.compile(r"extern __shared__ __align__\(64\) uchar pool_buf_ptr\[\];")
KNOBS = {
    "one": TensorCoreKnobs(tokens=1, warps=2, ring=3, sets=8, chunk_blocks=2, block_rows=8, loads=2),
    "four": TensorCoreKnobs(
        tokens=4, warps=3, ring=4, sets=4, chunk_blocks=3, block_rows=4, prefetch_tiles=9
    ),
    "eight": TensorCoreKnobs(tokens=8, warps=2, ring=2, sets=2, chunk_blocks=1, block_rows=6, row_blocks=2),
    "sixteen": TensorCoreKnobs(
        tokens=16, warps=1, ring=3, sets=1, chunk_blocks=4, block_rows=3, row_blocks=2
    ),
}


def tile_layout(packed: torch.Tensor) -> torch.Tensor:
    """tiles (NB, KB, 32, 4) of a packed matrix: the layout of codegen/tir_tiles.py, written as one permutation."""
    groups, columns = packed.shape
    width = -(-columns // 256)
    padded = torch.zeros(groups * 32, width * 256, dtype=torch.int64)
    padded[:, :columns] = unpack_signs(packed, groups * 32, torch.int64).add(1).div(2, rounding_mode="floor")
    # rows: block, half, g; columns: block, j div 2, t, j mod 2, h, byte
    bits = padded.view(groups * 2, 2, 8, width, 4, 4, 2, 2, 4).permute(0, 3, 2, 5, 7, 1, 8, 4, 6)
    words = (bits.reshape(groups * 2, width, 32, 4, 32) << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


class Emulated:
    """Kernels by name, compiled for the CPU."""

    def __init__(self, folder: Path, early: bool) -> None:
        templates = [t for name, k in KNOBS.items() for t in library.tensor_core_templates(name, (), (k,))]
        source = tirx_source(templates)
        kernels = list(KERNEL.finditer(source))
        text = source[kernels[0].start() : source.index("#include <tvm/ffi/c_api.h>")]
        text = WAIT.sub(r"cp_async_wait_group(\1)", POOL.sub("", text))
        self.parameters: dict[str, list[str]] = {}
        launchers = ""
        for kernel in kernels:
            declared = kernel[2].replace("__restrict__ ", "")
            names = [p.strip().rsplit(" ", 1)[1] for p in declared.split(",")]
            self.parameters[kernel[1]] = names
            launchers += (
                f'extern "C" long run_{kernel[1]}(int grid_size, int threads, long tiles_bytes, long z_bytes, '
                f"{declared}) {{\n"
                "  warp::bad_reads = 0;\n"
                "  warp::tiles_begin = (const uchar*)tiles_ptr; warp::tiles_end = warp::tiles_begin + tiles_bytes;\n"
                "  warp::z_begin = (const uchar*)z_ptr; warp::z_end = warp::z_begin + z_bytes;\n"
                "  for (int b = 0; b < grid_size; ++b) {\n    warp::begin_block();\n"
                f"    block::run_one({{b, 0, 0}}, {{threads, 1, 1}}, [=] {{ {kernel[1]}({', '.join(names)}); }});\n"
                "  }\n"
                "  return warp::bad_reads;\n}\n"
            )
        helpers = tensorcore_device.STORE_PLANES + tensorcore_device.WARP_ADD
        (folder / "kernels.cpp").write_text('#include "cuda_warp_emulator.h"\n' + helpers + text + launchers)
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
        flags += ["-DEARLY_COPIES"] if early else []
        command = [str(compiler.path), *flags, "kernels.cpp", "-o", "kernels.so"]
        subprocess.run(command, cwd=folder, check=True, timeout=120)
        self.library = ctypes.CDLL(str(folder / "kernels.so"))

    def __call__(
        self,
        name: str,
        grid: int,
        z: torch.Tensor,
        z_scale: torch.Tensor,
        tiles: torch.Tensor,
        scale: torch.Tensor,
    ) -> torch.Tensor:
        """y of the kernel, with one row more that it must leave alone."""
        kernel = f"sign_matmul_tiled_{name}_{KNOBS[name].tokens}_kernel"
        y = torch.full((z.shape[0] + 1, scale.shape[0]), 7.0)
        pointers = {"tiles_ptr": tiles, "z_ptr": z, "z_scale_ptr": z_scale, "scale_ptr": scale, "y_ptr": y}
        sizes = {
            "NB": tiles.shape[0], "KB": tiles.shape[1], "K": z.shape[1], "OC": scale.shape[0], "m": z.shape[0],
            "grid": grid, "kind": 0,
        }  # fmt: skip
        arguments: list[object] = []
        for parameter in self.parameters[kernel]:
            if parameter in pointers:
                arguments.append(ctypes.c_void_p(pointers[parameter].data_ptr()))
            else:
                arguments.append(ctypes.c_int(sizes[parameter]))
        run = getattr(self.library, f"run_{kernel}")
        run.restype = ctypes.c_long
        threads = KNOBS[name].warps * 32
        bad = run(grid, threads, ctypes.c_long(tiles.nbytes), ctypes.c_long(z.nbytes), *arguments)
        assert bad == 0, f"{bad} reads outside the arguments"
        return y


@pytest.fixture(scope="module", params=[False, True], ids=["late copies", "early copies"])
def emulated(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Emulated:
    return Emulated(tmp_path_factory.mktemp("emulated"), request.param)


@pytest.mark.parametrize(
    "name, tokens, rows, columns, grid",
    [
        ("one", 1, 33, 700, 2), ("one", 1, 16, 8, 1), ("one", 1, 100, 1544, 1), ("one", 1, 64, 256, 4),
        ("four", 4, 70, 1300, 2), ("four", 3, 17, 777, 1), ("four", 1, 40, 1800, 1), ("four", 2, 31, 5, 1),
        ("eight", 8, 50, 600, 1), ("eight", 5, 90, 264, 3), ("eight", 1, 1, 1, 1), ("eight", 7, 33, 1031, 1),
        ("sixteen", 16, 40, 1100, 2), ("sixteen", 9, 48, 512, 1), ("sixteen", 13, 5, 300, 1),
    ],
)  # fmt: skip
def test_kernel_is_bit_identical(
    emulated: Emulated, name: str, tokens: int, rows: int, columns: int, grid: int
) -> None:
    g = torch.Generator().manual_seed(rows + columns)
    z = torch.randint(-Z_MAX, Z_MAX + 1, (tokens, columns), generator=g).to(torch.int16)
    packed = pack_signs(torch.randn(rows, columns, generator=g))
    z_scale, scale = torch.rand(tokens, 1, generator=g), torch.rand(rows, generator=g)
    tiles = tile_layout(packed)[: -(-rows // 16)].contiguous()
    y = emulated(name, grid, z, z_scale, tiles, scale)
    assert torch.equal(y[:-1], reference.sign_matmul(z, z_scale, packed, scale, torch.float32))
    assert (y[-1] == 7.0).all()
