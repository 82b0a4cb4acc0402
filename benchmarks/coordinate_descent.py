"""What sweeps of coordinate descent over the blocks of columns gain after block LDLQ, on one decoder block of a model.

    python benchmarks/coordinate_descent.py MODEL [--block 3] [--bits 2.4] [--beam 64] [--sweeps 3]

A sweep encodes every block of columns once more in the metric of its own part of the damped gram H, its target moved
by the errors of all other blocks, and keeps the rows whose error tr(E H Eᵀ) falls. Prints, per group of linears, the
error after LDLQ over the energy, after each sweep over that, and after one least-squares scale per row on top.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch.fx import Node

from liftc.driver.compile import CompileOptions, prepare_job
from liftc.driver.quantize import make_stream
from liftc.quant.activations import Budget
from liftc.quant.encode import encode_prepared, prepare_many
from liftc.quant.ldlq import diagonal_blocks, quantize_group
from liftc.quant.mapping import lam_of, load_mapping
from liftc.quant.result import QuantizeOptions
from liftc.quant.whitening import Whitening, damped
from liftc.spec import LiftSpec


def quadratic(error: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """e H eᵀ of every row."""
    return ((error @ metric) * error).sum(1)


class Descent:
    """One group after LDLQ, in whitened coordinates."""

    def __init__(
        self,
        weight: torch.Tensor,
        gram: torch.Tensor,
        spec: LiftSpec,
        whitening: Whitening,
        options: QuantizeOptions,
    ) -> None:
        self.mapping, self.beam = load_mapping(spec.format), options.beam
        lam, d = lam_of(spec.format), spec.format.subspace_dim
        found = quantize_group(
            weight, gram, spec, whitening, self.mapping, beam=self.beam, damp=options.damp, lam=lam
        )
        self.scale = found.output_scale.float()[:, None]
        self.wanted, self.decoded = (whitening.whiten_weight(w).double() for w in (weight, found.weight))
        self.metric = damped(whitening.whiten_gram(gram.double()), options.damp)
        self.blocks = diagonal_blocks(self.metric, d)
        self.searches = prepare_many(self.mapping, torch.linalg.cholesky(self.blocks).mT, lam)
        self.size = d

    def loss(self, scale: torch.Tensor | None = None) -> float:
        """tr(E H Eᵀ) / tr(W H Wᵀ), with a further factor (OC, 1) per row."""
        decoded = self.decoded if scale is None else self.decoded * scale
        error = quadratic(self.wanted - decoded, self.metric).sum()
        return float(error / quadratic(self.wanted, self.metric).sum())

    def sweep(self) -> None:
        """Encode every block once more."""
        product = (self.wanted - self.decoded) @ self.metric
        for index, search in enumerate(self.searches):
            columns, own = slice(index * self.size, (index + 1) * self.size), self.blocks[index]
            error = self.wanted[:, columns] - self.decoded[:, columns]
            others = product[:, columns] - error @ own
            target = self.wanted[:, columns] + torch.linalg.solve(own, others.T).T
            signs = encode_prepared((target.float() / self.scale), search, self.beam)
            new = ((signs.float() @ self.mapping.T) * self.scale).double()
            moved = self.wanted[:, columns] - new
            before, after = (quadratic(e, own) + 2 * (e * others).sum(1) for e in (error, moved))
            new = torch.where((after < before)[:, None], new, self.decoded[:, columns])
            product += (self.decoded[:, columns] - new) @ self.metric[columns]
            self.decoded[:, columns] = new

    def row_scale(self) -> torch.Tensor:
        """The factor (OC, 1) of every row with the least error."""
        along = ((self.wanted @ self.metric) * self.decoded).sum(1)
        return (along / quadratic(self.decoded, self.metric))[:, None]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--block", type=int, default=3)
    parser.add_argument("--bits", type=float, default=2.4)
    parser.add_argument("--beam", type=int, default=64)
    parser.add_argument("--sweeps", type=int, default=3)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--rows", type=int, default=512, help="rows of each group (default 512)")
    parser.add_argument("--captured", type=Path, help="folder that liftc capture wrote")
    a = parser.parse_args()
    options = QuantizeOptions(beam=a.beam)
    job = prepare_job(
        a.model, CompileOptions(bits=a.bits, calibration_windows=a.windows, captured=a.captured)
    )
    with tempfile.TemporaryDirectory() as folder:
        stream = make_stream(
            job.captured, job.program, job.inputs, options, Path(folder), "cpu", Budget(None)
        )
        runner, fetch = stream.new_runner(stream.stores()), stream.checkpoint.tensor
        index = next(i for i, s in enumerate(runner.segments) if s.block == a.block)
        for earlier in range(index):
            runner.advance(earlier, fetch)
        for lift, names in stream.groups(runner.segments[index]).items():
            source, spec, rows = stream.nodes[names[0]].args[0], job.program.lifts[lift], []
            assert isinstance(source, Node)
            runner.observe(index, fetch, {source: lambda x, rows=rows: rows.append(x.float().flatten(0, -2))})
            inputs = torch.cat(rows)
            weight = torch.cat([fetch(job.program.linears[n].weight).float() for n in names])[: a.rows]
            started = time.perf_counter()
            descent = Descent(weight, inputs.T @ inputs / len(inputs), spec, stream.whitening(spec), options)
            after_ldlq, first = time.perf_counter() - started, descent.loss()
            ratios = []
            for _ in range(a.sweeps):
                descent.sweep()
                ratios.append(f"{descent.loss() / first:.3f}")
            scaled = descent.loss(descent.row_scale()) / first
            swept = time.perf_counter() - started - after_ldlq
            print(
                f"{names[0]:40s} LDLQ {first:.5f} ({after_ldlq:.1f} s), sweeps x {' '.join(ratios)} ({swept:.1f} s), "
                f"row scales x {scaled:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
