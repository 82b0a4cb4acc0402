"""Rows of `liftc bench kernels` for what surrounds a linear: operations of their own, and forms of its kernels.

Before it a norm, a gate or a GELU, behind it a bias and a residual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import gelu, layer_norm, silu

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


@dataclass(frozen=True)
class Surroundings:
    """What a language model has before a linear ("" for nothing) and adds behind it."""

    before: str
    bias: bool = False
    residual: bool = False

    @property
    def name(self) -> str:
        """As the rows have it."""
        behind = ["bias"] * self.bias + ["residual"] * self.residual
        return ", ".join([self.before] * bool(self.before) + behind)


def surroundings(shape: Shape) -> tuple[Surroundings, ...]:
    """Those of a linear by its size: behind a norm where it has more outputs than inputs, else before a residual,
    behind a gate or a GELU where it has more inputs. As in Llama, in Gemma and in GPT-2.
    """
    rows, features = shape
    if rows > features:
        return (Surroundings("norm"), Surroundings("unit offset norm"), Surroundings("layer norm", bias=True))
    if rows == features:
        return (Surroundings("", residual=True),)
    return (
        Surroundings("gate", residual=True),
        Surroundings("gelu gate", residual=True),
        Surroundings("gelu", bias=True, residual=True),
    )


class FusedRows:
    """Rows of the kernels, operands and clock of `rows`; none where signs stay packed, as on a CPU."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.ops = rows, rows.ops
        self.fused = FusedLifts(rows.ops)

    def shape(self, shape: Shape, fmt: LiftFormat, batch: int) -> Iterator[Record]:
        """One linear, cold, in each of its surroundings: as operations of their own, then as the kernels take them."""
        rows = self.rows
        rounds = rows.rounds([shape], fmt, batch) if rows.cold else 1
        linears = rows.operands.linears(self.ops, [shape] * rounds, fmt, batch, rows.dtype)
        if linears[0].signs.dim() != 4 or rows.dtype == torch.float32:
            return
        for around in surroundings(shape):
            yield from self._surrounded(around, linears, shape, fmt, batch)

    def _surrounded(
        self, around: Surroundings, linears: list[Linear], shape: Shape, fmt: LiftFormat, batch: int
    ) -> Iterator[Record]:
        rows = self.rows
        separate, fused = self._lifts(around.before, shape[1], batch)
        bias = self._normal(shape[0]) if around.bias else None
        residual = self._normal(batch, shape[0]) if around.residual else None

        def multiply(linear: Linear, lifted: Lifted, in_kernel: bool) -> Tensor:
            added = (bias, residual) if in_kernel else ()
            y = self.ops.tiles.sign_matmul(*lifted, linear.signs, linear.scale, rows.dtype, *added)
            if not in_kernel and bias is not None:
                y = y + bias
            return y if in_kernel or residual is None else residual + y

        lifted = fused(linears[0])
        good = self._near(separate(linears[0]), lifted)
        good = good and torch.equal(multiply(linears[0], lifted, True), multiply(linears[0], lifted, False))
        for kernel, lift in (("separate+lift+sign_matmul", separate), ("fused+lift+sign_matmul", fused)):

            def work(lift: Callable[[Linear], Lifted] = lift) -> tuple[float, float] | None:
                def run() -> None:
                    for linear in linears:
                        multiply(linear, lift(linear), lift is fused)

                size = linears[0].sign_bytes
                return (rows.clock.microseconds(run) / len(linears), size) if good else None

            yield rows.attempt(kernel, shape, fmt, batch, work, knobs={"form": around.name})

    def _lifts(
        self, before: str, features: int, batch: int
    ) -> tuple[Callable[[Linear], Lifted], Callable[[Linear], Lifted]]:
        """The lift of what torch makes of x, and that of x itself."""
        dtype, fused = self.rows.dtype, self.fused
        x = self._normal(batch, features * (2 if before.endswith("gate") else 1))
        gain, shift = self._normal(features), self._normal(features)
        gate, up = x[:, :features], x[:, features:]

        def normed() -> Tensor:
            wide = x.float()
            return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _EPS)

        made: dict[str, Callable[[], Tensor]] = {
            "": lambda: x,
            "norm": lambda: gain * normed().to(dtype),
            "unit offset norm": lambda: (normed() * (gain.float() + 1.0)).to(dtype),
            "layer norm": lambda: layer_norm(x, (features,), gain, shift, _EPS),
            "gate": lambda: silu(gate) * up,
            "gelu gate": lambda: gelu(gate, approximate="tanh") * up,
            "gelu": lambda: gelu(x),
        }
        taken: dict[str, Callable[[Tensor, Tensor], Lifted]] = {
            "": lambda *factors: self.ops.lift_operands(x, None, *factors),
            "norm": lambda *factors: fused.norm(x, gain, _EPS, dtype, None, *factors),
            "unit offset norm": lambda *factors: fused.unit_offset_norm(x, gain, _EPS, None, *factors),
            "layer norm": lambda *factors: fused.layer_norm(x, gain, shift, _EPS, None, *factors),
            "gate": lambda *factors: fused.gate(x, None, *factors),
            "gelu gate": lambda *factors: fused.gelu(x, 1, None, *factors),
            "gelu": lambda *factors: fused.gelu(x, 2, None, *factors),
        }
        make, take = made[before], taken[before]
        return (
            lambda linear: self.ops.lift_operands(make(), None, linear.left, linear.right),
            lambda linear: take(linear.left, linear.right),
        )

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
