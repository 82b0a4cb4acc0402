"""lower-linears: the selected linears become lift and sign_matmul, their dense weights leave the program."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Graph, Node

from liftc import ir
from liftc.packing import packed_rows
from liftc.passes.base import Pass, PassError
from liftc.passes.nodes import ATEN, LinearUse, TensorReads, linear_uses, place, remove_dead, type_of, typed
from liftc.program import Program
from liftc.spec import DTYPES, LiftSpec, TensorSpec
from liftc.tensor_names import (
    activation_scale_name,
    lift_members,
    output_scale_name,
    packed_name,
    packed_parts,
    transform_names,
)

_SCALE_DTYPE = "bf16"


@dataclass(frozen=True)
class LowerLinears(Pass):
    """Replace `linear(x, @w, b)` by `z, s = lift(x, ...)`, `y = sign_matmul(z, s, @packed, @output_scale)`.

    One lift node serves all linears of a lift; a bias is added afterwards. Declares the tensors the quantizer
    fills in (names in liftc/tensor_names.py). activation_scale: every lift also scales its input channels.
    """

    name: ClassVar[str] = "lower-linears"
    activation_scale: bool = False

    def apply(self, program: Program) -> Program:
        for name, linear in program.linears.items():
            if linear.lift not in program.lifts:
                raise PassError(f"lower-linears: linear {name} has no lift; run share-transforms first")
        if packed_parts(program):
            raise PassError("lower-linears: the linears of this program are lowered already")
        result = program.copy()
        self._declare(result)
        uses = list(linear_uses(result))
        names = {linear.weight: name for name, linear in result.linears.items()}
        for graph_name, graph in result.graphs.items():
            lowering = _Lowering(result, graph, self.activation_scale)
            for use in uses:
                if use.graph == graph_name and use.weight in names:
                    lowering.replace(use, names[use.weight])
            remove_dead(graph)
        for name, linear in result.linears.items():
            readers = [g for g, graph in result.graphs.items() if _reads(graph, linear.weight)]
            if readers:
                raise PassError(
                    f"lower-linears: {linear.weight} of linear {name} is read elsewhere in {readers[0]}"
                )
            del result.tensors[linear.weight]
        return result

    def _declare(self, program: Program) -> None:
        for name, linear in program.linears.items():
            lifted = program.lifts[linear.lift].lifted_features
            shape = (packed_rows(linear.out_features), lifted)
            program.tensors[packed_name(name)] = TensorSpec(shape, "i32")
            program.tensors[output_scale_name(name)] = TensorSpec((linear.out_features,), _SCALE_DTYPE)
        for lift, spec in program.lifts.items():
            if self.activation_scale:
                program.tensors[activation_scale_name(lift)] = TensorSpec((spec.in_features,), _SCALE_DTYPE)
            names, fmt = transform_names(lift, spec), spec.format
            program.tensors[names.left] = TensorSpec((spec.left, spec.left), "f32")
            program.tensors[names.right] = TensorSpec((spec.right, spec.right), "f32")
            program.tensors[names.mapping] = TensorSpec((fmt.subspace_dim, fmt.lifted_dim), "f32")


class _Lowering:
    """Rewrites the linears of one graph; new nodes go where the first linear of their lift stood."""

    def __init__(self, program: Program, graph: Graph, activation_scale: bool) -> None:
        self.program = program
        self.graph = graph
        self.activation_scale = activation_scale
        self.reads = TensorReads(program, graph)
        self.rights: dict[tuple[str, str], Node] = {}
        self.lifted: dict[str, tuple[Node, Node, Node]] = {}

    def replace(self, use: LinearUse, name: str) -> None:
        node, lift = use.node, self.program.linears[name].lift
        dtype, dims = typed(self.program, node, f"lower-linears, {name}")
        with self.graph.inserting_before(node):
            x, z, z_scale = self.lifted.get(lift) or self._lift(use, lift, dims[:-1])
            if x is not use.x:
                members = ", ".join(lift_members(self.program)[lift])
                raise PassError(f"lower-linears: {members} share a lift but read different activations")
            packed, scale = self.reads.read(packed_name(name)), self.reads.read(output_scale_name(name))
            args = (z, z_scale, packed, scale, DTYPES[dtype])
            new = self._call(ir.sign_matmul, args, "sign_matmul", node, type_of(dtype, dims))
            if len(node.args) > 2 and node.args[2] is not None:
                new = self._call(ATEN.add.Tensor, (new, node.args[2]), "add_bias", node, type_of(dtype, dims))
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)

    def _lift(self, use: LinearUse, lift: str, lead: tuple[str, ...]) -> tuple[Node, Node, Node]:
        spec = self.program.lifts[lift]
        names = transform_names(lift, spec)
        scale = self.reads.read(activation_scale_name(lift)) if self.activation_scale else None
        left, right = self.reads.read(names.left), self._right(names.right, names.mapping, spec, use.node)
        kinds = (type_of("i16", (*lead, str(spec.lifted_features))), type_of("f32", (*lead, "1")))
        node = self._call(ir.lift, (use.x, scale, left, right), "lift", use.node, f"({', '.join(kinds)})")
        z = self._call(operator.getitem, (node, 0), "z", use.node, kinds[0])
        z_scale = self._call(operator.getitem, (node, 1), "z_scale", use.node, kinds[1])
        for new in (node, z, z_scale):
            new.meta["source"] = lift
        self.lifted[lift] = (use.x, z, z_scale)
        return self.lifted[lift]

    def _right(self, right: str, mapping: str, spec: LiftSpec, like: Node) -> Node:
        if (right, mapping) not in self.rights:
            args = (self.reads.read(right), self.reads.read(mapping))
            kind = type_of("f32", (str(spec.right), str(spec.lifted_right)))
            node = self._call(ir.decode_right, args, "decode_right", like, kind)
            node.meta.update(block=-1, source="")
            self.rights[right, mapping] = node
        return self.rights[right, mapping]

    def _call(self, target: object, args: tuple[object, ...], name: str, like: Node, kind: str) -> Node:
        return place(self.graph.create_node("call_function", target, args, name=name), like, kind)  # type: ignore[arg-type]


def _reads(graph: Graph, tensor: str) -> bool:
    return any(node.op == "get_attr" and node.target == tensor for node in graph.nodes)
