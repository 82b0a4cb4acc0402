"""The product that lifts for itself, run on the CPU by an emulator of warps, against liftc/reference.py in float64.

What a GPU adds is in test_lifted_gpu.py.
"""

from __future__ import annotations

import functools

import pytest
import torch
from emulated_kernels import Emulated
from operand_layouts import tile_layout

from liftc import reference
from liftc.format import LiftFormat
from liftc.packing import pack_signs
from liftc.runtime.factors import small_factor_words
from liftc.spec import transform_shape

pytest.importorskip("tvm", reason="kernels are built with TVM")
from liftc.codegen import library, lift_device, popcount_device, tensorcore_device
from liftc.codegen.build_cuda import tirx_source
from liftc.codegen.knobs import LiftedKnobs

KNOBS = {
    "few": LiftedKnobs(
        warps=3, ring=4, start_tiles=1, step_tiles=1, block_rows=24, most_right=32, most_lifted=80
    ),
    "many": LiftedKnobs(warps=24, block_rows=4, dependent_launch=True),
}
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
SHAPES = (
    (72, LiftFormat(19, 8)), (40, LiftFormat(24, 16)), (8, LiftFormat(9, 8)), (608, LiftFormat(40, 16)),
    (800, LiftFormat(48, 24)), (1000, LiftFormat(77, 32)),
)  # fmt: skip


@functools.cache
def generated_source() -> str:
    """The CUDA source of every kernel of these tests."""
    return tirx_source([t for name, k in KNOBS.items() for t in library.lifted_templates(name, (), (k,))])


@pytest.fixture(scope="module", params=[False, True], ids=["late copies", "early copies"])
def emulated(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Emulated:
    names = ("SPLIT", "WARP_SUM", "Z_SCALE", "STAGE_X8", "STORE_PAIR")
    helpers = "".join(getattr(lift_device, name) for name in names) + tensorcore_device.WARP_ADD
    helpers += popcount_device.STORE_BITS + popcount_device.WEIGH_BITS
    folder = tmp_path_factory.mktemp("lifted")
    return Emulated(folder, request.param, generated_source(), "cuda_lifted_emulator.h", helpers)


def run(
    emulated: Emulated, name: str, x: torch.Tensor, in_scale: torch.Tensor | None, left: torch.Tensor,
    right: torch.Tensor, signs: torch.Tensor, scale: torch.Tensor, grid: int,
) -> torch.Tensor:  # fmt: skip
    """float32 (OC,) of one launch."""
    knobs, (t2, lifted) = KNOBS[name], right.shape
    short = next(key for key, value in DTYPES.items() if value == x.dtype)
    tiles = tile_layout(pack_signs(signs))[: -(-signs.shape[0] // 16)].contiguous()
    left_words, right_words, bound = small_factor_words(left, right)
    streamed = torch.cat([t.flatten() for t in (tiles, left_words, right_words)])
    sizes = [t.numel() for t in (tiles, left_words, right_words)]
    held = [part.view(t.shape) for part, t in zip(streamed.split(sizes), (tiles, left_words, right_words))]
    y = torch.full((signs.shape[0] + 1,), 7.0)  # one more, which must stay as it is
    emulated(
        f"lifted_sign_matmul_{name}_{short}", grid, knobs.warps * 32, (streamed, x),
        tiles=held[0], x=x, in_scale=torch.ones(1) if in_scale is None else in_scale, bound=bound, left=held[1],
        right=held[2], LV=held[1].numel() // 4, RV=held[2].numel() // 4, scale=scale, y=y, grid=grid, kind=0, t1=left.shape[0], t2=t2, C=lifted, NB=tiles.shape[0],
        KB=tiles.shape[1], IC=len(x), SC=1 if in_scale is None else len(in_scale), OC=signs.shape[0],
    )  # fmt: skip
    assert y[-1] == 7.0
    return y[:-1]


def factors(in_features: int, fmt: LiftFormat) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(in_features)
    t1, t2 = transform_shape(in_features, fmt)
    lifted = t2 // fmt.subspace_dim * fmt.lifted_dim
    return torch.randn(t1, t1, generator=g), torch.randn(t2, lifted, generator=g)


@pytest.mark.parametrize("in_features, fmt", SHAPES)
@pytest.mark.parametrize("name, short", [("few", "bf16"), ("few", "f16"), ("many", "f16")])
@pytest.mark.parametrize("scaled", [True, False])
def test_z_is_within_one_step(
    emulated: Emulated, in_features: int, fmt: LiftFormat, name: str, short: str, scaled: bool
) -> None:
    """Every row of signs differs from the first one in one column, so that their differences are z."""
    g = torch.Generator().manual_seed(in_features)
    left, right = factors(in_features, fmt)
    columns = min(left.shape[0] * right.shape[1], 511)
    x = torch.randn(in_features, generator=g).to(DTYPES[short])
    in_scale = torch.rand(in_features, generator=g) + 0.5 if scaled else None
    first = torch.randn(left.shape[0] * right.shape[1], generator=g).sign()
    flipped = torch.randperm(len(first), generator=g)[:columns]
    signs = first.repeat(columns + 1, 1)
    signs[torch.arange(columns) + 1, flipped] *= -1
    y = run(emulated, name, x, in_scale, left, right, signs, torch.ones(columns + 1), 2 if name == "few" else 9)
    want, z_scale = reference.lift(x[None], in_scale, left, right)
    sums = (y.double() / z_scale.double()[0]).round()
    assert float((y.double() / z_scale.double()[0] - sums).abs().max()) < 0.3
    z = (sums[0] - sums[1:]) / 2 * first[flipped]
    assert float((z - want[0, flipped]).abs().max()) <= 1
    wide = None if in_scale is None else in_scale.double()
    real = reference.lift_real(x[None].double(), wide, left.double(), right.double())[0, flipped]
    assert float((z - real / z_scale.double()[0]).abs().max()) < 0.75
    assert abs(float(sums[0] - want[0].double() @ first.double())) <= len(first) * 0.05 + 1


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e30])
def test_what_has_no_step(emulated: Emulated, value: float) -> None:
    left, right = factors(72, LiftFormat(19, 8))
    x = torch.zeros(72, dtype=torch.bfloat16)
    x[5] = value
    signs = torch.ones(5, left.shape[0] * right.shape[1])
    y = run(emulated, "few", x, None, left, right, signs, torch.ones(5), 1)
    assert bool((y == 0).all() if value == 0 else y.isnan().all())


def test_llama_2_7b(emulated: Emulated) -> None:
    """The factors it is made for, 4096 features at 2.4 bits."""
    g = torch.Generator().manual_seed(7)
    left, right = factors(4096, LiftFormat(77, 32))
    x, scale = torch.randn(4096, generator=g).bfloat16(), torch.rand(50, generator=g)
    signs = torch.randn(50, left.shape[0] * right.shape[1], generator=g).sign()
    y = run(emulated, "many", x, None, left, right, signs, scale, 2)
    z, z_scale = reference.lift(x[None], None, left, right)
    want = (z.double() @ signs.double().T * z_scale.double())[0] * scale.double()
    error = (y.double() - want) / (z_scale.double()[0] * scale.double())
    assert float(error.abs().max()) < 20  # z of 9856 columns, a few of them rounded the other way
