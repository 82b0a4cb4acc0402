"""Build a graph from parsed statements; shared by the text and the JSON reader.

Values come with references in place of nodes. Names and ops are checked here, so that nothing a file says
reaches the code generator of torch.fx unchecked. Every complaint is a ValueError for the reader to locate.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from liftc.opnames import op_target
from liftc.values import is_argument_name, is_node_name, is_tensor_name


@dataclass(frozen=True)
class NodeRef:
    """`%name`: the result of an earlier node."""

    name: str


@dataclass(frozen=True)
class TensorRef:
    """`@name`: a tensor of the program."""

    name: str


class GraphBuilder:
    """Appends nodes one by one; `names` are the names of all nodes to come, in order to keep clear of them.

    A tensor gets one get_attr node, just before its first reader. tensor_type gives its type text.
    """

    def __init__(self, names: Collection[str], tensor_type: Callable[[str], str] | None = None) -> None:
        self.graph = Graph()
        self._names = set(names)
        self._tensor_type = tensor_type
        self._nodes: dict[str, Node] = {}
        self._tensors: dict[str, Node] = {}
        self._calls = 0

    def input(self, name: str, meta: Mapping[str, Any]) -> None:
        """Append a placeholder."""
        if self._calls:
            raise ValueError(f"input %{name} comes after the first call")
        self._register(name, self.graph.placeholder(self._checked(name)), meta)

    def call(self, name: str, op: str, args: Any, kwargs: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Append a call of op (a name of liftc/opnames.py)."""
        self._calls += 1
        target = op_target(op)
        values = self.resolve(args)
        named = {key: self.resolve(value) for key, value in kwargs.items()}
        for key in named:
            if not is_argument_name(key):
                raise ValueError(f"%{name} has an argument with the impossible name {key!r}")
        self._register(name, self.graph.call_function(target, values, named, None, self._checked(name)), meta)

    def output(self, value: Any) -> Graph:
        """Append the output and return the finished graph."""
        self.graph.output(self.resolve(value))
        return self.graph

    def resolve(self, value: Any) -> Any:
        """`value` with references replaced by nodes."""
        if isinstance(value, NodeRef):
            if value.name not in self._nodes:
                raise ValueError(f"%{value.name} is not defined before it is used")
            return self._nodes[value.name]
        if isinstance(value, TensorRef):
            return self._tensor(value.name)
        if isinstance(value, (list, tuple)):
            return type(value)(self.resolve(item) for item in value)
        if isinstance(value, slice):
            return slice(*(self.resolve(item) for item in (value.start, value.stop, value.step)))
        return value

    def _tensor(self, target: str) -> Node:
        if target not in self._tensors:
            if not is_tensor_name(target):
                raise ValueError(f"{target!r} cannot be the name of a tensor")
            name = "_" + "".join(c if c.isalnum() else "_" for c in target)
            while name in self._names:
                name += "_"
            self._names.add(name)
            # Graph.get_attr would warn: it looks for an owning module.
            node = self.graph.create_node("get_attr", target, name=name)
            node.meta = {"type": self._tensor_type(target)} if self._tensor_type else {}
            self._tensors[target] = node
        return self._tensors[target]

    def _checked(self, name: str) -> str:
        if not is_node_name(name):
            raise ValueError(f"{name!r} cannot be the name of a node")
        if name in self._nodes:
            raise ValueError(f"%{name} is defined twice")
        return name

    def _register(self, name: str, node: Node, meta: Mapping[str, Any]) -> None:
        if node.name != name:
            raise ValueError(f"%{name} is a name torch.fx keeps for itself")
        node.meta = dict(meta)
        self._nodes[name] = node
