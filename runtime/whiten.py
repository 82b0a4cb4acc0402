"""Activations in the space of the decoded weights: x' = left · reshape(x * activation_scale) · right_inverse.

Half-precision x on a GPU: one launch of the kernel (codegen/tensorcore_whiten.py) for factors up to 128, two products
in the type of x for larger ones. Else two products in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from liftc.errors import LiftcError
from liftc.kernel_object import KernelFunction
from liftc.runtime.factors import PerFactors
from liftc.runtime.kernels import Kernels
from liftc.spec import DTYPES

HALVES = (torch.float16, torch.bfloat16)
"""Types of x whose products are made in them; all others are made in float32."""

_WARPS = 8

Tensor = torch.Tensor


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


def two_products(
    x: Tensor, activation_scale: Tensor | None, left: Tensor, right: Tensor, times: float
) -> Tensor:
    """times * left · reshape(x * activation_scale) · right per token in the type of x, left and right."""
    tokens, t1, t2 = x.shape[0], left.shape[0], right.shape[0]
    if activation_scale is not None:
        x = torch.mul(x, activation_scale, out=torch.empty_like(x))  # in float32, rounded once, one pass
    scaled = _padded(x, None, t1 * t2)
    mixed = torch.mm(scaled.view(-1, t2), right * times).view(tokens, t1, t2)
    return torch.bmm(left.expand(tokens, t1, t1), mixed).view(tokens, t1 * t2)


def _rounded(dtype: torch.dtype, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    return left.to(dtype), right.to(dtype)


def _padded(x: Tensor, activation_scale: Tensor | None, width: int) -> Tensor:
    """x * activation_scale with zeros up to `width` features."""
    scaled = x if activation_scale is None else x * activation_scale
    return torch.nn.functional.pad(scaled, (0, width - x.shape[1])) if x.shape[1] < width else scaled


def tokens_together(left_words: Tensor, right_words: Tensor, shared_bytes: int) -> int:
    """Tokens that a block works on: as many as fit, each with as many warps as 16 columns of its padded rows."""
    bytes_of_token = left_words.shape[0] * 16 * (right_words.shape[1] // 2 | 1) * 64
    return max(1, min(_WARPS // right_words.shape[1], (shared_bytes - 4 * _WARPS) // bytes_of_token))


class Whitening:
    """The kernels of one loaded object that transform activations."""

    def __init__(self, kernels: Kernels) -> None:
        functions = kernels.functions
        self._functions: dict[torch.dtype, list[tuple[KernelFunction, Callable[..., None]]]] = {}
        for f in kernels.of("whiten"):
            self._functions.setdefault(DTYPES[f.dtype], []).append((f, functions[f.symbol]))
        self._tiles = PerFactors(factor_tiles)
        self._halves = {dtype: PerFactors(partial(_rounded, dtype)) for dtype in HALVES}
        self._ones: dict[torch.device, Tensor] = {}

    def __call__(
        self, x: Tensor, activation_scale: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype, times: float
    ) -> Tensor:  # fmt: skip
        """times * left · reshape(x * activation_scale) · right per token: x (m, IC) -> (m, t1 t2) of `dtype`."""
        t1, t2, features = left.shape[0], right.shape[0], x.shape[1]
        if dtype == x.dtype and dtype in HALVES and features % 8 == 0 and t2 % 8 == 0 and x.shape[0]:
            for spec, function in self._functions.get(dtype, ()):
                if t1 <= spec.most_left and t2 <= spec.most_right:
                    return self._with(spec, function, x, activation_scale, left, right, times)
            if x.device.type == "cuda":
                return two_products(x, activation_scale, *self._halves[dtype](left, right), times)
        scaled = _padded(x.float(), activation_scale, t1 * t2)
        mixed = torch.matmul(left, scaled.view(-1, t1, t2))
        white = torch.matmul(mixed, right).view(-1, t1 * t2)
        return (white if times == 1 else white * times).to(dtype)

    def _with(
        self, spec: KernelFunction, function: Callable[..., None], x: Tensor, activation_scale: Tensor | None,
        left: Tensor, right: Tensor, times: float,
    ) -> Tensor:  # fmt: skip
        device, tokens, t2 = x.device, x.shape[0], right.shape[0]
        if device not in self._ones:
            self._ones[device] = torch.ones(1, device=device)
        scale = self._ones[device] if activation_scale is None else activation_scale.contiguous()
        left_words, right_words, factor = self._tiles(left, right)
        out = torch.empty((tokens, left.shape[0] * t2), dtype=x.dtype, device=device)
        together = tokens_together(left_words, right_words, spec.shared_bytes)
        operands = (x.contiguous(), scale, left_words, right_words, factor, out)
        try:
            function(*operands, t2, times, together, -(-tokens // together))
        except (TypeError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1:]
            raise LiftcError(
                f"liftc.lifted_linear: the transform kernel refuses its operands ({reason})"
            ) from None
        return out
