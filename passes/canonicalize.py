"""canonicalize: one spelling per computation, so that later passes need to know only one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Graph, Node

from liftc.passes.base import Pass
from liftc.passes.nodes import (
    ATEN,
    LINEAR,
    argument,
    is_call,
    is_mutating,
    node_type,
    place,
    remove_dead,
    takes,
    type_of,
)
from liftc.program import Program

# fmt: off
_ALIASES = (
    ATEN.alias, ATEN.detach, ATEN.detach_, ATEN.lift_fresh, ATEN.positive, ATEN.resolve_conj,
    ATEN.resolve_neg,
)
_SAME_TYPE_SAME_VALUE = (
    ATEN.to, ATEN.view, ATEN.reshape, ATEN._unsafe_view, ATEN._reshape_alias, ATEN.view_as, ATEN.flatten,
    ATEN.expand, ATEN.expand_as, ATEN.squeeze, ATEN.type_as,
)
_COPIES = (ATEN.clone, ATEN._to_copy, ATEN.lift_fresh_copy)
_FRESH = (
    ATEN.linear, ATEN.addmm, ATEN.mm, ATEN.bmm, ATEN.add, ATEN.sub, ATEN.mul, ATEN.div, ATEN.neg, ATEN.silu,
    ATEN.gelu, ATEN.softmax, ATEN.layer_norm, ATEN.embedding,
)
_GUARDS = (
    ATEN._assert_tensor_metadata, ATEN._assert_scalar, ATEN._assert_async, ATEN.sym_constrain_range,
    ATEN.sym_constrain_range_for_size,
)
_DROPOUTS = (ATEN.dropout, ATEN.feature_dropout, ATEN.alpha_dropout)
_FLATTENINGS = (ATEN.view, ATEN.reshape, ATEN._unsafe_view, ATEN.flatten)
# fmt: on


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Drop nodes that do nothing, and write every product with a stored matrix as aten.linear.

    `addmm(b, view(x), @w)` followed by a view (GPT-2's Conv1D), `mm` and `matmul` become
    `linear(x, t(@w), b)` on the un-flattened x, so that linears on one activation read one node. A weight
    stored the other way round, `matmul(x, t(@w))`, becomes `linear(x, @w)`.
    """

    name: ClassVar[str] = "canonicalize"

    def apply(self, program: Program) -> Program:
        result = program.copy()
        for graph in result.graphs.values():
            _one_read_per_tensor(graph)
            _drop_identities(result, graph)
            for node in list(graph.nodes):
                _as_linear(result, graph, node)
            remove_dead(graph)
        return result


def _one_read_per_tensor(graph: Graph) -> None:
    first: dict[object, Node] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr" and first.setdefault(node.target, node) is not node:
            node.replace_all_uses_with(first[node.target])
            graph.erase_node(node)


def _drop_identities(program: Program, graph: Graph) -> None:
    in_place = _written(graph)
    for node in list(graph.nodes):
        if is_call(node, *_GUARDS):
            graph.erase_node(node)
            continue
        source = node.args[0] if node.op == "call_function" and node.args else None
        if isinstance(source, Node) and _is_identity(program, node, source, in_place):
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _is_identity(program: Program, node: Node, source: Node, in_place: set[Node]) -> bool:
    """True when `node` can be replaced by its first argument, `source`."""
    if is_call(node, *_ALIASES):
        return True
    if is_call(node, *_DROPOUTS):
        return not argument(node, "train") or bool(argument(node, "p") == 0)
    kind = node_type(program, node)
    if kind is None or kind != node_type(program, source):
        return False
    layout = takes(node, "memory_format") and argument(node, "memory_format") is not None
    if is_call(node, *_SAME_TYPE_SAME_VALUE):
        return not layout and not (takes(node, "copy") and argument(node, "copy"))
    if is_call(node, ATEN.slice):
        return bool(argument(node, "step") == 1)
    # A copy matters when somebody writes, and when it makes a strided tensor dense.
    written = any(other.op != "placeholder" for other in in_place)
    return is_call(node, *_COPIES) and not layout and not written and is_call(source, *_FRESH)


def _written(graph: Graph) -> set[Node]:
    """Nodes whose memory some call writes."""
    written: set[Node] = set()
    for node in graph.nodes:
        if is_mutating(node):
            for argument_, value in zip(node.target._schema.arguments, node.args):
                if argument_.is_write and isinstance(value, Node):
                    written.add(value)
    return written


