"""fold-decode-transform: the fused right factor of a transform is computed once, at load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from liftc import ir
from liftc.passes.base import Pass
from liftc.passes.nodes import remove_dead
from liftc.program import Program
from liftc.tensor_names import folded_name


@dataclass(frozen=True)
class FoldDecodeTransform(Pass):
    """Turn `decode_right(@right, @mapping)` into a read of a tensor listed in Program.folded.

    Only calls whose operands are all stored tensors fold; equal ones share one tensor.
    """

    name: ClassVar[str] = "fold-decode-transform"

    def apply(self, program: Program) -> Program:
        result = program.copy()
        for graph in result.graphs.values():
            reads: dict[str, Node] = {}
            for node in list(graph.nodes):
                operands = _stored_operands(node, program)
                if operands is None:
                    continue
                name = folded_name(operands)
                result.folded[name] = ("decode_right", operands)
                if name not in reads:
                    with graph.inserting_before(node):
                        reads[name] = graph.create_node("get_attr", name)
                        reads[name].meta = {"type": node.meta.get("type", "")}
                node.replace_all_uses_with(reads[name])
                graph.erase_node(node)
            remove_dead(graph)
        return result


def _stored_operands(node: Node, program: Program) -> tuple[str, ...] | None:
    """Names of the operands of a decode_right of stored tensors, None for any other node."""
    if node.op != "call_function" or node.target is not ir.decode_right or node.kwargs:
        return None
    names = []
    for operand in node.args:
        if not isinstance(operand, Node) or operand.op != "get_attr" or operand.target not in program.tensors:
            return None
        names.append(str(operand.target))
    return tuple(names)
