"""choose-order: activation first for few tokens, weight first for many (paper, appendix D)."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Graph, Node

from liftc import ir
from liftc.passes.base import Pass, PassError
from liftc.passes.nodes import ATEN, TensorReads, node_type, place, remove_dead, type_of
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
    reads = TensorReads(program, graph)
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not ir.sign_matmul:
            continue
        lift = lift_of(node)
        if lift is None:
            continue
        x, scale, left, right = lift.args
        with graph.inserting_before(node):
            factors = _factors(program, reads, right)
        if factors is None:
            continue
        packed, output_scale, dtype = node.args[2:]
        kind = node.meta.get("type", "")
        with graph.inserting_before(node):
            args = (x, scale, left, *factors, packed, output_scale)
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


def _factors(program: Program, reads: TensorReads, right: Any) -> tuple[Any, Any] | None:
    """right_inverse and mapping_matrix of a fused right factor, read by new nodes where it is folded already.

    None when the factor is neither decode_right of two operands nor folded from them.
    """
    if not isinstance(right, Node):
        return None
    if right.op == "call_function" and right.target is ir.decode_right and len(right.args) == 2:
        return right.args[0], right.args[1]
    op, names = program.folded.get(str(right.target), ("", ())) if right.op == "get_attr" else ("", ())
    if op != "decode_right" or len(names) != 2:
        return None
    return reads.read(names[0]), reads.read(names[1])


def _fused_right(program: Program, graph: Graph, node: Node) -> Node:
    """The right factor of lift for a lifted_linear: decode_right of its factors, before `node`."""
    kinds = [node_type(program, factor) for factor in node.args[3:5]]  # type: ignore[arg-type]
    if kinds[0] is None or kinds[1] is None:
        raise PassError(f"choose-order: the factors of node %{node.name} have no known type")
    (t2, _), (d, lifted) = (tuple(map(int, kind[1])) for kind in kinds if kind)
    new = graph.create_node("call_function", ir.decode_right, node.args[3:5], name="decode_right")
    place(new, node, type_of("f32", (str(t2), str(t2 // d * lifted))))
    new.meta.update(block=-1, source="")
    return new


def _activation_first(program: Program, graph: Graph) -> None:
    lifts: dict[tuple[Any, ...], tuple[Node, Node]] = {}
    rights: dict[tuple[Any, ...], Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not ir.lifted_linear:
            continue
        kind = node_type(program, node)
        if kind is None:
            raise PassError(f"choose-order: the type of node %{node.name} is not known")
        operands = tuple(node.args[:5])
        packed, output_scale = node.args[5:]
        with graph.inserting_before(node):
            if operands not in lifts:
                if operands[3:] not in rights:
                    rights[operands[3:]] = _fused_right(program, graph, node)
                fused = (*operands[:3], rights[operands[3:]])
                lifts[operands] = _lift(program, graph, node, fused, kind[1][:-1], packed)
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
