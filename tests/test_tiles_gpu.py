"""Tensor-core kernels and fused operands on a GPU, against liftc/reference.py; objects as in test_kernels_gpu.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from operand_layouts import linear_factors, tile_layout, z_of
from test_kernels_gpu import (  # noqa: F401
    DTYPES,
    LIFTS,
    allowed_error,
    doubles,
    lift_operands,
    loaded,
    sign_operands,
)

from liftc import ir, reference
from liftc.errors import LiftcError
from liftc.format import LiftFormat
from liftc.packing import pack_signs
from liftc.runtime.fused_lifts import FusedLifts
from liftc.runtime.kernels import Kernels
from liftc.runtime.ops import WEIGHT_FIRST_TOKENS, Ops, register
from liftc.runtime.planes import Planes
from liftc.spec import Z_MAX

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = (
    (576, 1386),
    (33, 700),
    (16, 8),
    (1, 1),
    (100, 129),
    (64, 2),
    (4096, 9856),
    (28672, 154),
    (70, 40000),
)
LEADS = ((0,), (1,), (3,), (2, 2), (1, 1, 1), (5,), (8,), (3, 3), (15,), (16,), (17,), (2, 20))


@pytest.fixture
def ops(loaded: Kernels) -> Iterator[Ops]:  # noqa: F811
    ops = register(loaded)
    if not ops.tiles.available:
        pytest.skip("the object has no tensor-core kernels for this GPU")
    yield ops
    for op in ("lift", "sign_matmul", "lifted_linear"):
        ir.unregister_kernel(op, "cuda")


@pytest.mark.parametrize("rows, columns", SHAPES)
def test_tiles_have_the_documented_layout(ops: Ops, rows: int, columns: int) -> None:
    packed = sign_operands((1,), rows, columns)[2]
    tiles = ops.tiles.from_packed(packed, rows)
    assert torch.equal(tiles, tile_layout(packed)[: -(-rows // 16)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_sign_matmul_is_bit_identical(ops: Ops, rows: int, columns: int, dtype: torch.dtype) -> None:
    for lead in LEADS:
        z, z_scale, packed, scale = sign_operands(lead, rows, columns)
        tiles = ops.tiles.from_packed(packed, rows)
        want = reference.sign_matmul(z, z_scale, packed, scale, dtype)
        got = ir.sign_matmul(z, z_scale, tiles, scale, dtype)
        assert got.dtype == dtype and torch.equal(got, want), lead
        assert torch.equal(ir.sign_matmul(z, z_scale, tiles, scale, dtype), got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, columns", [(576, 1386), (33, 700), (1, 1), (4099, 154)])
def test_bias_and_residual_are_added_as_separate_operations_do(
    ops: Ops, rows: int, columns: int, dtype: torch.dtype
) -> None:
    for lead in ((0,), (1,), (1, 2), (7,), (2, 8), (20,)):
        z, z_scale, packed, scale = sign_operands(lead, rows, columns)
        scale = scale / 2**14  # sums of float16 stay finite
        tiles = ops.tiles.from_packed(packed, rows)
        want = reference.sign_matmul(z, z_scale, packed, scale, dtype)
        assert want.isfinite().all()
        spread = float(want.float().abs().mean()) if want.numel() else 1.0
        g = torch.Generator().manual_seed(rows)
        bias = (torch.randn(rows, generator=g) * spread).to("cuda", dtype)
        wide = (torch.randn(*lead, 2 * rows, generator=g) * spread).to("cuda", dtype)
        for residual in (wide[..., rows:].contiguous(), wide[..., :rows], wide[..., 1 : rows + 1]):
            for given in ((bias, None), (None, residual), (bias, residual)):
                total = want if given[0] is None else want + bias
                total = total if given[1] is None else total + residual
                got = ops.tiles.sign_matmul(z, z_scale, tiles, scale, dtype, *given)
                assert torch.equal(got, total), lead


def test_addends_that_do_not_fit_are_refused(ops: Ops) -> None:
    z, z_scale, packed, scale = sign_operands((2,), 70, 600)
    tiles = ops.tiles.from_packed(packed, 70)
    good, bias = torch.zeros(2, 70, device="cuda"), torch.zeros(70, device="cuda")
    for given, message in (
        ((bias[:69], None), r"bias is f32\[69\] on cuda:0; need f32\[70\]"),
        ((bias.half(), None), "bias is f16"),
        ((bias.cpu(), None), "bias is f32.* on cpu"),
        ((None, good[:1]), r"residual is f32\[1,70\] on cuda:0; need f32\[2,70\]"),
        ((None, good[0]), r"residual is f32\[70\]"),
        ((bias, good.bfloat16()), "residual is bf16"),
    ):
        with pytest.raises(LiftcError, match=message):
            ops.tiles.sign_matmul(z, z_scale, tiles, scale, torch.float32, *given)


@pytest.mark.parametrize("pattern", ["all", "none", "alternating", "extremes"])
def test_largest_sums_do_not_wrap(ops: Ops, pattern: str) -> None:
    columns, rows = 131072, 33
    z = torch.full((2, columns), Z_MAX, dtype=torch.int16, device="cuda")
    z[1] = -Z_MAX
    signs = torch.full((rows, columns), -1 if pattern == "none" else 1, device="cuda")
    if pattern == "alternating":
        signs[:, ::2] = -1
    if pattern == "extremes":
        z[:, ::2] *= -1
        signs[:, ::2] = -1
    packed, ones = pack_signs(signs), torch.ones(rows, device="cuda")
    tiles = ops.tiles.from_packed(packed, rows)
    for tokens in (2, 8, 16):
        many, unit = z.repeat(tokens // 2, 1), torch.ones(tokens, 1, device="cuda")
        got = ir.sign_matmul(many, unit, tiles, ones, torch.float32)
        assert torch.equal(got, reference.sign_matmul(many, unit, packed, ones, torch.float32)), tokens


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features, fmt", LIFTS)
def test_operand_lift_is_within_one_step(ops: Ops, in_features: int, fmt: object, dtype: torch.dtype) -> None:
    for lead in ((1,), (1, 1, 1), (3,), (5,), (4, 2), (9,), (16,)):
        x, scale, left, right = lift_operands(lead, in_features, fmt)  # type: ignore[arg-type]
        x = x.to(dtype)
        if x[..., 0].numel() > 1:
            x[0] = 0.0
        for used in (scale, None):
            planes, z_scale = ops.lift_operands(x, used, left, right)
            if in_features % 8 or right.shape[0] % 8:
                assert not isinstance(planes, Planes), "vectors of 8 values cannot have been loaded"
                continue
            assert isinstance(planes, Planes), "no kernel took a lift of an ordinary shape"
            exact = reference.lift_real(*doubles(x, used, left, right)).reshape(planes.tokens, -1)
            z = z_of(planes.data, planes.tokens, planes.columns)
            step = reference.lift_scale(x, used, left, right)
            assert z_scale.shape == step.shape == (*lead, 1)
            torch.testing.assert_close(z_scale, step, rtol=1e-5, atol=0)
            finite = (step > 0).flatten()
            assert finite.any()
            error = z[finite] - exact[finite] / z_scale.view(-1, 1)[finite].double()
            assert float(error.abs().max()) < 0.75 and not z[~finite].any()
            assert torch.equal(planes.totals.sum(0, dtype=torch.int32), z.sum(1, dtype=torch.int32))


def test_operand_lift_of_nan_and_infinite_tokens(ops: Ops) -> None:
    x, _, left, right = lift_operands((4,), 72, LiftFormat(19, 8))
    x[1, 5], x[2, 69] = torch.nan, -torch.inf
    planes, z_scale = ops.lift_operands(x, None, left, right)
    assert isinstance(planes, Planes)
    z = z_of(planes.data, 4, planes.columns)
    assert not z[1:3].any() and z_scale[1:3].isnan().all() and z[0].any() and z[3].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_features", [576, 8192])
def test_lifts_behind_norms_and_gates(ops: Ops, in_features: int, dtype: torch.dtype) -> None:
    fused = FusedLifts(ops)
    for tokens in (1, 3, 7, 16):
        x, scale, left, right = lift_operands((1, tokens), in_features, LiftFormat(77, 32))
        x, gain = x.to(dtype), (scale + 0.25).to(dtype)
        wide = x.float()
        normed = gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)
        pair = torch.cat([x, x.flip(-1)], -1)
        gated = torch.nn.functional.silu(x) * x.flip(-1)
        check_fused(ops, tokens, scale, left, right, [
            (fused.norm(x, gain, 1e-5, dtype, scale, left, right), normed),
            (fused.gate(pair, scale, left, right), gated),
        ])  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_features", [576, 8192, 16384])
def test_lifts_behind_layer_norms_and_gelus(ops: Ops, in_features: int, dtype: torch.dtype) -> None:
    """Tokens 30 away from 0; 16384 features do not wait in registers between the two passes of the norm."""
    fused = FusedLifts(ops)
    for tokens in (1, 3, 7, 16):
        x, scale, left, right = lift_operands((1, tokens), in_features, LiftFormat(77, 32))
        far, gain, shift = (x + 30).to(dtype), (scale + 0.25).to(dtype), (scale.flip(0) - 0.5).to(dtype)
        wide, shape = far.double(), (in_features,)
        normed = [
            torch.nn.functional.layer_norm(wide, shape, gain.double(), bias, 1e-5).to(dtype)
            for bias in (shift.double(), None)
        ]
        near = x.to(dtype)
        root = torch.rsqrt(near.double().pow(2).mean(-1, keepdim=True) + 1e-5)
        offset = (near.double() * root * (1 + gain.double())).to(dtype)
        x = (2 * x).to(dtype)
        pair = torch.cat([x, x.flip(-1)], -1)
        gelus = [
            torch.nn.functional.gelu(x.double(), approximate=mode).to(dtype) for mode in ("none", "tanh")
        ]
        check_fused(ops, tokens, scale, left, right, [
            (fused.layer_norm(far, gain, shift, 1e-5, scale, left, right), normed[0]),
            (fused.layer_norm(far, gain, None, 1e-5, scale, left, right), normed[1]),
            (fused.unit_offset_norm(near, gain, 1e-5, scale, left, right), offset),
            *((fused.gelu(pair, c, scale, left, right), gelus[c] * x.flip(-1)) for c in range(2)),
            *((fused.gelu(x, c, scale, left, right), gelus[c - 2]) for c in range(2, 4)),
        ])  # fmt: skip


def test_fused_lifts_of_nan_and_infinite_tokens(ops: Ops) -> None:
    fused = FusedLifts(ops)
    x, _, left, right = lift_operands((5,), 576, LiftFormat(19, 8))
    x = x.to(torch.float16)
    x[1, 5], x[2, 69], x[3, 0] = torch.nan, -torch.inf, torch.inf
    ones = torch.ones_like(x[0])
    made = [fused.layer_norm(x, ones, ones, 1e-5, None, left, right)]
    made += [fused.gelu(torch.cat([x, ones.expand(5, -1)], -1), c, None, left, right) for c in range(2)]
    made += [fused.gelu(x, c, None, left, right) for c in range(2, 4)]
    for planes, z_scale in made:
        assert isinstance(planes, Planes), "no kernel took it"
        z = z_of(planes.data, 5, planes.columns)
        assert not z[1:4].any() and z_scale[1:4].isnan().all()
        assert z[0].any() and z[4].any() and torch.isfinite(z_scale[[0, 4]]).all()


def check_fused(
    ops: Ops, tokens: int, scale: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor,
    made: list[tuple[tuple[Planes | torch.Tensor, torch.Tensor], torch.Tensor]],
) -> None:  # fmt: skip
    """What fused forms made is the lift of what separate operations make, but for a bit of x now and then."""
    for (planes, z_scale), plain in made:
        assert isinstance(planes, Planes), "no kernel took it"
        want, want_scale = ops.lift_operands(plain, scale, left, right)
        assert isinstance(want, Planes)
        torch.testing.assert_close(z_scale, want_scale, rtol=1e-4, atol=0)
        z, plain_z = (z_of(p.data, tokens, p.columns).int() for p in (planes, want))
        away = (z - plain_z).abs()  # roundings of x that differ by a bit move z by a step or a few
        assert float(away.float().mean()) < 0.1 and int(away.max()) <= 16
        assert torch.equal(planes.totals.sum(0, dtype=torch.int32), z.sum(1, dtype=torch.int32))


def test_products_of_operands_equal_products_of_z(ops: Ops) -> None:
    for tokens in (1, 3, 6, 8, 13, 16):
        x, scale, left, right = lift_operands((tokens,), 576, LiftFormat(77, 32))
        rows, columns = 1000, left.shape[0] * right.shape[1]
        packed, out_scale = sign_operands((1,), rows, columns)[2:]
        tiles = ops.tiles.from_packed(packed, rows)
        planes, z_scale = ops.lift_operands(x, scale, left, right)
        assert isinstance(planes, Planes)
        z = z_of(planes.data, tokens, columns)
        for operand in (planes, ops.tiles.planes.split(z)):
            got = ops.tiles.sign_matmul(operand, z_scale, tiles, out_scale, torch.float32)
            want = reference.sign_matmul(z, z_scale, packed, out_scale, torch.float32)
            assert torch.equal(z_of(operand.data, tokens, columns), z) and torch.equal(got, want), tokens


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 20, WEIGHT_FIRST_TOKENS["cuda"], WEIGHT_FIRST_TOKENS["cuda"] + 5])
def test_lifted_linear_on_tiles(ops: Ops, tokens: int, dtype: torch.dtype) -> None:
    for in_features, fmt in LIFTS[:3]:
        x, scale, _, _ = lift_operands((1, tokens), in_features, fmt)
        x = x.to(dtype)
        factors, columns = linear_factors(in_features, fmt)
        factors = [f.cuda() for f in factors]
        packed, out_scale = sign_operands((1,), 77, columns)[2:]
        tiles = ops.tiles.from_packed(packed, 77)
        got = ir.lifted_linear(x, scale, *factors, tiles, out_scale)
        exact = reference.lifted_linear(*doubles(x, scale, *factors), packed, out_scale.double())
        assert got.dtype == dtype and got.shape == exact.shape
        if not tokens:
            continue
        assert ((got.double() - exact).abs() <= allowed_error(x, scale, factors, out_scale, exact)).all()
        if tokens == 1:
            z, z_scale = ops.lift_operands(x, scale, factors[0], reference.decode_right(*factors[1:]))
            assert torch.equal(got, ops.tiles.sign_matmul(z, z_scale, tiles, out_scale, dtype))


@pytest.mark.parametrize("tokens", [1, 4, 8, 16])
def test_chain_in_graphs_and_on_two_streams_stays_exact(ops: Ops, tokens: int) -> None:
    """Dependent launches: every product reads what the lift just before it wrote, 200 times over."""
    x, _, left, right = lift_operands((tokens,), 576, LiftFormat(77, 32))
    rows, columns = 576, left.shape[0] * right.shape[1]
    packed, scale = sign_operands((1,), rows, columns)[2:]
    tiles = ops.tiles.from_packed(packed, rows)
    inputs = [x * (i + 1) ** 0.5 for i in range(4)]

    def chain() -> list[torch.Tensor]:
        results = []
        for value in inputs * 5:
            planes, z_scale = ops.lift_operands(value, None, left, right)
            results.append(ops.tiles.sign_matmul(planes, z_scale, tiles, scale, torch.float32))
        return results

    want = []
    for value in inputs * 5:
        planes, z_scale = ops.lift_operands(value, None, left, right)
        assert isinstance(planes, Planes)
        torch.cuda.synchronize()
        z = z_of(planes.data, tokens, columns)
        want.append(reference.sign_matmul(z, z_scale, packed, scale, torch.float32))
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    graphs, outputs = [], []
    for stream in streams:
        with torch.cuda.stream(stream):
            chain()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append(chain())
        graphs.append(graph)
    for _ in range(10):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    for results in outputs:
        assert all(torch.equal(a, b) for a, b in zip(results, want, strict=True))


def test_misuse_is_one_sentence(ops: Ops) -> None:
    z, z_scale, packed, scale = sign_operands((2,), 70, 600)
    tiles = ops.tiles.from_packed(packed, 70)
    for bad, message in (
        ((z.float(), z_scale, tiles, scale, torch.float32), "z f32"),
        ((z, z_scale.double(), tiles, scale, torch.float32), "z_scale f64"),
        ((z[:, :500].contiguous(), z_scale, tiles, scale, torch.float32), "70 x 500 signs need"),
        ((z, z_scale, tiles[:4], scale, torch.float32), r"need contiguous i32\[5,3,32,4\]"),
        (
            (z, z_scale, tiles.transpose(2, 3).contiguous().transpose(2, 3), scale, torch.float32),
            "contiguous",
        ),
        ((z, z_scale, tiles.long(), scale, torch.float32), "got i64"),
        ((z, z_scale, tiles.cpu(), scale, torch.float32), "on one GPU"),
        ((z, z_scale, tiles, scale.cpu(), torch.float32), "on one GPU"),
        ((z, z_scale, tiles, scale, torch.int32), "dtype torch.int32"),
    ):
        with pytest.raises(LiftcError, match=message):
            ir.sign_matmul(*bad)
    with pytest.raises(LiftcError, match=r"70 rows need i32\[3,K\]"):
        ops.tiles.from_packed(packed[:2], 70)


def test_strided_and_misaligned_z(ops: Ops) -> None:
    operands = sign_operands((1, 9), 70, 104)
    want = reference.sign_matmul(*operands, torch.float32)
    z, z_scale, packed, out_scale = operands
    tiles = ops.tiles.from_packed(packed, 70)
    odd = torch.empty(9 * 104 + 1, dtype=torch.int16, device="cuda")[1:].view(1, 9, 104).copy_(z)
    for value in (odd, z.repeat(1, 1, 2)[..., :104], z.expand(1, 9, 104)):
        assert torch.equal(ir.sign_matmul(value, z_scale, tiles, out_scale, torch.float32), want)
