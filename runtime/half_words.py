"""Small matrices as operand words of half-precision tensor cores, in the orders that the kernels of the weight-first
order read (codegen/tensorcore_decode.py, codegen/tensorcore_whiten.py)."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def mapping_shape(subspace_dim: int, lifted_dim: int) -> tuple[int, int, int]:
    """(groups of 32 columns, pieces of at most 128 signs, steps of 16 signs of a piece)."""
    pieces = -(-lifted_dim // 128)
    return -(-subspace_dim // 32), pieces, -(-lifted_dim // (16 * pieces))


def mapping_words(mapping: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """mapping f32 (d, D) as operands of `decode_tiles`, and what it was divided by, f32 (1,), a power of two.

    int32 (groups pieces steps parts, 2, 32, 4): word e of lane 4 g + t of half h holds, as two float16, entries q and
    q + H of column 32 group + 8 (g div 2) + 2 (2 h + e div 2) + g mod 2, with H = 2 steps and q = 16 steps piece +
    2 H t + H - 1 - 2 step - e mod 2. Part 1 holds what rounding part 0 lost.
    """
    d, lifted = mapping.shape
    groups, pieces, steps = mapping_shape(d, lifted)
    scaled, power = _scaled(mapping)
    exact = torch.nn.functional.pad(scaled * 1024, (0, pieces * 16 * steps - lifted, 0, groups * 32 - d))
    high = exact.half()
    values = torch.stack([high, (exact - high.float()).half()][:parts])
    # columns: group, n div 2, half, word pair, n mod 2; signs: piece, t, half of the pair, reversed (step, word)
    values = values.view(parts, groups, 4, 2, 2, 2, pieces, 4, 2, steps, 2).flip((9, 10))
    words = values.permute(1, 6, 9, 0, 3, 2, 5, 7, 4, 10, 8).contiguous().view(torch.int32)
    return words.view(groups * pieces * steps * parts, 2, 32, 4), power.reshape(1) / 1024


def factor_tiles(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The factors as operands of `whiten`, and what they were divided by, f32 (1,), a power of two each.

    left f32 (t1, t1) -> int32 (n1, n1, 32, 4), n1 = ceil(t1 / 16): word e of lane 4 g + t of tile (a, b) holds, as two
    float16, row 16 a + g + 8 (e mod 2) and the columns 16 b + 2 t + 8 (e div 2) and one more.
    right f32 (t2, t2) -> int32 (nj, n2, 32, 4), nj = ceil(t2 / 16), n2 = 2 ceil(t2 / 32), transposed: row n + 8 s of
    tile (a, b) is column 16 a + 4 (n div 2) + 2 s + n mod 2 of `right`; word e of lane 4 g + t holds row g + 8 (e mod
    2) of the tile at rows 32 (b div 2) + 8 t + 4 (b mod 2) + 2 (e div 2) of `right` and one more.
    """
    (left, by_left), (right, by_right) = _scaled(left), _scaled(right)
    n1, t2 = -(-left.shape[0] // 16), right.shape[0]
    pad = torch.nn.functional.pad
    rest = n1 * 16 - left.shape[0]
    # row: tile, half, 8; column: tile, half, quarter, pair
    words = pad(left, (0, rest, 0, rest)).half().view(n1, 2, 8, n1, 2, 4, 2).permute(0, 3, 2, 5, 4, 1, 6)
    left_words = words.contiguous().view(torch.int32).view(n1, n1, 32, 4)
    nj, n2 = -(-t2 // 16), -(-t2 // 32) * 2
    rows = pad(right.t(), (0, n2 * 16 - t2, 0, nj * 16 - t2)).half()
    # column of right: tile, n div 2, half, n mod 2; row of right: pair of tiles, quarter, tile, half, pair
    words = rows.view(nj, 4, 2, 2, n2 // 2, 4, 2, 2, 2).permute(0, 4, 6, 1, 3, 5, 7, 2, 8)
    right_words = words.contiguous().view(torch.int32).view(nj, n2, 32, 4)
    return left_words, right_words, (by_left * by_right).reshape(1)


def _scaled(factor: Tensor) -> tuple[Tensor, Tensor]:
    """factor / p with p the power of two that brings its largest entry between 0.5 and 1, and p."""
    power = torch.exp2(torch.frexp(factor.abs().amax()).exponent.float())
    return factor / power, power
