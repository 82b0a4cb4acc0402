"""Call every CUDA kernel of an object on small shapes, for compute-sanitizer; needs torch and tvm_ffi.

    compute-sanitizer --tool memcheck python scripts/call_kernels.py OUT/kernels/cuda-sm_90a.so

Shapes are odd on purpose: last tiles half full, fewer rows than a tile, one column. Results are compared with float64
on the CPU; what is wrong is named, and the rest still runs. A function that nothing calls is an error too.
scripts/gpu_check.py --parts sanitize runs this under memcheck and racecheck, with every tensor in memory of its own.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import gelu, layer_norm, silu

from liftc import reference
from liftc.errors import LiftcError
from liftc.format import LiftFormat
from liftc.kernel_object import KernelFunction
from liftc.packing import pack_signs, unpack_signs
from liftc.runtime.fused_lifts import FusedLifts
from liftc.runtime.kernels import Kernels, load_kernels
from liftc.runtime.operands import MOST_STEP_ERROR, planes_to_z
from liftc.runtime.ops import WEIGHT_FIRST_TOKENS, Ops
from liftc.runtime.planes import LIFT_OPS, LIFTS, Planes
from liftc.runtime.tiles import PRODUCTS
from liftc.runtime.whiten import Whitening
from liftc.spec import DTYPE_NAMES, DTYPES, Z_MAX, transform_shape

GPU = torch.device("cuda", 0)
SHAPES = ((33, 700), (1990, 1386), (1, 64), (16, 1), (570, 3000))
"""Rows and columns of signs."""
LIFTED = (
    (576, LiftFormat(77, 32)),
    (200, LiftFormat(24, 8)),
    (64, LiftFormat(64, 32)),
    (6240, LiftFormat(32, 32)),
)
"""Features of lifts and formats: the last one has more than 64 rows and columns."""
FACTORS = ((7, 40), (5, 128), (128, 8))
"""Factors of transforms: both kernels, tiles of 16 that are half full, and the largest left factor."""

Tensor = torch.Tensor
Check = tuple[str, bool]


@dataclass
class Caller:
    """The functions of an object, counted when called."""

    kernels: Kernels
    called: Counter[str]

    @classmethod
    def of(cls, kernels: Kernels) -> Caller:
        called: Counter[str] = Counter()

        def counted(symbol: str, function: Callable[..., None]) -> Callable[..., None]:
            def call(*arguments: Any) -> None:
                called[symbol] += 1
                function(*arguments)

            return call

        functions = {symbol: counted(symbol, f) for symbol, f in kernels.functions.items()}
        return cls(replace(kernels, functions=functions), called)

    def only(self, op: str, symbol: str) -> Ops:
        """Ops with one function for an op; a product or a lift to planes without those of the other forms."""
        others = next((forms for forms in (PRODUCTS, (*LIFTS, *LIFT_OPS)) if op in forms), (op,))
        kept = tuple(f for f in self.kernels.object.functions if f.op not in others or f.symbol == symbol)
        return Ops(replace(self.kernels, object=replace(self.kernels.object, functions=kept)))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def signs_and_scale(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return pack_signs(random(rows, columns)), random(rows).abs() + 0.1


def random_z(tokens: int, columns: int) -> Tensor:
    z = (random(tokens, columns) * Z_MAX / 3).clamp(-Z_MAX, Z_MAX).to(torch.int16)
    z[0, 0] = -Z_MAX
    return z


def near(got: Tensor, want: Tensor, bound: float) -> bool:
    """Whether got is as close to want, of float64, as `bound` of its largest entry."""
    return bool((got.cpu().double() - want).abs().max() <= bound * want.abs().max())


def products(ops: Ops, most: int, dtype: torch.dtype) -> Iterator[Check]:
    """Tiles or packed signs times z."""
    for rows, columns in SHAPES:
        packed, scale = signs_and_scale(rows, columns)
        for tokens in sorted({1, max(1, most - 1), most}):
            z, step = random_z(tokens, columns), random(tokens, 1).abs()
            want = reference.sign_matmul(z, step, packed, scale, dtype)
            signs = packed.to(GPU)
            if ops.tiles.available:
                signs = ops.tiles.from_packed(signs, rows)
            operands = (z.to(GPU), step.to(GPU), signs, scale.to(GPU), dtype)
            what = f"{rows} x {columns}, {tokens} tokens, {dtype}"
            yield what, torch.equal(ops.sign_matmul(*operands).cpu(), want)
            if ops.tiles.available:
                bias, residual = random(rows, seed=1).to(dtype), random(tokens, rows, seed=2).to(dtype)
                got = ops.tiles.sign_matmul(*operands, bias.to(GPU), residual.to(GPU))
                yield f"{what}, bias and residual", torch.equal(got.cpu(), want + bias + residual)


def lifts(ops: Ops, function: KernelFunction, most: int, dtype: torch.dtype) -> Iterator[Check]:
    """Lifts to planes or z, and the product of a lift's planes: columns past the last one are not written."""
    fused, op = FusedLifts(ops), function.op
    choices = range({"lift_planes_gelu": 4, "lift_planes_layer": 2}.get(op, 1))
    for features, fmt in LIFTED:
        t1, t2 = transform_shape(features, fmt)
        if op.startswith("lift_planes") and (t1 > function.most_left or t2 > function.most_right):
            continue
        left, right = random(t1, t1), random(t2, t2 // fmt.subspace_dim * fmt.lifted_dim)
        on_gpu = (left.to(GPU), right.to(GPU))
        packed, scale = signs_and_scale(47, t1 * right.shape[1])
        for tokens in sorted({1, max(1, most - 1), most}):
            for in_scale, choice in product((None, random(features).abs() + 0.5), choices):
                paired = op.endswith("gate") or (op.endswith("gelu") and choice < 2)
                given = random(tokens, features * (2 if paired else 1)).to(dtype).to(GPU)
                gain = random(features).to(dtype).to(GPU)
                factor = None if in_scale is None else in_scale.to(GPU)
                x = given
                if op == "lift_planes_norm":
                    wide = given.float()
                    x = gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)
                    operand, step = fused.norm(given, gain, 1e-5, dtype, factor, *on_gpu)
                elif op == "lift_planes_layer" and choice:
                    wide = given.double()
                    root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
                    x = (wide * root * (1 + gain.double())).to(dtype)
                    operand, step = fused.unit_offset_norm(given, gain, 1e-5, factor, *on_gpu)
                elif op == "lift_planes_layer":
                    shift = random(features, seed=1).to(dtype).to(GPU)
                    x = layer_norm(given.double(), (features,), gain.double(), shift.double(), 1e-5).to(dtype)
                    operand, step = fused.layer_norm(given, gain, shift, 1e-5, factor, *on_gpu)
                elif op == "lift_planes_gate":
                    x = silu(given[:, :features]) * given[:, features:]
                    operand, step = fused.gate(given, factor, *on_gpu)
                elif op == "lift_planes_gelu":
                    x = gelu(given[:, :features], approximate="tanh" if choice % 2 else "none")
                    x = x * given[:, features:] if paired else x
                    operand, step = fused.gelu(given, choice, factor, *on_gpu)
                elif op in LIFTS:
                    operand, step = ops.lift_operands(given, factor, *on_gpu)
                else:
                    operand, step = ops.lift(given, factor, *on_gpu)
                text = f"{features} features {fmt}, {tokens} tokens, scale {in_scale is not None}, choice {choice}"
                if isinstance(operand, Planes) != op.startswith("lift_planes"):
                    yield f"{text}: not taken", False
                    continue
                z = (planes_to_z(operand) if isinstance(operand, Planes) else operand).cpu()
                factors = (None if in_scale is None else in_scale.double(), left.double(), right.double())
                real, exact_step = (
                    f(x.cpu().double(), *factors) for f in (reference.lift_real, reference.lift_scale)
                )
                value = z * step.cpu().double()
                if x is given:
                    good = bool(((value - real).abs() <= MOST_STEP_ERROR * exact_step).all())
                else:  # a rounding of x that falls the other way moves much of z
                    good = near(value, real, 0.01)
                yield text, good and near(step, exact_step.double(), 1e-5 if x is given else 1e-3)
                signs = packed.to(GPU)
                if isinstance(operand, Planes):
                    signs = ops.tiles.from_packed(signs, 47)
                    got = ops.tiles.sign_matmul(operand, step, signs, scale.to(GPU), torch.float32)
                    totals = operand.totals.cpu().sum(0, dtype=torch.int32)
                    yield f"{text}: sums", torch.equal(totals, z.sum(1, dtype=torch.int32))
                else:
                    got = ops.sign_matmul(operand, step, signs, scale.to(GPU), torch.float32)
                want = reference.sign_matmul(z, step.cpu(), packed, scale, torch.float32)
                yield f"{text}: product", torch.equal(got.cpu(), want)


