"""Whitening transform T = diag(s1) (P1 ⊗ P2) of paper section 3.2, kept as its inverse's two factors.

T⁻¹ x = reshape(left · reshape(x * activation_scale, (t1, t2)) · right_inverse) with left = P1⁻¹ (t1, t1),
right_inverse = P2⁻ᵀ (t2, t2), activation_scale = 1 / s1. Weights move the other way: W' = W T.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from liftc.errors import QuantizeError


@dataclass(frozen=True)
class Whitening:
    """One transform on in_features <= t1 * t2 inputs (zero padded to t1 * t2).

    left: float32 (t1, t1). right_inverse: float32 (t2, t2). activation_scale: float32 (in_features,) or None.
    """

    left: torch.Tensor
    right_inverse: torch.Tensor
    activation_scale: torch.Tensor | None = None

    def to(self, device: torch.device) -> Whitening:
        """The same transform with its tensors on `device`."""
        scale = None if self.activation_scale is None else self.activation_scale.to(device)
        return Whitening(self.left.to(device), self.right_inverse.to(device), scale)

    @property
    def padded_in_features(self) -> int:
        return self.left.shape[0] * self.right_inverse.shape[0]

    def whiten_activation(self, x: torch.Tensor) -> torch.Tensor:
        """T⁻¹ x for x (..., in_features), in x's dtype -> (..., t1 t2)."""
        scaled = x if self.activation_scale is None else x * self.activation_scale.to(x)
        return self._mix(scaled, self.left.to(x), self.right_inverse.to(x))

    def whiten_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """W T for rows of weight (OC, in_features) -> (OC, t1 t2)."""
        scaled = weight if self.activation_scale is None else weight / self.activation_scale.to(weight)
        left = torch.linalg.inv(self.left.double()).T.to(weight)
        right = torch.linalg.inv(self.right_inverse.double()).T.to(weight)
        return self._mix(scaled, left, right)

    def unwhiten_weight(self, whitened: torch.Tensor, in_features: int) -> torch.Tensor:
        """W' T⁻¹ for rows of whitened (OC, t1 t2) -> (OC, in_features)."""
        dense = self._mix(whitened, self.left.T.to(whitened), self.right_inverse.T.to(whitened))
        dense = dense[:, :in_features]
        return dense if self.activation_scale is None else dense * self.activation_scale.to(whitened)

    def whiten_gram(self, gram: torch.Tensor) -> torch.Tensor:
        """T⁻¹ H T⁻ᵀ for the input gram H = E[x xᵀ] (in_features, in_features) -> (t1 t2, t1 t2)."""
        half = self.whiten_activation(gram)
        return self.whiten_activation(half.T.contiguous())

    def _mix(self, rows: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        t1, t2 = left.shape[0], right.shape[0]
        padded = functional.pad(rows, (0, t1 * t2 - rows.shape[-1]))
        mixed = left @ padded.reshape(*rows.shape[:-1], t1, t2) @ right
        return torch.flatten(mixed, -2)


def random_orthogonal(size: int, seed: int) -> torch.Tensor:
    """Haar-distributed orthogonal matrix, float64 (size, size), the same for the same seed."""
    if size < 1:
        raise QuantizeError(f"whitening: an orthogonal factor needs a positive size, got {size}")
    generator = torch.Generator().manual_seed(seed * 1_000_003 + size)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    orthogonal: torch.Tensor = q * torch.sign(torch.diagonal(r))
    return orthogonal


def orthogonal_factor(size: int, seed: int) -> torch.Tensor:
    """A Hadamard matrix with random signs on both sides where size is a power of two, which spreads every
    input evenly; else a random orthogonal matrix. float64 (size, size), the same for the same seed."""
    if size < 2 or size & (size - 1):
        return random_orthogonal(size, seed)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + size)
    signs = torch.randint(0, 2, (2, size), generator=generator, dtype=torch.float64) * 2 - 1
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return signs[0][:, None] * matrix * signs[1] / math.sqrt(size)


def orthogonal_whitening(left: int, right: int, seed: int) -> Whitening:
    """Data-free transform P1 ⊗ P2 of orthogonal factors; shared by all layers of the same shape."""
    p1 = orthogonal_factor(left, seed)
    p2 = orthogonal_factor(right, seed + 1)
    return Whitening(left=p1.T.float().contiguous(), right_inverse=p2.float().contiguous())


def damped(gram: torch.Tensor, damp: float) -> torch.Tensor:
    """Symmetrised float64 gram plus damp times its mean diagonal; a zero gram becomes the identity."""
    work = gram.double()
    work = work.add(work.T).div_(2)
    mean = work.diagonal().mean().item()
    if not math.isfinite(mean):
        raise QuantizeError(
            "calibration produced NaN or infinite activations; check the model's weights or use --dtype float32"
        )
    if mean <= 0:
        return torch.eye(work.shape[0], dtype=torch.float64, device=work.device)
    work.diagonal().add_(damp * mean)
    return work
