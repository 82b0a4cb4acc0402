"""Operands of the kernels, their layouts written with torch: what the kernels are compared with."""

from __future__ import annotations

import torch

from liftc.format import LiftFormat
from liftc.packing import unpack_signs
from liftc.spec import transform_shape


def tile_layout(packed: torch.Tensor) -> torch.Tensor:
    """tiles (NB, KB, 32, 4) of a packed matrix: the layout of codegen/tir_tiles.py, written as one permutation."""
    groups, columns = packed.shape
    width = -(-columns // 256)
    padded = torch.zeros(groups * 32, width * 256, dtype=torch.int64, device=packed.device)
    padded[:, :columns] = unpack_signs(packed, groups * 32, torch.int64).add(1).div(2, rounding_mode="floor")
    # rows: block, half, g; columns: block, j div 2, t, j mod 2, h, byte
    bits = padded.view(groups * 2, 2, 8, width, 4, 4, 2, 2, 4).permute(0, 3, 2, 5, 7, 1, 8, 4, 6)
    words = (bits.reshape(groups * 2, width, 32, 4, 32) << torch.arange(32, device=packed.device)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def z_of(planes: torch.Tensor, tokens: int, columns: int) -> torch.Tensor:
    """The fixed-point values int16 (tokens, columns) that planes of either layout stand for."""
    blocks, pieces, _, wide = planes.shape
    bytes_of = planes[:, :, : 2 * tokens].to(torch.int32).view(blocks, pieces, tokens, 2, wide)
    z = 256 * bytes_of[..., 0, :] + bytes_of[..., 1, :]
    if pieces == 4:  # runs of 64 columns
        ordered = z.permute(2, 0, 1, 3)
    else:  # piece: quarter, t; byte: s, e; column: quarter, s, t, e
        ordered = z.view(blocks, 4, 4, tokens, 4, 4).permute(3, 0, 1, 4, 2, 5)
    return ordered.reshape(tokens, -1)[:, :columns].to(torch.int16)


def linear_factors(in_features: int, fmt: LiftFormat) -> tuple[list[torch.Tensor], int]:
    """Random left, right_inverse and mapping_matrix of a lifted linear, and the columns of its signs."""
    g = torch.Generator().manual_seed(in_features)
    t1, t2 = transform_shape(in_features, fmt)
    shapes = ((t1, t1), (t2, t2), (fmt.subspace_dim, fmt.lifted_dim))
    factors = [torch.randn(shape, generator=g) / shape[0] ** 0.5 for shape in shapes]
    return factors, t1 * t2 // fmt.subspace_dim * fmt.lifted_dim


def planes_of(z: torch.Tensor, columns: int) -> torch.Tensor:
    """Planes int8 (KB, 4, columns, 64) of z; other columns, and those of z past its last, hold 99."""
    tokens, width = z.shape
    blocks = -(-width // 256)
    padded = torch.full((tokens, blocks * 256), 99 * 257, dtype=torch.int32)
    padded[:, :width] = z
    high = (padded + 128).div(256, rounding_mode="floor")
    parts = torch.stack([high, padded - 256 * high], 1).view(2 * tokens, blocks, 4, 64)
    planes = torch.full((blocks, 4, columns, 64), 99, dtype=torch.int8)
    planes[:, :, : 2 * tokens] = parts.permute(1, 2, 0, 3).to(torch.int8)
    return planes


def group_planes(z: torch.Tensor, columns: int) -> torch.Tensor:
    """Planes int8 (KB, 16, columns, 16) of z, as the warp-group kernels take them; other columns hold 99."""
    tokens, width = z.shape
    blocks = -(-width // 256)
    padded = torch.full((tokens, blocks * 256), 99, dtype=torch.int32)
    padded[:, :width] = z
    high = (padded + 128).div(256, rounding_mode="floor")
    parts = torch.stack([high, padded - 256 * high], 1).view(2 * tokens, blocks, 4, 4, 4, 4)
    planes = torch.full((blocks, 16, columns, 16), 99, dtype=torch.int8)
    # columns of a block: quarter, t, step and half, byte
    planes.view(blocks, 4, 4, columns, 4, 4)[:, :, :, : 2 * tokens] = parts.permute(1, 2, 4, 0, 3, 5).to(
        torch.int8
    )
    return planes


def halves() -> tuple[torch.Tensor, torch.Tensor]:
    """x (1, 9) of norm 64 and right (9, 9) with a largest column of 2047.875: the step of z is exactly 8.

    With left = 1, T* x in steps is 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 6.5, 2 and 1023.9375.
    """
    x = torch.tensor([[4.0, 12.0, 20.0, -4.0, -12.0, -20.0, 52.0, 16.0, 4.0]])
    return x, torch.diag(torch.tensor([1.0] * 8 + [2047.875]))
