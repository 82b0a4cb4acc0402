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
from liftc.runtime.whiten import factor_tiles, tokens_together, two_products

pytest.importorskip("tvm", reason="kernels are built with TVM")
from liftc.codegen import library, tensorcore_decode, tensorcore_whiten, tile_device, toolchain
from liftc.codegen.build_cuda import tirx_source

KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\([^)]*\) (\w+)\(([^)]*)\) \{')
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
WAIT = re.compile(r"tvm_builtin_ptx_cp_async_wait_group_async_wait_group_(\d+)\(\)")
THREADS = {"decode": tensorcore_decode.WARPS * 32, "unpack": 256, "whiten": tensorcore_whiten.WARPS * 32}


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
        text = WAIT.sub(r"cp_async_wait_group(\1)", text).replace(
            "extern __shared__ __align__(64) uchar pool_buf_ptr[];", ""
        )
        self.parameters: dict[str, list[str]] = {}
        launchers = ""
        for kernel in kernels:
            declared = kernel[2].replace("__restrict__ ", "")
            names = [p.strip().rsplit(" ", 1)[1] for p in declared.split(",")]
            self.parameters[kernel[1]] = names
            launchers += (
                f'extern "C" long run_{kernel[1]}(int grid_size, int threads, void* first, long bytes, '
                f"void* second, long more, {declared}) {{\n"
                "  warp::bad_reads = 0;\n"
                "  warp::tiles_begin = (const uchar*)first; warp::tiles_end = warp::tiles_begin + bytes;\n"
                "  warp::begin = (const uchar*)second; warp::end = warp::begin + more;\n"
                "  for (int b = 0; b < grid_size; ++b) {\n    warp::begin_blocks(1);\n"
                f"    auto body = [=] {{ {kernel[1]}({', '.join(names)}); }};\n"
                "    block::run_together({{b, 0, 0}}, {threads, 1, 1}, body);\n"
                "  }\n  return warp::bad_reads;\n}\n"
            )
        halves = "".join(tile_device.STORE_HALVES.replace("KIND", kind) for kind in ("f16", "bf16"))
        helpers = "".join(
            (
                tile_device.WARP_MAX, tile_device.LOAD_TILE, tile_device.LAY_ROWS, tile_device.SIGN_PAIRS,
                tile_device.WORDS_OF_LANE,
                halves, tile_device.STORE_F32,
                *(text.removeprefix(tile_device.STORE_VECTOR) for text in tile_device.UNPACK.values()),
                *tile_device.LOAD_EIGHT.values(), *tile_device.STORE_FOUR.values(),
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
        self, symbol: str, grid: int, readable: tuple[torch.Tensor, ...], /, **arguments: torch.Tensor | float
    ) -> None:
        """Run; loads of vectors may read `readable`, two at most. cse_v1: a product of sizes that the host computes."""
        values: list[object] = [ctypes.c_int(grid), ctypes.c_int(THREADS[symbol[:6]])]
        for tensor in (*readable, *readable)[:2]:
            values += [ctypes.c_void_p(tensor.data_ptr()), ctypes.c_long(tensor.nbytes)]
        for parameter in self.parameters[f"{symbol}_kernel"]:
            value = grid if parameter == "grid" else arguments[parameter.removesuffix("_ptr")]
            if isinstance(value, torch.Tensor):
                values.append(ctypes.c_void_p(value.data_ptr()))
            else:
                values.append(ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int(value))
        run = getattr(self.library, f"run_{symbol}_kernel")
        run.restype = ctypes.c_long
        bad = run(*values)
        assert bad == 0, f"{bad} reads outside the arguments"

    def on_tiles(
        self, symbol: str, grid: int, tiles: torch.Tensor, /, **arguments: torch.Tensor | float
    ) -> None:
        """Run a kernel that reads tiles."""
        self(symbol, grid, (tiles,), tiles=tiles, NB=tiles.shape[0], KB=tiles.shape[1], **arguments)


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
    want = (signs.view(rows, blocks, -1) @ mapping.double().T * 2 * scale.double()[:, None, None]).view(
        rows, -1
    )
    results = []
    room = (tensorcore_decode.MOST_TILES * 256 - 255) // fmt.lifted_dim // 2 * 2
    for grid, runs in ((1, -(-blocks // room)), (3, -(-blocks // room) + 1)):
        out = torch.full((rows + 1, want.shape[1]), 7.0).to(
            DTYPES[kind]
        )  # one row more, which must stay as it is
        emulated.on_tiles(
            f"decode_tiles_{kind}", grid, tiles, times=2.0, runs=runs, mapping=mapping, scale=scale, out=out, OC=rows,
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
    emulated.on_tiles(
        f"unpack_tiles_{kind}", 2, tiles, out=out, OC=rows, K=columns, cse_v1=tiles.shape[0] * tiles.shape[1]
    )
    assert (out[-1] == 7.0).all() and torch.equal(out[:-1].double(), signs)


@pytest.mark.parametrize("kind, bound", [("f16", 1.5e-3), ("bf16", 5e-3)])
@pytest.mark.parametrize("size", tensorcore_whiten.SIZES)
def test_whitened_activations(emulated: Emulated, kind: str, bound: float, size: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(size[0])
    shapes = ((size[0] * 16 - 5, size[1] * 16, 0, 3), (size[0] * 16, 16, 0, 5), (7, 40, 272, 6), (1, 8, 8, 3))
    for t1, t2, features, tokens in shapes:
        features = features or t1 * t2 - 16
        x = torch.randn(tokens, features, generator=g)
        x[0] *= 1e-2  # tokens are scaled one by one
        x[1] = 0.0
        x[2] *= 30
        if tokens > 3:
            x[3, 1], x[4, 0] = torch.nan, torch.inf
        x = x.to(DTYPES[kind])
        left, right = torch.randn(t1, t1, generator=g) / 40, torch.randn(t2, t2, generator=g) * 3
        scale = torch.rand(features, generator=g) + 0.5 if t1 > 1 else torch.ones(1)
        left_words, right_words, factor = factor_tiles(left, right)
        words = torch.cat([left_words.view(-1), right_words.view(-1)])
        out = torch.full((tokens + 1, t1 * t2), 7.0).to(DTYPES[kind])
        together = tokens_together(left_words, right_words, tensorcore_whiten.shared_bytes(*size))
        emulated(
            f"whiten_{kind}_{size[0]}_{size[1]}", -(-tokens // together), (x, words), x=x, in_scale=scale,
            left=words[: left_words.numel()], right=words[left_words.numel() :], factor=factor, out=out, t2=t2,
            times=0.25, together=together, m=tokens, IC=features, SC=scale.numel(), P=t1 * t2, n1=left_words.shape[0],
            nj=right_words.shape[0], n2=right_words.shape[1],
        )  # fmt: skip
        padded = torch.zeros(tokens, t1 * t2, dtype=torch.float64)
        padded[:, :features] = x.double() * scale.double()
        want = (left.double() @ padded.view(tokens, t1, t2) @ right.double()).view(tokens, -1) / 4
        assert (out[-1] == 7.0).all() and not out[1].any() and not out[3:-1][:2].isfinite().any()
        error = (out[:-1].double() - want).abs().amax(1) / want.abs().amax(1).clamp_min(1e-30)
        assert error[want.isfinite().all(1)].max() <= bound


@pytest.mark.parametrize("dtype, bound", [(torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
def test_large_factors_take_two_products(dtype: torch.dtype, bound: float) -> None:
    g = torch.Generator().manual_seed(0)
    t1, t2, features, tokens = 140, 24, 3300, 5
    x, scale = torch.randn(tokens, features, generator=g).to(dtype), torch.rand(features, generator=g) + 0.5
    left, right = torch.randn(t1, t1, generator=g) / 12, torch.randn(t2, t2, generator=g) / 5
    padded = torch.zeros(tokens, t1 * t2, dtype=torch.float64)
    for used in (scale, None):
        padded[:, :features] = x.double() * (1 if used is None else used.double())
        want = (left.double() @ padded.view(tokens, t1, t2) @ right.double()).view(tokens, -1) / 16
        got = two_products(x, used, left.to(dtype), right.to(dtype), 1 / 16)
        assert got.dtype == dtype and (got.double() - want).abs().max() <= bound * want.abs().max()
