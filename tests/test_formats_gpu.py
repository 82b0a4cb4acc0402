"""Every kind of format and adversarial tokens on a GPU: lift, product and whole calls against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from operand_layouts import linear_factors, z_of
from test_kernels_gpu import allowed_error, doubles, loaded, sign_operands  # noqa: F401

from liftc import ir, reference
from liftc.format import LiftFormat
from liftc.runtime.kernels import Kernels
from liftc.runtime.ops import WEIGHT_FIRST_TOKENS, Ops, register
from liftc.runtime.planes import Planes
from liftc.spec import transform_shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FORMATS = (
    "32/32", "48/32", "64/32", "77/32", "96/32", "128/32", "8/8", "24/8", "24/10", "16/16", "40/16", "61/24",
    "64/64", "150/64",
)  # fmt: skip
FEATURES, ROWS = 1920, 200  # a multiple of every subspace dimension


@pytest.fixture
def ops(loaded: Kernels) -> Iterator[Ops]:  # noqa: F811
    ops = register(loaded)
    if not ops.tiles.available:
        pytest.skip("the object has no tensor-core kernels for this GPU")
    yield ops
    for op in ("lift", "sign_matmul", "lifted_linear"):
        ir.unregister_kernel(op, "cuda")


def adversarial(dtype: torch.dtype) -> torch.Tensor:
    """Tokens (9, FEATURES) that stress sums and the step of z; as large and as small as float16 allows there."""
    g = torch.Generator("cuda").manual_seed(3)
    x = torch.randn(9, FEATURES, generator=g, device="cuda")
    large, small = (2.0**4, 2.0**-10) if dtype == torch.float16 else (2.0**50, 2.0**-40)
    x[1] = 1.0
    x[2] = 1.0
    x[2, ::2] = -1.0
    x[3, 77] = 2.0**12  # one massive entry
    x[4] = 0.0
    x[4, FEATURES - 1] = 3.0
    x[5] *= large
    x[6] *= small
    x[7] = 0.0
    x[8] = x[8].sign() * x[8].abs().pow(6).clamp_max(2.0**14)  # heavy tails
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", FORMATS)
def test_lift_and_product_of_adversarial_tokens(ops: Ops, text: str, dtype: torch.dtype) -> None:
    """z within .75 of a step of float64 however it was made, and its products exact, in tiles and packed."""
    x = adversarial(dtype)
    factors, columns = linear_factors(FEATURES, LiftFormat.parse(text))
    left, right = factors[0].cuda(), reference.decode_right(*(f.cuda() for f in factors[1:]))
    packed, scale = sign_operands((1,), ROWS, columns)[2:]
    tiles = ops.tiles.from_packed(packed, ROWS)
    for part in (x, x[3:4], x[5:8]):
        real, step = (
            reference.lift_real(*doubles(part, None, left, right)),
            reference.lift_scale(part, None, left, right),
        )
        for planes_too in (True, False):
            made, z_scale = (ops.lift_operands if planes_too else ops.lift)(part, None, left, right)
            z = z_of(made.data, len(part), columns) if isinstance(made, Planes) else made
            torch.testing.assert_close(z_scale, step, rtol=1e-5, atol=0)
            assert ((z * z_scale.double() - real).abs() <= 0.75 * step).all()
            want = reference.sign_matmul(z, z_scale, packed, scale, torch.float32)
            assert torch.equal(ops.tiles.sign_matmul(made, z_scale, tiles, scale, torch.float32), want)
            assert torch.equal(ir.sign_matmul(z, z_scale, packed, scale, torch.float32), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 8, 9, 16])
@pytest.mark.parametrize("features", [4096, 5120, 8192, 11008, 13824, 14336, 28672])
def test_lifts_of_models(ops: Ops, features: int, tokens: int, dtype: torch.dtype) -> None:
    """Each form of the lift on factors of real models: within .75 of a step of float64, the same in every run, and read
    by the product as it was made."""
    fmt = LiftFormat(77, 32)
    t1, t2 = transform_shape(features, fmt)
    columns = t1 * (t2 // 32 * 77)
    g = torch.Generator("cuda").manual_seed(features + tokens)
    left = torch.randn(t1, t1, generator=g, device="cuda") / t1**0.5
    right = torch.randn(t2, columns // t1, generator=g, device="cuda") / t2**0.5
    x = torch.randn(tokens, features, generator=g, device="cuda").to(dtype)
    real = reference.lift_real(*doubles(x, None, left, right))
    step = reference.lift_scale(x, None, left, right)
    packed, scale = sign_operands((1,), 48, columns)[2:]
    tiles = ops.tiles.from_packed(packed, 48)
    first = None
    for _ in range(6):
        made, z_scale = ops.lift_operands(x, None, left, right)
        assert isinstance(made, Planes)
        z = z_of(made.data, tokens, columns)
        first = z if first is None else first
        assert torch.equal(z, first)
        y = ops.tiles.sign_matmul(made, z_scale, tiles, scale, torch.float32)
        assert torch.equal(y, reference.sign_matmul(z, z_scale, packed, scale, torch.float32))
    torch.testing.assert_close(z_scale, step, rtol=1e-5, atol=0)
    assert ((first * z_scale.double() - real).abs() <= 0.75 * step).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", FORMATS)
def test_whole_calls(ops: Ops, text: str, dtype: torch.dtype) -> None:
    """lifted_linear of one token, two launches and weight first, on tiles and packed signs."""
    factors, columns = linear_factors(FEATURES, LiftFormat.parse(text))
    factors = [f.cuda() for f in factors]
    packed, scale = sign_operands((1,), ROWS, columns)[2:]
    many = torch.randn(
        WEIGHT_FIRST_TOKENS["cuda"] + 3, FEATURES, generator=torch.Generator("cuda").manual_seed(5), device="cuda"
    ).to(dtype)  # fmt: skip
    many[1] = 1.0
    many[2, ::2] = -many[2, ::2].abs()
    for signs in (ops.tiles.from_packed(packed, ROWS), packed):
        for x in (many[:1], many[:19], many):
            got = ir.lifted_linear(x, None, *factors, signs, scale)
            exact = reference.lifted_linear(*doubles(x, None, *factors), packed, scale.double())
            assert got.dtype == dtype
            assert ((got.double() - exact).abs() <= allowed_error(x, None, factors, scale, exact)).all()
