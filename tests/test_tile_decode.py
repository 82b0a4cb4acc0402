"""Tiles turned into numbers: the decoding kernels, run on the CPU by an emulator of warps, against float64."""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
from pathlib import Path

import pytest
import torch
from operand_layouts import tile_layout

from liftc.format import LiftFormat
from liftc.packing import pack_signs, unpack_signs

pytest.importorskip("tvm", reason="kernels are built with TVM")
from liftc.codegen import library, tensorcore_decode, tile_device, toolchain
from liftc.codegen.build_cuda import tirx_source

KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\([^)]*\) (\w+)\(([^)]*)\) \{')
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
THREADS = tensorcore_decode.WARPS * 32


@functools.cache
def generated_source() -> str:
    """The CUDA source of every kernel of these tests."""
    return tirx_source(list(library.decode_templates()))


class Emulated:
    """Kernels by name, compiled for the CPU; blocks run one after the other."""

    def __init__(self, folder: Path) -> None:
        source = generated_source()
        kernels = list(KERNEL.finditer(source))
        text = source[kernels[0].start() : source.index("#include <tvm/ffi/c_api.h>")]
        text = text.replace("extern __shared__ __align__(64) uchar pool_buf_ptr[];", "")
        self.parameters: dict[str, list[str]] = {}
        launchers = ""
        for kernel in kernels:
            declared = kernel[2].replace("__restrict__ ", "")
            names = [p.strip().rsplit(" ", 1)[1] for p in declared.split(",")]
            self.parameters[kernel[1]] = names
            launchers += (
                f'extern "C" long run_{kernel[1]}(int grid_size, int threads, void* first, long bytes, {declared}) {{\n'
                "  warp::bad_reads = 0;\n"
                "  warp::tiles_begin = (const uchar*)first; warp::tiles_end = warp::tiles_begin + bytes;\n"
                "  for (int b = 0; b < grid_size; ++b) {\n    warp::begin_blocks(1);\n"
                f"    auto body = [=] {{ {kernel[1]}({', '.join(names)}); }};\n"
                "    block::run_together({{b, 0, 0}}, {threads, 1, 1}, body);\n"
                "  }\n  return warp::bad_reads;\n}\n"
            )
        halves = "".join(tile_device.STORE_HALVES.replace("KIND", kind) for kind in ("f16", "bf16"))
        helpers = "".join(
            (
                tile_device.WARP_MAX, tile_device.LOAD_TILE, tile_device.LAY_ROWS, tile_device.SIGN_PAIRS,
                halves, tile_device.STORE_F32, *tile_device.UNPACK_EIGHT.values(),
            )
        )  # fmt: skip
        (folder / "kernels.cpp").write_text('#include "cuda_half_emulator.h"\n' + helpers + text + launchers)
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

    def __call__(
        self, symbol: str, grid: int, tiles: torch.Tensor, /, **arguments: torch.Tensor | int
    ) -> None:
        """Run; `tiles` is what loads of tiles may read, cse_v1 a product of sizes that the host computes."""
        values: list[object] = [ctypes.c_int(grid), ctypes.c_int(THREADS)]
        values += [ctypes.c_void_p(tiles.data_ptr()), ctypes.c_long(tiles.nbytes)]
        given = {"tiles": tiles, "grid": grid, "NB": tiles.shape[0], "KB": tiles.shape[1]} | arguments
        for parameter in self.parameters[f"{symbol}_kernel"]:
            value = given[parameter.removesuffix("_ptr")]
            if isinstance(value, torch.Tensor):
                values.append(ctypes.c_void_p(value.data_ptr()))
            else:
                values.append(ctypes.c_int(value))
        run = getattr(self.library, f"run_{symbol}_kernel")
        run.restype = ctypes.c_long
        bad = run(*values)
        assert bad == 0, f"{bad} reads outside the tiles"


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    return Emulated(tmp_path_factory.mktemp("emulated"))


def made(
    rows: int, blocks: int, fmt: LiftFormat
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Signs (rows, blocks D), their tiles, a mapping and scales."""
    g = torch.Generator().manual_seed(rows + blocks)
    packed = pack_signs(torch.randn(rows, blocks * fmt.lifted_dim, generator=g))
    tiles = tile_layout(packed)[: -(-rows // 16)].contiguous()
    mapping = torch.randn(fmt.subspace_dim, fmt.lifted_dim, generator=g)
    return unpack_signs(packed, rows, torch.float64), tiles, mapping, torch.rand(rows, generator=g) + 0.5


@pytest.mark.parametrize("kind, bound", [("f32", 2e-6), ("f16", 1e-3), ("bf16", 5e-3)])
@pytest.mark.parametrize(
    "fmt, rows, blocks",
    [
        (LiftFormat(77, 32), 33, 83), (LiftFormat(24, 8), 16, 9), (LiftFormat(24, 10), 17, 33),
        (LiftFormat(40, 16), 50, 3), (LiftFormat(61, 24), 1, 11), (LiftFormat(128, 64), 47, 2),
        (LiftFormat(192, 48), 20, 5), (LiftFormat(1, 1), 5, 300), (LiftFormat(96, 64), 40, 6),
        (LiftFormat(150, 20), 18, 7),
    ],
)  # fmt: skip
def test_decoded_weights(
    emulated: Emulated, kind: str, bound: float, fmt: LiftFormat, rows: int, blocks: int
) -> None:
    if kind == "f32" and fmt.lifted_dim > 96 and fmt.subspace_dim > 32:
        fmt = LiftFormat(90, 33)  # two parts of a larger mapping do not fit
    signs, tiles, mapping, scale = made(rows, blocks, fmt)
    want = (signs.view(rows, blocks, -1) @ mapping.double().T * scale.double()[:, None, None]).view(rows, -1)
    results = []
    room = (tensorcore_decode.MOST_TILES * 256 - 255) // fmt.lifted_dim
    for grid, runs in ((1, -(-blocks // room)), (3, min(blocks, 2))):
        out = torch.full((rows + 1, want.shape[1]), 7.0).to(
            DTYPES[kind]
        )  # one row more, which must stay as it is
        emulated(
            f"decode_tiles_{kind}", grid, tiles, runs=runs, mapping=mapping, scale=scale, out=out, OC=rows,
            P=want.shape[1], d=fmt.subspace_dim, D=fmt.lifted_dim, cse_v1=mapping.numel(),
        )  # fmt: skip
        assert (out[-1] == 7.0).all()
        results.append(out[:-1])
    assert torch.equal(results[0], results[1])
    error = (results[0].double() - want).abs().amax() / want.abs().amax()
    assert error <= bound


@pytest.mark.parametrize("rows, columns", [(16, 256), (33, 700), (5, 8), (49, 1031), (1, 1)])
@pytest.mark.parametrize("kind", DTYPES)
def test_unpacked_signs(emulated: Emulated, kind: str, rows: int, columns: int) -> None:
    signs, tiles, _, _ = made(rows, columns, LiftFormat(1, 1))
    out = torch.full((rows + 1, columns), 7.0).to(DTYPES[kind])
    emulated(
        f"unpack_tiles_{kind}", 2, tiles, out=out, OC=rows, K=columns, cse_v1=tiles.shape[0] * tiles.shape[1]
    )
    assert (out[-1] == 7.0).all() and torch.equal(out[:-1].double(), signs)
