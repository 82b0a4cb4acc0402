"""The weight-first order on a GPU: decoded weights, transformed activations and whole calls against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from operand_layouts import linear_factors
from test_kernels_gpu import doubles, loaded, sign_operands  # noqa: F401

from liftc import ir, reference
from liftc.format import LiftFormat
from liftc.packing import unpack_signs
from liftc.runtime.kernels import Kernels
from liftc.runtime.ops import WEIGHT_FIRST_TOKENS, Ops, register
from liftc.runtime.weight_first import DECODED_BYTES
from liftc.runtime.whiten import Whitening

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Error of decoded weights, of their largest entry: rounding M and the result, for float32 sums of two parts.
BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
FORMATS = ("77/32", "64/32", "96/32", "24/8", "24/10", "40/16", "61/24", "128/64", "192/64")


@pytest.fixture
def ops(loaded: Kernels) -> Iterator[Ops]:  # noqa: F811
    ops = register(loaded)
    if not ops.tiles.available:
        pytest.skip("the object has no tensor-core kernels for this GPU")
    yield ops
    for op in ("lift", "sign_matmul", "lifted_linear"):
        ir.unregister_kernel(op, "cuda")


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("text", FORMATS)
def test_decoded_weights(ops: Ops, text: str, dtype: torch.dtype) -> None:
    fmt = LiftFormat.parse(text)
    d, lifted = fmt.subspace_dim, fmt.lifted_dim
    g = torch.Generator("cuda").manual_seed(lifted)
    mapping = torch.randn(d, lifted, generator=g, device="cuda")
    if not ops.tiles.decodes(mapping, dtype):
        assert dtype == torch.float32 and d > 32
        return
    for rows, blocks in ((16, 1), (100, 37), (1, 300)):
        packed, scale = sign_operands((1,), rows, blocks * lifted)[2:]
        out = torch.full((rows + 1, blocks * d), 7.0, dtype=dtype, device="cuda")  # the last row must stay
        tiles = ops.tiles.from_packed(packed, rows)
        ops.tiles.decode(tiles, mapping, scale, out[:-1], 2.0)
        signs = unpack_signs(packed, rows, torch.float64).view(rows, blocks, lifted)
        want = (signs @ mapping.double().T).view(rows, -1) * 2 * scale.double()[:, None]
        assert (out[-1] == 7).all()
        assert (out[:-1].double() - want).abs().max() <= BOUNDS[dtype] * want.abs().max()


@pytest.mark.parametrize(
    "dtype, bound", [(torch.float16, 2e-3), (torch.bfloat16, 1.5e-2), (torch.float32, 1e-5)]
)
@pytest.mark.parametrize(
    "t1, t2, features", [(128, 64, 8192), (86, 128, 11008), (7, 40, 272), (224, 128, 28672)]
)
def test_transformed_activations(
    loaded: Kernels, t1: int, t2: int, features: int, dtype: torch.dtype, bound: float  # noqa: F811
) -> None:  # fmt: skip
    g = torch.Generator("cuda").manual_seed(t1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, device="cuda")

    left, right = (torch.linalg.qr(normal(n, n))[0].contiguous() for n in (t1, t2))
    x, scale = normal(9, features).to(dtype), torch.rand(features, generator=g, device="cuda") + 0.5
    x[0] = 0.0
    padded = torch.zeros(9, t1 * t2, dtype=torch.float64, device="cuda")
    padded[:, :features] = x.double() * scale.double()
    want = (left.double() @ padded.view(9, t1, t2) @ right.double()).view(9, -1) / 16
    got = Whitening(loaded)(x, scale, left, right, dtype, 1 / 16)
    assert got.dtype == dtype and not got[0].any()
    assert (got.double() - want).abs().max() <= bound * want.abs().max()


@pytest.mark.parametrize("dtype", BOUNDS)
def test_calls_of_any_length_agree(ops: Ops, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches of 16 tokens, both sides of the threshold, and chunks of rows; the same call gives the same bits."""
    fmt = LiftFormat(77, 32)
    factors, columns = linear_factors(8192, fmt)
    factors = [f.cuda() for f in factors]
    packed, scale = sign_operands((1,), 321, columns)[2:]
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(2, WEIGHT_FIRST_TOKENS["cuda"], 8192, generator=g, device="cuda").to(dtype)
    exact = reference.lifted_linear(x.double(), None, *doubles(*factors), packed, scale.double())
    operands = (None, *factors, ops.tiles.from_packed(packed, 321), scale)
    bound = {torch.float32: 1e-2, torch.float16: 1e-2, torch.bfloat16: 3e-2}[dtype] * float(exact.abs().max())
    for part in (x, x[:1, :-1], x[:, :17], x[0, 0]):
        got = ir.lifted_linear(part, *operands)
        want = exact[tuple(slice(0, n) for n in part.shape[:-1])] if part.dim() > 1 else exact[0, 0]
        assert got.shape == want.shape and (got.double() - want).abs().max() <= bound
    whole = ir.lifted_linear(x, *operands)
    assert torch.equal(whole, ir.lifted_linear(x, *operands))
    monkeypatch.setitem(DECODED_BYTES, "cuda", 1)
    assert (ir.lifted_linear(x, *operands) - whole).abs().max() <= bound
