"""The binary tensor-core sign_matmul, run on the CPU by an emulator of warps, against liftc/reference.py.

What a GPU adds (real mma, launches, float16 results) is in test_tiles_gpu.py.
"""

from __future__ import annotations

import functools

import pytest
import torch
from added_results import CASES, check, outputs
from emulated_kernels import Emulated
from operand_layouts import planes_of, tile_layout

from liftc.packing import pack_signs
from liftc.spec import Z_MAX

pytest.importorskip("tvm", reason="kernels are built with TVM")
from liftc.codegen import library, popcount_device, tensorcore_device
from liftc.codegen.build_cuda import tirx_source
from liftc.codegen.knobs import PopcountKnobs

KNOBS = {
    "one": PopcountKnobs(
        tokens=1, warps=2, ring=5, chunk_blocks=2, block_rows=8, early_tiles=3, first_tiles=2
    ),
    "wide": PopcountKnobs(tokens=1, warps=3, ring=4, chunk_blocks=5, block_rows=4, early_tiles=1),
    "four": PopcountKnobs(4, warps=4, ring=4, chunk_blocks=1, block_rows=4, first_tiles=1),
}


@functools.cache
def generated_source() -> str:
    """The CUDA source of every kernel of these tests."""
    return tirx_source([t for name, k in KNOBS.items() for t in library.popcount_templates(name, (), (k,))])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    helpers = popcount_device.STORE_BITS + popcount_device.WEIGH_BITS + popcount_device.LANES_ADD
    helpers += tensorcore_device.STORE_Y + tensorcore_device.TOUCH
    folder = tmp_path_factory.mktemp("popcount")
    return Emulated(folder, generated_source(), "cuda_popcount_emulator.h", helpers)


@pytest.fixture(scope="module", params=[False, True], ids=["late copies", "early copies"])
def emulated(compiled: Emulated, request: pytest.FixtureRequest) -> Emulated:
    return compiled.landing(request.param)


@pytest.mark.parametrize("adds, dtype", CASES)
@pytest.mark.parametrize(
    "name, tokens, rows, columns, grid, extreme",
    [
        ("one", 1, 33, 700, 2, False), ("one", 1, 16, 8, 1, False), ("one", 1, 100, 1544, 1, False),
        ("one", 1, 64, 256, 4, False), ("one", 1, 40, 1400, 1, True), ("wide", 1, 48, 2900, 1, False),
        ("wide", 1, 31, 1100, 2, False), ("four", 4, 70, 1300, 2, False), ("four", 3, 17, 777, 1, False),
        ("four", 1, 40, 1800, 1, False), ("four", 2, 31, 5, 1, True),
    ],
)  # fmt: skip
def test_sign_matmul_is_bit_identical(
    emulated: Emulated,
    name: str,
    tokens: int,
    rows: int,
    columns: int,
    grid: int,
    extreme: bool,
    adds: int,
    dtype: torch.dtype,
) -> None:
    g = torch.Generator().manual_seed(rows + columns)
    z = torch.randint(-Z_MAX, Z_MAX + 1, (tokens, columns), generator=g).to(torch.int16)
    signs = torch.randn(rows, columns, generator=g)
    if extreme:  # the largest sums, and those that cancel
        z = torch.full_like(z, -Z_MAX)
        signs[1:] = 1
        signs[2::2, ::2] = -1
    packed = pack_signs(signs)
    z_scale, scale = torch.rand(tokens, 1, generator=g) * 1e-3, torch.rand(rows, generator=g)
    tiles = tile_layout(packed)[: -(-rows // 16)].contiguous()
    knobs = KNOBS[name]
    planes = planes_of(z, 2 * knobs.tokens)
    parts = torch.randint(-(2**31), 2**31, (33, tokens), generator=g).to(torch.int32)
    totals = torch.cat([z.sum(1, dtype=torch.int32)[None] - parts.sum(0, dtype=torch.int32), parts])
    given = outputs(tokens, rows, adds, dtype)
    emulated(
        f"sign_matmul_popcount_{name}_{knobs.tokens}", grid, knobs.warps * 32, (tiles, planes),
        tiles=tiles, planes=planes, totals=totals, z_scale=z_scale, scale=scale, **given, NB=tiles.shape[0],
        KB=tiles.shape[1], OC=rows, m=tokens, grid=grid, P=totals.shape[0],
    )  # fmt: skip
    check(given, z, z_scale, packed, scale)
