"""Time the tensor-core kernels of a CUDA object on this GPU; needs torch and tvm_ffi, neither TVM nor a compiler.

    python scripts/bench_gpu_kernels.py OUT/kernels/cuda-sm_90a.so [--records codegen/records] [--json FILE]

Weights are read cold: every measurement walks through more than 1.5 GB of distinct signs in one CUDA graph, in which
a kernel may start while the one before it ends, as in a model. Figures are medians of replays. The read ceiling
is the best rate of a kernel that only reads, measured in the same run; fractions are useful bits per second over it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from liftc.format import LiftFormat
from liftc.kernel_object import KernelFunction
from liftc.runtime.kernels import load_kernels
from liftc.runtime.ops import Ops
from liftc.runtime.planes import Planes
from liftc.runtime.tiles import tile_shape
from liftc.spec import Z_MAX, transform_shape

FORMATS = (LiftFormat(77, 32), LiftFormat(64, 32), LiftFormat(96, 32))
BATCHES = (1, 4, 8, 16)
MODELS = {  # name: layers, ((linear, out_features, in_features), ...)
    "Llama-2-70B": (
        6,
        (("qkv", 10240, 8192), ("o", 8192, 8192), ("gate+up", 57344, 8192), ("down", 8192, 28672)),
    ),
    "Llama-2-7B": (
        8,
        (("qkv", 12288, 4096), ("o", 4096, 4096), ("gate+up", 22016, 4096), ("down", 4096, 11008)),
    ),
}
COLD_BYTES = 1_500_000_000
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Linear:
    """A lifted linear with its own random signs; the other operands are shared by linears of the same size."""

    name: str
    rows: int
    features: int
    lifted: int
    tiles: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    x: torch.Tensor
    scale: torch.Tensor
    planes: Planes
    z_scale: torch.Tensor


class Bench:
    """Kernels, a pool of random signs, and measurements on one GPU."""

    def __init__(self, path: Path, pool_bytes: int) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.kernels = load_kernels(path, self.device)
        self.ops = Ops(self.kernels)
        if not self.ops.tiles.available:
            raise SystemExit(f"{path.name} has no tensor-core kernels for {torch.cuda.get_device_name()}")
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.pool = torch.empty(pool_bytes // 4, dtype=torch.int32, device=self.device)
        step = 1 << 26
        for part in self.pool.split(step):
            part.copy_(self._random(-(2**31), 2**31, (part.numel(),), torch.int64))
        self.ceiling = self._read_ceiling()

    def _random(self, low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device=self.device, dtype=dtype)

    def median(self, run: Callable[[], Any], repeats: int = 11) -> float:
        """Microseconds of `run`, median of repeats after two for warming up."""
        times = []
        for index in range(repeats + 2):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            if index >= 2:
                times.append(begin.elapsed_time(end) * 1e3)
        return statistics.median(times)

    def graph(self, run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        """`run` captured after one call, so that modules are loaded and states exist."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph

    def _read_ceiling(self) -> float:
        """GB/s. Reads for a second first, so that clocks are at their working rate."""
        read = self.kernels.functions[self.kernels.of("read_ceiling")[0].symbol]
        seen = torch.zeros(1, dtype=torch.int32, device=self.device)
        processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        for _ in range(max(1, int(1.5e12 / self.pool.nbytes))):
            read(self.pool, seen, 2 * processors)
        times = [self.median(partial(read, self.pool, seen, n * processors)) for n in (1, 2, 3, 4, 8)]
        return float(self.pool.nbytes / min(times) / 1e3)

    def linears(self, shapes: Sequence[tuple[str, int, int]], fmt: LiftFormat, tokens: int) -> list[Linear]:
        """Linears of these (name, rows, features), each with the next signs of the pool."""
        made, shared, at = [], {}, 0
        for name, rows, features in shapes:
            left, right = transform_shape(features, fmt)
            lifted = right // fmt.subspace_dim * fmt.lifted_dim
            shape = tile_shape(rows, left * lifted)
            size = shape[0] * shape[1] * 128
            tiles, at = self.pool[at : at + size].view(shape), at + size
            if (rows, features) not in shared:
                z = self._random(-Z_MAX, Z_MAX + 1, (tokens, left * lifted), torch.int64).to(torch.int16)
                shared[rows, features] = (
                    torch.randn(left, left, generator=self.generator, device=self.device),
                    torch.randn(right, lifted, generator=self.generator, device=self.device),
                    torch.randn(tokens, features, generator=self.generator, device=self.device).to(DTYPE),
                    torch.rand(rows, generator=self.generator, device=self.device),
                    self.ops.tiles.planes.split(z),
                    torch.rand(tokens, 1, generator=self.generator, device=self.device),
                )
            made.append(Linear(name, rows, features, left * lifted, tiles, *shared[rows, features]))
        return made

    def product(self, linear: Linear) -> torch.Tensor:
        """sign_matmul of operands that are ready."""
        return self.ops.tiles.sign_matmul(linear.planes, linear.z_scale, linear.tiles, linear.scale, DTYPE)

    def whole(self, linear: Linear) -> torch.Tensor:
        """lift and sign_matmul."""
        z, z_scale = self.ops.lift_operands(linear.x, None, linear.left, linear.right)
        return self.ops.tiles.sign_matmul(z, z_scale, linear.tiles, linear.scale, DTYPE)

    def exact(self, linear: Linear) -> bool:
        """Whether the product equals the exact integer sum with its two scales."""
        tokens = linear.planes.tokens
        parts = linear.planes.data[:, :, : 2 * tokens].double().view(-1, 4, tokens, 2, 64)
        z = (256 * parts[:, :, :, 0] + parts[:, :, :, 1]).permute(2, 0, 1, 3).reshape(tokens, -1)
        z = z[:, : linear.lifted]
        got, step = self.product(linear), 2048
        for begin in range(0, linear.rows, step):
            end = min(begin + step, linear.rows)
            signs = torch.empty(end - begin, linear.lifted, dtype=torch.float32, device=self.device)
            self.ops.tiles.unpack(linear.tiles[begin // 16 : (end + 15) // 16], signs)
            want = ((z @ signs.double().T).float() * linear.z_scale) * linear.scale[begin:end]
            if not torch.equal(got[:, begin:end], want.to(DTYPE)):
                return False
        return True

    def chain(self, linears: Sequence[Linear], with_lift: bool) -> float:
        """Microseconds of all linears in order."""
        step = self.whole if with_lift else self.product

        def run() -> None:
            for linear in linears:
                step(linear)

        return self.median(self.graph(run).replay)

    def dense(self, rows: int, features: int, tokens: int) -> float:
        """Microseconds per dense linear in float16 (cuBLAS), weights cold."""
        count = max(1, -(-COLD_BYTES // (rows * features * 2)))
        count = min(count, self.pool.nbytes // (rows * features * 2))
        weights = self.pool[: count * rows * features // 2].view(torch.float16).view(count, rows, features)
        x = torch.zeros(tokens, features, dtype=torch.float16, device=self.device)

        def run() -> None:
            for weight in weights:
                torch.nn.functional.linear(x, weight)

        return self.median(self.graph(run).replay) / count

    def unpacked(self, linear: Linear) -> float:
        """Microseconds of a product in plain steps: signs to float16 in memory, then a dense product."""
        signs = torch.empty(linear.rows, linear.lifted, dtype=torch.float16, device=self.device)
        z = torch.zeros(linear.planes.tokens, linear.lifted, dtype=torch.float16, device=self.device)

        def run() -> None:
            self.ops.tiles.unpack(linear.tiles, signs)
            torch.nn.functional.linear(z, signs)

        return self.median(self.graph(run).replay, 5)

    def serving(self, tokens: int) -> KernelFunction:
        """The product kernel for so many tokens."""
        return next(f for f in self.kernels.of("sign_matmul_tiled") if f.accepts(tokens, 0, 0))


def driver_version() -> str:
    """Version of the NVIDIA kernel driver, or "unknown"."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return "unknown"
    return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")


def measurements(
    bench: Bench, formats: Sequence[LiftFormat], batches: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """One record per chain and per linear; bytes are those of the signs alone."""
    capability = torch.cuda.get_device_capability(bench.device)
    common = {
        "kernel_version": bench.kernels.object.kernel_version, "arch": f"sm_{capability[0]}{capability[1]}",
        "device": torch.cuda.get_device_name(bench.device), "read_ceiling_gbs": round(bench.ceiling, 1),
        "torch": torch.__version__, "driver": driver_version(),
        "when": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }  # fmt: skip
    knobs = list(bench.kernels.object.knobs)
    for fmt in formats:
        for tokens in batches:
            kernel = bench.serving(tokens)
            for model, (layers, shapes) in MODELS.items():
                linears = bench.linears(list(shapes) * layers, fmt, tokens)
                status = "ok" if all(bench.exact(linear) for linear in linears[: len(shapes)]) else "wrong"
                size = sum(linear.rows * linear.lifted for linear in linears) / 8
                for what, with_lift in (("sign_matmul", False), ("lift+sign_matmul", True)):
                    time = bench.chain(linears, with_lift)
                    yield common | {
                        "kernel": what, "symbol": kernel.symbol, "format": str(fmt),
                        "chain": f"{layers} layers of {model}",
                        "out_features": 0, "in_features": 0, "batch": tokens, "knobs": knobs, "status": status,
                        "microseconds": round(time, 2), "gigabytes_per_second": round(size / time / 1e3, 1),
                        "fraction_of_ceiling": round(size / time / 1e3 / bench.ceiling, 4),
                    }  # fmt: skip
                for shape in shapes:
                    bits = linears[[s[0] for s in shapes].index(shape[0])]
                    count = max(1, -(-COLD_BYTES // (bits.tiles.nbytes)))
                    count = min(count, bench.pool.nbytes // bits.tiles.nbytes)
                    copies = bench.linears([shape] * count, fmt, tokens)
                    for what, with_lift in (("sign_matmul", False), ("lift+sign_matmul", True)):
                        time = bench.chain(copies, with_lift) / count
                        size = bits.rows * bits.lifted / 8
                        extra = {}
                        if not with_lift and fmt == formats[0]:
                            extra = {
                                "cublas_float16_microseconds": round(
                                    bench.dense(bits.rows, bits.features, tokens), 2
                                ),
                                "unpack_and_matmul_microseconds": round(bench.unpacked(bits), 2),
                            }
                        yield common | {
                            "kernel": what, "symbol": kernel.symbol, "format": str(fmt),
                            "linear": f"{model} {shape[0]}",
                            "out_features": bits.rows, "in_features": bits.features, "batch": tokens, "knobs": knobs,
                            "status": status, "microseconds": round(time, 2),
                            "gigabytes_per_second": round(size / time / 1e3, 1),
                            "fraction_of_ceiling": round(size / time / 1e3 / bench.ceiling, 4), **extra,
                        }  # fmt: skip


def main() -> None:
    """Measure, print one line per record, append the records."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kernels", type=Path)
    parser.add_argument("--records", type=Path, help="folder whose <device>.jsonl gets the records")
    parser.add_argument("--json", type=Path, help="file for all records of this run")
    parser.add_argument("--format", type=LiftFormat.parse, action="append")
    parser.add_argument("--batch", type=int, action="append")
    a = parser.parse_args()
    bench = Bench(a.kernels, 2_000_000_000)
    print(f"{torch.cuda.get_device_name()}, read ceiling {bench.ceiling:.0f} GB/s, {a.kernels.name}")
    records = []
    for record in measurements(bench, tuple(a.format or FORMATS), tuple(a.batch or BATCHES)):
        records.append(record)
        what = record.get("chain") or record["linear"]
        peers = [
            f" {k.removesuffix('_microseconds')} {record[k]} us"
            for k in record
            if k.endswith("_microseconds")
        ]
        print(
            f"{record['format']} batch {record['batch']:2d} {what:28s} {record['kernel']:17s}"
            f"{record['microseconds']:9.1f} us {record['gigabytes_per_second']:7.0f} GB/s "
            f"{100 * record['fraction_of_ceiling']:5.1f} % {record['status']}"
            + "".join(peers),
            flush=True,
        )  # fmt: skip
    if a.json:
        a.json.write_text(json.dumps(records, indent=1))
    if a.records:
        name = torch.cuda.get_device_name().replace(" ", "-")
        with (a.records / f"{name}.jsonl").open("a") as stream:
            stream.writelines(json.dumps(record, sort_keys=True) + "\n" for record in records)


if __name__ == "__main__":
    main()
