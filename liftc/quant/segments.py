"""A captured graph cut into decoder blocks, and which of its values depend on the tokens.

The call_function nodes of a graph form consecutive segments: what comes before block 0, block 0, block 1,
..., and what comes after the last. Values that do not depend on the tokens (masks, rotary tables) are
computed once and shared by all sequences.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from liftc.errors import QuantizeError

aten = torch.ops.aten
_FIRST_AXIS = re.compile(r"\[([^],]*)[],]")
RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default)


@dataclass(frozen=True)
class Segment:
    """Consecutive call_function nodes; `block` is -1 before the first block and after the last."""

    block: int
    nodes: tuple[Node, ...]

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the tensors the segment reads, each once, in order of first use."""
        names = (str(a.target) for node in self.nodes for a in node.all_input_nodes if a.op == "get_attr")
        return tuple(dict.fromkeys(names))


def split_blocks(graph: Graph) -> list[Segment]:
    """Segments of `graph` in execution order; a graph without blocks is a single segment.

    Nodes between two blocks join the earlier one. Raises QuantizeError when blocks are interleaved.
    """
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    blocks = [int(node.meta.get("block", -1)) for node in nodes]
    last = max((index for index, block in enumerate(blocks) if block >= 0), default=-1)
    segments: list[tuple[int, list[Node]]] = [(-1, [])]
    for index, (node, block) in enumerate(zip(nodes, blocks, strict=True)):
        current = segments[-1][0]
        if index > last >= 0:
            if current >= 0:
                segments.append((-1, []))
        elif block >= 0 and block != current:
            if block < current:
                raise QuantizeError(
                    f"the blocks of this model are interleaved: {node.name} of block {block} runs after "
                    f"block {current} began; quantize it as a plain module instead"
                )
            segments.append((block, []))
        segments[-1][1].append(node)
    return [Segment(block, tuple(members)) for block, members in segments if members]


class SegmentedGraph:
    """Segments of a graph, with the life of every value.

    tokens: placeholders whose values differ between sequences. shared: placeholders equal for all. Any other
    placeholder is scratch: a cache the graph writes before it reads it. uniform: all sequences have the same
    shapes, so that sizes taken from them are shared values.
    """

    def __init__(self, graph: Graph, tokens: Set[str], shared: Set[str], *, uniform: bool) -> None:
        self.segments = split_blocks(graph)
        self.placeholders = {node.name: node for node in graph.find_nodes(op="placeholder")}
        self.scratch = {n for name, n in self.placeholders.items() if name not in tokens | shared}
        varying = {n for name, n in self.placeholders.items() if name in tokens} | self.scratch
        self.per_sequence = self._reached(graph, varying, skip_sizes=uniform)
        self.from_weights = self._reached(
            graph, {n for n in graph.nodes if n.op == "get_attr"}, skip_sizes=False
        )
        self.last_use: dict[Node, int] = {}
        self.dies: dict[Node, list[Node]] = {}
        last_reader: dict[Node, tuple[int, Node]] = {}
        for index, segment in enumerate(self.segments):
            for node in segment.nodes:
                for operand in node.all_input_nodes:
                    self.last_use[operand] = index
                    last_reader[operand] = (index, node)
        self.results = [operand for node in graph.find_nodes(op="output") for operand in node.all_input_nodes]
        self.last_use.update(dict.fromkeys(self.results, len(self.segments)))
        for operand, (index, node) in last_reader.items():
            if operand.op == "call_function" and self.last_use[operand] == index:
                self.dies.setdefault(node, []).append(operand)

    @staticmethod
    def _reached(graph: Graph, start: Set[Node], *, skip_sizes: bool) -> set[Node]:
        """`start` and every call that depends on it; with skip_sizes, not through the size of a tensor."""
        found = set(start)
        for node in graph.nodes:
            if node.op == "call_function" and any(operand in found for operand in node.all_input_nodes):
                if not (skip_sizes and node.target is aten.sym_size.int):
                    found.add(node)
        return found

    def outputs(self, index: int) -> list[Node]:
        """Nodes of segment `index` that depend on the tokens and are read after it."""
        return [
            n
            for n in self.segments[index].nodes
            if n in self.per_sequence and self.last_use.get(n, -1) > index
        ]

    @property
    def batchable(self) -> bool:
        """Whether sequences can be stacked along the first axis: every value that depends on the tokens has
        a first axis of size 1, and none is concatenated with one that does not; or `symbolic_batch`."""
        return self._stackable({"1"}) or self.symbolic_batch

    @property
    def symbolic_batch(self) -> bool:
        """Whether the graph was captured for any batch: one symbol is the first axis of every value that depends on
        the tokens. Values that depend on its size alone are computed once, so all batches must be equally large."""
        symbols = {
            first
            for node in self.per_sequence
            for first in _FIRST_AXIS.findall(str(node.meta.get("type", "")))
        }
        return not self.scratch and len(symbols) == 1 and symbols != {"1"} and self._stackable(symbols)

    def _stackable(self, allowed: Set[str]) -> bool:
        for node in self.per_sequence:
            if node.op == "placeholder" and node in self.scratch:
                continue
            if any(first not in allowed for first in _FIRST_AXIS.findall(str(node.meta.get("type", "")))):
                return False
            if node.target is aten.cat.default and not set(node.all_input_nodes) <= self.per_sequence:
                return False
        return all("type" in node.meta for node in self.per_sequence)

    def arguments(self, node: Node, values: Mapping[Node, Any], batch: int, device: torch.device) -> Any:
        """(args, kwargs) of a call with operands read from `values`, for `batch` stacked sequences on `device`."""

        def place(item: Any) -> Any:
            if isinstance(item, Node):
                return values[item]
            return device if isinstance(item, torch.device) else item

        args, kwargs = map_aggregate(node.args, place), map_aggregate(node.kwargs, place)
        if batch > 1 and node.target in RESHAPES and node in self.per_sequence and args[1][0] == 1:  # type: ignore[index]
            args = (args[0], [batch, *args[1][1:]], *args[2:])  # type: ignore[index,misc]
        return args, kwargs


def functional_target(node: Node) -> Any:
    """What a node calls, with writes into caches replaced by their functional form (a new tensor)."""
    return aten.index_copy.default if node.target is aten.index_copy_.default else node.target
