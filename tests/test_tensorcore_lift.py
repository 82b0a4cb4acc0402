"""The tensor-core lift, run on the CPU by an emulator of warps, against liftc/reference.py in float64.

What a GPU adds is in test_tiles_gpu.py.
"""

from __future__ import annotations

import functools

import pytest
import torch
from emulated_kernels import Emulated
from hypothesis import given, settings
from hypothesis import strategies as st
from lift_launches import before_lift, check, check_fused, factors, launch
from operand_layouts import group_planes, z_of

from liftc.format import LiftFormat
from liftc.kernel_object import KernelFunction
from liftc.spec import Z_MAX

pytest.importorskip("tvm", reason="kernels are built with TVM")
from liftc.codegen import library, lift_device, tensorcore_device, tensorcore_lift
from liftc.codegen.build_cuda import tirx_source
from liftc.codegen.knobs import LiftKnobs

SMALL = {"most_left": 64, "most_right": 128}
KNOBS = {
    "one": LiftKnobs(1, ahead=2, left_depth=2, warps=2, **SMALL),
    "pair": LiftKnobs(6, group=2, units=1, left_depth=1, warps=3, trigger=1, dependent_launch=True, **SMALL),
    "kept": LiftKnobs(1, ahead=3, left_depth=1, warps=2, left_kept=2, cluster=2, **SMALL),
    "shared": LiftKnobs(4, 2, tiles=2, ahead=1, left_depth=1, warps=2, left_kept=4, cluster=3, **SMALL),
    "wide": LiftKnobs(6, 3, tiles=2, units=2, ahead=1, warps=2, trigger=2, dependent_launch=True, **SMALL),
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KERNELS = [("one", d) for d in DTYPES] + [("pair", "bfloat16"), ("pair", "float32"), ("wide", "float16")]
KERNELS += [("kept", "bfloat16"), ("shared", "float32")]
FUSED = [("one", "bfloat16"), ("wide", "float16"), ("pair", "float32"), ("shared", "float16")]
SHAPES = (
    (72, LiftFormat(19, 8)), (40, LiftFormat(24, 16)), (8, LiftFormat(9, 8)), (608, LiftFormat(40, 16)),
    (800, LiftFormat(48, 24)), (1000, LiftFormat(77, 32)),
)  # fmt: skip


@functools.cache
def generated_source() -> str:
    """The CUDA source of every kernel of these tests."""
    templates = []
    plain = [("plain", *kernel) for kernel in KERNELS]
    for form, name, dtype in plain + [(form, *kernel) for form in ("norm", "gate") for kernel in FUSED]:
        symbol = f"lift_{form}_{name}_{dtype}"
        make = functools.partial(tensorcore_lift.lift_planes, symbol, dtype, KNOBS[name], form)
        templates.append(library.KernelTemplate(KernelFunction(symbol, "lift_planes", ""), make))
    return tirx_source(templates)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    folder = tmp_path_factory.mktemp("emulated")
    names = ("SPLIT", "WARP_SUM", "Z_SCALE", "STAGE_Z", "STORE_ROWS", "PLACE", "ROUND")
    helpers = "".join(getattr(lift_device, name) for name in names)
    helpers += tensorcore_device.WARP_ADD
    return Emulated(folder, generated_source(), "cuda_lift_emulator.h", helpers)


def run(
    emulated: Emulated, name: str, x: torch.Tensor, in_scale: torch.Tensor | None, left: torch.Tensor,
    right: torch.Tensor, row_blocks: int = 1, pieces: int = 4, form: str = "plain", gain: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Planes, sums of z and z_scale of one launch."""
    knobs, tokens, lifted = KNOBS[name], len(x), right.shape[1]
    dtype = next(key for key, value in DTYPES.items() if value == x.dtype)
    row_blocks = -(-row_blocks // knobs.cluster) * knobs.cluster
    emulated.library.set_cluster(knobs.cluster)
    return launch(
        emulated, f"lift_{form}_{name}_{dtype}", knobs.warps * 32, -(-tokens // knobs.group), row_blocks,
        -(-lifted // (16 * knobs.tiles)), x, in_scale, left, right, pieces, gain,
    )  # fmt: skip


@pytest.mark.parametrize("in_features, fmt", SHAPES)
@pytest.mark.parametrize("name, dtype", KERNELS)
@pytest.mark.parametrize("scaled", [True, False])
def test_z_is_within_one_step(
    emulated: Emulated, in_features: int, fmt: LiftFormat, name: str, dtype: str, scaled: bool
) -> None:
    g = torch.Generator().manual_seed(in_features)
    left, right = factors(in_features, fmt)
    tokens, width = min(5, KNOBS[name].tokens), left.shape[0] * right.shape[1]
    x = torch.randn(tokens, in_features, generator=g)
    if tokens > 1:
        x[1] = 0.0
    x = x.to(DTYPES[dtype])
    in_scale = torch.rand(in_features, generator=g) + 0.5 if scaled else None
    planes, totals, z_scale = run(emulated, name, x, in_scale, left, right, 1 + in_features % 3)
    z = z_of(planes, tokens, width)
    check(z, z_scale, x, in_scale, left, right)
    assert torch.equal(totals, z.sum(1, dtype=torch.int32))


@pytest.mark.parametrize("in_features, fmt", SHAPES[::2])
@pytest.mark.parametrize("name, dtype", FUSED)
@pytest.mark.parametrize("form", ["norm", "gate"])
@pytest.mark.parametrize("scaled", [True, False])
def test_fused_forms_lift_what_separate_operations_make(
    emulated: Emulated, in_features: int, fmt: LiftFormat, name: str, dtype: str, form: str, scaled: bool
) -> None:
    g = torch.Generator().manual_seed(in_features)
    left, right = factors(in_features, fmt)
    tokens, width = min(4, KNOBS[name].tokens), left.shape[0] * right.shape[1]
    given, gain, x = before_lift(tokens, in_features, form, DTYPES[dtype], g)
    in_scale = torch.rand(in_features, generator=g) + 0.5 if scaled else None
    planes, totals, z_scale = run(emulated, name, given, in_scale, left, right, 2, form=form, gain=gain)
    z = z_of(planes, tokens, width)
    assert torch.equal(totals, z.sum(1, dtype=torch.int32))
    check_fused(z, z_scale, x, in_scale, left, right)


@pytest.mark.parametrize("shape", SHAPES[::3], ids=str)
@pytest.mark.parametrize("name, dtype", [k for k in KERNELS if k[1] == "float32"] + [("kept", "bfloat16")])
def test_planes_for_warp_groups(
    emulated: Emulated, name: str, dtype: str, shape: tuple[int, LiftFormat]
) -> None:
    left, right = factors(*shape)
    tokens = min(4, KNOBS[name].tokens)
    x = torch.randn(tokens, shape[0], generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    z = z_of(run(emulated, name, x, None, left, right)[0], tokens, left.shape[0] * right.shape[1])
    planes, totals, _ = run(emulated, name, x, None, left, right, pieces=16)
    padded = torch.nn.functional.pad(z.int(), (0, -z.shape[1] % 256), value=99 * 257)  # as nobody wrote them
    assert torch.equal(planes, group_planes(padded, 2 * tokens))
    assert torch.equal(totals, z.sum(1, dtype=torch.int32))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_adversarial_tokens(emulated: Emulated, data: st.DataObject) -> None:
    """Hadamard-like factors reach the bound; one massive entry, tiny and huge tokens, alternating signs."""
    t1, t2, copies = data.draw(st.sampled_from([(8, 8, 1), (16, 32, 2), (4, 64, 3)]))
    signs = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(64)] for i in range(64)])
    left, right = signs[:t1, :t1] / t1**0.5, signs[:t2, :t2].repeat(1, copies) / t2**0.5
    exponent = data.draw(st.integers(-30, 40))
    kind = data.draw(st.sampled_from(["ones", "alternating", "massive", "row", "random"]))
    x = torch.full((1, t1 * t2), 2.0**exponent)
    if kind == "alternating":
        x[:, ::2] *= -1
    if kind == "massive":
        x[:, data.draw(st.integers(0, t1 * t2 - 1))] *= 2.0**20
    if kind == "row":
        x *= torch.outer(signs[data.draw(st.integers(0, t1 - 1)), :t1], signs[0, :t2]).reshape(1, -1)
    if kind == "random":
        x *= torch.randn(1, t1 * t2, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    x = x.to(data.draw(st.sampled_from([torch.bfloat16, torch.float32])))
    planes, totals, z_scale = run(emulated, "one", x, None, left, right)
    z = z_of(planes, 1, t1 * t2 * copies)
    check(z, z_scale, x, None, left, right)
    assert torch.equal(totals, z.sum(1, dtype=torch.int32))
    if kind in ("ones", "row"):
        assert int(z.abs().max()) >= Z_MAX - 1, "these tokens reach the bound"


def test_tokens_that_are_not_finite_or_next_to_nothing(emulated: Emulated) -> None:
    left, right = factors(*SHAPES[0])
    x = torch.randn(6, SHAPES[0][0], generator=torch.Generator().manual_seed(1))
    x[0, 3], x[1, 71], x[2] = torch.nan, -torch.inf, x[2] * 1e-30
    x[3, 5] = 3e38
    x[4] = 0.0
    planes, totals, z_scale = run(emulated, "pair", x, None, left, right)
    z = z_of(planes, 6, left.shape[0] * right.shape[1])
    assert not z[:5].any() and z[5].any() and not totals[:5].any()
    assert z_scale[[0, 1, 3]].isnan().all() and not z_scale[[2, 4]].any() and z_scale[5] > 0
    check(z, z_scale, x, None, left, right)
