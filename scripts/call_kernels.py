"""Call every CUDA kernel of an object on small shapes, for compute-sanitizer; needs torch and tvm_ffi.

    compute-sanitizer --tool memcheck python scripts/call_kernels.py OUT/kernels/cuda-sm_90a.so

Shapes are odd on purpose: last tiles half full, fewer rows than a tile, one column. Results are checked too.
scripts/gpu_check.py --parts sanitize runs it under memcheck and racecheck.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from liftc import reference
from liftc.format import LiftFormat
from liftc.packing import pack_signs
from liftc.runtime import operands
from liftc.runtime.kernels import Kernels, load_kernels
from liftc.runtime.operands import Operands
from liftc.runtime.ops import Ops
from liftc.runtime.tiles import PRODUCTS
from liftc.spec import transform_shape

SHAPES = ((33, 576), (1990, 576), (16, 64), (1, 64), (545, 1536), (570, 4096))
FORMATS = (LiftFormat(77, 32), LiftFormat(24, 10))


def only(kernels: Kernels, symbol: str, op: str) -> Kernels:
    """The object with one function for an op."""
    kept = tuple(f for f in kernels.object.functions if f.op != op or f.symbol == symbol)
    return replace(kernels, object=replace(kernels.object, functions=kept))


def small_tokens(kernels: Kernels, device: torch.device) -> int:
    """Products and lifts of every kernel for few tokens; the number of calls checked."""
    called = 0
    source = Operands(device, 1 << 24)
    for op in (*PRODUCTS, "lift_planes"):
        for function in kernels.of(op):
            if function.dtype not in ("", "bf16"):
                continue
            ops = Ops(only(kernels, function.symbol, op))
            for fmt in FORMATS:
                most = function.max_tokens or 16
                for tokens in sorted({most, max(1, most - 1)}):
                    for linear in source.linears(ops, SHAPES, fmt, tokens, torch.bfloat16):
                        good = operands.product_is_exact(ops, linear, torch.bfloat16)
                        if not good or not operands.lift_is_right(ops, linear):
                            raise SystemExit(
                                f"{function.symbol} is wrong at {linear.rows} x {linear.features}"
                            )
                        called += 1
            print(f"{function.symbol} is right", flush=True)
    return called


def plain_and_many(kernels: Kernels, device: torch.device) -> int:
    """The plain kernels, the tile kernels and lifted_linear in every dtype; the number of calls checked."""
    ops, called = Ops(kernels), 0
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for rows, features in SHAPES:
            fmt = FORMATS[0]
            t1, t2 = transform_shape(features, fmt)
            inverse = torch.randn(t2, t2, generator=generator) / t2**0.5
            mapping = torch.randn(fmt.subspace_dim, fmt.lifted_dim, generator=generator) / fmt.lifted_dim**0.5
            left = torch.randn(t1, t1, generator=generator) / t1**0.5
            right = reference.decode_right(inverse, mapping)
            packed = pack_signs(torch.randn(rows, t1 * right.shape[1], generator=generator))
            scale = torch.rand(rows, generator=generator)
            for tokens in (1, 5, 40):
                x = torch.randn(tokens, features, generator=generator).to(dtype)
                on = [t.to(device) for t in (x, left, right, packed, scale)]
                z, z_scale = ops.lift(on[0], None, on[1], on[2])
                want = reference.sign_matmul(z.cpu(), z_scale.cpu(), packed, scale, dtype)
                tiles = [on[3]] + ([ops.tiles.from_packed(on[3], rows)] if ops.tiles.available else [])
                for signs in tiles:
                    if not torch.equal(ops.sign_matmul(z, z_scale, signs, on[4], dtype).cpu(), want):
                        raise SystemExit(
                            f"sign_matmul is wrong at {rows} x {features}, {tokens} tokens, {dtype}"
                        )
                    many = (on[0], None, on[1], inverse.to(device), mapping.to(device), signs, on[4])
                    got = ops.lifted_linear(*many).cpu().float()
                    exact = reference.lifted_linear(x.double(), None, left.double(), inverse.double(),
                                                    mapping.double(), packed, scale.double()).float()  # fmt: skip
                    if (got - exact).norm() > 0.02 * exact.norm():
                        raise SystemExit(
                            f"lifted_linear is wrong at {rows} x {features}, {tokens} tokens, {dtype}"
                        )
                    called += 2
        print(f"plain, tile and weight-first kernels are right in {dtype}", flush=True)
    return called


def main() -> None:
    device = torch.device("cuda", 0)
    kernels = load_kernels(Path(sys.argv[1]), device)
    called = small_tokens(kernels, device) + plain_and_many(kernels, device)
    torch.cuda.synchronize()
    print(f"{called} calls of {len(kernels.functions)} functions are right")


if __name__ == "__main__":
    main()
