"""CPU kernels against liftc/reference.py: exactness, shapes, dtypes, strides, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from liftc import ir, reference
from liftc.errors import LiftcError
from liftc.format import LiftFormat
from liftc.packing import pack_signs, unpack_signs
from liftc.runtime import weight_first
from liftc.runtime.kernels import Kernels, load_kernels
from liftc.runtime.ops import WEIGHT_FIRST_TOKENS, register
from liftc.spec import Z_MAX, transform_shape

pytest.importorskip("tvm", reason="kernels are built with TVM")
from built_kernels import OTHER_LEVEL, cpu_object
from operand_layouts import halves, linear_factors

from liftc.codegen.build import native_cpu_level

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEADS = ((0,), (1,), (7,), (1, 1), (1, 1, 1), (1, 7), (2, 3), (5, 1), (2, 1, 3), (1, 0))
LIFTS = (
    (576, LiftFormat(77, 32)), (70, LiftFormat(19, 8)), (33, LiftFormat(24, 10)), (5, LiftFormat(1, 1)),
    (130, LiftFormat(150, 64)),
)  # fmt: skip


@pytest.fixture(scope="module", params=["native", "other"])
def loaded(request: pytest.FixtureRequest) -> Kernels:
    level = native_cpu_level() if request.param == "native" else OTHER_LEVEL
    kernels = load_kernels(cpu_object(level), CPU)
    kernels.set_num_threads(2)
    return kernels


@pytest.fixture
def kernels(loaded: Kernels) -> Iterator[Kernels]:
    register(loaded)
    yield loaded
    for op in ("lift", "sign_matmul", "lifted_linear"):
        ir.unregister_kernel(op, "cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sign_operands(
    lead: tuple[int, ...], rows: int, columns: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = generator(seed)
    z = torch.randint(-Z_MAX, Z_MAX + 1, (*lead, columns), generator=g).to(torch.int16)
    packed = pack_signs(torch.randn(rows, columns, generator=g))
    return z, torch.rand(*lead, 1, generator=g), packed, torch.rand(rows, generator=g)


def lift_operands(
    lead: tuple[int, ...], in_features: int, fmt: LiftFormat, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = generator(in_features)
    t1, t2 = transform_shape(in_features, fmt)
    right = torch.randn(t2, t2 // fmt.subspace_dim * fmt.lifted_dim, generator=g)
    x = torch.randn(*lead, in_features, generator=g).to(dtype)
    return x, torch.rand(in_features, generator=g) + 0.5, torch.randn(t1, t1, generator=g), right


def as_double(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.double() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, columns", [(576, 1386), (33, 7), (1, 1), (100, 129), (31, 513), (64, 2)])
def test_sign_matmul_is_bit_identical_for_every_shape(
    kernels: Kernels, rows: int, columns: int, dtype: torch.dtype
) -> None:
    for lead in LEADS:
        operands = sign_operands(lead, rows, columns)
        got = ir.sign_matmul(*operands, dtype)
        assert torch.equal(got, reference.sign_matmul(*operands, dtype)), lead


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 9), st.integers(1, 140), st.integers(1, 300), st.sampled_from(DTYPES), st.integers(0, 99)
)
def test_sign_matmul_property(
    kernels: Kernels, tokens: int, rows: int, columns: int, dtype: torch.dtype, seed: int
) -> None:
    operands = sign_operands((tokens,), rows, columns, seed)
    assert torch.equal(ir.sign_matmul(*operands, dtype), reference.sign_matmul(*operands, dtype))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("z_value", [Z_MAX, -Z_MAX])
def test_largest_sums_do_not_wrap(kernels: Kernels, sign: int, z_value: int) -> None:
    columns = 131072  # 2^17, where the largest sum is 2^31 - 2^17
    z = torch.full((1, 1, columns), z_value, dtype=torch.int16)
    signs = torch.full((33, columns), sign)
    signs[1, ::2] *= -1  # and one that cancels
    got = ir.sign_matmul(z, torch.ones(1, 1, 1), pack_signs(signs), torch.ones(33), torch.float32)
    assert got[0, 0, 0].item() == float(torch.tensor(columns * Z_MAX).float()) * sign * (
        1 if z_value > 0 else -1
    )
    assert got[0, 0, 1].item() == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_pass_through(kernels: Kernels, dtype: torch.dtype) -> None:
    z, z_scale, packed, scale = sign_operands((2, 3), 70, 40)
    z_scale[0, 1] = torch.nan
    z_scale[1, 2] = 1e38
    scale[3] = 0.0
    scale[4] = torch.inf
    scale[5] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # the NaN of all ones
    got = ir.sign_matmul(z, z_scale, packed, scale, dtype)
    torch.testing.assert_close(
        got, reference.sign_matmul(z, z_scale, packed, scale, dtype), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features, fmt", LIFTS)
def test_lift_is_within_one_step_of_the_exact_value(
    kernels: Kernels, in_features: int, fmt: LiftFormat, dtype: torch.dtype
) -> None:
    for lead in LEADS:
        x, scale, left, right = lift_operands(lead, in_features, fmt, dtype)
        for used in (scale, None):
            z, z_scale = ir.lift(x, used, left, right)
            exact = reference.lift_real(
                *as_double(x), None if used is None else used.double(), *as_double(left, right)
            )
            assert z.dtype == torch.int16 and z.shape == exact.shape and z_scale.shape == (*lead, 1)
            if z.numel():
                step = reference.lift_scale(x, used, left, right)
                torch.testing.assert_close(z_scale, step, rtol=2e-6, atol=0)
                error = (z - exact / z_scale.double()).abs()
                assert float(error.max()) < 0.6  # rounding is 0.5, the rest is float32 arithmetic


def test_lift_of_zero_infinite_and_tiny_tokens(kernels: Kernels) -> None:
    x, scale, left, right = lift_operands((6,), 70, LiftFormat(19, 8), torch.float32)
    x[0] = 0.0
    x[1, 5] = torch.nan
    x[2, 69] = -torch.inf
    x[3] *= 1e-25  # squares that vanish
    x[4] *= 1e15
    z, z_scale = ir.lift(x, scale, left, right)
    want, want_scale = reference.lift(x, scale, left, right)
    assert not z[:4].any() and not z_scale[[0, 3]].any() and z_scale[1:3].isnan().all()
    assert z[4].any() and ir.lift(x * 1e22, scale, left, right)[1][4:].isnan().all()
    assert int((z[4:].int() - want[4:].int()).abs().max()) <= 1
    torch.testing.assert_close(z_scale, want_scale, rtol=1e-5, atol=0, equal_nan=True)


def test_lift_rounds_half_to_even(kernels: Kernels) -> None:
    x, right = halves()
    z, z_scale = ir.lift(x, None, torch.eye(1), right)
    assert z.tolist() == [[0, 2, 2, 0, -2, -2, 6, 2, 1024]] and z_scale.item() == 8.0


def test_lift_keeps_up_with_changed_factors(kernels: Kernels) -> None:
    x, right = halves()
    left = torch.eye(1)
    assert ir.lift(x, None, left, right)[1].item() == 8.0
    right *= 2.0
    assert ir.lift(x, None, left, right)[1].item() == 16.0
    assert ir.lift(x, None, left, right / 4.0)[1].item() == 4.0
    left *= 0.5
    assert ir.lift(x, None, left, right)[1].item() == 8.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 7, WEIGHT_FIRST_TOKENS["cpu"], WEIGHT_FIRST_TOKENS["cpu"] + 5])
def test_lifted_linear_matches_in_both_orders(kernels: Kernels, tokens: int, dtype: torch.dtype) -> None:
    for in_features, fmt in LIFTS:
        x, scale, _, _ = lift_operands((1, tokens), in_features, fmt, dtype)
        factors, columns = linear_factors(in_features, fmt)
        rows = 77
        _, _, packed, out_scale = sign_operands((1,), rows, columns)
        for used in (scale, None):
            got = ir.lifted_linear(x, used, *factors, packed, out_scale)
            exact = reference.lifted_linear(
                x.double(),
                None if used is None else used.double(),
                *as_double(*factors),
                packed,
                out_scale.double(),
            )
            assert got.dtype == dtype and got.shape == (1, tokens, rows)
            lifted = 0 < tokens < WEIGHT_FIRST_TOKENS["cpu"]  # z is rounded
            bound = (3e-3 if lifted else 1e-4) if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(
                got.double(), exact, rtol=bound, atol=bound * float(exact.abs().max()) if tokens else 1
            )


def test_lifted_linear_works_in_row_chunks(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = LiftFormat(19, 8)
    x, scale, _, _ = lift_operands((1, WEIGHT_FIRST_TOKENS["cpu"] + 3), 70, fmt, torch.float32)
    factors, columns = linear_factors(70, fmt)
    _, _, packed, out_scale = sign_operands((1,), 151, columns)
    whole = ir.lifted_linear(x, scale, *factors, packed, out_scale)
    monkeypatch.setitem(weight_first.DECODED_BYTES, "cpu", 1)  # the smallest chunk: 32 rows
    torch.testing.assert_close(ir.lifted_linear(x, scale, *factors, packed, out_scale), whole)


def test_long_calls_are_split(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    from liftc.runtime import ops

    monkeypatch.setattr(ops, "_MAX_GRID", 3)
    register(kernels)
    operands = sign_operands((2, 5), 40, 50)
    assert torch.equal(
        ir.sign_matmul(*operands, torch.float32), reference.sign_matmul(*operands, torch.float32)
    )
    x, scale, left, right = lift_operands((2, 5), 70, LiftFormat(19, 8), torch.float32)
    z, z_scale = ir.lift(x, scale, left, right)
    parts = [ir.lift(x.view(10, 70)[i : i + 1], scale, left, right) for i in range(10)]
    assert torch.equal(z.view(10, -1), torch.cat([p[0] for p in parts]))
    assert torch.equal(z_scale.view(10, 1), torch.cat([p[1] for p in parts]))


def test_strided_and_misaligned_inputs(kernels: Kernels) -> None:
    fmt = LiftFormat(77, 32)
    x, scale, left, right = lift_operands((1, 9), 576, fmt, torch.float32)
    odd = torch.empty(577 * 9 + 1)[1:][: 576 * 9].view(1, 9, 576).copy_(x)  # 4 bytes off any vector width
    whole = ir.lift(x, scale, left, right)
    last = ir.lift(x[:, -1:], scale, left, right)
    assert torch.equal(last[0], whole[0][:, -1:])
    for view in (odd, x.transpose(0, 1).contiguous().transpose(0, 1), x.repeat(1, 1, 2)[..., :576]):
        assert torch.equal(ir.lift(view, scale, left, right)[0], whole[0])
    assert torch.equal(ir.lift(x, scale, left.t().contiguous().t(), right)[0], whole[0])
    z, z_scale, packed, out_scale = sign_operands((1, 9), 70, 99)
    want = reference.sign_matmul(z, z_scale, packed, out_scale, torch.float32)
    for a, b in (
        (z.repeat(1, 1, 2)[..., :99], packed), (z, packed.t().contiguous().t()),
        (torch.empty(9 * 99 + 1, dtype=torch.int16)[1:].view(1, 9, 99).copy_(z), packed),
        (z, torch.empty(packed.numel() + 1, dtype=torch.int32)[1:].view_as(packed).copy_(packed)),
    ):  # fmt: skip
        assert torch.equal(ir.sign_matmul(a, z_scale, b, out_scale, torch.float32), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpack_signs_kernel(kernels: Kernels, dtype: torch.dtype) -> None:
    name = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    for rows, columns in ((576, 1386), (33, 7), (1, 1), (100, 129)):
        packed = pack_signs(torch.randn(rows, columns, generator=generator()))
        out = torch.full((rows, columns), 3.0, dtype=dtype)
        kernels.functions[f"unpack_signs_{name}"](packed, out)
        assert torch.equal(out, unpack_signs(packed, rows, dtype))


def test_misuse_is_one_sentence(kernels: Kernels) -> None:
    x, scale, left, right = lift_operands((1, 2), 70, LiftFormat(19, 8), torch.float32)
    z, z_scale, packed, out_scale = sign_operands((1, 2), 40, 50)
    ir_lift, ir_sign = ir.lift, ir.sign_matmul
    factors, columns = linear_factors(70, LiftFormat(19, 8))
    signs = sign_operands((1,), 40, columns)[2]
    good = (scale, *factors, signs, out_scale)
    assert ir.lifted_linear(x.repeat(1, 150, 1), *good).shape == (1, 300, 40)
    wrong = (
        (scale[:-1], *good[1:]), (scale, factors[0][:-1], *good[2:]), (*good[:2], factors[1].half(), *good[3:]),
        (*good[:3], factors[2][:7], *good[4:]), (*good[:4], packed, out_scale), (*good[:4], signs.long(), out_scale),
        (*good[:5], out_scale[:30]), (*good[:5], out_scale.half()), (scale, torch.eye(2), *good[2:]),
    )  # fmt: skip
    calls = [
        lambda: ir_lift(torch.randn(1, 2, 700), None, left, right),
        lambda: ir_lift(x, scale[:-1], left, right),
        lambda: ir_lift(x.double(), scale, left, right),
        lambda: ir_lift(x, scale, left.double(), right),
        lambda: ir_lift(x, scale, left[:-1], right),
        lambda: ir_lift(x, scale, left[0], right),
        lambda: ir_sign(z, z_scale, packed[:1], out_scale, torch.float32),
        lambda: ir_sign(z, z_scale, packed, out_scale[:20], torch.float32),
        lambda: ir_sign(z, z_scale, packed[:, :-1], out_scale, torch.float32),
        lambda: ir_sign(z, z_scale, packed.long(), out_scale, torch.float32),
        lambda: ir_sign(z.int(), z_scale, packed, out_scale, torch.float32),
        lambda: ir_sign(z, z_scale[:, :1], packed, out_scale, torch.float32),
        lambda: ir_sign(z, z_scale, packed, out_scale, torch.int32),
        lambda: ir_sign(z, z_scale, packed, out_scale.half(), torch.float32),
        *(partial(ir.lifted_linear, x.repeat(1, 150, 1), *operands) for operands in wrong),
        lambda: ir.lifted_linear(x, scale, *factors[:2], factors[2][:0], packed, out_scale),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(LiftcError) as caught:
            call()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
