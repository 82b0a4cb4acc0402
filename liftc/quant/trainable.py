"""The parts of a quantized model that gradients can change while its signs stay fixed.

Output scales move by a factor, s = s0 exp(g); norm weights and biases by a share of their root mean square,
v = v0 + rms(v0) g; linears that are not quantized yet are trained as float32 masters. What a linear sees
during training is what the artifact will hold: scales rounded to bfloat16, vectors to their own dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from liftc.quant.blocks import ScaledWeight


@dataclass(frozen=True)
class Rates:
    """Learning rates: of log output scales, of vectors relative to their size, of dense weights (absolute)."""

    scale: float = 2e-3
    vector: float = 2e-3
    dense: float = 1e-4


@dataclass
class _Scaled:
    unit: torch.Tensor
    start: torch.Tensor
    gain: torch.Tensor
    transposed: bool

    def scale(self) -> torch.Tensor:
        return self.start * self.gain.exp()


@dataclass
class _Vector:
    start: torch.Tensor
    size: torch.Tensor
    gain: torch.Tensor

    def value(self) -> torch.Tensor:
        return (self.start.float() + self.size * self.gain).to(self.start.dtype)


class Trainable:
    """Tensors of one or more blocks by checkpoint name: fixed, dense, scaled or vector, on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.fixed: dict[str, torch.Tensor] = {}
        self._dense: dict[str, tuple[torch.Tensor, torch.dtype]] = {}
        self._scaled: dict[str, _Scaled] = {}
        self._vectors: dict[str, _Vector] = {}

    def __contains__(self, name: str) -> bool:
        return any(name in table for table in (self.fixed, self._dense, self._scaled, self._vectors))

    @property
    def weight_count(self) -> int:
        """Weights of all quantized linears."""
        return sum(held.unit.numel() for held in self._scaled.values())

    def add_vector(self, name: str, value: torch.Tensor) -> None:
        """A norm weight or bias (n,); one of zeros moves in units of 1e-2."""
        start = value.detach().to(self.device)
        size = start.float().square().mean().sqrt()
        size = torch.where(size > 0, size, torch.full_like(size, 1e-2))
        self._vectors[name] = _Vector(start, size, torch.zeros_like(start, dtype=torch.float32))

    def add_dense(self, name: str, value: torch.Tensor) -> None:
        """A linear weight that is still to be quantized, as the graph reads it."""
        self._dense[name] = (value.detach().to(self.device, torch.float32, copy=True), value.dtype)

    def dense(self, name: str) -> torch.Tensor:
        """The present float32 value of a dense weight."""
        return self._dense[name][0].detach()

    def quantized(self, name: str, unit: torch.Tensor, scale: torch.Tensor, *, transposed: bool) -> None:
        """Replace a weight by diag(scale) unit; unit (OC, IC) in the model's dtype, scale (OC,)."""
        self._dense.pop(name, None)
        self.fixed.pop(name, None)
        start = scale.detach().to(self.device, torch.float32)
        self._scaled[name] = _Scaled(unit.to(self.device), start, torch.zeros_like(start), transposed)

    def parameters(self, *, dense: bool) -> list[tuple[str, list[torch.Tensor]]]:
        """("scale" | "vector" | "dense", tensors), kinds without tensors left out."""
        kinds = [("scale", [s.gain for s in self._scaled.values()]),
                 ("vector", [v.gain for v in self._vectors.values()])]  # fmt: skip
        if dense:
            kinds.append(("dense", [master for master, _ in self._dense.values()]))
        return [(kind, tensors) for kind, tensors in kinds if tensors]

    def weights(self) -> Mapping[str, torch.Tensor | ScaledWeight]:
        """What BlockRunner.outputs takes; follows the parameters under autograd."""
        found: dict[str, torch.Tensor | ScaledWeight] = dict(self.fixed)
        found.update({name: master.to(dtype) for name, (master, dtype) in self._dense.items()})
        for name, held in self._scaled.items():
            found[name] = ScaledWeight(held.unit, _rounded(held.scale()), held.transposed)
        found.update({name: vector.value() for name, vector in self._vectors.items()})
        return found

    @torch.no_grad()
    def tensor(self, name: str) -> torch.Tensor:
        """The present value of any tensor, as the graph reads it."""
        held = self.weights_of(name)
        return held.dense() if isinstance(held, ScaledWeight) else held

    def weights_of(self, name: str) -> torch.Tensor | ScaledWeight:
        """One entry of `weights`."""
        if name in self._scaled:
            held = self._scaled[name]
            return ScaledWeight(held.unit, _rounded(held.scale()), held.transposed)
        if name in self._vectors:
            return self._vectors[name].value()
        if name in self._dense:
            master, dtype = self._dense[name]
            return master.to(dtype)
        return self.fixed[name]

    def scales(self) -> dict[str, torch.Tensor]:
        """bfloat16 (OC,) output scale of every quantized weight, on the CPU."""
        return {n: s.scale().detach().to(torch.bfloat16).cpu() for n, s in self._scaled.items()}

    def vectors(self) -> dict[str, torch.Tensor]:
        """All vectors in their own dtype, on the CPU."""
        return {name: v.value().detach().cpu() for name, v in self._vectors.items()}

    def changed_vectors(self) -> dict[str, torch.Tensor]:
        """Vectors that training moved, in their own dtype, on the CPU."""
        values = {name: (v.value().detach(), v.start) for name, v in self._vectors.items()}
        return {name: new.cpu() for name, (new, old) in values.items() if not torch.equal(new, old)}


def _rounded(scale: torch.Tensor) -> torch.Tensor:
    """bfloat16 rounding whose gradient is the identity."""
    return scale + (scale.detach().to(torch.bfloat16).float() - scale.detach())
