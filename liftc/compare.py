"""Structural equality of programs and graphs, and the first difference in words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from torch.fx import Graph, Node

from liftc.program import Program

_TABLES = ("tensors", "linears", "lifts", "folded", "attrs")


def programs_equal(a: Program, b: Program) -> bool:
    """True when both programs have the same name, tables (order included) and graphs."""
    return program_difference(a, b) is None


def program_difference(a: Program, b: Program) -> str | None:
    """First difference between two programs in one line, or None."""
    if a.name != b.name:
        return f"name: {a.name!r} and {b.name!r}"
    for table in _TABLES:
        left, right = getattr(a, table), getattr(b, table)
        for x, y in zip_longest(left.items(), right.items()):
            if not _same(x, y):
                return f"{table}: {x} and {y}"
    if list(a.graphs) != list(b.graphs):
        return f"graphs: {list(a.graphs)} and {list(b.graphs)}"
    for name in a.graphs:
        difference = graph_difference(a.graphs[name], b.graphs[name])
        if difference:
            return f"graph {name}: {difference}"
    return None


def graph_difference(a: Graph, b: Graph) -> str | None:
    """First difference between two graphs in one line, or None.

    A get_attr node is a reference to a tensor and not a step of the computation, so readers of a tensor are
    compared by its name, wherever the node that fetches it stands and whatever it is called. All other
    nodes must agree in order, name, op, target, arguments (1, 1.0 and True differ) and metadata; of the
    output only the value counts.
    """
    for x, y in zip_longest(_steps(a), _steps(b)):
        if x is None or y is None:
            return f"{(x or y).name} has no counterpart"
        output = x.op == y.op == "output"
        for what in ("args",) if output else ("op", "name", "target", "args", "kwargs"):
            if not _same(_plain(getattr(x, what)), _plain(getattr(y, what))):
                return f"{what} of {x.name}: {getattr(x, what)!r} and {getattr(y, what)!r}"
        if not output and node_facts(x) != node_facts(y):
            return f"metadata of {x.name}: {node_facts(x)} and {node_facts(y)}"
    return None


def node_facts(node: Node) -> tuple[str, int, str]:
    """(type, block, source) of a node with the defaults "", -1 and "" for what is absent."""
    return node.meta.get("type", ""), node.meta.get("block", -1), node.meta.get("source", "")


def _steps(graph: Graph) -> Iterator[Node]:
    return (node for node in graph.nodes if node.op != "get_attr")


def _plain(value: Any) -> Any:
    """Arguments with nodes replaced by references; list and tuple stay apart."""
    if isinstance(value, Node):
        return ("@", value.target) if value.op == "get_attr" else ("%", value.name)
    if isinstance(value, slice):
        return (slice, _plain(value.start), _plain(value.stop), _plain(value.step))
    if isinstance(value, tuple):
        return (tuple, *(_plain(item) for item in value))
    if isinstance(value, list):
        return (list, *(_plain(item) for item in value))
    if isinstance(value, dict):
        return (dict, *((key, _plain(item)) for key, item in value.items()))
    return value


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float):
        return (a == b and math.copysign(1, a) == math.copysign(1, b)) or (a != a and b != b)
    return bool(a == b)
