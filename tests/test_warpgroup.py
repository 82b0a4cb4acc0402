"""The warp-group sign_matmul of sm_90a, run on the CPU by an emulator of wgmma, clusters and bulk copies.

What a GPU adds is in test_tiles_gpu.py.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from emulated_kernels import Emulated
from operand_layouts import group_planes, tile_layout

from liftc import reference
from liftc.errors import BuildError
from liftc.packing import pack_signs
from liftc.spec import Z_MAX

pytest.importorskip("tvm", reason="kernels are built with TVM")
from liftc.codegen import library, tensorcore_device, toolchain, warpgroup_device
from liftc.codegen.build_cuda import compile_flags, tirx_source
from liftc.codegen.knobs import WARPGROUP_KNOBS, BinaryKnobs, WarpgroupKnobs

KNOBS = {
    "one": WarpgroupKnobs(1, groups=2, ring=4, sets=4, chunk_blocks=2, z_buffers=2, block_rows=10, split=2),
    "two": WarpgroupKnobs(2, groups=1, ring=2, sets=8, chunk_blocks=5, z_buffers=1, block_rows=6),
    "four": WarpgroupKnobs(4, groups=2, ring=3, sets=8, chunk_blocks=3, z_buffers=2, block_rows=9),
    "eight": WarpgroupKnobs(8, groups=1, ring=4, sets=4, chunk_blocks=1, z_buffers=3, block_rows=6),
    "sixteen": WarpgroupKnobs(16, groups=2, ring=2, sets=2, chunk_blocks=4, z_buffers=1, block_rows=5),
    "pair": WarpgroupKnobs(4, groups=2, ring=3, sets=2, chunk_blocks=2, z_buffers=2, block_rows=10, split=2),
    "four_blocks": WarpgroupKnobs(16, groups=1, ring=3, sets=1, chunk_blocks=2, block_rows=7, split=4),
}


BINARY = {
    "four": BinaryKnobs(4, groups=2, ring=3, chunk_blocks=3, z_buffers=2, block_rows=9),
    "eight": BinaryKnobs(8, groups=1, ring=4, chunk_blocks=1, z_buffers=3, block_rows=6),
    "sixteen": BinaryKnobs(16, groups=2, ring=2, chunk_blocks=4, z_buffers=1, block_rows=5),
    "pair": BinaryKnobs(4, groups=2, ring=3, chunk_blocks=2, z_buffers=2, block_rows=10, split=2),
    "four_blocks": BinaryKnobs(16, groups=1, ring=3, chunk_blocks=2, block_rows=7, split=4),
}


@functools.cache
def generated_source() -> str:
    """The CUDA source of every kernel of these tests."""
    templates = [t for name, k in KNOBS.items() for t in library.warpgroup_templates(name, (), (k,))]
    templates += [t for name, k in BINARY.items() for t in library.binary_templates(name, (), (k,))]
    return tirx_source(templates)


@pytest.fixture(scope="module", params=[False, True], ids=["late copies", "early copies"])
def emulated(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Emulated:
    folder = tmp_path_factory.mktemp("emulated")
    return Emulated(
        folder,
        request.param,
        generated_source(),
        "cuda_warpgroup_emulator.h",
        tensorcore_device.WARP_ADD + warpgroup_device.BITS_OF_BYTES,
    )


@pytest.mark.parametrize(
    "form, name, tokens, rows, columns, clusters",
    [
        ("warpgroup", "one", 1, 150, 2100, 1), ("warpgroup", "one", 1, 33, 300, 2),
        ("warpgroup", "two", 2, 90, 1500, 1), ("warpgroup", "two", 1, 16, 256, 1),
        ("warpgroup", "four", 4, 70, 1300, 2), ("warpgroup", "four", 3, 17, 777, 1),
        ("warpgroup", "four", 1, 140, 1800, 1), ("warpgroup", "four", 2, 31, 5, 1),
        ("warpgroup", "eight", 8, 50, 600, 1), ("warpgroup", "eight", 5, 90, 1300, 3),
        ("warpgroup", "eight", 1, 1, 1, 1), ("warpgroup", "sixteen", 16, 75, 2100, 1),
        ("warpgroup", "sixteen", 9, 48, 512, 3), ("warpgroup", "pair", 4, 155, 1500, 1),
        ("warpgroup", "pair", 2, 200, 1100, 2), ("warpgroup", "pair", 1, 20, 200, 1),
        ("warpgroup", "four_blocks", 16, 100, 2800, 1), ("warpgroup", "four_blocks", 11, 40, 600, 2),
        ("binary", "four", 4, 70, 1300, 2), ("binary", "four", 1, 140, 1800, 1), ("binary", "four", 2, 31, 5, 1),
        ("binary", "eight", 8, 50, 600, 1), ("binary", "eight", 5, 90, 1300, 3), ("binary", "sixteen", 16, 75, 2100, 1),
        ("binary", "pair", 4, 155, 1500, 1), ("binary", "pair", 1, 20, 200, 1),
        ("binary", "four_blocks", 11, 40, 600, 2),
    ],
)  # fmt: skip
def test_sign_matmul_is_bit_identical(
    emulated: Emulated, form: str, name: str, tokens: int, rows: int, columns: int, clusters: int
) -> None:
    threads, knobs = (32, KNOBS[name]) if form == "warpgroup" else (128, BINARY[name])
    g = torch.Generator().manual_seed(rows + columns)
    z = torch.randint(-Z_MAX, Z_MAX + 1, (tokens, columns), generator=g).to(torch.int16)
    z[0, : columns // 2] = Z_MAX
    packed = pack_signs(torch.randn(rows, columns, generator=g))
    z_scale, scale = torch.rand(tokens, 1, generator=g), torch.rand(rows, generator=g)
    tiles = tile_layout(packed)[: -(-rows // 16)].contiguous()
    planes = group_planes(z, 2 * knobs.tokens)
    parts = torch.randint(-(2**31), 2**31, (34, tokens), generator=g).to(torch.int32)
    parts[0] += z.sum(1, dtype=torch.int32) - parts.sum(0, dtype=torch.int32)
    y = torch.full((tokens + 1, rows), 7.0)  # one row more, which must stay as it is
    emulated.library.set_split(knobs.split)
    grid = clusters * knobs.split
    emulated(
        f"sign_matmul_{form}_{name}_{knobs.tokens}", grid, knobs.groups * 128 + threads, (tiles, planes),
        tiles=tiles, planes=planes, totals=parts, z_scale=z_scale, scale=scale, y=y, NB=tiles.shape[0],
        KB=tiles.shape[1], OC=rows, m=tokens, P=parts.shape[0], grid=grid, kind=0,
    )  # fmt: skip
    assert torch.equal(y[:-1], reference.sign_matmul(z, z_scale, packed, scale, torch.float32))
    assert (y[-1] == 7.0).all()


def test_chosen_kernels_compile_without_spills(tmp_path: Path) -> None:
    try:
        nvcc = toolchain.find_nvcc()
    except BuildError:
        pytest.skip("no nvcc on this machine")
    templates = [t for k in WARPGROUP_KNOBS.values() for t in library.warpgroup_templates("chosen", (), k)]
    (tmp_path / "kernels.cu").write_text(tirx_source(templates))
    flags = [*compile_flags(("sm_90a",), ""), "-w", "-Xptxas=-v", "-cubin"]
    command = [str(nvcc.path), *flags, "kernels.cu", "-o", "k.cubin"]
    text = toolchain.run_compiler(command, tmp_path, "CUDA kernels")
    assert (
        text.count("spill stores")
        == len(templates)
        == text.count(" 0 bytes spill stores, 0 bytes spill loads")
    )
    assert "serialized" not in text  # what the assembler says when products would wait for each other