def decoded(ops: Ops, kernels: Kernels, dtype: torch.dtype) -> Iterator[Check]:
    """Signs and weights as numbers, of tiles and of packed signs."""
    unpack = kernels.functions[f"unpack_signs_{DTYPE_NAMES[dtype]}"]
    for rows, columns in SHAPES:
        packed, scale = signs_and_scale(rows, columns)
        signs = unpack_signs(packed, rows, dtype)
        for kind in ("unpack_signs", "unpack_tiles"):
            out = torch.full((rows, columns), 7.0, dtype=dtype, device=GPU)
            if kind == "unpack_signs":
                unpack(packed.to(GPU), out)
            else:
                ops.tiles.unpack(ops.tiles.from_packed(packed.to(GPU), rows), out)
            yield f"{kind} {rows} x {columns}", torch.equal(out.cpu(), signs)
    for fmt in (LiftFormat(77, 32), LiftFormat(24, 10), LiftFormat(24, 8)):
        for rows, blocks in ((100, 37), (1, 3)):
            packed, scale = signs_and_scale(rows, blocks * fmt.lifted_dim)
            mapping = random(fmt.subspace_dim, fmt.lifted_dim)
            out = torch.empty(rows, blocks * fmt.subspace_dim, dtype=dtype, device=GPU)
            ops.tiles.decode(
                ops.tiles.from_packed(packed.to(GPU), rows), mapping.to(GPU), scale.to(GPU), out, 2.0
            )
            bits = unpack_signs(packed, rows, torch.float64).view(rows, blocks, -1)
            want = (bits @ mapping.double().T).view(rows, -1) * 2 * scale.double()[:, None]
            yield f"decode {rows} x {blocks} blocks of {fmt}", near(out, want, 1e-2)


