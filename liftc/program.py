"""Program: the captured graphs of one model and the tables that describe them.

A graph is a plain `torch.fx.Graph`: placeholders, `get_attr` nodes whose target is a key of
`Program.tensors`, `call_function` nodes whose target is an OpOverload (or a whitelisted operator) and one
output. No graph owns weights; tensors live in a checkpoint on disk until something needs them.

Node metadata, all plain values so that text and JSON keep them:
    node.meta["type"]    "bf16[1,t,576]", "i64[]", or "(i16[1,t,1386], f32[1,t,1])"; "" when not a tensor
    node.meta["block"]   decoder block the node belongs to, -1 outside
    node.meta["source"]  module path it was captured from, "" when unknown
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Graph, Node

from liftc.spec import DTYPE_NAMES, LiftSpec, LinearSpec, TensorSpec

Attribute = str | int | float | bool
META_KEYS = ("type", "block", "source")


@dataclass
class Program:
    """Graphs by name ("prefill", "decode" for a causal language model; "forward" for anything else).

    tensors: every tensor a graph reads. linears: the layers selected for lowering. lifts: the shared lifts.
    folded: tensors computed once at load, name -> (op, names of its operands). attrs: facts about the model.
    Passes treat a Program as immutable: they work on `copy()` and return it.
    """

    name: str
    graphs: dict[str, Graph] = field(default_factory=dict)
    tensors: dict[str, TensorSpec] = field(default_factory=dict)
    linears: dict[str, LinearSpec] = field(default_factory=dict)
    lifts: dict[str, LiftSpec] = field(default_factory=dict)
    folded: dict[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    attrs: dict[str, Attribute] = field(default_factory=dict)

    def copy(self) -> Program:
        """A Program that can be changed without touching this one (graphs are copied node by node)."""
        return replace(
            self,
            graphs={name: copy_graph(graph) for name, graph in self.graphs.items()},
            tensors=dict(self.tensors),
            linears=dict(self.linears),
            lifts=dict(self.lifts),
            folded=dict(self.folded),
            attrs=dict(self.attrs),
        )


def copy_graph(graph: Graph) -> Graph:
    """Copy a graph, keeping node names and the metadata of META_KEYS."""
    result = Graph()
    mapping: dict[Node, Node] = {}
    for node in graph.nodes:
        new = result.create_node(
            node.op,
            node.target,
            torch.fx.node.map_arg(node.args, lambda n: mapping[n]),
            torch.fx.node.map_arg(node.kwargs, lambda n: mapping[n]),
            node.name,
        )
        new.name = node.name
        new.meta = {key: copy.copy(node.meta[key]) for key in META_KEYS if key in node.meta}
        mapping[node] = new
    return result


def type_text(value: object) -> str:
    """Type text of a (fake) tensor or a tuple of them: "bf16[1,t,576]"; "" for anything else."""
    if isinstance(value, torch.Tensor):
        return f"{DTYPE_NAMES.get(value.dtype, str(value.dtype)[6:])}[{','.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)) and value and all(isinstance(v, torch.Tensor) for v in value):
        return f"({', '.join(type_text(v) for v in value)})"
    return ""


def split_type(text: str) -> tuple[str, tuple[str, ...]]:
    """("bf16", ("1", "t", "576")) of the type text of a single tensor; raises ValueError otherwise."""
    dtype, bracket, rest = text.partition("[")
    if not bracket or not rest.endswith("]"):
        raise ValueError(f"not the type of one tensor: {text!r}")
    return dtype, tuple(part for part in rest[:-1].split(",") if part)
