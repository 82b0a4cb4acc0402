"""The binary warp-group sign_matmul of sm_90a, run on the CPU by an emulator of wgmma, clusters and bulk copies.

What a GPU adds is in test_tiles_gpu.py.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from added_results import CASES, check, outputs
from emulated_kernels import Emulated
from operand_layouts import group_planes, tile_layout
from sass_operands import find_disassembler, overwrites, overwritten_operands

from liftc.errors import BuildError
from liftc.packing import pack_signs
from liftc.spec import Z_MAX

pytest.importorskip("tvm", reason="kernels are built with TVM")
from liftc.codegen import library, tensorcore_device, toolchain, warpgroup_device
from liftc.codegen.build_cuda import compile_flags, tirx_source
from liftc.codegen.default_knobs import BINARY_KNOBS, GROUP_LIFT_KNOBS
from liftc.codegen.knobs import BinaryKnobs

KNOBS = {
    "four": BinaryKnobs(4, stage_blocks=2, ring=3, cutters=1, z_stages=2, block_rows=9, split=1, prefetch=1),
    "eight": BinaryKnobs(8, 1, 2, stage_blocks=2, ring=2, cutters=3, z_stages=1, block_rows=6, split=1),
    "sixteen": BinaryKnobs(16, 1, 2, stage_blocks=2, ring=2, cutters=2, z_stages=3, block_rows=5, split=1),
    "pair": BinaryKnobs(8, 3, ring=2, cutters=2, z_stages=3, block_rows=12, prefetch=5),
    "four_blocks": BinaryKnobs(16, 1, 4, stage_blocks=2, ring=3, cutters=1, z_stages=2, block_rows=7, split=4),
    "odd": BinaryKnobs(4, stage_blocks=5, ring=2, z_stages=3, prefetch=2, first_stages=0, multiply_registers=120,
                       helper_registers=56),
    "many": BinaryKnobs(16, 1, 1, stage_blocks=2, ring=2, cutters=2, z_stages=3, block_rows=13, split=1),
}  # fmt: skip


@functools.cache
def generated_source() -> str:
    """The CUDA source of every kernel of these tests."""
    return tirx_source([t for name, k in KNOBS.items() for t in library.binary_templates(name, (), (k,))])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    folder = tmp_path_factory.mktemp("emulated")
    helpers = tensorcore_device.WARP_ADD + warpgroup_device.BITS_OF_BYTES + tensorcore_device.TOUCH
    helpers += tensorcore_device.ADDENDS + warpgroup_device.LOAD_FOUR + warpgroup_device.STORE_FOUR
    return Emulated(folder, generated_source(), "cuda_warpgroup_emulator.h", helpers)


@pytest.fixture(scope="module", params=[False, True], ids=["late copies", "early copies"])
def emulated(compiled: Emulated, request: pytest.FixtureRequest) -> Emulated:
    return compiled.landing(request.param)


@pytest.mark.parametrize("adds, dtype", CASES)
@pytest.mark.parametrize(
    "name, tokens, rows, columns, clusters",
    [
        ("four", 4, 70, 1300, 2), ("four", 3, 17, 777, 1), ("four", 1, 140, 1800, 1), ("four", 2, 31, 5, 1),
        ("eight", 8, 50, 600, 1), ("eight", 5, 90, 1300, 3), ("eight", 1, 1, 1, 1),
        ("sixteen", 16, 75, 2100, 1), ("sixteen", 9, 48, 512, 3),
        ("pair", 8, 155, 5200, 1), ("pair", 4, 200, 1100, 2), ("pair", 1, 20, 200, 1), ("pair", 7, 61, 7100, 1),
        ("odd", 4, 70, 9000, 1), ("odd", 3, 50, 700, 2),
        ("four_blocks", 16, 100, 2800, 1), ("four_blocks", 11, 40, 600, 2),
        ("many", 16, 203, 600, 1), ("many", 3, 206, 300, 1),
    ],
)  # fmt: skip
def test_sign_matmul_is_bit_identical(
    emulated: Emulated,
    name: str,
    tokens: int,
    rows: int,
    columns: int,
    clusters: int,
    adds: int,
    dtype: torch.dtype,
) -> None:
    knobs = KNOBS[name]
    g = torch.Generator().manual_seed(rows + columns)
    z = torch.randint(-Z_MAX, Z_MAX + 1, (tokens, columns), generator=g).to(torch.int16)
    z[0, : columns // 2] = Z_MAX
    packed = pack_signs(torch.randn(rows, columns, generator=g))
    z_scale, scale = torch.rand(tokens, 1, generator=g) * 1e-3, torch.rand(rows, generator=g)
    tiles = tile_layout(packed)[: -(-rows // 16)].contiguous()
    planes = group_planes(z, 2 * knobs.tokens)
    parts = torch.randint(-(2**31), 2**31, (34, tokens), generator=g).to(torch.int32)
    parts[0] += z.sum(1, dtype=torch.int32) - parts.sum(0, dtype=torch.int32)
    given = outputs(tokens, rows, adds, dtype)
    emulated.library.set_split(knobs.split)
    grid = clusters * knobs.split
    emulated(
        f"sign_matmul_binary_{name}_{knobs.tokens}", grid, knobs.threads(), (tiles, planes),
        tiles=tiles, planes=planes, totals=parts, z_scale=z_scale, scale=scale, **given, NB=tiles.shape[0],
        KB=tiles.shape[1], OC=rows, m=tokens, P=parts.shape[0], grid=grid,
    )  # fmt: skip
    check(given, z, z_scale, packed, scale)


def group_lifts() -> list[library.KernelTemplate]:
    """The largest lifts in use for bfloat16 activations, which have all forms of the products."""
    return [
        template
        for choices in GROUP_LIFT_KNOBS.values()
        for template in library.group_lift_templates(
            "chosen", (), tuple({(k.most_left, k.registers): k for k in choices}.values())
        )
        if template.function.dtype == "bf16"
    ]


@pytest.fixture(scope="module")
def assembled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The machine code of the kernels in use, and what the assembler said."""
    try:
        nvcc = toolchain.find_nvcc()
    except BuildError:
        pytest.skip("no nvcc on this machine")
    folder = tmp_path_factory.mktemp("assembled")
    templates = [t for k in BINARY_KNOBS.values() for t in library.binary_templates("chosen", (), k)]
    templates += group_lifts()
    (folder / "kernels.cu").write_text(tirx_source(templates))
    flags = [*compile_flags(("sm_90a",), ""), "-w", "-Xptxas=-v", "-cubin"]
    command = [str(nvcc.path), *flags, "kernels.cu", "-o", "k.cubin"]
    return folder / "k.cubin", toolchain.run_compiler(command, folder, "CUDA kernels")


