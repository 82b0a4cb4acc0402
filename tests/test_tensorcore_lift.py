"""The tensor-core lift, run on the CPU by an emulator of warps, against liftc/reference.py in float64.

What a GPU adds is in test_tiles_gpu.py.
"""

from __future__ import annotations

import ctypes
import functools
import re

import pytest
import torch
from emulated_kernels import Emulated
from hypothesis import given, settings
from hypothesis import strategies as st
from lift_launches import before_lift, check, check_fused, factors, gelu_of, launch, layer_norm_of
from operand_layouts import group_planes, z_of

from liftc.format import LiftFormat
from liftc.kernel_object import KernelFunction
from liftc.runtime.planes import LIFT_OPS
from liftc.spec import Z_MAX

pytest.importorskip("tvm", reason="kernels are built with TVM")
from liftc.codegen import library, lift_device, lift_forms_device, tensorcore_device, tensorcore_lift
from liftc.codegen.build_cuda import tirx_source
from liftc.codegen.default_knobs import LIFT_KNOBS
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
CHOICES = [("norm", 0), ("gate", 0), ("layer", 0), ("layer", 1), *(("gelu", choice) for choice in range(4))]
SHAPES = (
    (72, LiftFormat(19, 8)), (40, LiftFormat(24, 16)), (8, LiftFormat(9, 8)), (608, LiftFormat(40, 16)),
    (800, LiftFormat(48, 24)), (1000, LiftFormat(77, 32)),
)  # fmt: skip

GELUS = """
extern "C" void gelu_of_tests(const float* x, float* made, long count, int approximate) {
  for (long i = 0; i < count; ++i) made[i] = approximate ? liftc_gelu_tanh(x[i]) : liftc_gelu(x[i]);
}
"""
"""gelu as the kernels compute it, before it is rounded."""


@functools.cache
def generated_source() -> str:
    """The CUDA source of every kernel of these tests."""
    templates = []
    plain = [("plain", *kernel) for kernel in KERNELS]
    fused = [(form, *kernel) for form in tensorcore_lift.FORMS[1:] for kernel in FUSED]
    for form, name, dtype in plain + fused:
        symbol = f"lift_{form}_{name}_{dtype}"
        make = functools.partial(tensorcore_lift.lift_planes, symbol, dtype, KNOBS[name], form)
        templates.append(library.KernelTemplate(KernelFunction(symbol, "lift_planes", ""), make))
    return tirx_source(templates)


LACKS = {
    "a mean that is not awaited": (r"tvm_builtin_cuda_cta_sync\(\);(?=\s*centre_ptr\[0\] = 0x0p)", ""),
    "a spread that is not awaited": (r"tvm_builtin_cuda_cta_sync\(\);(?=\s*root_ptr\[0\] = 0x0p)", ""),
    "padding that counts": (
        r"(liftc_deviations_x8\(.*?), (centre_ptr\[\d\]), .*, 2\)\);",
        r"\1, \2, 1, 2));",
    ),
    "padding that is shifted": (r"(liftc_layer_x8\(.*), of_piece\w*, choice, 2\);", r"\1, 1, choice, 2);"),
}
"""What is changed in a kernel, and into what, so that it lacks something."""


def lacking(source: str) -> str:
    """The smallest LayerNorm with one of LACKS after the other, lift_layer_0_bfloat16 and so on."""
    symbol = "lift_layer_one_bfloat16_kernel"
    defined = rf'extern "C" __global__ [^;{{]*\b{symbol}\([^)]*\) \{{.*?\n\}}\n'
    whole = re.search(defined, source, re.DOTALL)
    assert whole is not None
    kernels = ""
    for number, (pattern, into) in enumerate(LACKS.values()):
        kernel, found = re.subn(pattern, into, whole[0])
        assert found > 0, pattern
        kernels += kernel.replace(symbol, f"lift_layer_{number}_bfloat16_kernel")
    return kernels


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    folder = tmp_path_factory.mktemp("emulated")
    names = ("SPLIT", "WARP_SUM", "Z_SCALE", "STAGE_Z", "STORE_ROWS", "PLACE", "ROUND")
    helpers = "".join(getattr(lift_device, name) for name in names)
    helpers += lift_forms_device.FORMS + tensorcore_device.WARP_ADD + GELUS
    source = generated_source()
    end = source.index("#include <tvm/ffi/c_api.h>")
    source = source[:end] + lacking(source) + source[end:]
    return Emulated(folder, source, "cuda_lift_emulator.h", helpers)


