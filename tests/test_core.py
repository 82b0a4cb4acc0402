"""Formats, specs, packing and the reference ops."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liftc import ir, reference
from liftc.errors import FormatError, LiftcError
from liftc.format import LiftFormat
from liftc.packing import concatenate_packed, pack_signs, packed_rows, slice_packed, unpack_signs
from liftc.spec import Z_MAX, LiftSpec, transform_shape


def random_signs(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (rows, columns), generator=generator) * 2 - 1


def test_bits_round_to_the_nearest_32nd() -> None:
    fmt = LiftFormat.from_bits(2.4)
    assert (str(fmt), fmt.bit_width) == ("LQ-77/32", Fraction(77, 32))
    assert LiftFormat.parse("24/10") == LiftFormat.parse("LQ-24/10") == LiftFormat(24, 10)


@pytest.mark.parametrize("bits", [0, 0.5, 9, -1, float("nan"), float("inf")])
def test_rejects_bits_out_of_range(bits: float) -> None:
    with pytest.raises(FormatError, match="between 1 and 8"):
        LiftFormat.from_bits(bits)


@pytest.mark.parametrize("text", ["abc", "LQ-10/24", "LQ-0/0", "LQ-999/32", "LQ-33/4", "LQ-77", "77/32/1"])
def test_rejects_formats(text: str) -> None:
    with pytest.raises(FormatError):
        LiftFormat.parse(text)


@given(rows=st.integers(1, 100), columns=st.integers(0, 40), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_pack_round_trip(rows: int, columns: int, seed: int) -> None:
    signs = random_signs(rows, columns, seed)
    packed = pack_signs(signs)
    assert packed.shape == (packed_rows(rows), columns) and packed.dtype == torch.int32
    assert torch.equal(unpack_signs(packed, rows, torch.int64), signs)


def test_packed_bit_order_is_rows_from_the_least_significant() -> None:
    signs = -torch.ones(40, 2)
    signs[0, 0] = signs[31, 1] = signs[33, 0] = 1
    assert pack_signs(signs).tolist() == [[1, -(2**31)], [2, 0]]


@given(start=st.integers(0, 70), count=st.integers(1, 70))
@settings(max_examples=40, deadline=None)
def test_slice_packed_equals_packing_the_slice(start: int, count: int) -> None:
    signs = random_signs(140, 5)
    assert torch.equal(
        slice_packed(pack_signs(signs), start, start + count), pack_signs(signs[start : start + count])
    )


def test_concatenate_packed_refuses_ragged_parts() -> None:
    a, b = random_signs(64, 3), random_signs(5, 3)
    stacked = concatenate_packed([pack_signs(a), pack_signs(b)], [64, 5])
    assert torch.equal(stacked, pack_signs(torch.cat([a, b])))
    with pytest.raises(LiftcError, match="does not fill its words"):
        concatenate_packed([pack_signs(b), pack_signs(a)], [5, 64])


@pytest.mark.parametrize("features", [1, 7, 31, 32, 100, 384, 576, 1536, 4096, 11008, 28672])
@pytest.mark.parametrize("fmt", ["LQ-77/32", "LQ-24/10", "LQ-128/64", "LQ-3/1"])
def test_transform_shape_covers_with_little_padding(features: int, fmt: str) -> None:
    form = LiftFormat.parse(fmt)
    left, right = transform_shape(features, form)
    spec = LiftSpec(form, features, left, right)
    assert spec.padded_in_features - features < max(right, form.subspace_dim)
    assert Fraction(spec.lifted_features, spec.padded_in_features) == form.bit_width


def test_spec_refuses_sums_that_could_overflow() -> None:
    with pytest.raises(LiftcError, match="overflow"):
        LiftSpec(LiftFormat(128, 32), 65536, 512, 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [(), (1,), (7,), (2, 3), (0,)])
def test_both_orders_agree(dtype: torch.dtype, batch: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*batch, 70, generator=generator).to(dtype)
    left = torch.linalg.qr(torch.randn(3, 3, generator=generator))[0]
    right_inverse = torch.linalg.qr(torch.randn(24, 24, generator=generator))[0]
    mapping = torch.randn(8, 19, generator=generator)
    right = reference.decode_right(right_inverse, mapping)
    scale, activation = torch.rand(37, generator=generator), torch.rand(70, generator=generator) + 0.5
    packed = pack_signs(random_signs(37, 3 * 57))
    z, z_scale = ir.lift(x, activation, left, right)
    first = ir.sign_matmul(z, z_scale, packed, scale, torch.float32)
    second = reference.lifted_linear(x.float(), activation, left, right_inverse, mapping, packed, scale)
    assert first.shape == (*batch, 37)
    # Roundings of z of up to half a step, of random sign, added over 3 * 57 columns: six standard deviations.
    noise = 6 * 0.29 * (3 * 57) ** 0.5 * float(z_scale.max()) if z_scale.numel() else 0.0
    torch.testing.assert_close(first, second, atol=noise, rtol=1e-4)


def test_fixed_point_of_zero_and_non_finite_tokens() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, -2.0], [float("nan"), 1.0], [float("inf"), 1.0]])
    z, scale = reference.lift(x, None, torch.eye(1), torch.eye(2))
    assert (
        z.tolist()[:2] == [[0, 0], [7327, -14653]] and scale[0].item() == 0
    )  # 16383 / sqrt 5 and twice that
    assert z[2:].eq(0).all() and scale[2:].isnan().all()


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("features, rows, columns", [(64, 8, 10), (1024, 32, 77), (4096, 64, 154)])
def test_no_value_exceeds_the_bound(features: int, rows: int, columns: int, heavy: bool) -> None:
    g = torch.Generator().manual_seed(features)
    left, right = torch.randn(rows, rows, generator=g), torch.randn(features // rows, columns, generator=g)
    x = torch.randn(5, features, generator=g)
    if heavy:
        x *= torch.randn(5, features, generator=g).exp() ** 2
    row = torch.kron(left[rows // 2], right[:, columns // 2])  # the worst token for one row of T*
    x[0] = row
    real = reference.lift_real(x.double(), None, left.double(), right.double())
    assert (real.abs() <= reference.lift_scale(x, None, left, right) * (Z_MAX + 0.01)).all()
    bound = reference.lift_bound(left, right)
    norms = left.double().norm(dim=1)[:, None] * right.double().norm(dim=0)
    assert bound.double() >= norms.max() and float(bound) == pytest.approx(float(norms.max()), rel=1e-6)
    z, z_scale = reference.lift(x, None, left, right)
    assert int(z.abs().max()) <= Z_MAX and float((z - real / z_scale.double()).abs().max()) < 0.6


def test_lift_refuses_too_many_features() -> None:
    with pytest.raises(LiftcError, match="exceed the transform"):
        reference.lift(torch.zeros(1, 5), None, torch.eye(2), torch.eye(2))


def test_ops_survive_export_and_compile() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, packed: torch.Tensor,
                    scale: torch.Tensor) -> torch.Tensor:  # fmt: skip
            z, z_scale = ir.lift(x, None, left, right)
            return ir.sign_matmul(z, z_scale, packed, scale, torch.float32)

    args = (
        torch.randn(2, 8),
        torch.eye(2),
        torch.randn(4, 9),
        pack_signs(random_signs(5, 18)),
        torch.ones(5),
    )
    exported = torch.export.export(Layer(), args, strict=False)
    assert torch.equal(exported.module()(*args), Layer()(*args))
