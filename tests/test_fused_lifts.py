"""Which norms and gates a loaded graph hands to its lifts, and that it computes the same."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Graph, Node

from liftc import env, reference
from liftc.runtime.executor import BoundGraph
from liftc.runtime.fused_lifts import fuse
from liftc.runtime.planes import GATED, Source

aten = torch.ops.aten
FEATURES = 12


class PlanesOfTests:
    """Takes every call of one token and remembers it; computes by hand what the kernels do."""

    def __init__(self) -> None:
        self.sources: list[Source] = []

    def lift(self, x: torch.Tensor, scale: Any, left: Any, right: Any, source: Source) -> Any:
        if x.shape[0] != 1:
            return None
        self.sources.append(source)
        if source.gain is not None:
            wide = x.float()
            x = source.gain * (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + source.eps)).to(
                x.dtype
            )
        else:
            x = torch.nn.functional.silu(x[..., :FEATURES]) * x[..., FEATURES:]
        return reference.lift(x, scale, left, right)


class OpsOfTests:
    def __init__(self) -> None:
        self.planes = PlanesOfTests()
        self.tiles = self

    def lift_operands(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.lift(*arguments)


def tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "gain": (torch.rand(FEATURES, generator=g) + 0.5).to(dtype),
        "left": torch.randn(3, 3, generator=g),
        "right": torch.randn(4, 6, generator=g),
    }


def norm(graph: Graph, x: Node, dtype: torch.dtype, swapped: bool = False) -> Node:
    call = graph.call_function
    wide = call(aten.to.dtype, (x, torch.float32))
    mean = call(aten.mean.dim, (call(aten.pow.Tensor_Scalar, (wide, 2)), [-1], True))
    root = call(aten.rsqrt.default, (call(aten.add.Tensor, (mean, 1e-5)),))
    cast = call(aten.to.dtype, (call(aten.mul.Tensor, (root, wide) if swapped else (wide, root)), dtype))
    gain = graph.get_attr("gain")
    return call(aten.mul.Tensor, (cast, gain) if swapped else (gain, cast))


def gate(graph: Graph, x: Node, sizes: tuple[int, int] = (FEATURES, FEATURES), first: int = 0) -> Node:
    call = graph.call_function
    split = call(aten.split_with_sizes.default, (x, list(sizes), -1))
    left = call(aten.silu.default, (call(operator.getitem, (split, first)),))
    return call(aten.mul.Tensor, (left, call(operator.getitem, (split, 1 - first))))


def build(
    ops: OpsOfTests, make: Callable[[Graph, Node], Node], lifts: int = 1, returned: bool = False
) -> Graph:
    graph = Graph()
    x = make(graph, graph.placeholder("x"))
    results: list[Node] = [x] if returned else []
    for _ in range(lifts):
        arguments = (x, None, graph.get_attr("left"), graph.get_attr("right"))
        lifted = graph.call_function(ops.lift_operands, arguments)
        results += [graph.call_function(operator.getitem, (lifted, i)) for i in range(2)]
    graph.output(tuple(results))
    return graph


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lifts", [1, 2])
@pytest.mark.parametrize("what", ["norm", "norm with swapped factors", "gate"])
def test_fused_graphs_compute_the_same(what: str, lifts: int, dtype: torch.dtype) -> None:
    ops = OpsOfTests()
    width = FEATURES * (2 if what == "gate" else 1)

    def make(graph: Graph, x: Node) -> Node:
        return gate(graph, x) if what == "gate" else norm(graph, x, dtype, "swapped" in what)

    graph, held = build(ops, make, lifts), tensors(dtype)
    before = BoundGraph(graph, held, torch.device("cpu"))
    assert fuse(graph, ops) == lifts  # type: ignore[arg-type]
    assert not [n for n in graph.nodes if n.target in (aten.mul.Tensor, aten.to.dtype, aten.silu.default)]
    after = BoundGraph(graph, held, torch.device("cpu"))
    for rows in (1, 3):  # taken by the kernels of this test, and done by separate operations
        x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)
        for got, want in zip(after.call(x), before.call(x), strict=True):
            torch.testing.assert_close(got, want)
    assert len(ops.planes.sources) == lifts
    if what == "gate":
        assert ops.planes.sources[0] == GATED
    else:
        source = ops.planes.sources[0]
        assert (
            source.op == "lift_planes_norm" and source.eps == 1e-5 and torch.equal(source.gain, held["gain"])
        )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [
        lambda g, x: gate(g, x, (FEATURES + 4, FEATURES - 4)),
        lambda g, x: gate(g, x, first=1),
        lambda g, x: g.call_function(aten.mul.Tensor, (x, x)),
        lambda g, x: g.call_function(aten.add.Tensor, (norm(g, x, torch.bfloat16), x)),
        lambda g, x: x,
    ],
)
def test_other_inputs_stay(make: Callable[[Graph, Node], Node]) -> None:
    ops = OpsOfTests()
    graph = build(ops, make)
    nodes = len(graph.nodes)
    assert fuse(graph, ops) == 0 and len(graph.nodes) == nodes  # type: ignore[arg-type]


def test_a_norm_that_others_read_stays() -> None:
    ops = OpsOfTests()
    graph = build(ops, lambda g, x: norm(g, x, torch.bfloat16), returned=True)
    assert fuse(graph, ops) == 0  # type: ignore[arg-type]


def test_a_norm_to_another_dtype_is_done_by_separate_operations() -> None:
    ops = OpsOfTests()
    graph, held = build(ops, lambda g, x: norm(g, x, torch.bfloat16)), tensors(torch.bfloat16)
    x = torch.randn(1, FEATURES, generator=torch.Generator().manual_seed(1))
    want = BoundGraph(graph, held, torch.device("cpu")).call(x)
    assert fuse(graph, ops) == 1  # type: ignore[arg-type]
    got = BoundGraph(graph, held, torch.device("cpu")).call(x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)) and not ops.planes.sources


def test_lifts_are_fused_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIFTC_FUSED_LIFTS", raising=False)
    assert env.fused_lifts()
    monkeypatch.setenv("LIFTC_FUSED_LIFTS", "0")
    assert not env.fused_lifts()
