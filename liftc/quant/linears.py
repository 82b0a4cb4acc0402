"""Where the selected linears of a program stand: their nodes in a graph, their rows in a group."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from liftc.program import Program
from liftc.spec import LinearSpec

aten = torch.ops.aten


def linear_nodes(graph: Graph, program: Program) -> dict[str, Node]:
    """The aten.linear node of every selected linear, by linear name."""
    by_weight = {spec.weight: name for name, spec in program.linears.items()}
    found: dict[str, Node] = {}
    for node in graph.find_nodes(op="call_function", target=aten.linear.default):
        weight = node.args[1]
        if isinstance(weight, Node) and weight.target is aten.t.default:
            weight = weight.args[0]
        if isinstance(weight, Node) and weight.op == "get_attr" and str(weight.target) in by_weight:
            found[by_weight[str(weight.target)]] = node
    return found


def row_slices(linears: list[LinearSpec]) -> dict[str, slice]:
    """Rows of each linear in the stacked weight of its group."""
    slices: dict[str, slice] = {}
    start = 0
    for linear in linears:
        slices[linear.name] = slice(start, start + linear.out_features)
        start += linear.out_features
    return slices
