"""The oracle: plain torch meaning of every lift op. Every kernel is tested against these functions.

Shapes: D = lifted_dim, d = subspace_dim, t1 = left, t2 = right, IC <= t1 t2 = padded_in_features,
K = t1 (t2 / d) D = lifted_features, OC = out_features, G = ceil(OC / 32).
"""

from __future__ import annotations

import torch
from torch.nn import functional

from liftc.errors import LiftcError
from liftc.packing import unpack_signs
from liftc.spec import Z_MAX

MOST_NOTHING = 2.0**-100
"""Sums of squares and steps of z below this count as zero: they have no float32 inverse to rely on."""


def lift_real(
    x: torch.Tensor, activation_scale: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """Lifted activation T* x before fixed point (paper eq. 4): x (..., IC) -> float32 or float64 (..., K).

    T* x = reshape(left · reshape(x * activation_scale, (t1, t2)) · right), left (t1, t1), right (t2, K / t1).
    Computed in float64 when `left` is float64, else in float32. Raises LiftcError when IC > t1 t2.
    """
    work = left.dtype if left.dtype == torch.float64 else torch.float32
    t1, t2 = left.shape[0], right.shape[0]
    if x.shape[-1] > t1 * t2:
        raise LiftcError(f"lift: {x.shape[-1]} input features exceed the transform's {t1} x {t2}")
    scaled = x.to(work) if activation_scale is None else x.to(work) * activation_scale.to(work)
    padded = functional.pad(scaled, (0, t1 * t2 - x.shape[-1]))
    mixed = left.to(work) @ padded.reshape(*x.shape[:-1], t1, t2) @ right.to(work)
    return mixed.reshape(*x.shape[:-1], t1 * right.shape[1])


def lift_bound(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A bound of ||row k of T*|| for every k, float32 (): max_i ||left_i|| max_c ||right_:c||, rounded up.

    Row k = (i, c) of T* is the Kronecker product of row i of `left` and column c of `right`, so the bound is the
    largest norm itself. Computed in float64.
    """
    exact = left.double().norm(dim=1).amax() * right.double().norm(dim=0).amax()
    rounded = exact.float()
    return torch.where(
        rounded.double() < exact, torch.nextafter(rounded, torch.full_like(rounded, torch.inf)), rounded
    )


def lift_scale(
    x: torch.Tensor, activation_scale: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """Step of the fixed-point numbers, float32 (..., 1): lift_bound ||x * activation_scale||_2 / 16383 per token.

    By Cauchy and Schwarz no |T* x| exceeds 16383 steps. NaN where the sum of squares or the step is not finite in
    float32, 0 where one of them is below 2^-100: a token of zeros, or next to nothing.
    """
    work = left.dtype if left.dtype == torch.float64 else torch.float32
    scaled = x.to(work) if activation_scale is None else x.to(work) * activation_scale.to(work)
    squares = scaled.double().square().sum(-1, keepdim=True).float()
    scale = squares.sqrt() * (lift_bound(left, right) / Z_MAX)
    scale = torch.where((squares < MOST_NOTHING) | (scale < MOST_NOTHING), 0.0, scale)
    return torch.where(torch.isfinite(squares) & torch.isfinite(scale), scale, torch.nan)


def lift(
    x: torch.Tensor, activation_scale: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fixed-point lifted activation: z int16 (..., K) and z_scale float32 (..., 1), T* x ~ z * z_scale.

    z_scale as in lift_scale and z = round-half-even(T* x / z_scale), at most 16383 in magnitude; z = 0 where z_scale
    is 0 (a token of zeros) or NaN (a token with NaN or infinity).
    """
    real = lift_real(x, activation_scale, left, right).float()
    scale = lift_scale(x, activation_scale, left, right)
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    z = torch.round(real * inverse).clamp(-Z_MAX, Z_MAX)
    return torch.where(scale > 0, z, 0.0).nan_to_num(0.0).to(torch.int16), scale


def sign_matmul(
    z: torch.Tensor,
    z_scale: torch.Tensor,
    packed: torch.Tensor,
    output_scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y = output_scale * (B z) * z_scale with B the signs: z (..., K), packed (G, K) -> (..., OC) in `dtype`.

    The sum is an exact integer (|z| <= 16383, K <= 131072), so the result does not depend on the order of
    summation: y = cast((float32(sum) * z_scale) * float32(output_scale)).
    """
    signs = unpack_signs(packed, output_scale.shape[0], torch.float64)
    total = z.to(torch.float64) @ signs.T
    return ((total.float() * z_scale) * output_scale.float()).to(dtype)


def decode_weight(
    packed: torch.Tensor,
    output_scale: torch.Tensor,
    activation_scale: torch.Tensor | None,
    left: torch.Tensor,
    right: torch.Tensor,
    in_features: int,
) -> torch.Tensor:
    """The dense weight a lifted linear stands for, (OC, IC): diag(output_scale) B T*.

    float64 when `left` is float64, else float32.
    """
    work = left.dtype if left.dtype == torch.float64 else torch.float32
    t1, t2 = left.shape[0], right.shape[0]
    signs = unpack_signs(packed, output_scale.shape[0], work).view(-1, t1, right.shape[1])
    dense = (left.to(work).T @ (signs @ right.to(work).T)).reshape(-1, t1 * t2)[:, :in_features]
    if activation_scale is not None:
        dense = dense * activation_scale.to(work)
    return dense * output_scale.to(work)[:, None]


def lifted_linear(
    x: torch.Tensor,
    activation_scale: torch.Tensor | None,
    left: torch.Tensor,
    right_inverse: torch.Tensor,
    mapping_matrix: torch.Tensor,
    packed: torch.Tensor,
    output_scale: torch.Tensor,
) -> torch.Tensor:
    """Weight-first order (paper appendix D): decode the weight, then one dense product; (..., IC) -> (..., OC).

    right_inverse (t2, t2) and mapping_matrix (d, D) are those of decode_right, which gives the right of lift.
    """
    right = decode_right(right_inverse, mapping_matrix)
    weight = decode_weight(packed, output_scale, activation_scale, left, right, x.shape[-1])
    return functional.linear(x.to(weight.dtype), weight).to(x.dtype)


def decode_right(right_inverse: torch.Tensor, mapping_matrix: torch.Tensor) -> torch.Tensor:
    """Right factor of T*: right_inverse (t2, t2), mapping_matrix M (d, D) -> (t2, (t2 / d) D) = P2' (I ⊗ M)."""
    t2, d = right_inverse.shape[0], mapping_matrix.shape[0]
    if t2 % d:
        raise LiftcError(f"decode_right: right factor {t2} is not a multiple of d = {d}")
    work = torch.promote_types(torch.promote_types(right_inverse.dtype, mapping_matrix.dtype), torch.float32)
    blocks = right_inverse.to(work).view(t2, t2 // d, d) @ mapping_matrix.to(work)
    return blocks.reshape(t2, -1)
