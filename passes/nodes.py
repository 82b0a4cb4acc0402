"""Questions passes ask about nodes, and the small edits they share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from liftc.passes.base import PassError
from liftc.program import Program
from liftc.rules import parse_type, weight_of

ATEN = torch.ops.aten
LINEAR = ATEN.linear.default


@dataclass(frozen=True)
class LinearUse:
    """One aten.linear whose weight is a stored tensor: `x @ w.T`, or `x @ w` when transposed."""

    graph: str
    node: Node
    x: Node
    weight: str
    transposed: bool


def linear_uses(program: Program) -> Iterator[LinearUse]:
    """Every linear on a stored weight, graph by graph in order of execution."""
    for name, graph in program.graphs.items():
        for node in graph.nodes:
            if node.op == "call_function" and node.target is LINEAR:
                weight = weight_of(node.args[1])
                if weight and weight[0] in program.tensors and isinstance(node.args[0], Node):
                    yield LinearUse(name, node, node.args[0], *weight)


def argument(node: Node, name: str) -> Any:
    """Value of an argument of an OpOverload call by its schema name, the default when it is not given."""
    for index, known in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if known.name == name:
            if name in node.kwargs:
                return node.kwargs[name]
            given = not known.kwarg_only and index < len(node.args)
            return node.args[index] if given else known.default_value
    return None


def takes(node: Node, name: str) -> bool:
    """True when the op of the call has an argument `name`."""
    return any(known.name == name for known in node.target._schema.arguments)  # type: ignore[union-attr]


def is_call(node: object, *packets: Any) -> bool:
    """True for a call of any overload of the given op packets (torch.ops.aten.view, ...)."""
    target = node.target if isinstance(node, Node) and node.op == "call_function" else None
    return isinstance(target, torch._ops.OpOverload) and target.overloadpacket in packets


def is_mutating(node: Node) -> bool:
    """True for a call that writes into one of its arguments."""
    return (
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and node.target._schema.is_mutable
    )


def node_type(program: Program, node: Node) -> tuple[str, tuple[str, ...]] | None:
    """(dtype, dimensions) of a node that is one tensor of known type, else None."""
    if node.op == "get_attr" and node.target in program.tensors:
        return parse_type(str(program.tensors[str(node.target)]))
    return parse_type(node.meta.get("type", ""))


def typed(program: Program, node: Node, needed_by: str) -> tuple[str, tuple[str, ...]]:
    """node_type, or PassError when the type is not known."""
    kind = node_type(program, node)
    if kind is None or not kind[1]:
        raise PassError(f"{needed_by}: the type of node %{node.name} is not known; capture the model again")
    return kind


def type_of(dtype: str, dims: tuple[str, ...]) -> str:
    """Type text, the inverse of parse_type."""
    return f"{dtype}[{','.join(dims)}]"


def place(node: Node, like: Node, kind: str) -> Node:
    """Give a new node its type, and the block and source of `like`."""
    node.meta = {
        "type": kind,
        "block": like.meta.get("block", -1),
        "source": like.meta.get("source", ""),
    }
    return node


class TensorReads:
    """The get_attr nodes of one graph, one per tensor; `read` makes what is missing, for a node to come."""

    def __init__(self, program: Program, graph: Graph) -> None:
        self.program = program
        self.graph = graph
        self._reads: dict[str, Node] = {}

    def read(self, name: str) -> Node:
        """The node that reads tensor `name`, created at the graph's insertion point on first use."""
        if name not in self._reads:
            node = self.graph.create_node("get_attr", name)
            spec = self.program.tensors.get(name)
            node.meta = {"type": str(spec) if spec else ""}
            self._reads[name] = node
        return self._reads[name]


def remove_dead(graph: Graph) -> None:
    """Erase nodes whose result nobody reads; inputs, the output and nodes that write in place stay."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output") and not is_mutating(node):
            graph.erase_node(node)
