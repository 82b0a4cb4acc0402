"""Activations in the space of the decoded weights: x' = left · reshape(x * activation_scale) · right_inverse.

On a GPU with the kernel (codegen/tensorcore_whiten.py) one launch for half-precision x; else two products in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from liftc.errors import LiftcError
from liftc.kernel_object import KernelFunction
from liftc.runtime.factors import PerFactors
from liftc.runtime.half_words import factor_tiles
from liftc.runtime.kernels import Kernels
from liftc.spec import DTYPES

_WARPS = 8

Tensor = torch.Tensor


def tokens_together(left_words: Tensor, right_words: Tensor, room: int) -> int:
    """Tokens that a block works on: as many as keep its warps busy and fit."""
    bytes_of_token = left_words.shape[0] * 16 * (right_words.shape[1] // 2 | 1) * 64
    return max(1, min(_WARPS // right_words.shape[0], room // bytes_of_token))


class Whitening:
    """The kernels of one loaded object that transform activations."""

    def __init__(self, kernels: Kernels) -> None:
        functions = kernels.functions
        self._functions: dict[torch.dtype, list[tuple[KernelFunction, Callable[..., None]]]] = {}
        for f in kernels.of("whiten"):
            self._functions.setdefault(DTYPES[f.dtype], []).append((f, functions[f.symbol]))
        self._tiles = PerFactors(factor_tiles)
        self._ones: dict[torch.device, Tensor] = {}

    def __call__(
        self, x: Tensor, activation_scale: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype, times: float
    ) -> Tensor:  # fmt: skip
        """times * left · reshape(x * activation_scale) · right per token: x (m, IC) -> (m, t1 t2) of `dtype`."""
        t1, t2, features = left.shape[0], right.shape[0], x.shape[1]
        if dtype == x.dtype and features % 8 == 0 and t2 % 8 == 0 and x.shape[0]:
            for spec, function in self._functions.get(dtype, ()):
                if t1 <= spec.most_left and t2 <= spec.most_right:
                    return self._with(spec, function, x, activation_scale, left, right, times)
        scaled = x.float()
        if activation_scale is not None:
            scaled = scaled * activation_scale
        if features < t1 * t2:
            scaled = torch.nn.functional.pad(scaled, (0, t1 * t2 - features))
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
        together = tokens_together(left_words, right_words, spec.block_results)
        operands = (x.contiguous(), scale, left_words, right_words, factor, out)
        try:
            function(*operands, t2, times, together, -(-tokens // together))
        except (TypeError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1:]
            raise LiftcError(
                f"liftc.lifted_linear: the transform kernel refuses its operands ({reason})"
            ) from None
        return out
