"""Run a captured graph one decoder block at a time, so that only that block's weights are in memory.

Sequences of equal shape are stacked into batches. Hidden states are kept per batch, and only while a later
segment reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.nn import functional

from liftc.errors import QuantizeError
from liftc.quant.activations import ActivationStore
from liftc.quant.segments import SegmentedGraph, functional_target

aten = torch.ops.aten
Fetch = Callable[[str], torch.Tensor]
Hook = Callable[[torch.Tensor], None]
Watch = Callable[[Node, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ScaledWeight:
    """A weight diag(scale) unit whose scale can be trained without a gradient of the whole matrix.

    unit: (OC, IC) in the model's dtype. scale: float32 (OC,). transposed: the graph reads the transpose.
    """

    unit: torch.Tensor
    scale: torch.Tensor
    transposed: bool = False

    def dense(self) -> torch.Tensor:
        """The weight as the graph reads it."""
        weight = (self.unit * self.scale[:, None]).to(self.unit.dtype)
        return weight.T if self.transposed else weight

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """functional.linear with this weight; the scale is applied in float32."""
        y = (functional.linear(x, self.unit).float() * self.scale).to(x.dtype)
        return y if bias is None else y + bias


Weights = Mapping[str, "torch.Tensor | ScaledWeight"]


class BlockRunner:
    """Evaluates segments over many sequences.

    sequences: one dict per sequence, placeholder name -> value that depends on the tokens. shared:
    placeholder name -> value equal for all sequences. scratch: builds a placeholder that the graph
    overwrites (a KV cache), by name; its contents never outlive a segment. batch: sequences per call, when
    the graph can be batched; at most that many, in equal batches, when it was captured for any batch. Weights
    are moved to `device`, hidden states live in `store`.
    """

    def __init__(
        self,
        graph: Graph,
        sequences: Sequence[Mapping[str, Any]],
        shared: Mapping[str, Any],
        scratch: Callable[[str], torch.Tensor],
        *,
        device: torch.device | str = "cpu",
        batch: int = 1,
        store: ActivationStore | None = None,
    ) -> None:
        self.device = torch.device(device)
        names = set(sequences[0])
        uniform = len({_shapes(sequence) for sequence in sequences}) == 1
        self.graph = SegmentedGraph(graph, names, set(shared), uniform=uniform)
        self.segments = self.graph.segments
        known = self.graph.placeholders
        self._scratch_factory = scratch
        self._shared: dict[Node, Any] = {known[k]: self._move(v) for k, v in shared.items() if k in known}
        self._store = store if store is not None else ActivationStore()
        self._by_name: dict[str, Node] = {node.name: node for node in graph.nodes}
        self.rows: list[int] = []
        self.position = 0
        size = batch if uniform or not self.graph.symbolic_batch else 1
        if self.graph.symbolic_batch:
            size = max(n for n in range(1, size + 1) if len(sequences) % n == 0)
        for stacked in stack(sequences, size if self.graph.batchable else 1):
            first = next(iter(stacked.values()))
            self.rows.append(int(first.shape[0]) if isinstance(first, torch.Tensor) and first.ndim else 1)
            self._store.put(len(self.rows) - 1, {k: v for k, v in stacked.items() if k in known})

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.rows)

    def value(self, number: int, node: Node) -> Any:
        """Value of a node that is still alive for a batch."""
        return self._alive(number).get(node)

    def observe(self, index: int, fetch: Fetch, hooks: Mapping[Node, Hook]) -> None:
        """Run segment `index` for every batch, call each hook with its node's value, keep nothing.

        A hook may sit on a value of an earlier segment that this one reads. Stops after the last hook.
        """
        weights = self.weights(index, fetch)
        inside = set(self.segments[index].nodes)
        with torch.no_grad():
            for number in range(len(self)):
                alive = self._alive(number)
                for node in hooks.keys() - inside:
                    hooks[node](alive[node])
                wanted = {node: hook for node, hook in hooks.items() if node in inside}
                if wanted:
                    self._run(index, self.rows[number], alive, weights, wanted)

    def advance(self, index: int, fetch: Fetch) -> None:
        """Run segment `index` (= position) for every batch and keep what later segments read."""
        weights = self.weights(index, fetch)
        with torch.no_grad():
            for number in range(len(self)):
                alive = self._alive(number)
                alive.update(self._run(index, self.rows[number], alive, weights, None))
                per_sequence = self.graph.per_sequence
                kept = {n: v for n, v in alive.items() if n in per_sequence and self._needed(n, index)}
                self._store.put(number, {node.name: value for node, value in kept.items()})
        self._shared = {n: v for n, v in self._shared.items() if self._needed(n, index)}
        self.position = index + 1

    def weights(self, index: int, fetch: Fetch) -> dict[str, torch.Tensor]:
        """The tensors segment `index` reads, on the runner's device."""
        return {name: fetch(name).to(self.device) for name in self.segments[index].weights}

    def outputs(
        self,
        index: int,
        number: int,
        weights: Weights,
        inputs: Mapping[Node, Any] | None = None,
        watch: Mapping[Node, Watch] | None = None,
    ) -> dict[Node, Any]:
        """What later segments read of segment `index` for one batch, differentiable in the weights.

        inputs: values that replace stored ones. watch: functions of a node and its value whose result takes the
        value's place.
        """
        alive = {**self._alive(number), **(inputs or {})}
        local = self._run(index, self.rows[number], alive, weights, None, watch or {})
        return {node: local[node] for node in self.graph.outputs(index) if node in local}

    def keep(self, store: ActivationStore) -> Kept:
        """What is alive now, for every batch, kept in a store of its own while the runner goes on."""
        for number in range(len(self)):
            store.put(number, self._store.get(number, torch.device("cpu")))
        return Kept(self, dict(self._shared), store)

    def node(self, name: str) -> Node:
        """The node of the graph with this name."""
        return self._by_name[name]

    def close(self) -> None:
        """Drop the hidden states, files included."""
        self._store.clear()

    def share(self, values: Mapping[str, Any]) -> None:
        """Replace shared inputs (by placeholder name) for the segments that follow."""
        for name, value in values.items():
            if name in self.graph.placeholders:
                self._shared[self.graph.placeholders[name]] = self._move(value)

    def _alive(self, number: int) -> dict[Node, Any]:
        stored = self._store.get(number, self.device)
        return {**self._shared, **{self._by_name[name]: value for name, value in stored.items()}}

    def _needed(self, node: Node, index: int) -> bool:
        return self.graph.last_use.get(node, -1) > index

    def _move(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, torch.Tensor) else value

    def _run(
        self,
        index: int,
        rows: int,
        alive: Mapping[Node, Any],
        weights: Weights,
        hooks: dict[Node, Hook] | None,
        watch: Mapping[Node, Watch] = MappingProxyType({}),
    ) -> dict[Node, Any]:
        """Local values of a segment that are still needed at its end; with hooks, stops after the last one."""
        segment, graph = self.segments[index], self.graph
        values: dict[Node, Any] = dict(alive)
        for node in {o for n in segment.nodes for o in n.all_input_nodes if o in graph.scratch}:
            empty = self._scratch_factory(node.name).to(self.device)
            values[node] = empty if rows == 1 else empty.expand(rows, *empty.shape[1:])
        local: dict[Node, Any] = {}
        remaining = len(hooks) if hooks is not None else -1
        for node in segment.nodes:
            if node in values and node not in graph.from_weights:
                continue
            for operand in node.all_input_nodes:
                if operand.op == "get_attr":
                    held = weights[str(operand.target)]
                    direct = node.target is aten.linear.default and operand is node.args[1]
                    if isinstance(held, torch.Tensor) or not direct:
                        values[operand] = held.dense() if isinstance(held, ScaledWeight) else held
                elif operand not in values:
                    raise QuantizeError(f"block {segment.block} reads {operand.name}, which nothing computed")
            value = self._call(node, values, rows, weights)
            if node in watch:
                value = watch[node](node, value)
            values[node] = value
            if node in graph.per_sequence:
                local[node] = value
            elif self._needed(node, index) or node not in graph.from_weights:
                self._shared[node] = value
            if hooks is not None and node in hooks:
                hooks[node](value)
                remaining -= 1
                if remaining == 0:
                    break
            for dead in graph.dies.get(node, ()):
                values.pop(dead, None)
                local.pop(dead, None)
        return local

    def _call(self, node: Node, values: dict[Node, Any], rows: int, weights: Weights) -> Any:
        if node.target is aten.linear.default and isinstance(node.args[1], Node):
            held = weights.get(str(node.args[1].target)) if node.args[1].op == "get_attr" else None
            if isinstance(held, ScaledWeight) and not held.transposed:
                bias = values[node.args[2]] if len(node.args) > 2 and isinstance(node.args[2], Node) else None
                return held.linear(values[node.args[0]], bias)  # type: ignore[index]
        args, kwargs = self.graph.arguments(node, values, rows, self.device)
        return functional_target(node)(*args, **kwargs)


@dataclass(frozen=True)
class Kept:
    """What was alive before a segment of a runner."""

    runner: BlockRunner
    shared: Mapping[Node, Any]
    store: ActivationStore

    def get(self, number: int) -> dict[Node, Any]:
        """Values by node for one batch, on the runner's device."""
        stored = self.store.get(number, self.runner.device)
        return {**self.shared, **{self.runner.node(name): value for name, value in stored.items()}}

    def close(self) -> None:
        """Drop the values, files included."""
        self.store.clear()


def stack(sequences: Sequence[Mapping[str, Any]], batch: int) -> list[dict[str, Any]]:
    """Sequences of equal shapes stacked along their first axis, at most `batch` together, in order of first
    appearance."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for sequence in sequences:
        groups.setdefault(_shapes(sequence), []).append(sequence)
    found: list[dict[str, Any]] = []
    for members in groups.values():
        for start in range(0, len(members), batch):
            part = members[start : start + batch]
            one = len(part) == 1
            found.append({k: v if one else torch.cat([m[k] for m in part]) for k, v in part[0].items()})
    return found


def _shapes(sequence: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(
        (k, tuple(v.shape) if isinstance(v, torch.Tensor) else v) for k, v in sorted(sequence.items())
    )
