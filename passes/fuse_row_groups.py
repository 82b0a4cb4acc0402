"""fuse-row-groups: the linears of one lift become one sign_matmul over their stacked rows."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Graph, Node

from liftc import ir
from liftc.passes.base import Pass
from liftc.passes.nodes import ATEN, TensorReads, node_type, place, remove_dead, type_of
from liftc.program import Program
from liftc.spec import ROWS_PER_WORD, TensorSpec
from liftc.tensor_names import lift_members, output_scale_name, packed_name


@dataclass(frozen=True)
class FuseRowGroups(Pass):
    """Stack the rows of linears that share a lift: one sign_matmul, then a split of its result.

    Stacking keeps whole words of the packed layout only if every linear but the last has a multiple of 32
    rows; other groups stay as they are. The stacked tensors carry the lift's name; packed_parts tells which
    linears they hold.
    """

    name: ClassVar[str] = "fuse-row-groups"

    def apply(self, program: Program) -> Program:
        result = program.copy()
        fused = {lift: members for lift, members in lift_members(program).items() if _fits(program, members)}
        result.tensors = _stacked_tensors(program, fused)
        for graph in result.graphs.values():
            _fuse(result, graph, fused)
        return result


def _fits(program: Program, members: list[str]) -> bool:
    rows = [program.linears[name].out_features for name in members]
    lowered = all(packed_name(name) in program.tensors for name in members)
    return len(members) > 1 and lowered and not any(count % ROWS_PER_WORD for count in rows[:-1])


def _stacked_tensors(program: Program, fused: dict[str, list[str]]) -> dict[str, TensorSpec]:
    """Program.tensors with the tensors of each group stacked where those of its first linear stood."""
    stacked: dict[str, tuple[str, TensorSpec] | None] = {}
    for lift, members in fused.items():
        for naming in (packed_name, output_scale_name):
            parts = [program.tensors[naming(name)] for name in members]
            rows = sum(spec.shape[0] for spec in parts)
            stacked.update(dict.fromkeys(map(naming, members)))
            whole = TensorSpec((rows, *parts[0].shape[1:]), parts[0].dtype)
            stacked[naming(members[0])] = naming(lift), whole
    entries = [stacked.get(name, (name, spec)) for name, spec in program.tensors.items()]
    return dict(entry for entry in entries if entry is not None)


def _fuse(program: Program, graph: Graph, fused: dict[str, list[str]]) -> None:
    products = {
        str(node.args[2].target): node
        for node in graph.nodes
        if node.op == "call_function" and node.target is ir.sign_matmul and isinstance(node.args[2], Node)
    }
    reads = TensorReads(program, graph)
    for lift, members in fused.items():
        parts = [products[packed_name(name)] for name in members]
        earliest = min(parts)  # in order of execution; all share z, which comes before
        z, z_scale, _, _, dtype = earliest.args
        kind = node_type(program, earliest) or ("", ())
        rows = [program.linears[name].out_features for name in members]
        kinds = [type_of(kind[0], (*kind[1][:-1], str(count))) for count in rows]
        with graph.inserting_before(earliest):
            packed, scale = reads.read(packed_name(lift)), reads.read(output_scale_name(lift))
            args = (z, z_scale, packed, scale, dtype)
            product = graph.create_node("call_function", ir.sign_matmul, args, name="sign_matmul")
            place(product, earliest, type_of(kind[0], (*kind[1][:-1], str(sum(rows)))))
            split = graph.create_node(
                "call_function", ATEN.split_with_sizes.default, (product, rows, -1), name="split"
            )
            place(split, earliest, f"({', '.join(kinds)})")
            product.meta["source"] = split.meta["source"] = lift
            for index, part in enumerate(parts):
                new = graph.create_node("call_function", operator.getitem, (split, index), name="rows")
                place(new, part, kinds[index])
                _allow_strides(program, part, rows[index])
                part.replace_all_uses_with(new)
    remove_dead(graph)


def _allow_strides(program: Program, node: Node, width: int) -> None:
    """A split is not contiguous: a view that merges features with other dimensions becomes a reshape."""
    for user in node.users:
        if user.target is not ATEN.view.default:
            continue
        kind = node_type(program, user)
        dims = kind[1] if kind else ()
        tails = [dims[i:] for i in range(len(dims)) if all(dim.isdigit() for dim in dims[i:])]
        if not any(math.prod(map(int, tail)) == width for tail in tails):
            user.target = ATEN.reshape.default
