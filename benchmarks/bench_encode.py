"""Seconds per million weights of the encoder, compiled against plain PyTorch, in the same run.

    python benchmarks/bench_encode.py                         # this CPU, and the GPU when there is one
    python benchmarks/bench_encode.py --device cuda --beams 16,64,256,1024 --json bench.json

Each figure is the median of --repeats runs after a warm-up; the plain version runs once, on fewer weights,
because it is slow. Both encode the same Gaussian weights; their mean squared errors are printed as a check.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from liftc import env
from liftc.format import LiftFormat
from liftc.quant import lattice, mapping
from liftc.quant.encode import Prepared, decode, encode_prepared, prepare, project


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", action="append", choices=("cpu", "cuda"), help="default: all present")
    parser.add_argument("--formats", default="LQ-64/32,LQ-77/32,LQ-96/32")
    parser.add_argument("--beams", default="16,64,256")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--weights", type=int, help="default: a quarter of a million on a CPU, 8 million on a GPU"
    )
    parser.add_argument("--no-plain", action="store_true", help="leave the plain PyTorch column out")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    devices = a.device or (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    rows = []
    for device in devices:
        print(f"{lattice.device_name(device)}, {env.num_threads()} threads, torch {torch.__version__}")
        print(
            f"{'format':12s}{'beam':>6s}{'compiled s/M':>14s}{'plain s/M':>12s}{'ratio':>8s}{'mse':>10s}{'plain':>10s}"
        )
        for name in a.formats.split(","):
            for beam in map(int, a.beams.split(",")):
                row = measure(LiftFormat.parse(name), beam, device, a)
                rows.append(row)
                plain, ratio = row.get("plain_seconds", float("nan")), row.get("ratio", float("nan"))
                print(
                    f"{name:12s}{beam:6d}{row['seconds']:14.4f}{plain:12.3f}{ratio:8.1f}{row['mse']:10.5f}"
                    f"{row.get('plain_mse', float('nan')):10.5f}",
                    flush=True,
                )
    if a.json:
        a.json.write_text(json.dumps(rows, indent=1))


def measure(fmt: LiftFormat, beam: int, device: str, a: argparse.Namespace) -> dict[str, Any]:
    """One row: seconds per million weights of both versions, and their errors."""
    matrix = mapping.load_mapping(fmt).to(device)
    prepared = prepare(matrix, None, mapping.lam_of(fmt))
    d = fmt.subspace_dim
    count = (a.weights or (8_000_000 if device == "cuda" else 250_000)) // d
    w = torch.randn(count, d, generator=torch.Generator(device).manual_seed(0), device=device)
    encode_prepared(w[:256], prepared, beam)
    times = []
    for _ in range(a.repeats):
        wait(device)
        began = time.perf_counter()
        signs = encode_prepared(w, prepared, beam)
        wait(device)
        times.append((time.perf_counter() - began) / w.numel() * 1e6)
    row: dict[str, Any] = {
        "device": lattice.device_name(device), "format": str(fmt), "beam": beam,
        "seconds": statistics.median(times), "all_seconds": times, "weights": w.numel(),
        "mse": (w - decode(signs, matrix)).square().mean().item(),
    }  # fmt: skip
    if not a.no_plain:
        few = w[: max(64, min(count, (1 << 20 if device == "cuda" else 1 << 15) // d * 64 // max(beam, 64)))]
        plain_torch(few[:32], prepared, beam)
        wait(device)
        began = time.perf_counter()
        signs = plain_torch(few, prepared, beam)
        wait(device)
        row["plain_seconds"] = (time.perf_counter() - began) / few.numel() * 1e6
        row["plain_mse"] = (few - decode(signs, matrix)).square().mean().item()
        row["ratio"] = row["plain_seconds"] / row["seconds"]
    return row


def plain_torch(w: torch.Tensor, prepared: Prepared, beam: int, rows: int = 1024) -> torch.Tensor:
    """The usual way to write the search with PyTorch operators: residual rows, topk and gather per level."""
    big, table = prepared.lifted_dim, prepared.table
    # entry 1 << bit of a table differs from entry 0 by twice the element of R that belongs to the bit
    powers = (1 << torch.arange(4, device=w.device)).tolist()
    upper = torch.stack([(table[..., p] - table[..., 0]) / 2 for p in powers], -1).reshape(big, -1)[:, :big]
    upper = upper + torch.diag(prepared.diagonal)
    found = []
    for targets in torch.split(project(w, prepared, beam), rows):
        residual = targets[:, None, :].clone()
        signs = torch.zeros_like(residual)
        cost = residual.new_zeros(len(targets), 1)
        for i in range(big - 1, -1, -1):
            n = cost.shape[1]
            at = residual[:, :, i]
            children = torch.cat([cost + (at - upper[i, i]) ** 2, cost + (at + upper[i, i]) ** 2], 1)
            if 2 * n > beam:
                cost, pick = children.topk(beam, dim=1, largest=False, sorted=False)
            else:
                cost, pick = children, torch.arange(2 * n, device=w.device).expand(len(targets), -1)
            parent = (pick % n)[:, :, None].expand(-1, -1, big)
            sign = torch.where(pick < n, 1.0, -1.0)
            residual = residual.gather(1, parent) - sign[:, :, None] * upper[:, i]
            signs = signs.gather(1, parent)
            signs[:, :, i] = sign
        best = cost.argmin(1)[:, None, None].expand(-1, 1, big)
        found.append(signs.gather(1, best)[:, 0])
    return torch.cat(found).to(torch.int8)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
