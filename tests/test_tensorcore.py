"""The tensor-core sign_matmul, run on the CPU by an emulator of warps, against liftc/reference.py; its tiles.

What a GPU adds (real mma, launches, float16 results) is in test_kernels_gpu.py.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from added_results import CASES, check, outputs
from emulated_kernels import Emulated
from operand_layouts import group_planes, planes_of, tile_layout, z_of

from liftc import reference
from liftc.errors import BuildError, LiftcError
from liftc.kernel_object import KernelFunction
from liftc.packing import pack_signs
from liftc.runtime.planes import Planes
from liftc.runtime.tiles import TiledSigns
from liftc.spec import Z_MAX

pytest.importorskip("tvm", reason="kernels are built with TVM")
from liftc.codegen import library, tensorcore_device, tensorcore_split, toolchain
from liftc.codegen.build_cuda import compile_flags, tirx_source
from liftc.codegen.default_knobs import (
    BINARY_KNOBS,
    GROUP_LIFT_KNOBS,
    LIFT_KNOBS,
    POPCOUNT_KNOBS,
    SHARED_BYTES,
    TENSOR_CORE_KNOBS,
    chip_family,
)
from liftc.codegen.knobs import TensorCoreKnobs

KNOBS = {
    "one": TensorCoreKnobs(tokens=1, warps=2, ring=5, sets=8, chunk_blocks=2, block_rows=8, first_tiles=1),
    "four": TensorCoreKnobs(4, warps=3, ring=4, sets=4, chunk_blocks=3, block_rows=4, prefetch_tiles=9, first_tiles=2),
    "eight": TensorCoreKnobs(8, warps=2, ring=2, row_blocks=2, sets=2, chunk_blocks=1, z_buffers=3, block_rows=6),
    "sixteen": TensorCoreKnobs(16, warps=1, ring=3, row_blocks=2, sets=1, chunk_blocks=4, z_buffers=1, block_rows=3),
}  # fmt: skip


@functools.cache
def generated_source() -> str:
    """The CUDA source of every kernel of these tests."""
    templates = [t for name, k in KNOBS.items() for t in library.tensor_core_templates(name, (), (k,))]
    make = functools.partial(tensorcore_split.split_z, "split_z")
    return tirx_source(
        [*templates, library.KernelTemplate(KernelFunction("split_z", "split_z", "i16"), make)]
    )


def split_z(
    emulated: Emulated, z: torch.Tensor, columns: int, pieces: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    """Planes in `pieces` of a block with room for `columns`, and the sums of z."""
    tokens, width = z.shape
    blocks = -(-width // 256)
    planes = torch.full((blocks, pieces, columns, 256 // pieces), 99, dtype=torch.int8)
    totals = torch.full((1, tokens), 99, dtype=torch.int32)
    emulated(
        "split_z", tokens, 1024, (z, z), z=z, planes=planes, totals=totals, m=tokens, K=width, KB=blocks,
        COLS=columns, PIECES=pieces, WIDE=256 // pieces,
    )  # fmt: skip
    return planes, totals


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    helpers = tensorcore_device.STORE_PLANES + tensorcore_device.WARP_ADD
    helpers += tensorcore_device.STORE_Y + tensorcore_device.TOUCH
    folder = tmp_path_factory.mktemp("emulated")
    return Emulated(folder, generated_source(), "cuda_warp_emulator.h", helpers)


@pytest.fixture(scope="module", params=[False, True], ids=["late copies", "early copies"])
def emulated(compiled: Emulated, request: pytest.FixtureRequest) -> Emulated:
    return compiled.landing(request.param)


@pytest.mark.parametrize("adds, dtype", CASES)
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
    emulated: Emulated,
    name: str,
    tokens: int,
    rows: int,
    columns: int,
    grid: int,
    adds: int,
    dtype: torch.dtype,
) -> None:
    g = torch.Generator().manual_seed(rows + columns)
    z = torch.randint(-Z_MAX, Z_MAX + 1, (tokens, columns), generator=g).to(torch.int16)
    packed = pack_signs(torch.randn(rows, columns, generator=g))
    z_scale, scale = torch.rand(tokens, 1, generator=g) * 1e-3, torch.rand(rows, generator=g)
    tiles = tile_layout(packed)[: -(-rows // 16)].contiguous()
    knobs = KNOBS[name]
    planes, totals = split_z(emulated, z, 2 * knobs.tokens)
    assert torch.equal(z_of(planes, tokens, columns), z) and torch.equal(
        totals[0], z.sum(1, dtype=torch.int32)
    )
    if grid > 1:  # a lift hands over one row of parts for each of its blocks
        extra = torch.randint(-(2**31), 2**31, (33, tokens), generator=g).to(torch.int32)
        totals = torch.cat([totals - extra.sum(0, dtype=torch.int32), extra])
    given = outputs(tokens, rows, adds, dtype)
    emulated(
        f"sign_matmul_tiled_{name}_{knobs.tokens}", grid, knobs.warps * 32, (tiles, planes),
        tiles=tiles, planes=planes, totals=totals, z_scale=z_scale, scale=scale, **given, NB=tiles.shape[0],
        KB=tiles.shape[1], OC=rows, m=tokens, grid=grid,
        P=totals.shape[0],
    )  # fmt: skip
    check(given, z, z_scale, packed, scale)


def called_by_runtime(emulated: Emulated) -> TiledSigns:
    """The runtime's products on CPU tensors, with one kernel, for four tokens."""
    knobs = KNOBS["four"]
    spec = KernelFunction("sign_matmul_tiled_four_4", "sign_matmul_tiled", "", max_tokens=4, block_rows=4)

    def function(tiles: Any, planes: Any, totals: Any, z_scale: Any, scale: Any, *rest: Any) -> None:
        bias, residual, y, grid, kind, adds = rest
        assert all(t.dtype == torch.uint8 and t.is_contiguous() for t in (bias, residual, y))
        assert y.numel() == residual.numel() and not any(t.data_ptr() % 4 for t in (bias, residual, y))
        emulated(
            spec.symbol, grid, knobs.warps * 32, (tiles, planes), tiles=tiles, planes=planes, totals=totals,
            z_scale=z_scale, scale=scale, bias=bias, residual=residual, y=y, NB=tiles.shape[0], KB=tiles.shape[1],
            OC=scale.shape[0], m=z_scale.shape[0], grid=grid, kind=kind, adds=adds, P=totals.shape[0],
        )  # fmt: skip

    kernels = SimpleNamespace(
        functions={spec.symbol: function}, of=lambda op: [spec] if op == spec.op else []
    )
    tiles = TiledSigns(kernels)  # type: ignore[arg-type]
    tiles._processors[torch.device("cpu")] = 2
    return tiles


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lead", [(1,), (1, 3), (2, 2)])
def test_the_runtime_adds_bias_and_residual(
    emulated: Emulated, lead: tuple[int, ...], dtype: torch.dtype
) -> None:
    runtime, rows, columns = called_by_runtime(emulated), 101, 300
    g, tokens = torch.Generator().manual_seed(rows), math.prod(lead)
    z = torch.randint(-Z_MAX, Z_MAX + 1, (tokens, columns), generator=g).to(torch.int16)
    packed = pack_signs(torch.randn(rows, columns, generator=g))
    z_scale, scale = torch.rand(*lead, 1, generator=g) * 1e-3, torch.rand(rows, generator=g)
    tiles = tile_layout(packed)[: -(-rows // 16)].contiguous()
    planes = Planes(planes_of(z, 8), z.sum(1, dtype=torch.int32)[None], torch.Size(lead), columns)
    want = reference.sign_matmul(z.view(*lead, columns), z_scale, packed, scale, dtype)
    bias = (torch.randn(rows, generator=g) * 100).to(dtype)
    wide = (torch.randn(*lead, 2 * rows, generator=g) * 100).to(dtype)
    operands = (planes, z_scale, tiles, scale, dtype)
    assert torch.equal(runtime.sign_matmul(*operands), want)
    assert torch.equal(runtime.sign_matmul(*operands, bias), want + bias)
    for residual in (wide[..., rows:].contiguous(), wide[..., :rows], wide[..., 1 : rows + 1]):
        assert torch.equal(runtime.sign_matmul(*operands, None, residual), want + residual)
        assert torch.equal(runtime.sign_matmul(*operands, bias, residual), want + bias + residual)
    for added, message in (
        ((bias[1:], None), r"bias is \w+\[100\] on cpu; need \w+\[101\]"),
        ((bias.double(), None), "bias is f64"),
        ((None, bias), "residual is"),
        ((bias, wide), "residual is"),
    ):
        with pytest.raises(LiftcError, match=message):
            runtime.sign_matmul(*operands, *added)


@pytest.mark.parametrize("tokens, columns", [(1, 700), (3, 5), (8, 1032)])
def test_split_z_for_warp_groups(emulated: Emulated, tokens: int, columns: int) -> None:
    g = torch.Generator().manual_seed(columns)
    z = torch.randint(-Z_MAX, Z_MAX + 1, (tokens, columns), generator=g).to(torch.int16)
    planes, totals = split_z(emulated, z, 16, 16)
    padded = torch.nn.functional.pad(z, (0, -columns % 256))
    assert torch.equal(planes[:, :, : 2 * tokens], group_planes(padded, 2 * tokens))
    assert torch.equal(totals[0], z.sum(1, dtype=torch.int32))


@pytest.mark.parametrize("family", TENSOR_CORE_KNOBS)
def test_every_llama_70b_layer_launches(family: str) -> None:
    """Shared memory never depends on the layer; rows beyond one wave of blocks make more waves."""
    for knobs in TENSOR_CORE_KNOBS[family]:
        assert knobs.shared_bytes() <= SHARED_BYTES[family]
    for lift in LIFT_KNOBS[family]:
        assert lift.shared_bytes() <= SHARED_BYTES[family]
    for grouped in GROUP_LIFT_KNOBS.get(family, ()):
        for form in ("plain", library.usual_form(grouped)):
            assert grouped.shared_bytes(form) <= SHARED_BYTES[family]
    one, groups = POPCOUNT_KNOBS.get(family, ()), BINARY_KNOBS.get(family, ())
    for product in (*one, *groups):
        assert product.shared_bytes() <= SHARED_BYTES[family]
    assert [k.tokens for k in (*one, *TENSOR_CORE_KNOBS[family], *groups)] == [1, 4, 8, 16]
    assert {chip_family(a) for a in ("sm_80", "sm_86", "sm_90", "sm_90a", "sm_100", "sm_120")} == set(
        TENSOR_CORE_KNOBS
    )


@pytest.mark.parametrize("family, arch", [("ampere", "sm_80"), ("hopper", "sm_90a"), ("blackwell", "sm_120")])
def test_kernels_compile_without_spills(tmp_path: Path, family: str, arch: str) -> None:
    try:
        nvcc = toolchain.find_nvcc()
    except BuildError:
        pytest.skip("no nvcc on this machine")
    knobs = TENSOR_CORE_KNOBS[family]
    templates = [
        *library.popcount_templates(family, (arch,), POPCOUNT_KNOBS.get(family, ())),
        *library.tensor_core_templates(family, (arch,), tuple(dict.fromkeys(knobs))),
        *library.binary_templates(family, (arch,), BINARY_KNOBS.get(family, ())),
        list(library.lift_templates(family, (arch,), LIFT_KNOBS[family][:1]))[-1],
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
    assert (
        text.count("bytes spill stores")
        == len(templates)
        == text.count(" 0 bytes spill stores, 0 bytes spill loads")
    )
