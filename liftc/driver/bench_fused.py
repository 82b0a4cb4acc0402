"""Rows of `liftc bench kernels` for what surrounds a linear: operations of their own, and forms of its kernels.

Before it a norm or a gate, behind it a residual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from liftc.driver.bench_rows import Rows, Shape
from liftc.format import LiftFormat
from liftc.kernel_records import Record
from liftc.runtime.fused_lifts import FusedLifts
from liftc.runtime.operands import Linear, planes_to_z
from liftc.runtime.planes import Planes

Tensor = torch.Tensor
Lifted = tuple[Planes | Tensor, Tensor]

MOST_ERROR = 2e-3
"""Largest distance of lifted tokens, as a share of their norm: a bit of x now and then (runtime/fused_lifts.py)."""

_EPS = 1e-5


class FusedRows:
    """Rows of the kernels, operands and clock of `rows`; none where signs stay packed, as on a CPU."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.ops = rows, rows.ops
        self.fused = FusedLifts(rows.ops)

    def shape(self, shape: Shape, fmt: LiftFormat, batch: int) -> Iterator[Record]:
        """One linear, cold, as in a language model: behind an RMS norm where it has more outputs than inputs, else
        before a residual, behind a SiLU gate where it has more inputs.
        """
        rows = self.rows
        rounds = rows.rounds([shape], fmt, batch) if rows.cold else 1
        linears = rows.operands.linears(self.ops, [shape] * rounds, fmt, batch, rows.dtype)
        if linears[0].signs.dim() != 4 or rows.dtype == torch.float32:
            return
        gate, norm = shape[1] > shape[0], shape[1] < shape[0]
        form = "norm" if norm else "gate, residual" if gate else "residual"
        x = self._normal(batch, shape[1] * (2 if gate else 1))
        gain = self._normal(shape[1])
        residual = None if norm else self._normal(batch, shape[0])

        def separate(linear: Linear) -> Lifted:
            if form == "residual":
                return self.ops.lift_operands(x, None, linear.left, linear.right)
            return self._gate(linear, x) if gate else self._norm(linear, x, gain)

        def fused(linear: Linear) -> Lifted:
            if form == "residual":
                return self.ops.lift_operands(x, None, linear.left, linear.right)
            if gate:
                return self.fused.gate(x, None, linear.left, linear.right)
            return self.fused.norm(x, gain, _EPS, rows.dtype, None, linear.left, linear.right)

        def multiply(linear: Linear, lifted: Lifted, in_kernel: bool) -> Tensor:
            added = (None, residual) if in_kernel else ()
            y = self.ops.tiles.sign_matmul(*lifted, linear.signs, linear.scale, rows.dtype, *added)
            return y if in_kernel or residual is None else residual + y

        lifted = fused(linears[0])
        good = self._near(separate(linears[0]), lifted)
        good = good and torch.equal(multiply(linears[0], lifted, True), multiply(linears[0], lifted, False))
        for kernel, lift in (("separate+lift+sign_matmul", separate), ("fused+lift+sign_matmul", fused)):

            def work(lift: Callable[[Linear], Lifted] = lift) -> tuple[float, float] | None:
                def run() -> None:
                    for linear in linears:
                        multiply(linear, lift(linear), lift is fused)

                return (rows.clock.microseconds(run) / rounds, linears[0].sign_bytes) if good else None

            yield rows.attempt(kernel, shape, fmt, batch, work, knobs={"form": form})

    def _norm(self, linear: Linear, x: Tensor, gain: Tensor) -> Lifted:
        wide = x.float()
        root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _EPS)
        return self.ops.lift_operands(gain * (wide * root).to(x.dtype), None, linear.left, linear.right)

    def _gate(self, linear: Linear, x: Tensor) -> Lifted:
        gate, up = x.chunk(2, -1)
        return self.ops.lift_operands(torch.nn.functional.silu(gate) * up, None, linear.left, linear.right)

    def _near(self, one: Lifted, other: Lifted) -> bool:
        values = []
        for z, z_scale in (one, other):
            if not isinstance(z, Planes):
                return False
            values.append(planes_to_z(z).double() * z_scale.double())
        return bool((values[0] - values[1]).norm() <= MOST_ERROR * values[0].norm())

    def _normal(self, *shape: int) -> Tensor:
        generator = self.rows.operands.generator
        return torch.randn(list(shape), generator=generator, device=self.rows.device).to(self.rows.dtype)
