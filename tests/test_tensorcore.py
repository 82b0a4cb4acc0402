"""The tensor-core sign_matmul, run on the CPU by an emulator of warps, against liftc/reference.py; its tiles.

What a GPU adds (real mma, launches, float16 results) is in test_kernels_gpu.py.
"""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
from pathlib import Path

import pytest
import torch
from operand_layouts import tile_layout, z_of

from liftc import reference
from liftc.errors import BuildError
from liftc.format import LiftFormat
from liftc.kernel_object import KernelFunction
from liftc.packing import pack_signs
from liftc.spec import Z_MAX, transform_shape

pytest.importorskip("tvm", reason="kernels are built with TVM")
from liftc.codegen import library, tensorcore_device, tensorcore_lift, toolchain
from liftc.codegen.build import compile_flags, tirx_source
from liftc.codegen.knobs import (
    LIFT_KNOBS,
    SHARED_BYTES,
    TENSOR_CORE_KNOBS,
    LiftKnobs,
    TensorCoreKnobs,
    chip_family,
)

KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\([^)]*\) (\w+)\(([^)]*)\) \{')
WAIT = re.compile(r"tvm_builtin_ptx_cp_async_wait_group_async_wait_group_(\d+)\(\)")
POOL = re.compile(r"extern __shared__ __align__\(64\) uchar pool_buf_ptr\[\];")
KNOBS = {
    "one": TensorCoreKnobs(tokens=1, warps=2, ring=3, sets=8, chunk_blocks=2, block_rows=8),
    "four": TensorCoreKnobs(tokens=4, warps=3, ring=4, sets=4, chunk_blocks=3, block_rows=4, prefetch_tiles=9),
    "eight": TensorCoreKnobs(8, warps=2, ring=2, row_blocks=2, sets=2, chunk_blocks=1, z_buffers=3, block_rows=6),
    "sixteen": TensorCoreKnobs(16, warps=1, ring=3, row_blocks=2, sets=1, chunk_blocks=4, z_buffers=1, block_rows=3),
}  # fmt: skip
LIFT = LiftKnobs(tokens=3, rows=4, threads=64, results=120, most_left=40, most_right=160)


@functools.cache
def generated_source() -> str:
    """The CUDA source of every kernel of these tests."""
    templates = [t for name, k in KNOBS.items() for t in library.tensor_core_templates(name, (), (k,))]
    for symbol, make in (
        ("lift_planes", functools.partial(tensorcore_lift.lift_planes, "lift_planes", "float32", LIFT)),
        ("split_z", functools.partial(tensorcore_lift.split_z, "split_z")),
    ):
        templates.append(library.KernelTemplate(KernelFunction(symbol, symbol, "f32"), make))
    return tirx_source(templates)


class Emulated:
    """Kernels by name, compiled for the CPU. Blocks of a grid run together, as a grid-wide barrier needs."""

    def __init__(self, folder: Path, early: bool) -> None:
        source = generated_source()
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
        helpers = "".join(
            getattr(tensorcore_device, n) for n in ("STORE_PLANES", "WARP_ADD", "WARP_MAX", "ROUND", "SCALE")
        )
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
        self, symbol: str, grid: int, threads: int, streamed: tuple[torch.Tensor, torch.Tensor],
        /, **arguments: torch.Tensor | int,
    ) -> None:  # fmt: skip
        """Run; `streamed` are the tensors that asynchronous copies and vector loads may read."""
        values: list[object] = [ctypes.c_int(grid), ctypes.c_int(threads)]
        for tensor in streamed:
            values += [ctypes.c_void_p(tensor.data_ptr()), ctypes.c_long(tensor.nbytes)]
        for parameter in self.parameters[f"{symbol}_kernel"]:
            value = arguments[parameter.removesuffix("_ptr")]
            if isinstance(value, torch.Tensor):
                values.append(ctypes.c_void_p(value.data_ptr()))
            else:
                values.append(ctypes.c_int(value))
        run = getattr(self.library, f"run_{symbol}_kernel")
        run.restype = ctypes.c_long
        bad = run(*values)
        assert bad == 0, f"{bad} reads outside the arguments"

    def split_z(self, z: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Planes with room for `columns` and the sums of z."""
        tokens, width = z.shape
        blocks = -(-width // 256)
        planes = torch.full((blocks, 4, columns, 64), 99, dtype=torch.int8)
        totals = torch.full((1, tokens), 99, dtype=torch.int32)
        self(
            "split_z", tokens, 1024, (z, z), z=z, planes=planes, totals=totals, m=tokens, K=width, KB=blocks,
            COLS=columns,
        )  # fmt: skip
        return planes, totals


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
def test_sign_matmul_is_bit_identical(
    emulated: Emulated, name: str, tokens: int, rows: int, columns: int, grid: int
) -> None:
    g = torch.Generator().manual_seed(rows + columns)
    z = torch.randint(-Z_MAX, Z_MAX + 1, (tokens, columns), generator=g).to(torch.int16)
    packed = pack_signs(torch.randn(rows, columns, generator=g))
    z_scale, scale = torch.rand(tokens, 1, generator=g), torch.rand(rows, generator=g)
    tiles = tile_layout(packed)[: -(-rows // 16)].contiguous()
    knobs = KNOBS[name]
    planes, totals = emulated.split_z(z, 2 * knobs.tokens)
    assert torch.equal(z_of(planes, tokens, columns), z) and torch.equal(totals[0], z.sum(1, dtype=torch.int32))
    if grid > 1:  # a lift hands over one row of parts for each of its blocks
        extra = torch.randint(-(2**31), 2**31, (33, tokens), generator=g).to(torch.int32)
        totals = torch.cat([totals - extra.sum(0, dtype=torch.int32), extra])
    y = torch.full((tokens + 1, rows), 7.0)  # one row more, which must stay as it is
    emulated(
        f"sign_matmul_tiled_{name}_{knobs.tokens}", grid, knobs.warps * 32, (tiles, planes),
        tiles=tiles, planes=planes, totals=totals, z_scale=z_scale, scale=scale, y=y, NB=tiles.shape[0],
        KB=tiles.shape[1], OC=rows, m=tokens, grid=grid, kind=0,
        P=totals.shape[0],
    )  # fmt: skip
    assert torch.equal(y[:-1], reference.sign_matmul(z, z_scale, packed, scale, torch.float32))
    assert (y[-1] == 7.0).all()


@pytest.mark.parametrize(
    "in_features, fmt, col_blocks",
    [
        (70, LiftFormat(19, 8), 2), (33, LiftFormat(24, 10), 1), (5, LiftFormat(1, 1), 1), (600, LiftFormat(40, 16), 3),
        (800, LiftFormat(48, 24), 5),
    ],
)  # fmt: skip
@pytest.mark.parametrize("scaled", [True, False])
def test_lift_planes_is_within_one_step(
    emulated: Emulated, in_features: int, fmt: LiftFormat, col_blocks: int, scaled: bool
) -> None:
    g = torch.Generator().manual_seed(in_features)
    t1, t2 = transform_shape(in_features, fmt)
    lifted = t2 // fmt.subspace_dim * fmt.lifted_dim
    tokens, width = 3, t1 * lifted
    x = torch.randn(tokens, in_features, generator=g)
    x[1] = 0.0
    left, right = torch.randn(t1, t1, generator=g), torch.randn(t2, lifted, generator=g)
    in_scale = torch.rand(in_features, generator=g) + 0.5 if scaled else torch.ones(1)
    blocks, row_blocks = -(-width // 256), -(-t1 // LIFT.rows)
    state = torch.zeros(16, dtype=torch.int32)
    found = torch.full((tokens * row_blocks * col_blocks,), 99, dtype=torch.int32)
    for _ in range(2):  # the state is ready for the next launch
        planes = torch.full((blocks, 4, 8, 64), 99, dtype=torch.int8)
        totals = torch.full((row_blocks * col_blocks, tokens), 99, dtype=torch.int32)
        z_scale = torch.full((tokens, 1), 99.0)
        emulated(
            "lift_planes", row_blocks * col_blocks, LIFT.threads, (x, x), x=x, in_scale=in_scale, left=left,
            right=right, planes=planes, totals=totals, z_scale=z_scale, state=state, grid=row_blocks * col_blocks,
            col_blocks=col_blocks, m=tokens, IC=in_features, SC=in_scale.numel(), t1=t1, t2=t2, C=lifted, KB=blocks,
            COLS=8, found=found, room=found.numel(),
        )  # fmt: skip
        z = z_of(planes, tokens, width)
        want, want_scale = reference.lift(x, in_scale if scaled else None, left, right)
        assert int((z.int() - want.int()).abs().max()) <= 1 and not z[1].any()
        assert int(z[0].abs().max()) == Z_MAX == int(z[2].abs().max())
        assert torch.equal(totals.sum(0, dtype=torch.int32), z.sum(1, dtype=torch.int32))
        torch.testing.assert_close(z_scale, want_scale, rtol=1e-5, atol=0)
        x[0, -1], x[2, 0] = 0.25, -3.0


@pytest.mark.parametrize("family", TENSOR_CORE_KNOBS)
def test_every_llama_70b_layer_launches(family: str) -> None:
    """Shared memory never depends on the layer; rows beyond one wave of blocks make more waves."""
    for knobs in TENSOR_CORE_KNOBS[family]:
        assert knobs.shared_bytes() <= SHARED_BYTES[family]
    for lift in LIFT_KNOBS[family]:
        assert lift.shared_bytes() <= SHARED_BYTES[family]
    assert [k.tokens for k in TENSOR_CORE_KNOBS[family]] == [1, 4, 8, 16]
    assert {chip_family(a) for a in ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")} == set(
        TENSOR_CORE_KNOBS
    )


@pytest.mark.parametrize("family, arch", [("ampere", "sm_80"), ("blackwell", "sm_120")])
def test_kernels_compile_without_spills(tmp_path: Path, family: str, arch: str) -> None:
    try:
        nvcc = toolchain.find_nvcc()
    except BuildError:
        pytest.skip("no nvcc on this machine")
    knobs = TENSOR_CORE_KNOBS[family]
    templates = [
        *library.tensor_core_templates(family, (arch,), (knobs[0], knobs[-1])),
        list(library.operand_templates(family, (arch,), LIFT_KNOBS[family][:1]))[-1],
    ]
    (tmp_path / "kernels.cu").write_text(tirx_source(templates))
    command = [
        str(nvcc.path),
        *compile_flags((arch,), ""),
        "-w",
        "-Xptxas=-v",
        "-cubin",
        "kernels.cu",
        "-o",
        "k.cubin",
    ]
    text = toolchain.run_compiler(command, tmp_path, "CUDA kernels")
    assert text.count("bytes spill stores") == 3 == text.count(" 0 bytes spill stores, 0 bytes spill loads")
