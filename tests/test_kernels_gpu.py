"""CUDA kernels against liftc/reference.py on a GPU.

Uses build/kernels/cuda-*.so (with its .json) where there is one, which needs torch and tvm_ffi only; otherwise
builds for the GPU at hand, which needs TVM and nvcc.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from operand_layouts import halves, linear_factors

from liftc import ir, reference
from liftc.errors import LiftcError
from liftc.format import LiftFormat
from liftc.packing import pack_signs, unpack_signs
from liftc.runtime.kernels import Kernels, load_kernels
from liftc.runtime.ops import WEIGHT_FIRST_TOKENS, register
from liftc.spec import Z_MAX, transform_shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
LEADS = ((0,), (1,), (7,), (1, 1, 1), (1, 7), (2, 3), (5, 1), (1, 0), (1, 130))
SHAPES = ((576, 1386), (33, 7), (1, 1), (100, 129), (31, 513), (64, 2), (4096, 9856), (28672, 154))
LIFTS = (
    (576, LiftFormat(77, 32)), (70, LiftFormat(19, 8)), (33, LiftFormat(24, 10)), (5, LiftFormat(1, 1)),
    (130, LiftFormat(150, 64)), (8192, LiftFormat(77, 32)),
)  # fmt: skip


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    device = torch.device("cuda")
    built = sorted(Path("build/kernels").glob("cuda-*.so"))
    if not built:
        pytest.importorskip("tvm", reason="no build/kernels/cuda-*.so, and no TVM to build one")
        from liftc.codegen.build import build

        major, minor = torch.cuda.get_device_capability(device)
        out = tmp_path_factory.mktemp("artifact")
        built = [build("cuda", (f"sm_{major}{minor}",), out).path]
    return load_kernels(built[0], device)


@pytest.fixture(autouse=True)
def kernels(loaded: Kernels) -> Iterator[Kernels]:
    register(loaded)
    yield loaded
    for op in ("lift", "sign_matmul", "lifted_linear"):
        ir.unregister_kernel(op, "cuda")


@functools.lru_cache(maxsize=4)
def random_signs(rows: int, columns: int) -> torch.Tensor:
    """Packed signs on the GPU."""
    g = torch.Generator("cuda").manual_seed(rows + columns)
    return pack_signs(torch.randn(rows, columns, generator=g, device="cuda"))


def sign_operands(lead: tuple[int, ...], rows: int, columns: int) -> list[torch.Tensor]:
    """z, z_scale, packed and output_scale on the GPU."""
    g = torch.Generator("cuda").manual_seed(rows + columns)
    z = torch.randint(-Z_MAX, Z_MAX + 1, (*lead, columns), generator=g, device="cuda").to(torch.int16)
    scales = [torch.rand(shape, generator=g, device="cuda") for shape in ((*lead, 1), (rows,))]
    return [z, scales[0], random_signs(rows, columns), scales[1]]


def lift_operands(lead: tuple[int, ...], in_features: int, fmt: LiftFormat) -> list[torch.Tensor]:
    """x, activation_scale, left and right on the GPU."""
    g = torch.Generator("cuda").manual_seed(in_features)
    t1, t2 = transform_shape(in_features, fmt)
    shapes = ((t2, t2 // fmt.subspace_dim * fmt.lifted_dim), (*lead, in_features), (t1, t1))
    right, x, left = (torch.randn(shape, generator=g, device="cuda") for shape in shapes)
    return [x, torch.rand(in_features, generator=g, device="cuda") + 0.5, left, right]


def doubles(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """In float64, in which the references work on the GPU too: sums of signs and z are exact."""
    return [None if t is None else t.double() for t in tensors]


def allowed_error(
    x: torch.Tensor, scale: torch.Tensor | None, factors: list[torch.Tensor], out_scale: torch.Tensor,
    exact: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """What lifted_linear may be away from the exact result, (..., OC) float64.

    Few tokens: K roundings of z by up to half a step (.7 with float32 sums), each of either sign, add up to more than
    2.5 sqrt(K) steps with a chance of 1e-10, to more than .7 K never; a step is lift_scale (docs/method.md). Then the
    rounding of the result, and three of float32. Many: products in float32, or in halves with a few roundings.
    """
    eps = torch.finfo(x.dtype).eps
    if x.shape[:-1].numel() >= WEIGHT_FIRST_TOKENS["cuda"]:
        return (1e-5 if x.dtype == torch.float32 else 4 * eps) * (exact.abs() + exact.abs().max())
    left, right_inverse, mapping = factors
    right = reference.decode_right(right_inverse, mapping)
    columns = left.shape[0] * right.shape[1]
    step = reference.lift_scale(x, scale, left, right).double()
    of_z = step * out_scale.double() * min(2.5 * columns**0.5, 0.7 * columns)
    return of_z + (eps + 2**-22) * exact.abs()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_sign_matmul_is_bit_identical(rows: int, columns: int, dtype: torch.dtype) -> None:
    for lead in LEADS:
        operands = sign_operands(lead, rows, columns)
        got = ir.sign_matmul(*operands, dtype)
        assert torch.equal(got, reference.sign_matmul(*operands, dtype)), lead


@pytest.mark.parametrize("sign", [1, -1])
def test_largest_sums_do_not_wrap(sign: int) -> None:
    z = torch.full((1, 1, 131072), Z_MAX, dtype=torch.int16, device="cuda")
    packed = pack_signs(torch.full((33, 131072), sign, device="cuda"))
    ones = torch.ones(1, 1, 1, device="cuda")
    got = ir.sign_matmul(z, ones, packed, torch.ones(33, device="cuda"), torch.float32)
    assert (got == float(torch.tensor(131072 * Z_MAX).float()) * sign).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_pass_through(dtype: torch.dtype) -> None:
    z, z_scale, packed, scale = sign_operands((2, 3), 70, 40)
    z_scale[0, 1] = torch.nan
    z_scale[1, 2] = 1e38
    scale[3] = 0.0
    scale[4] = torch.inf
    got = ir.sign_matmul(z, z_scale, packed, scale, dtype)
    want = reference.sign_matmul(z, z_scale, packed, scale, dtype)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features, fmt", LIFTS)
def test_lift_is_within_one_step_of_the_exact_value(
    in_features: int, fmt: LiftFormat, dtype: torch.dtype
) -> None:
    for lead in LEADS:
        x, scale, left, right = lift_operands(lead, in_features, fmt)
        x = x.to(dtype)
        for used in (scale, None):
            z, z_scale = ir.lift(x, used, left, right)
            exact = reference.lift_real(*doubles(x, used, left, right))
            assert z.dtype == torch.int16 and z.shape == exact.shape and z_scale.shape == (*lead, 1)
            if z.numel():
                step = reference.lift_scale(x, used, left, right)
                torch.testing.assert_close(z_scale, step, rtol=1e-5, atol=0)
                error = (z - exact / z_scale.double()).abs()
                assert float(error.max()) < 0.7


def test_lift_of_zero_and_infinite_tokens_and_halves() -> None:
    x, scale, left, right = lift_operands((4,), 70, LiftFormat(19, 8))
    x[0] = 0.0
    x[1, 5] = torch.nan
    x[2, 69] = -torch.inf
    z, z_scale = ir.lift(x, scale, left, right)
    assert not z[:3].any() and z_scale[0] == 0 and z_scale[1:3].isnan().all() and z[3].any()
    x, right = (t.cuda() for t in halves())
    z, z_scale = ir.lift(x, None, torch.eye(1, device="cuda"), right)
    assert z.tolist() == [[0, 2, 2, 0, -2, -2, 6, 2, 1024]] and z_scale.item() == 8.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, WEIGHT_FIRST_TOKENS["cuda"], WEIGHT_FIRST_TOKENS["cuda"] + 5])
def test_lifted_linear_matches_in_both_orders(tokens: int, dtype: torch.dtype) -> None:
    for in_features, fmt in LIFTS[:-1]:
        x, scale, _, _ = lift_operands((1, tokens), in_features, fmt)
        x = x.to(dtype)
        factors, columns = linear_factors(in_features, fmt)
        factors = [f.cuda() for f in factors]
        packed, out_scale = sign_operands((1,), 77, columns)[2:]
        got = ir.lifted_linear(x, scale, *factors, packed, out_scale)
        exact = reference.lifted_linear(*doubles(x, scale, *factors), packed, out_scale.double())
        assert got.dtype == dtype and got.shape == exact.shape
        if not tokens:
            continue
        assert ((got.double() - exact).abs() <= allowed_error(x, scale, factors, out_scale, exact)).all()
        if tokens == 1:
            z, z_scale = ir.lift(x, scale, factors[0], reference.decode_right(*factors[1:]))
            assert torch.equal(got, ir.sign_matmul(z, z_scale, packed, out_scale, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpack_signs_kernel(kernels: Kernels, dtype: torch.dtype) -> None:
    for rows, columns in ((576, 1386), (33, 7), (1, 1), (100, 129)):
        packed = random_signs(rows, columns)
        out = torch.full((rows, columns), 3.0, dtype=dtype, device="cuda")
        kernels.functions[f"unpack_signs_{DTYPES[dtype]}"](packed, out)
        assert torch.equal(out, unpack_signs(packed, rows, dtype))


def test_strided_and_misaligned_inputs() -> None:
    operands = sign_operands((1, 9), 70, 99)
    want = reference.sign_matmul(*operands, torch.float32)
    z, z_scale, packed, out_scale = operands
    odd_z = torch.empty(9 * 99 + 1, dtype=torch.int16, device="cuda")[1:].view(1, 9, 99).copy_(z)
    odd_packed = torch.empty(packed.numel() + 1, dtype=torch.int32, device="cuda")[1:].view_as(packed)
    odd_packed.copy_(packed)
    for a, b in (
        (z.repeat(1, 1, 2)[..., :99], packed),
        (odd_z, odd_packed),
        (z, packed.t().contiguous().t()),
    ):
        assert torch.equal(ir.sign_matmul(a, z_scale, b, out_scale, torch.float32), want)


def test_runs_on_the_current_stream_and_in_a_cuda_graph() -> None:
    operands = sign_operands((1, 1), 576, 1386)
    z, z_scale, packed, out_scale = operands
    want = -reference.sign_matmul(*operands, torch.float32)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):  # the first launch loads the module
            ir.sign_matmul(z, z_scale, packed, out_scale, torch.float32)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ir.sign_matmul(z, z_scale, packed, out_scale, torch.float32)
    z.neg_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, want)


def test_cpu_and_cuda_tensors_do_not_mix() -> None:
    z, z_scale, packed, out_scale = sign_operands((1, 1), 40, 50)
    with pytest.raises(LiftcError, match="on one device"):
        ir.sign_matmul(z, z_scale, packed.cpu(), out_scale, torch.float32)
