"""Graphs of a norm, a gate or a GELU before lifts, and stand-ins for what computes them on a GPU."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from liftc import reference
from liftc.runtime.planes import Source

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
        if source.op == "lift_planes_layer":
            assert source.gain is not None
            gain, shift = source.gain.chunk(2)
            if source.choice:
                wide = x.float()
                root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + source.eps)
                x = (wide * root * (1 + source.gain.float())).to(x.dtype)
            else:
                x = torch.nn.functional.layer_norm(x, gain.shape, gain, shift, source.eps)
        elif source.op == "lift_planes_gelu":
            gate, up = x.chunk(2, -1) if source.choice < 2 else (x, None)
            x = torch.nn.functional.gelu(gate, approximate="tanh" if source.choice % 2 else "none")
            x = x if up is None else x * up
        elif source.gain is not None:
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
        "shift": torch.randn(FEATURES, generator=g).to(dtype),
        "left": torch.randn(3, 3, generator=g),
        "right": torch.randn(4, 6, generator=g),
    }


def normed(graph: Graph, x: Node, swapped: bool = False) -> Node:
    call = graph.call_function
    wide = call(aten.to.dtype, (x, torch.float32))
    mean = call(aten.mean.dim, (call(aten.pow.Tensor_Scalar, (wide, 2)), [-1], True))
    root = call(aten.rsqrt.default, (call(aten.add.Tensor, (mean, 1e-5)),))
    return call(aten.mul.Tensor, (root, wide) if swapped else (wide, root))


def norm(graph: Graph, x: Node, dtype: torch.dtype, swapped: bool = False) -> Node:
    cast = graph.call_function(aten.to.dtype, (normed(graph, x, swapped), dtype))
    gain = graph.get_attr("gain")
    return graph.call_function(aten.mul.Tensor, (cast, gain) if swapped else (gain, cast))


def offset_norm(
    graph: Graph, x: Node, offset: float = 1.0, gain: Node | None = None, like: Node | None = None
) -> Node:
    call = graph.call_function
    wide = call(aten.to.dtype, (gain or graph.get_attr("gain"), torch.float32))
    product = call(aten.mul.Tensor, (normed(graph, x), call(aten.add.Tensor, (wide, offset))))
    return call(aten.type_as.default, (product, like or x))


def gate(graph: Graph, x: Node, sizes: tuple[int, int] = (FEATURES, FEATURES), first: int = 0) -> Node:
    return gate_of(graph, graph.call_function(aten.split_with_sizes.default, (x, list(sizes), -1)), first)


def chunk_gate(graph: Graph, x: Node, *count_and_axis: int) -> Node:
    return gate_of(graph, graph.call_function(aten.chunk.default, (x, *(count_and_axis or (2, -1)))))


def gate_of(graph: Graph, split: Node, first: int = 0) -> Node:
    call = graph.call_function
    left = call(aten.silu.default, (call(operator.getitem, (split, first)),))
    return call(aten.mul.Tensor, (left, call(operator.getitem, (split, 1 - first))))


def layer_norm(graph: Graph, x: Node, *changes: Any, shifted: bool = True) -> Node:
    """As it is captured; `changes`: arguments in place of the shape, gain, shift and eps."""
    shift = graph.get_attr("shift") if shifted else None
    usual = ([FEATURES], graph.get_attr("gain"), shift, 1e-5, False)
    return graph.call_function(aten.layer_norm.default, (x, *changes, *usual[len(changes) :]))


def gelu(graph: Graph, x: Any, mode: str = "none") -> Node:
    return graph.call_function(aten.gelu.default, (x,), {"approximate": mode} if mode != "none" else {})


def gelu_gate(
    graph: Graph,
    x: Node,
    mode: str = "none",
    swapped: bool = False,
    first: int = 0,
    sizes: Any = None,
    axis: int = -1,
) -> Node:
    call = graph.call_function
    split = call(aten.split_with_sizes.default, (x, sizes or [FEATURES, FEATURES], axis))
    factors = (
        gelu(graph, call(operator.getitem, (split, first)), mode),
        call(operator.getitem, (split, 1 - first)),
    )
    return call(aten.mul.Tensor, factors[::-1] if swapped else factors)


LAYERS: dict[str, tuple[bool, Callable[[Graph, Node], Node]]] = {
    "layer norm": (True, layer_norm),
    "layer norm without a shift": (False, lambda g, x: layer_norm(g, x, shifted=False)),
    "layer norm with few arguments": (
        False,
        lambda g, x: g.call_function(aten.layer_norm.default, (x, [FEATURES], g.get_attr("gain"))),
    ),
    "unit offset": (False, offset_norm),
}
GATES: dict[str, tuple[int, Callable[[Graph, Node], Node]]] = {
    "gelu gate": (0, gelu_gate),
    "gelu gate with swapped factors": (0, lambda g, x: gelu_gate(g, x, swapped=True)),
    "tanh gelu gate": (1, lambda g, x: gelu_gate(g, x, "tanh")),
    "gelu": (2, gelu),
    "tanh gelu": (3, lambda g, x: gelu(g, x, "tanh")),
}


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
