"""Run a captured graph one decoder block at a time, so that only that block's weights are in memory.

The call_function nodes of a graph are cut into consecutive segments: what comes before block 0, block 0,
block 1, ..., and what comes after the last. Values that depend on the tokens (hidden states) are kept per
sequence and only while a later segment reads them; values that do not (masks, rotary tables) are computed
once and shared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from liftc.errors import QuantizeError

Fetch = Callable[[str], torch.Tensor]
Hook = Callable[[torch.Tensor], None]


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


class BlockRunner:
    """Evaluates segments over many sequences.

    sequences: one dict per sequence, placeholder name -> value that depends on the tokens. shared:
    placeholder name -> value equal for all sequences. scratch: builds a placeholder that the graph
    overwrites (a KV cache), by name; its contents never outlive a segment.
    """

    def __init__(
        self,
        graph: Graph,
        sequences: list[dict[str, Any]],
        shared: Mapping[str, Any],
        scratch: Callable[[str], torch.Tensor],
    ) -> None:
        self.segments = split_blocks(graph)
        self._scratch_factory = scratch
        placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
        self._scratch = {
            n for name, n in placeholders.items() if name not in shared and name not in sequences[0]
        }
        self._shared: dict[Node, Any] = {placeholders[k]: v for k, v in shared.items() if k in placeholders}
        self._values: list[dict[Node, Any]] = [
            {placeholders[k]: v for k, v in sequence.items() if k in placeholders} for sequence in sequences
        ]
        self._per_sequence = self._reachable(
            graph, {placeholders[k] for k in sequences[0] if k in placeholders}
        )
        self._last_use: dict[Node, int] = {}
        for index, segment in enumerate(self.segments):
            for node in segment.nodes:
                for operand in node.all_input_nodes:
                    self._last_use[operand] = index
        for node in graph.find_nodes(op="output"):
            for operand in node.all_input_nodes:
                self._last_use[operand] = len(self.segments)

    def __len__(self) -> int:
        return len(self._values)

    def value(self, sequence: int, node: Node) -> Any:
        """Value of a node that is still alive for a sequence."""
        return self._values[sequence].get(node, self._shared.get(node))

    def observe(self, index: int, fetch: Fetch, hooks: Mapping[Node, Hook]) -> None:
        """Run segment `index` for every sequence, call each hook with its node's value, keep nothing."""
        self._run(index, fetch, dict(hooks), keep=False)

    def advance(self, index: int, fetch: Fetch) -> None:
        """Run segment `index` for every sequence and keep what later segments read."""
        self._run(index, fetch, {}, keep=True)

    @torch.no_grad()
    def _run(self, index: int, fetch: Fetch, hooks: dict[Node, Hook], *, keep: bool) -> None:
        segment = self.segments[index]
        weights = {name: fetch(name) for name in segment.weights}
        wanted = {n for node in segment.nodes for n in node.all_input_nodes if n in self._scratch}
        scratch = {node: self._scratch_factory(node.name) for node in wanted}
        for number, alive in enumerate(self._values):
            local: dict[Node, Any] = {}
            remaining = len(hooks)

            def read(node: Node, local: dict[Node, Any] = local, alive: dict[Node, Any] = alive) -> Any:
                if node.op == "get_attr":
                    return weights[str(node.target)]
                for table in (local, alive, self._shared, scratch):
                    if node in table:
                        return table[node]
                raise QuantizeError(f"block {segment.block} reads {node.name}, which nothing computed")

            for node in segment.nodes:
                if node not in self._per_sequence and node in self._shared:
                    continue
                value = node.target(*map_arg(node.args, read), **map_arg(node.kwargs, read))  # type: ignore[operator]
                if node in self._per_sequence:
                    local[node] = value
                else:
                    self._shared[node] = value
                if node in hooks:
                    hooks[node](value)
                    remaining -= 1
                    if remaining == 0 and not keep:
                        break
            if keep:
                alive.update(local)
                self._values[number] = {n: v for n, v in alive.items() if self._last_use.get(n, -1) > index}
        if keep:
            self._shared = {n: v for n, v in self._shared.items() if self._last_use.get(n, -1) > index}

    def _reachable(self, graph: Graph, seeds: set[Node]) -> set[Node]:
        found = seeds | self._scratch
        for node in graph.nodes:
            if node.op == "call_function" and any(operand in found for operand in node.all_input_nodes):
                found.add(node)
        return found
