"""The lift on warp-group products, run on the CPU by an emulator of wgmma and bulk copies, against liftc/reference.py.

What a GPU adds is in test_tiles_gpu.py.
"""

from __future__ import annotations

import functools
import re
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from emulated_kernels import Emulated
from hypothesis import given, settings
from hypothesis import strategies as st
from lift_launches import before_lift, check, check_fused, launch
from operand_layouts import group_planes, planes_of, z_of

from liftc.kernel_object import KernelFunction
from liftc.runtime.kernels import Kernels
from liftc.runtime.planes import GELUS, PlaneKernels, Source

pytest.importorskip("tvm", reason="kernels are built with TVM")
from liftc.codegen import (
    library,
    lift_device,
    lift_forms_device,
    tensorcore_device,
    warpgroup_lift,
    warpgroup_lift_device,
)
from liftc.codegen.build_cuda import tirx_source
from liftc.codegen.default_knobs import BINARY_KNOBS, GROUP_LIFT_KNOBS, LIFT_KNOBS
from liftc.codegen.knobs import GroupLiftKnobs

KNOBS = {
    "small": GroupLiftKnobs(2, tiles=1, most_left=64, most_right=64, trigger=1),
    "large": GroupLiftKnobs(4, most_left=128, most_right=96),
    "odd": GroupLiftKnobs(2, 3, most_left=64, copied=False, registers=168, trigger=2, dependent_launch=False),
}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
KERNELS = (
    ("small", "bfloat16"), ("small", "float16"), ("large", "bfloat16"), ("odd", "bfloat16"),
)  # fmt: skip
FUSED = (("small", "float16", "norm"), ("small", "bfloat16", "gate"))
SHAPES = (  # kernel, dtype, t1, t2, C, features
    ("small", "bfloat16", 9, 8, 9, 72), ("small", "bfloat16", 37, 56, 15, 1800), ("small", "float16", 64, 64, 28, 4096),
    ("small", "float16", 1, 8, 3, 8), ("large", "bfloat16", 70, 96, 59, 6600), ("large", "bfloat16", 16, 24, 26, 80),
    ("large", "bfloat16", 128, 88, 28, 11264), ("odd", "bfloat16", 40, 72, 131, 2872),
    ("odd", "bfloat16", 64, 128, 44, 8192), ("odd", "bfloat16", 5, 104, 46, 512),
)  # fmt: skip
WIDE_ENOUGH = 99 * 257
"""z of which both bytes are as planes are before a launch."""


LACKS = {
    "sums that are not awaited": r"liftc_group_wait_16_16\([^;]*raw_ptr[^;]*;",
    "products that are not committed": r"liftc_group_commit\(\);",
    "sums that the products do not see": r"liftc_group_fence_16\([^;]*;",
    "P' that the products do not see": r"liftc_fence_shared\(\);(?=\s*\w+cta_sync\(\);\s*part_ptr)",
    "P' that is not awaited": r"tvm_builtin_cuda_cta_sync\(\);(?=\s*part_ptr)",
    "x that is not awaited": r"liftc_barrier_await\([^;]*;",
    "a sum of z that is not awaited": r"tvm_builtin_cuda_cta_sync\(\);(?=\s*if \(\(\(int\)threadIdx.x\) == 0)",
}
"""Patterns of what is taken away from a kernel."""


@functools.cache
def generated_source() -> str:
    """The CUDA source of every kernel of these tests."""
    templates = []
    for name, dtype, form in (*((*kernel, "plain") for kernel in KERNELS), *FUSED):
        symbol = f"lift_{form}_{name}_{dtype}"
        make = functools.partial(warpgroup_lift.lift_planes_grouped, symbol, dtype, KNOBS[name], form)
        templates.append(library.KernelTemplate(KernelFunction(symbol, "lift_planes_grouped", ""), make))
    return tirx_source(templates)


