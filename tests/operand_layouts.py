"""The operand layouts of the tensor-core kernels, written with torch: what the kernels are compared with."""

from __future__ import annotations

import torch

from liftc.packing import unpack_signs


def tile_layout(packed: torch.Tensor) -> torch.Tensor:
    """tiles (NB, KB, 32, 4) of a packed matrix: the layout of codegen/tir_tiles.py, written as one permutation."""
    groups, columns = packed.shape
    width = -(-columns // 256)
    padded = torch.zeros(groups * 32, width * 256, dtype=torch.int64)
    padded[:, :columns] = unpack_signs(packed, groups * 32, torch.int64).add(1).div(2, rounding_mode="floor")
    # rows: block, half, g; columns: block, j div 2, t, j mod 2, h, byte
    bits = padded.view(groups * 2, 2, 8, width, 4, 4, 2, 2, 4).permute(0, 3, 2, 5, 7, 1, 8, 4, 6)
    words = (bits.reshape(groups * 2, width, 32, 4, 32) << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def z_of(planes: torch.Tensor, tokens: int, columns: int) -> torch.Tensor:
    """The fixed-point values that planes stand for."""
    parts = planes[:, :, : 2 * tokens].to(torch.int32).view(-1, 4, tokens, 2, 64).permute(2, 0, 1, 3, 4)
    return (256 * parts[..., 0, :] + parts[..., 1, :]).reshape(tokens, -1)[:, :columns].to(torch.int16)