def _as_linear(program: Program, graph: Graph, node: Node) -> None:
    """Rewrite one product with a stored matrix; leave everything else alone."""
    if is_call(node, ATEN.addmm) and argument(node, "beta") == 1 and argument(node, "alpha") == 1:
        bias, x, matrix = (argument(node, name) for name in ("self", "mat1", "mat2"))
    elif is_call(node, ATEN.mm, ATEN.matmul):
        x, matrix = argument(node, "self"), argument(node, "mat2" if takes(node, "mat2") else "other")
        bias = None
    elif node.op == "call_function" and node.target is LINEAR:
        _canonical_weight(program, graph, node)
        return
    else:
        return
    base = _stored_matrix(program, matrix)
    if base is None or not isinstance(x, Node) or not isinstance(matrix, Node):
        return
    weight, flipped = base
    width = program.tensors[str(weight.target)].shape[flipped ^ 1]
    if isinstance(bias, Node) and (node_type(program, bias) or ("", ()))[1] != (str(width),):
        return
    for old, data, kind in _unflattened(program, node, x, str(width)):
        with graph.inserting_before(node):
            operand = weight if flipped else _transposed(program, graph, weight)
            operands = (data, operand, bias) if bias is not None else (data, operand)
            new = place(graph.create_node("call_function", LINEAR, operands, name="linear"), node, kind)
        old.replace_all_uses_with(new)
        if old is not node:
            graph.erase_node(old)
    if not node.users:
        graph.erase_node(node)


def _unflattened(program: Program, node: Node, x: Node, width: str) -> list[tuple[Node, Node, str]]:
    """(node to replace, its x, its type): views around a product of a flattened x, or the product itself."""
    kind = node.meta.get("type", "")
    source = x.args[0] if is_call(x, *_FLATTENINGS) else None
    inner = node_type(program, x)
    outer = node_type(program, source) if isinstance(source, Node) else None
    if not isinstance(source, Node) or not outer or not inner:
        return [(node, x, kind)]
    if inner[0] != outer[0] or len(inner[1]) != 2 or inner[1][1:] != outer[1][-1:]:
        return [(node, x, kind)]
    wanted = (inner[0], (*outer[1][:-1], width))
    views = list(node.users)
    if any(not is_call(view, *_FLATTENINGS) or node_type(program, view) != wanted for view in views):
        return [(node, x, kind)]
    return [(view, source, type_of(*wanted)) for view in views]


def _stored_matrix(program: Program, value: object) -> tuple[Node, bool] | None:
    """(get_attr node of a matrix, whether `value` is its transpose), None for anything else."""
    if not isinstance(value, Node):
        return None
    if value.op == "get_attr":
        spec = program.tensors.get(str(value.target))
        return (value, False) if spec and len(spec.shape) == 2 else None
    if not _swaps_two_dims(value):
        return None
    inner = _stored_matrix(program, value.args[0])
    return (inner[0], not inner[1]) if inner else None


def _swaps_two_dims(node: Node) -> bool:
    if is_call(node, ATEN.t, ATEN.numpy_T, ATEN.mT, ATEN.adjoint):
        return True
    if is_call(node, ATEN.transpose, ATEN.swapaxes, ATEN.swapdims):
        return {int(axis) % 2 for axis in node.args[1:3] if isinstance(axis, int)} == {0, 1}
    if is_call(node, ATEN.permute) and isinstance(node.args[1], (list, tuple)):
        return [int(axis) % 2 for axis in node.args[1] if isinstance(axis, int)] == [1, 0]
    return False


def _canonical_weight(program: Program, graph: Graph, node: Node) -> None:
    """Write the weight of a linear as `@w` or `aten.t(@w)`, whichever transposes it was built from."""
    base = _stored_matrix(program, node.args[1])
    if base is None or node.args[1] is base[0] or (base[1] and is_call(node.args[1], ATEN.t)):
        return
    with graph.inserting_before(node):
        operand = _transposed(program, graph, base[0]) if base[1] else base[0]
    node.update_arg(1, operand)


def _transposed(program: Program, graph: Graph, weight: Node) -> Node:
    spec = program.tensors[str(weight.target)]
    node = graph.create_node("call_function", ATEN.t.default, (weight,), name="t")
    return place(node, node, f"{spec.dtype}[{spec.shape[1]},{spec.shape[0]}]")