def run(
    emulated: Emulated, name: str, x: torch.Tensor, in_scale: torch.Tensor | None, left: torch.Tensor,
    right: torch.Tensor, row_blocks: int = 1, pieces: int = 4, form: str = "plain", gain: torch.Tensor | None = None,
    choice: int = 0, kernel: str = "",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Planes, sums of z and z_scale of one launch."""
    knobs, tokens, lifted = KNOBS[name], len(x), right.shape[1]
    dtype = next(key for key, value in DTYPES.items() if value == x.dtype)
    row_blocks = -(-row_blocks // knobs.cluster) * knobs.cluster
    emulated.library.set_cluster(knobs.cluster)
    return launch(
        emulated, f"lift_{form}_{kernel or name}_{dtype}", knobs.warps * 32, -(-tokens // knobs.group), row_blocks,
        -(-lifted // (16 * knobs.tiles)), x, in_scale, left, right, pieces, gain, choice=choice,
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
@pytest.mark.parametrize("form, choice", CHOICES)
@pytest.mark.parametrize("scaled", [True, False])
def test_fused_forms_lift_what_separate_operations_make(
    emulated: Emulated,
    in_features: int,
    fmt: LiftFormat,
    name: str,
    dtype: str,
    form: str,
    choice: int,
    scaled: bool,
) -> None:
    g = torch.Generator().manual_seed(in_features)
    left, right = factors(in_features, fmt)
    tokens, width = min(4, KNOBS[name].tokens), left.shape[0] * right.shape[1]
    given, gain, x = before_lift(tokens, in_features, form, DTYPES[dtype], g, choice)
    in_scale = torch.rand(in_features, generator=g) + 0.5 if scaled else None
    planes, totals, z_scale = run(
        emulated, name, given, in_scale, left, right, 2, form=form, gain=gain, choice=choice
    )
    z = z_of(planes, tokens, width)
    assert torch.equal(totals, z.sum(1, dtype=torch.int32))
    check_fused(z, z_scale, x, in_scale, left, right)


FAR = {"float32": 1000.0, "float16": 1000.0, "bfloat16": 200.0}
"""Tokens this far from 0, at a spread of 1."""


@pytest.mark.parametrize("name, dtype", FUSED)
def test_layer_norms_of_tokens_far_from_zero_and_of_equal_values(
    emulated: Emulated, name: str, dtype: str
) -> None:
    """Features that leave the last row of X half empty; what is padded is not shifted."""
    g, features = torch.Generator().manual_seed(3), 1000
    left, right = factors(*SHAPES[5])
    assert left.shape[0] * right.shape[0] > features
    tokens = min(4, KNOBS[name].tokens)
    x = (torch.randn(tokens, features, generator=g) + FAR[dtype]).to(DTYPES[dtype])
    gain, shift = (torch.randn(features, generator=g).to(DTYPES[dtype]) for _ in range(2))
    want = layer_norm_of(x, gain, shift)
    if tokens > 1:
        x[1] = 7.0
        want[1] = shift
    both = torch.cat([gain, shift])
    planes, totals, z_scale = run(emulated, name, x, None, left, right, 2, form="layer", gain=both)
    z = z_of(planes, tokens, left.shape[0] * right.shape[1])
    assert torch.equal(totals, z.sum(1, dtype=torch.int32))
    check_fused(z, z_scale, want, None, left, right)


def test_the_emulator_sees_what_a_layer_norm_lacks(emulated: Emulated) -> None:
    left, right = factors(*SHAPES[5])
    given, gain, x = before_lift(1, 1000, "layer", torch.bfloat16, torch.Generator().manual_seed(2))
    planes, _, z_scale = run(emulated, "one", given, None, left, right, form="layer", gain=gain)
    check_fused(z_of(planes, 1, left.shape[0] * right.shape[1]), z_scale, x, None, left, right)
    for number, lack in enumerate(LACKS):
        got = run(emulated, "one", given, None, left, right, form="layer", gain=gain, kernel=f"{number}")[0]
        assert not torch.equal(got, planes), lack


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("approximate", [False, True])
def test_gelu_of_every_number(emulated: Emulated, dtype: torch.dtype, approximate: bool) -> None:
    """Of half precision: a millionth away, farther only where next to nothing, so that it is rounded as the exact value
    but for a few that are halfway."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = every[every.isfinite()].float()
    made = torch.empty_like(x)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (x, made))
    emulated.library.gelu_of_tests(*pointers, ctypes.c_long(len(x)), int(approximate))
    wide = x.double()
    if approximate:
        exact = wide * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3))
    else:
        exact = wide / 2 * torch.special.erfc(-wide / 2**0.5)
    mode = "tanh" if approximate else "none"
    torch.testing.assert_close(exact, torch.nn.functional.gelu(wide, approximate=mode), rtol=1e-9, atol=1e-14)
    away = ((made - exact) / exact).abs()
    assert float(away[exact.abs() > 1e-4].max()) < 1.2e-6 and float(away[exact.abs() > 1e-30].max()) < 1e-5
    assert float(made[exact.abs() <= 1e-30].abs().max()) < 1.1e-30
    assert float((made.to(dtype) != exact.to(dtype)).float().mean()) < 2.5e-3


@pytest.mark.parametrize("form, choice", [("layer", 0), *(("gelu", choice) for choice in range(4))])
def test_fused_tokens_that_are_not_finite(emulated: Emulated, form: str, choice: int) -> None:
    left, right = factors(*SHAPES[4])
    g = torch.Generator().manual_seed(5)
    given, gain, x = before_lift(6, SHAPES[4][0], form, torch.float16, g, choice)
    given[0, 3], given[1, 700], given[2, 0], given[3, 9] = torch.nan, -torch.inf, torch.inf, -6e4
    if form == "gelu":
        x = gelu_of(given, choice)
    else:
        x = layer_norm_of(given, *gain.chunk(2))  # type: ignore[union-attr]
    planes, totals, z_scale = run(
        emulated, "wide", given, None, left, right, form=form, gain=gain, choice=choice
    )
    z = z_of(planes, 6, left.shape[0] * right.shape[1])
    assert z_scale[:3].isnan().all() and not z[:3].any() and not totals[:3].any()
    assert torch.isfinite(x[3:]).all()
    check_fused(z[3:], z_scale[3:], x[3:], None, left, right)


def test_forms_are_built_for_any_factors_in_half_precision() -> None:
    made = list(library.lift_templates("hopper", ("sm_90a",), LIFT_KNOBS["hopper"]))
    any_factors = {(k.tokens, k.most_left, k.most_right) for k in LIFT_KNOBS["hopper"] if k.takes_any()}
    for form in ("layer", "gelu"):
        built = [t.function for t in made if t.function.op == f"lift_planes_{form}"]
        assert {(f.max_tokens, f.most_left, f.most_right) for f in built} == any_factors
        assert sorted(f.dtype for f in built) == sorted(["bf16", "f16"] * len(any_factors))
    assert {t.function.op for t in made} == set(LIFT_OPS)


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