def test_chosen_kernels_compile_without_spills(assembled: tuple[Path, str]) -> None:
    text, kernels = assembled[1], sum(map(len, BINARY_KNOBS.values())) + len(group_lifts())
    assert kernels == text.count("spill stores") == text.count(" 0 bytes spill stores, 0 bytes spill loads")
    assert "serialized" not in text  # what the assembler says when products would wait for each other


def test_operands_stay_as_they_are_while_products_read_them(assembled: tuple[Path, str]) -> None:
    disassembler = find_disassembler(toolchain.find_nvcc().path)
    if disassembler is None:
        pytest.skip("no nvdisasm on this machine")
    assert overwritten_operands(disassembler, assembled[0]) == []


def test_an_overwritten_operand_is_found() -> None:
    loop = """
.L_x_1:
        /*0000*/                   LDS.128 R8, [R20] ;
        /*0010*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0020*/                   WARPGROUP.ARRIVE ;
        /*0030*/                   BGMMA.64x64x256.AND.POPC R24, R8, gdesc[UR8], R24, UP0, gsb0 ;
        /*0040*/              @!P0 BRA `(.L_x_1) ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/                   IMAD.MOV.U32 R9, RZ, RZ, R5 ;
        /*0070*/                   EXIT ;
"""
    assert [found.split(" <- ")[1] for found in overwrites(loop)] == ["LDS.128 R8, [R20]"]
    assert overwrites(loop.replace("LDS.128 R8, [R20]", "LDS.64 R6, [R20]")) == []
    lift = """
        /*0000*/                   WARPGROUP.ARRIVE ;
        /*0010*/                   HGMMA.64x32x16.F32.BF16 R24, R148, gdesc[UR8].tnspB, RZ, !UPT ;
        /*0020*/                   FFMA.FTZ R2, R151, R151, R2 ;
        /*0030*/                   HGMMA.64x32x16.F32.BF16 R24, R152, gdesc[UR12].tnspB, R24, gsb0 ;
        /*0040*/                   F2FP.BF16.F32.PACK_AB R151, R4, R3 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/                   F2FP.BF16.F32.PACK_AB R152, R4, R3 ;
        /*0070*/                   EXIT ;
"""
    assert [found.split()[1:3] for found in overwrites(lift)] == [["R24,", "R148,"]]
    assert overwrites(lift.replace("PACK_AB R151", "PACK_AB R156")) == []