def lacking(source: str) -> str:
    """The smallest kernel without one of LACKS after the other, lift_plain_0_bfloat16 and so on."""
    symbol = "lift_plain_small_bfloat16_kernel"
    defined = rf'extern "C" __global__ [^;{{]*\b{symbol}\([^)]*\) \{{.*?\n\}}\n'
    whole = re.search(defined, source, re.DOTALL)
    assert whole is not None
    kernels = ""
    for number, pattern in enumerate(LACKS.values()):
        kernel, found = re.subn(pattern, "", whole[0])
        assert found > 0, pattern
        kernels += kernel.replace(symbol, f"lift_plain_{number}_bfloat16_kernel")
    return kernels


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    source = generated_source()
    helpers = "".join(getattr(lift_device, name) for name in ("SPLIT", "WARP_SUM", "Z_SCALE"))
    helpers += lift_forms_device.FORMS + tensorcore_device.WARP_ADD
    helpers += warpgroup_lift_device.READ_X8 + warpgroup_lift_device.Z_WORDS
    for columns in sorted({16 * knobs.tiles for knobs in KNOBS.values()}):
        for text in (warpgroup_lift_device.STORE_MIXED, warpgroup_lift_device.STORE_GROUP_Z):
            helpers += warpgroup_lift_device.fill(text, columns)
    for op, numbers in sorted(set(re.findall(r"liftc_group_(mma|fence|wait)_([\d_]+)\(", source))):
        helpers += f"GROUP_{op.upper()}({numbers.replace('_', ', ')})\n"
    end = source.index("#include <tvm/ffi/c_api.h>")
    source = source[:end] + lacking(source) + source[end:]
    folder = tmp_path_factory.mktemp("emulated")
    return Emulated(folder, source, "cuda_group_lift_emulator.h", helpers)


@pytest.fixture(scope="module", params=[False, True], ids=["late", "early"])
def emulated(compiled: Emulated, request: pytest.FixtureRequest) -> Emulated:
    return compiled.landing(request.param)


