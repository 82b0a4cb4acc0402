"""Turn a graph and its tensors into a callable on one device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Graph, GraphModule
from torch.fx.node import Argument, map_aggregate

from liftc.errors import ArtifactError
from liftc.program import copy_graph, split_type
from liftc.spec import DTYPES


class BoundGraph:
    """A graph bound to tensors and a device: `call(*inputs)` runs it without autograd.

    Tensors are shared, not copied. Device arguments inside the graph are replaced by `device`.
    Raises ArtifactError when the graph reads a tensor that is not there.
    """

    def __init__(self, graph: Graph, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self.device = device
        bound = copy_graph(graph)
        names: dict[str, str] = {}
        for node in bound.nodes:
            if node.op == "get_attr":
                target = str(node.target)
                if target not in tensors:
                    raise ArtifactError(
                        f"graph node {node.name} reads tensor {target}, which the artifact lacks"
                    )
                node.target = names.setdefault(target, f"tensor_{len(names)}")
            elif node.op == "call_function":
                node.args = map_aggregate(node.args, self._place)
                node.kwargs = map_aggregate(node.kwargs, self._place)
        self.inputs = tuple(node.name for node in bound.nodes if node.op == "placeholder")
        self.types = {n.name: str(n.meta.get("type", "")) for n in bound.nodes if n.op == "placeholder"}
        self.module = GraphModule({flat: tensors[name] for name, flat in names.items()}, bound)

    def _place(self, value: Argument) -> Argument:
        return self.device if isinstance(value, torch.device) else value

    @torch.no_grad()
    def call(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Run the graph; outputs as the graph returns them, a one-element tuple unwrapped."""
        result = self.module(*inputs)
        if isinstance(result, (tuple, list)) and len(result) == 1:
            return result[0]  # type: ignore[no-any-return]
        return result  # type: ignore[no-any-return]


class KVCache:
    """Static key/value cache: one tensor per placeholder `k_cache_i` / `v_cache_i`, [1, heads, length, dim].

    The graphs write it in place; `length` is the longest sequence it holds.
    """

    def __init__(self, graph: BoundGraph, length: int) -> None:
        self.length = length
        self.tensors: list[torch.Tensor] = []
        for name in graph.inputs:
            if "_cache_" in name:
                dtype, dims = split_type(graph.types[name])
                shape = [int(dim) if dim.isdigit() else length for dim in dims]
                self.tensors.append(torch.zeros(shape, dtype=DTYPES[dtype], device=graph.device))

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        return sum(t.numel() * t.element_size() for t in self.tensors)
