"""choose-order: activation first for few tokens, weight first for many (paper, appendix D)."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Graph, Node

from liftc import ir
from liftc.passes.base import Pass, PassError
from liftc.passes.nodes import ATEN, node_type, place, remove_dead, type_of
from liftc.program import Program
from liftc.rules_lift import lift_of
from liftc.spec import DTYPES

_ORDERS = ("weight-first", "activation-first")
_MANY_TOKENS = ("prefill", "forward")


@dataclass(frozen=True)
class ChooseOrder(Pass):
    """Set the order of computation in some graphs.

    activation-first: lift the activation, then multiply by signs (lift, sign_matmul); cheapest for one token.
    weight-first: decode the weight, then one dense product (lifted_linear); cheapest for many. graphs: names
    of the graphs to change; by default prefill and forward, those the program has.
    """

    name: ClassVar[str] = "choose-order"
    graphs: tuple[str, ...] = ()
    order: str = "weight-first"

    def apply(self, program: Program) -> Program:
        if self.order not in _ORDERS:
            raise PassError(f"choose-order: order must be {' or '.join(_ORDERS)}, got {self.order!r}")
        for name in self.graphs:
            if name not in program.graphs:
                raise PassError(f"choose-order: there is no graph {name!r}, only {', '.join(program.graphs)}")
        result = program.copy()
        change = _weight_first if self.order == "weight-first" else _activation_first
        for name, graph in result.graphs.items():
            if name in (self.graphs or _MANY_TOKENS):
                change(result, graph)
                remove_dead(graph)
        return result


def _weight_first(program: Program, graph: Graph) -> None:
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not ir.sign_matmul:
            continue
        lift = lift_of(node)
        if lift is None:
            continue
        x, scale, left, right = lift.args
        packed, output_scale, dtype = node.args[2:]
        kind = node.meta.get("type", "")
        with graph.inserting_before(node):
            args = (x, scale, left, right, packed, output_scale)
            new = graph.create_node("call_function", ir.lifted_linear, args, name="lifted_linear")
            # lifted_linear answers in the dtype of x.
            x_kind = node_type(program, x) if isinstance(x, Node) else None
            same = x_kind is not None and DTYPES[x_kind[0]] is dtype
            own = node_type(program, node)
            place(new, node, kind if same or not own or not x_kind else type_of(x_kind[0], own[1]))
            if not same:
                new = place(
                    graph.create_node("call_function", ATEN.to.dtype, (new, dtype), name="to"), node, kind
                )
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _activation_first(program: Program, graph: Graph) -> None:
    lifts: dict[tuple[Any, ...], tuple[Node, Node]] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not ir.lifted_linear:
            continue
        kind = node_type(program, node)
        if kind is None:
            raise PassError(f"choose-order: the type of node %{node.name} is not known")
        operands = tuple(node.args[:4])
        packed, output_scale = node.args[4:]
        with graph.inserting_before(node):
            if operands not in lifts:
                lifts[operands] = _lift(program, graph, node, operands, kind[1][:-1], packed)
            args = (*lifts[operands], packed, output_scale, DTYPES[kind[0]])
            new = graph.create_node("call_function", ir.sign_matmul, args, name="sign_matmul")
            place(new, node, type_of(*kind))
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _lift(
    program: Program, graph: Graph, like: Node, operands: tuple[Any, ...], lead: tuple[str, ...], packed: Any
) -> tuple[Node, Node]:
    lifted = str(program.tensors[str(packed.target)].shape[1])
    kinds = (type_of("i16", (*lead, lifted)), type_of("f32", (*lead, "1")))
    lift = graph.create_node("call_function", ir.lift, operands, name="lift")
    place(lift, like, f"({', '.join(kinds)})")
    z, z_scale = (
        place(graph.create_node("call_function", operator.getitem, (lift, i), name=name), like, kinds[i])
        for i, name in enumerate(("z", "z_scale"))
    )
    return z, z_scale
