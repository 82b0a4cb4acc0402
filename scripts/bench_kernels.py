"""Time the CPU kernels beside torch's dense linear on this machine; prints Markdown tables.

Usage: python scripts/bench_kernels.py OUT/kernels/llvm-x86-64-v4.so [--threads 2] [--format LQ-77/32]

Every figure is the best of many short batches, because other work on the machine only ever adds time.
Data is hot in cache: a real model reads its weights from memory, so these are costs of arithmetic and calls.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

from liftc import ir
from liftc.format import LiftFormat
from liftc.packing import pack_signs
from liftc.runtime.kernels import Kernels, load_kernels
from liftc.runtime.ops import WEIGHT_FIRST_TOKENS, register
from liftc.spec import transform_shape

LAYERS = ((576, 576), (1536, 576), (576, 1536))  # (out_features, in_features)


def microseconds(work: Callable[[], object], seconds: float = 1.0) -> float:
    """Best time per call over batches of about half a millisecond."""
    work()
    start = time.perf_counter()
    work()
    batch = max(1, min(50, int(5e-4 / (time.perf_counter() - start + 1e-9))))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(batch):
            work()
        best = min(best, (time.perf_counter() - start) / batch)
    return best * 1e6


class Layer:
    """Random operands of one lifted linear."""

    def __init__(self, out_features: int, in_features: int, fmt: LiftFormat) -> None:
        generator = torch.Generator().manual_seed(0)
        t1, t2 = transform_shape(in_features, fmt)
        lifted = t2 // fmt.subspace_dim * fmt.lifted_dim
        self.left = torch.randn(t1, t1, generator=generator)
        self.right = torch.randn(t2, lifted, generator=generator)
        self.in_scale = torch.rand(in_features, generator=generator) + 0.5
        self.packed = pack_signs(torch.randn(out_features, t1 * lifted, generator=generator))
        self.out_scale = torch.rand(out_features, generator=generator)
        self.weight = torch.randn(out_features, in_features, generator=generator)
        self.words = self.packed.numel()

    def lift(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z, z_scale = ir.lift(x, self.in_scale, self.left, self.right)
        return z, z_scale


def decode_table(fmt: LiftFormat, kernels: Kernels) -> None:
    """One token: kernel alone, whole ops, dense linears."""
    print(f"\n{fmt}, one token, best of batches, us")
    print("| layer | words | sign_matmul kernel | sign_matmul op | lift op | linear f32 | linear bf16 |")
    print("|---|---|---|---|---|---|---|")
    for out_features, in_features in LAYERS:
        layer = Layer(out_features, in_features, fmt)
        x = torch.randn(1, 1, in_features)
        z, z_scale = layer.lift(x)
        y = torch.empty(1, 1, out_features)
        kernel = kernels.functions["sign_matmul_f32_tile1"]
        times = [
            microseconds(partial(kernel, z, z_scale, layer.packed, layer.out_scale, y)),
            microseconds(partial(ir.sign_matmul, z, z_scale, layer.packed, layer.out_scale, torch.float32)),
            microseconds(partial(layer.lift, x)),
            microseconds(partial(functional.linear, x, layer.weight)),
            microseconds(partial(functional.linear, x.bfloat16(), layer.weight.bfloat16())),
        ]
        print(
            f"| {in_features} -> {out_features} | {layer.words} | {' | '.join(f'{t:.1f}' for t in times)} |"
        )


def batch_table(fmt: LiftFormat) -> None:
    """Tokens per call: activation-first against weight-first order, to place WEIGHT_FIRST_TOKENS."""
    print(f"\n{fmt}, lift + sign_matmul against weight-first lifted_linear, us per call")
    print("| layer | tokens | lift + sign_matmul | weight first | linear f32 |")
    print("|---|---|---|---|---|")
    before = WEIGHT_FIRST_TOKENS["cpu"]
    for out_features, in_features in LAYERS:
        layer = Layer(out_features, in_features, fmt)
        operands = (layer.in_scale, layer.left, layer.right, layer.packed, layer.out_scale)
        for tokens in (4, 16, 64, 128, 192, 256, 384, 512):
            x = torch.randn(1, tokens, in_features)
            times = []
            for limit in (tokens + 1, tokens):
                WEIGHT_FIRST_TOKENS["cpu"] = limit
                times.append(microseconds(partial(ir.lifted_linear, x, *operands), 0.5))
            times.append(microseconds(partial(functional.linear, x, layer.weight), 0.5))
            print(f"| {in_features} -> {out_features} | {tokens} | {' | '.join(f'{t:.0f}' for t in times)} |")
    WEIGHT_FIRST_TOKENS["cpu"] = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernels", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--format", type=LiftFormat.parse, default=LiftFormat(77, 32))
    parser.add_argument("--batches", action="store_true", help="also time many tokens per call")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kernels = load_kernels(options.kernels, torch.device("cpu"))
    kernels.set_num_threads(options.threads)
    register(kernels)
    print(f"{kernels.object.path.name}, {options.threads} threads, torch {torch.__version__}")
    decode_table(options.format, kernels)
    if options.batches:
        batch_table(options.format)


if __name__ == "__main__":
    main()
