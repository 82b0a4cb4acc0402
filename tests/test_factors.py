"""What lift kernels keep per pair of factors: the bound and operand words (runtime/factors.py)."""

from __future__ import annotations

import gc

import torch

from liftc.reference import lift_bound
from liftc.runtime.factors import PerFactors, factor_bound, factor_words


def counted() -> tuple[PerFactors[float], list[int]]:
    calls: list[int] = []

    def compute(left: torch.Tensor, right: torch.Tensor) -> float:
        calls.append(1)
        return float(left.sum() * right.sum())

    return PerFactors(compute), calls


def test_values_are_computed_once_per_pair_and_again_after_a_change() -> None:
    kept, calls = counted()
    left, right, other = torch.ones(2), torch.full((3,), 2.0), torch.full((3,), 5.0)
    for _ in range(3):
        assert kept(left, right) == 12.0 and kept(left, other) == 30.0
    assert len(calls) == 2
    right += 1.0
    assert kept(left, right) == 18.0 and kept(left, other) == 30.0 and len(calls) == 3
    left *= 2.0
    assert kept(left, right) == 36.0 and kept(left, other) == 60.0 and len(calls) == 5


def test_equal_tensors_are_different_pairs() -> None:
    kept, calls = counted()
    left, right = torch.ones(2), torch.ones(3)
    kept(left, right), kept(left.clone(), right), kept(left, right.clone())
    assert len(calls) == 3


def test_nothing_is_kept_alive_and_no_address_is_mistaken() -> None:
    kept, calls = counted()
    left = torch.ones(2)
    for value in range(50):  # freed tensors leave their place to the next one
        right = torch.full((3,), float(value))
        assert kept(left, right) == 6.0 * value
        del right
    gc.collect()
    assert len(calls) == 50 and not kept._kept[left]
    del left
    gc.collect()
    assert not kept._kept


def test_inference_tensors() -> None:
    kept, calls = counted()
    with torch.inference_mode():
        left, right = torch.ones(2), torch.ones(3)
        assert kept(left, right) == kept(left, right) == 6.0
    assert len(calls) == 1


def test_words_hold_both_factors_to_16_bits() -> None:
    """The layouts of codegen/tensorcore_lift.py, value by value."""
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(21, 21, generator=g), torch.randn(40, 35, generator=g)
    left_words, right_words, bound = factor_words(left, right)
    assert left_words.shape == (3, 2, 32, 4) and right_words.shape == (3, 4, 2, 32, 4)
    assert torch.equal(bound, factor_bound(left, right)) and bound.item() == lift_bound(left, right).item()
    halves = left_words.view(torch.bfloat16).double().view(3, 2, 32, 2, 2, 2)  # .., parts, halves of k, pairs
    for row in range(24):
        for a in range(32):
            lane, half = row % 8 * 4 + a % 8 // 2, a % 16 // 8
            got = halves[row // 8, a // 16, lane, :, half, a % 2].sum()
            want = float(left[row, a]) if row < 21 and a < 21 else 0.0
            assert abs(float(got) - want) <= 2.0**-16 * abs(want)
    halves = right_words.view(torch.bfloat16).double().view(3, 4, 2, 32, 4, 2)
    for j in range(64):
        for c in range(48):
            quarter, step, word, pair = j % 32 // 8, j % 8 // 4, j % 4 // 2, j % 2
            lane = c % 8 * 4 + quarter
            got = halves[c // 16, j // 32 * 2 + step, :, lane, word * 2 + c % 16 // 8, pair].sum()
            want = float(right[j, c]) if j < 40 and c < 35 else 0.0
            assert abs(float(got) - want) <= 2.0**-16 * abs(want)