def whole(ops: Ops, dtype: torch.dtype) -> Iterator[Check]:
    """lifted_linear in both orders, on tiles and on packed signs."""
    fmt, features, rows = LiftFormat(77, 32), 576, 330
    t1, t2 = transform_shape(features, fmt)
    left, inverse = random(t1, t1) / t1**0.5, random(t2, t2) / t2**0.5
    mapping = random(fmt.subspace_dim, fmt.lifted_dim) / fmt.lifted_dim**0.5
    packed, scale = signs_and_scale(rows, t1 * t2 // fmt.subspace_dim * fmt.lifted_dim)
    factors = [t.to(GPU) for t in (left, inverse, mapping)]
    for tokens in (1, 21, WEIGHT_FIRST_TOKENS["cuda"] + 3):
        x = random(tokens, features).to(dtype)
        exact = reference.lifted_linear(
            x.double(), None, left.double(), inverse.double(), mapping.double(), packed, scale.double()
        )
        for signs in (packed.to(GPU), ops.tiles.from_packed(packed.to(GPU), rows)):
            got = ops.lifted_linear(x.to(GPU), None, *factors, signs, scale.to(GPU))
            yield f"{tokens} tokens, {'tiles' if signs.dim() == 4 else 'packed'}", near(got, exact, 0.02)


def transforms(kernels: Kernels, dtype: torch.dtype) -> Iterator[Check]:
    """Activations in the space of the decoded weights."""
    whiten = Whitening(kernels)
    for t1, t2 in FACTORS:
        left, right, features = random(t1, t1), random(t2, t2), t1 * t2 - 8
        for tokens, in_scale in ((1, None), (9, random(features).abs())):
            x = random(tokens, features).to(dtype)
            padded = torch.zeros(tokens, t1 * t2, dtype=torch.float64)
            padded[:, :features] = x.double() * (1.0 if in_scale is None else in_scale.double())
            want = (left.double() @ padded.view(tokens, t1, t2) @ right.double()).view(tokens, -1)
            used = None if in_scale is None else in_scale.to(GPU)
            got = whiten(x.to(GPU), used, left.to(GPU), right.to(GPU), dtype, 1.0)
            yield f"{t1} x {t2}, {tokens} tokens", near(got, want, 0.02)


def reading(kernels: Kernels, symbol: str) -> Iterator[Check]:
    """The kernel that only reads."""
    pool, seen = (
        torch.ones(99988, dtype=torch.int32, device=GPU),
        torch.zeros(1, dtype=torch.int32, device=GPU),
    )
    kernels.functions[symbol](pool, seen, 50)
    yield "reading", int(seen) == 0


def all_checks(caller: Caller) -> Iterator[tuple[str, Iterator[Check]]]:
    """What is called, and its checks."""
    kernels = caller.kernels
    ops = Ops(kernels)
    for op in (*PRODUCTS, *LIFTS, *(op for op in LIFT_OPS if op not in LIFTS), "lift"):
        for function in kernels.of(op):
            alone = caller.only(op, function.symbol)
            dtype, most = DTYPES.get(function.dtype, torch.bfloat16), function.max_tokens or 16
            checks = products(alone, most, dtype) if op in PRODUCTS else lifts(alone, function, most, dtype)
            yield function.symbol, checks
    portable = Ops(
        replace(kernels, functions={k: f for k, f in kernels.functions.items() if "tile" not in k})
    )
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        name = DTYPE_NAMES[dtype]
        yield f"sign_matmul_{name}", products(portable, 5, dtype)
        yield f"lifted_linear, {name}", whole(ops, dtype)
        yield f"signs as numbers, {name}", decoded(ops, kernels, dtype)
        yield f"transforms, {name}", transforms(kernels, dtype)
    for function in kernels.of("read_ceiling"):
        yield function.symbol, reading(kernels, function.symbol)


def main() -> None:
    caller = Caller.of(load_kernels(Path(sys.argv[1]), GPU))
    right = wrong = 0
    for name, checks in all_checks(caller):
        bad = []
        try:
            for text, good in checks:
                right += good
                if not good:
                    bad.append(text)
            torch.cuda.synchronize()
        except (LiftcError, RuntimeError, TypeError, ValueError) as error:
            bad.append(f"{type(error).__name__}: {error}")
        wrong += len(bad)
        print(f"{name}: {'right' if not bad else 'WRONG: ' + '; '.join(bad[:4])}", flush=True)
    idle = sorted(set(caller.kernels.functions) - set(caller.called))
    print(
        f"{sum(caller.called.values())} calls of {len(caller.called)} functions: {right} checks right, {wrong} wrong"
    )
    if idle:
        print(f"never called: {', '.join(idle)}")
    sys.exit(1 if wrong or idle else 0)


if __name__ == "__main__":
    main()
