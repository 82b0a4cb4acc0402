"""What lift kernels need of the two factors besides their values: the bound of their rows, and operand words.

Both are computed once per pair of tensors and kept as long as the two live.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch.utils.weak import WeakIdKeyDictionary

from liftc.reference import lift_bound

Tensor = torch.Tensor
Value = TypeVar("Value")


class PerFactors(Generic[Value]):
    """A value per pair (left, right), computed at first use; weak in both, computed again when either changed.

    Inside the capture of a CUDA graph nothing is kept: what a capture computes exists only in replays.
    """

    def __init__(self, compute: Callable[[Tensor, Tensor], Value]) -> None:
        self._compute = compute
        self._kept: Any = WeakIdKeyDictionary()

    def __call__(self, left: Tensor, right: Tensor) -> Value:
        versions = (_version(left), _version(right))
        of_left = self._kept.get(left)
        entry = None if of_left is None else of_left.get(right)
        if entry is not None and entry[0] == versions:
            return entry[1]  # type: ignore[no-any-return]
        value = self._compute(left, right)
        if not (left.is_cuda and torch.cuda.is_current_stream_capturing()):
            if of_left is None:
                of_left = self._kept[left] = WeakIdKeyDictionary()
            of_left[right] = versions, value
        return value


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def factor_bound(left: Tensor, right: Tensor) -> Tensor:
    """float32 (1,): the largest norm of a row of T*, rounded up (liftc/reference.py)."""
    return lift_bound(left, right).reshape(1)


def factor_words(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Operand words of left and right as codegen/tensorcore_lift.py describes them, and the bound float32 (1,).

    left f32 (t1, t1) -> int32 (ceil(t1 / 8), ceil(t1 / 16), 32, 4), right f32 (t2, C) -> int32 (ceil(C / 16),
    2 ceil(t2 / 32), 2, 32, 4); what is padded is zero.
    """
    t1, (t2, columns) = left.shape[0], right.shape
    rows, depth = -(-t1 // 8), -(-t1 // 16)
    padded = torch.nn.functional.pad(left, (0, depth * 16 - t1, 0, rows * 8 - t1))
    parts = [
        # row: tile, 8; column: operand, half, quarter, pair
        part.view(rows, 8, depth, 2, 4, 2).permute(0, 2, 1, 4, 3, 5).contiguous().view(torch.int32)
        for part in _high_and_low(padded)
    ]
    left_words = torch.cat([part.view(rows, depth, 32, 2) for part in parts], -1).contiguous()
    tiles, pieces = -(-columns // 16), -(-t2 // 32)
    padded = torch.nn.functional.pad(right, (0, tiles * 16 - columns, 0, pieces * 32 - t2))
    parts = [
        # feature: piece, quarter, step, half, pair; column: tile, half, 8
        part.view(pieces, 4, 2, 2, 2, tiles, 2, 8)
        .permute(5, 0, 2, 7, 1, 3, 6, 4)
        .contiguous()
        .view(torch.int32)
        for part in _high_and_low(padded)
    ]
    right_words = torch.stack([part.view(tiles, 2 * pieces, 32, 4) for part in parts], 2).contiguous()
    return left_words, right_words, factor_bound(left, right)


def _high_and_low(value: Tensor) -> tuple[Tensor, Tensor]:
    high = value.to(torch.bfloat16)
    return high, (value - high.float()).to(torch.bfloat16)
