"""The baselines of benchmarks/rival_methods.py do what their names say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "rival_methods.py"


@pytest.fixture(scope="module")
def rivals() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rivals", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rivals"] = module
    spec.loader.exec_module(module)
    return module


def layer(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and a correlated input gram with a few large channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * columns, columns, generator=generator) @ torch.randn(
        columns, columns, generator=generator
    )
    x[:, :3] *= 10
    return torch.randn(rows, columns, generator=generator), x.T.double() @ x.double() / len(x)


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("columns", [128, 160])
def test_grid_error_is_at_most_half_a_step(rivals: ModuleType, bits: int, columns: int) -> None:
    weight, _ = layer(8, columns, 0)
    grid = rivals.fit_grid(weight, bits, 64, clip=False)
    step = grid.scale.repeat_interleave(64, 1)[:, :columns]
    # the zero point is rounded, so an end of the range may lie half a step outside the grid
    assert bool(((grid.round(weight) - weight).abs() <= step * 1.01).all())
    assert grid.round(grid.round(weight)).equal(grid.round(weight))
    clipped = rivals.fit_grid(weight, bits, 64, clip=True).round(weight)
    assert (clipped - weight).square().sum() <= (grid.round(weight) - weight).square().sum()


def test_gptq_without_correlation_is_rounding(rivals: ModuleType) -> None:
    weight, _ = layer(8, 160, 1)
    grid = rivals.fit_grid(weight, 3, 64, clip=False)
    found = rivals.gptq(weight, torch.eye(160, dtype=torch.float64), grid)
    torch.testing.assert_close(found, grid.round(weight))


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_gptq_beats_rounding_under_the_gram(rivals: ModuleType, bits: int) -> None:
    weight, gram = layer(32, 160, bits)
    grid = rivals.fit_grid(weight, bits, 64, clip=True)
    found, plain = rivals.gptq(weight, gram, grid), grid.round(weight)
    assert rivals.output_loss(found - weight, gram) < 0.7 * rivals.output_loss(plain - weight, gram)
    assert grid.round(found).sub(found).abs().max() < 1e-5  # on the grid


def test_awq_never_loses_to_rounding(rivals: ModuleType) -> None:
    weight, gram = layer(32, 160, 5)
    magnitude = gram.diagonal().sqrt().float()
    scale = rivals.awq_scales(weight, gram, magnitude, 3, 64)
    plain = rivals.fit_grid(weight, 3, 64, clip=False).round(weight)
    scaled = rivals.fit_grid(weight * scale, 3, 64, clip=False).round(weight * scale) / scale
    clipped = rivals.awq_clip(weight, gram, 3, 64)
    assert rivals.output_loss(scaled - weight, gram) <= rivals.output_loss(plain - weight, gram)
    assert bool((clipped.abs() <= weight.abs() + 1e-6).all())


def test_hqq_lowers_the_absolute_error(rivals: ModuleType) -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(6)) ** 3
    first, last = (rivals.hqq(weight, 3, 64, steps=steps) for steps in (1, 20))
    assert (last - weight).abs().mean() < (first - weight).abs().mean()