def run(
    emulated: Emulated, name: str, x: torch.Tensor, in_scale: torch.Tensor | None, left: torch.Tensor,
    right: torch.Tensor, pieces: int = 4, columns: int = 0, kernel: str = "",
    form: str = "plain", gain: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Planes, sums of z and z_scale of one launch."""
    dtype = next(key for key, value in DTYPES.items() if value == x.dtype)
    knobs = KNOBS[name]
    emulated.library.begin_launch()
    made = launch(
        emulated, f"lift_{form}_{kernel or name}_{dtype}", knobs.threads(), len(x), 1,
        -(-right.shape[1] // knobs.columns()), x, in_scale, left, right, pieces, gain, columns,
    )  # fmt: skip
    assert knobs.shared_bytes(form) - 16 < emulated.library.shared_bytes_used() <= knobs.shared_bytes(form)
    return made


def operands(t1: int, t2: int, lifted: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(t1 * t2 + lifted)
    return torch.randn(t1, t1, generator=g), torch.randn(t2, lifted, generator=g)


@pytest.mark.parametrize("name, dtype, t1, t2, lifted, features", SHAPES)
@pytest.mark.parametrize("scaled", [True, False])
def test_z_is_within_one_step(
    emulated: Emulated, name: str, dtype: str, t1: int, t2: int, lifted: int, features: int, scaled: bool
) -> None:
    g = torch.Generator().manual_seed(features)
    left, right = operands(t1, t2, lifted)
    pieces = 16 if scaled else 4
    x = torch.randn(2, features, generator=g).to(DTYPES[dtype])
    in_scale = torch.rand(features, generator=g) + 0.5 if scaled else None
    planes, totals, z_scale = run(emulated, name, x, in_scale, left, right, pieces, columns=6)
    z = z_of(planes, 2, t1 * lifted)
    check(z, z_scale, x, in_scale, left, right)
    assert torch.equal(totals, z.sum(1, dtype=torch.int32))
    padded = torch.nn.functional.pad(z.int(), (0, -z.shape[1] % 256), value=WIDE_ENOUGH)
    laid_out = group_planes(padded, 6) if pieces == 16 else planes_of(padded, 6)
    assert torch.equal(planes, laid_out), "what is not z stays as it was"


@pytest.mark.parametrize("name, dtype", [("small", "float16"), ("large", "bfloat16"), ("odd", "bfloat16")])
@pytest.mark.parametrize("scaled", [True, False])
def test_tokens_that_are_not_finite_or_next_to_nothing(
    emulated: Emulated, name: str, dtype: str, scaled: bool
) -> None:
    left, right = operands(19, 24, 29)
    x = torch.randn(4, 440, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])
    x[0], x[1, 439], x[2, 7] = 0.0, -torch.inf, torch.nan
    in_scale = torch.full((440,), 1.5) if scaled else None
    planes, totals, z_scale = run(emulated, name, x, in_scale, left, right)
    z = z_of(planes, 4, 19 * 29)
    assert not z[:3].any() and z[3].any() and not totals[:3].any()
    assert not z_scale[0].any() and z_scale[1:3].isnan().all() and z_scale[3] > 0
    check(z, z_scale, x, in_scale, left, right)


@pytest.mark.parametrize("name, dtype, form", FUSED)
@pytest.mark.parametrize("scaled", [True, False])
def test_fused_forms_lift_what_separate_operations_make(
    emulated: Emulated, name: str, dtype: str, form: str, scaled: bool
) -> None:
    left, right = operands(22, 48, 29)
    features, g = 1000, torch.Generator().manual_seed(7)
    given, gain, x = before_lift(2, features, form, DTYPES[dtype], g)
    in_scale = torch.rand(features, generator=g) + 0.5 if scaled else None
    planes, totals, z_scale = run(emulated, name, given, in_scale, left, right, 16, form=form, gain=gain)
    z = z_of(planes, 2, 22 * 29)
    check_fused(z, z_scale, x, in_scale, left, right)
    assert torch.equal(totals, z.sum(1, dtype=torch.int32))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_every_column_is_stored_once(emulated: Emulated, data: st.DataObject) -> None:
    """Rows of T* x begin and end anywhere in words, blocks and pieces of planes."""
    name = data.draw(st.sampled_from(["small", "odd"]))
    t1, t2 = data.draw(st.integers(1, 18)), data.draw(st.sampled_from([8, 16, 40]))
    lifted = data.draw(st.integers(1, 2 * KNOBS[name].columns() + 3))
    features = data.draw(st.integers(1, t1 * t2 // 8)) * 8
    left, right = operands(t1, t2, lifted)
    x = torch.randn(1, features, generator=torch.Generator().manual_seed(features)).to(torch.bfloat16)
    z = []
    for pieces in (4, 16):
        planes, totals, z_scale = run(emulated, name, x, None, left, right, pieces)
        z.append(z_of(planes, 1, t1 * lifted))
        assert torch.equal(totals, z[-1].sum(1, dtype=torch.int32))
    check(z[0], z_scale, x, None, left, right)
    assert torch.equal(*z)


def test_the_emulator_sees_what_a_kernel_lacks(compiled: Emulated) -> None:
    late = compiled.landing(early=False)
    left, right = operands(37, 56, 15)
    x = torch.randn(1, 1800, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    planes, totals, z_scale = run(late, "small", x, None, left, right)
    z = z_of(planes, 1, 37 * 15)
    check(z, z_scale, x, None, left, right)
    assert torch.equal(totals, z.sum(1, dtype=torch.int32))
    for number, lack in enumerate(LACKS):
        others, other_totals, _ = run(late, "small", x, None, left, right, kernel=f"{number}")
        assert not (torch.equal(planes, others) and torch.equal(totals, other_totals)), lack


Calls = list[tuple[KernelFunction, tuple[object, ...]]]


@pytest.fixture
def library_planes(monkeypatch: pytest.MonkeyPatch) -> tuple[PlaneKernels, Calls]:
    """Planes of the kernels of an object for sm_90a, and their calls, which do nothing."""
    hopper = ("hopper", ("sm_90a",))
    templates = [
        *library.lift_templates(*hopper, LIFT_KNOBS["hopper"]),
        *library.group_lift_templates(*hopper, GROUP_LIFT_KNOBS["hopper"]),
        *library.binary_templates(*hopper, BINARY_KNOBS["hopper"]),
        *library.fixed_templates(*hopper),
    ]
    functions = [template.function for template in templates]
    assert len({f.symbol for f in functions}) == len(functions)
    calls: Calls = []
    callables = {f.symbol: lambda *arguments, f=f: calls.append((f, arguments)) for f in functions}
    kernels = SimpleNamespace(functions=callables, of=lambda op: [f for f in functions if f.op == op])
    products = tuple(f for f in functions if f.op == "sign_matmul_binary")
    monkeypatch.setattr(PlaneKernels, "_processors_of", lambda self, device: 132)
    return PlaneKernels(cast(Kernels, kernels), products), calls


def test_the_runtime_prefers_lifts_on_warp_groups(library_planes: tuple[PlaneKernels, Calls]) -> None:
    """Of the kernels of one object: by tokens, then by factors, then these before others, with their own grid."""
    planes, calls = library_planes
    for tokens, t1, t2, lifted, want in (
        (1, 64, 64, 40, ""), (2, 64, 128, 40, ""), (2, 65, 64, 40, "4_128x128"), (4, 128, 200, 60, "4_128x224"),
        (4, 129, 64, 40, ""), (5, 64, 64, 29, "8_64x64"), (8, 64, 72, 28, "8_64x128"), (6, 100, 128, 90, "8_128x128"),
        (16, 40, 128, 45, "16_64x128"), (9, 65, 128, 77, "16_128x128"), (16, 65, 224, 1, "16_128x224"),
        (16, 65, 232, 8, ""),
    ):  # fmt: skip
        left, right = operands(t1, t2, lifted)
        assert planes.lift(torch.ones(tokens, t1 * t2, dtype=torch.bfloat16), None, left, right) is not None
        function, arguments = calls.pop()
        assert function.op == ("lift_planes_grouped" if want else "lift_planes")
        smallest = planes.lift_for(tokens, torch.bfloat16)
        assert smallest is not None and smallest.max_tokens >= tokens
        if want:
            assert function.symbol == f"lift_planes_grouped_hopper_bf16_{want}"
            blocks = -(-lifted // function.block_columns)
            assert arguments[10:] == (blocks * tokens, 1, t1, t2, lifted, 0)
            assert cast(torch.Tensor, arguments[7]).shape == (blocks, tokens)


def test_the_runtime_passes_layer_norms_and_gelus(library_planes: tuple[PlaneKernels, Calls]) -> None:
    planes, calls = library_planes
    left, right = operands(40, 64, 29)
    x = torch.ones(3, 2560, dtype=torch.bfloat16)
    both = torch.rand(5120).to(torch.bfloat16)
    assert planes.lift(x, None, left, right, Source("lift_planes_layer", both, 1e-6)) is not None
    function, arguments = calls.pop()
    assert function.op == "lift_planes_layer" and (arguments[9], arguments[15]) == (1e-6, 0)
    assert torch.equal(cast(torch.Tensor, arguments[1]), both)
    large, _ = operands(200, 64, 29)
    for choice, width in enumerate((25600, 25600, 12800, 12800)):
        given = torch.ones(3, width, dtype=torch.bfloat16)
        assert planes.lift(given, None, large, right, Source("lift_planes_gelu", choice=choice)) is not None
        function, arguments = calls.pop()
        assert function.op == "lift_planes_gelu" and arguments[15] == choice


@pytest.mark.parametrize("tokens, t1", [(1, 40), (1, 100), (4, 128), (8, 40), (16, 90)])
def test_a_gelu_stays_where_a_lift_of_x_is_made_for_such_factors(
    library_planes: tuple[PlaneKernels, Calls], tokens: int, t1: int
) -> None:
    planes, calls = library_planes
    left, right = operands(t1, 64, 29)
    given = torch.ones(tokens, t1 * 64, dtype=torch.bfloat16)
    assert planes.lift(given, None, left, right, GELUS[2]) is None and not calls
    assert planes.lift(given, None, left, right) is not None
    gain = torch.ones(t1 * 64, dtype=torch.bfloat16)
    assert planes.lift(given, None, left, right, Source("lift_planes_layer", gain, 1e-6, 1)) is not None


@pytest.mark.parametrize(
    "source, width, dtype",
    [
        (Source("lift_planes_layer", torch.ones(2560, dtype=torch.bfloat16)), 2560, torch.bfloat16),
        (Source("lift_planes_layer", torch.ones(2, 2560, dtype=torch.bfloat16)), 2560, torch.bfloat16),
        (Source("lift_planes_layer", torch.ones(5120, dtype=torch.float16)), 2560, torch.bfloat16),
        (Source("lift_planes_layer", torch.ones(5120)), 2560, torch.float32),
        (Source("lift_planes_layer"), 2560, torch.bfloat16),
        (Source("lift_planes_norm", torch.ones(5120, dtype=torch.bfloat16)), 2560, torch.bfloat16),
        (Source("lift_planes_norm"), 2560, torch.bfloat16),
        (Source("lift_planes_gelu", choice=4), 2560, torch.bfloat16),
        (Source("lift_planes_gelu", choice=-1), 2560, torch.bfloat16),
        (Source("lift_planes_gelu", choice=2), 2560, torch.float32),
        (Source("lift_planes_gelu", choice=2), 5120, torch.bfloat16),
        (Source("lift_planes_gelu", torch.ones(2560, dtype=torch.bfloat16), choice=2), 2560, torch.bfloat16),
        (Source("lift_planes_gelu"), 2561, torch.bfloat16),
        (Source("lift_planes_gate"), 2561, torch.bfloat16),
    ],
)
def test_the_runtime_leaves_what_no_form_takes(
    library_planes: tuple[PlaneKernels, Calls], source: Source, width: int, dtype: torch.dtype
) -> None:
    planes, calls = library_planes
    left, right = operands(40, 64, 29)
    assert planes.lift(torch.ones(3, width, dtype=dtype), None, left, right, source) is None and not calls
