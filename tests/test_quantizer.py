"""Whitening, block LDLQ, block streaming and calibration windows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import Graph

from liftc import reference
from liftc.errors import QuantizeError
from liftc.format import LiftFormat
from liftc.quant.blocks import BlockRunner
from liftc.quant.calibration import cut_windows, read_text, spread_windows
from liftc.quant.ldlq import feedback_factor, quantize_group
from liftc.quant.mapping import load_mapping
from liftc.quant.segments import split_blocks
from liftc.quant.whitening import (
    Whitening,
    damped,
    orthogonal_factor,
    orthogonal_whitening,
    random_orthogonal,
)
from liftc.spec import LiftSpec, transform_shape

aten = torch.ops.aten
FORMAT = LiftFormat(64, 32)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(left=st.integers(1, 12), right=st.integers(1, 12), cut=st.integers(0, 3), scaled=st.booleans())
@settings(max_examples=25, deadline=None)
def test_whitening_inverse(left: int, right: int, cut: int, scaled: bool) -> None:
    """(W T)(T^-1 x) = W x, and un-whitening undoes whitening, for general factors and padded inputs."""
    features = max(1, left * right - min(cut, right - 1))
    white = Whitening(
        (torch.eye(left) * 2 + 0.1 * gaussian(left, left)).float(),
        (torch.eye(right) + 0.1 * gaussian(right, right, seed=1)).float(),
        torch.rand(features) + 0.5 if scaled else None,
    )
    weight, x = gaussian(5, features, seed=2), gaussian(features, seed=3)
    torch.testing.assert_close(white.whiten_weight(weight) @ white.whiten_activation(x), weight @ x)
    torch.testing.assert_close(white.unwhiten_weight(white.whiten_weight(weight), features), weight)


def test_whitened_gram_is_the_gram_of_whitened_inputs() -> None:
    white = orthogonal_whitening(3, 8, seed=5)
    x = gaussian(100, 22)
    inner = white.whiten_activation(x)
    torch.testing.assert_close(white.whiten_gram(x.T @ x), inner.T @ inner)


def test_orthogonal_factors_are_seeded() -> None:
    q = random_orthogonal(9, 3)
    torch.testing.assert_close(q @ q.T, torch.eye(9, dtype=torch.float64))
    assert torch.equal(q, random_orthogonal(9, 3)) and not torch.equal(q, random_orthogonal(9, 4))


@pytest.mark.parametrize("size", [1, 2, 9, 32, 64])
def test_hadamard_where_the_size_allows(size: int) -> None:
    q = orthogonal_factor(size, 3)
    torch.testing.assert_close(q @ q.T, torch.eye(size, dtype=torch.float64))
    assert torch.equal(q, orthogonal_factor(size, 3))
    if size in (2, 32, 64):
        torch.testing.assert_close(q.abs(), torch.full_like(q, size**-0.5))
        assert not torch.equal(q, orthogonal_factor(size, 4))
    else:
        assert torch.equal(q, random_orthogonal(size, 3))


def test_feedback_factor_inverts_the_damped_gram() -> None:
    x = gaussian(300, 24)
    gram = x.T @ x
    upper = feedback_factor(gram, 0.01)
    torch.testing.assert_close(upper.T @ upper @ damped(gram, 0.01), torch.eye(24, dtype=torch.float64))
    assert torch.equal(upper, upper.triu())
    low_rank = gaussian(3, 24)
    assert torch.isfinite(feedback_factor(low_rank.T @ low_rank, 0.01)).all()
    assert torch.equal(feedback_factor(torch.zeros(4, 4), 0.01), torch.eye(4, dtype=torch.float64))
    with pytest.raises(QuantizeError, match="NaN or infinite"):
        feedback_factor(torch.full((4, 4), math.nan), 0.01)


def group(weight: torch.Tensor, gram: torch.Tensor) -> tuple[float, float, torch.Tensor]:
    left, right = transform_shape(weight.shape[1], FORMAT)
    spec = LiftSpec(FORMAT, weight.shape[1], left, right)
    white = orthogonal_whitening(left, right, 0)
    result = quantize_group(weight, gram, spec, white, load_mapping(FORMAT), beam=8, damp=0.01, lam=0.05)
    folded = reference.decode_right(white.right_inverse, load_mapping(FORMAT))
    rebuilt = reference.decode_weight(
        result.packed, result.output_scale, None, white.left, folded, weight.shape[1]
    )
    torch.testing.assert_close(rebuilt, result.weight, atol=1e-4, rtol=1e-3)
    return result.relative_error, result.proxy_loss, result.output_scale


def test_feedback_lowers_the_proxy_loss() -> None:
    """With correlated inputs, LDLQ trades plain weight error for error that the inputs do not see."""
    weight = gaussian(64, 70, seed=1).float()
    inputs = gaussian(400, 8, seed=2) @ gaussian(8, 70, seed=3) + 0.2 * gaussian(400, 70, seed=4)
    gram = inputs.T @ inputs / 400
    plain_error, plain_proxy, _ = group(weight, torch.eye(70))
    with_feedback_error, with_feedback_proxy, _ = group(weight, gram)
    assert plain_error == pytest.approx(plain_proxy) and 0.05 < plain_error < 0.12
    assert with_feedback_proxy < 0.5 * plain_error and with_feedback_error > plain_error


def test_rows_of_zeros_stay_zero() -> None:
    weight = gaussian(8, 64).float()
    weight[2] = 0
    _, _, scale = group(weight, torch.eye(64))
    assert scale[2] == 0 and (scale[:2] > 0).all()


def test_rejects_nan_weights() -> None:
    with pytest.raises(QuantizeError, match="NaN"):
        group(torch.full((4, 64), math.nan), torch.eye(64))


def block_graph(blocks: list[int]) -> Graph:
    graph = Graph()
    x = graph.placeholder("x")
    shared = graph.placeholder("shared")
    node = x
    for number, block in enumerate(blocks):
        weight = graph.create_node("get_attr", f"w{number}")
        node = graph.call_function(aten.linear.default, (node, weight))
        node.meta["block"] = block
        node = graph.call_function(aten.add.Tensor, (node, shared))
        node.meta["block"] = block
    graph.output(node)
    return graph


def test_segments_follow_the_blocks() -> None:
    segments = split_blocks(block_graph([-1, 0, 0, -1, 1, -1, -1]))
    assert [(s.block, s.weights) for s in segments] == [
        (-1, ("w0",)), (0, ("w1", "w2", "w3")), (1, ("w4",)), (-1, ("w5", "w6")),
    ]  # fmt: skip
    with pytest.raises(QuantizeError, match="interleaved"):
        split_blocks(block_graph([0, 1, 0]))


def test_runner_equals_running_the_whole_graph() -> None:
    graph = block_graph([-1, 0, 1, -1])
    weights = {f"w{i}": gaussian(6, 6, seed=i) for i in range(4)}
    xs, shared = [gaussian(3, 6, seed=10 + i) for i in range(2)], gaussian(6, seed=20)
    runner = BlockRunner(graph, [{"x": x} for x in xs], {"shared": shared}, lambda name: torch.zeros(1))
    fetched: list[str] = []

    def fetch(name: str) -> torch.Tensor:
        fetched.append(name)
        return weights[name]

    seen: list[torch.Tensor] = []
    for index, segment in enumerate(runner.segments):
        runner.observe(index, fetch, {segment.nodes[0]: seen.append})
        runner.advance(index, fetch)
    output = next(iter(graph.find_nodes(op="output"))).args[0]
    for number, x in enumerate(xs):
        expected = x
        for i in range(4):
            expected = expected @ weights[f"w{i}"].T + shared
        torch.testing.assert_close(runner.value(number, output), expected)  # type: ignore[arg-type]
    assert len(seen) == 8 and fetched == ["w0", "w0", "w1", "w1", "w2", "w2", "w3", "w3"]


def test_windows() -> None:
    windows = cut_windows(list(range(10)), 3, None)
    assert [w.tolist() for w in windows] == [[[0, 1, 2]], [[3, 4, 5]], [[6, 7, 8]]]
    assert spread_windows(list(range(100)), 10, 3, 1)[0].shape == (1, 10)
    assert all(torch.equal(a, b) for a, b in zip(*(spread_windows(list(range(100)), 10, 3, 1) for _ in "ab")))
    with pytest.raises(QuantizeError, match="too few"):
        cut_windows([1, 2], 3, 1)
    assert len(read_text(None)) > 500_000
    with pytest.raises(QuantizeError, match="cannot read"):
        read_text(Path("no such file"))
