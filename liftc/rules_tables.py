"""Rules of the tables: names, shapes, and that linears, lifts, tensors and graphs tell the same story."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch

from liftc.packing import packed_rows
from liftc.program import Program
from liftc.rules import Context, TableRule, weight_of
from liftc.spec import DTYPES, LinearSpec, TensorSpec
from liftc.tensor_names import lift_members, output_scale_name, packed_name, packed_parts
from liftc.values import is_tensor_name

Faults = Iterator[tuple[str, str]]
_ATEN = torch.ops.aten


def dense_spec(program: Program, linear: LinearSpec) -> TensorSpec | None:
    """The checkpoint tensor of a linear that is not lowered yet, None once it is."""
    return program.tensors.get(linear.weight)


def _names(program: Program) -> Faults:
    for table in ("tensors", "linears", "lifts", "folded"):
        for name in getattr(program, table):
            if not is_tensor_name(name):
                yield f"{table} {name!r}", "found other characters"


def _specs(program: Program) -> Faults:
    for name, spec in program.tensors.items():
        sizes = all(type(dim) is int and dim >= 0 for dim in spec.shape)
        if spec.dtype not in DTYPES or not sizes:
            yield f"tensor {name}", f"found {spec}"


def _attrs(program: Program) -> Faults:
    for key, value in program.attrs.items():
        if type(value) not in (str, int, float, bool):
            yield f"attribute {key}", f"found {type(value).__name__}"


def _keys(program: Program) -> Faults:
    for name, linear in program.linears.items():
        if linear.name != name:
            yield f"linear {name}", f"found {linear.name}"


def _dense_shapes(program: Program) -> Faults:
    for name, linear in program.linears.items():
        spec = dense_spec(program, linear)
        shape = (linear.out_features, linear.in_features)
        expected = shape[::-1] if linear.transposed else shape
        if spec and spec.shape != expected:
            yield f"linear {name}", f"expected {list(expected)}, found {list(spec.shape)}"


def _lift_rows(program: Program) -> Faults:
    for name, linear in program.linears.items():
        if not linear.lift:
            continue
        lift = program.lifts.get(linear.lift)
        if lift is None:
            yield f"linear {name}", f"found no lift {linear.lift}"
        elif (linear.format, linear.in_features) != (lift.format, lift.in_features):
            expected = f"{lift.format} in={lift.in_features}"
            yield f"linear {name}", f"expected {expected}, found {linear.format} in={linear.in_features}"


def _used_lifts(program: Program) -> Faults:
    for lift, members in lift_members(program).items():
        if not members:
            yield f"lift {lift}", "found none"


def _folded(program: Program) -> Faults:
    context = Context(program)
    for name, (op, operands) in program.folded.items():
        if op != "decode_right":
            yield f"folded {name}", f"found op {op}"
        elif name in program.tensors:
            yield f"folded {name}", "found a stored tensor of the same name"
        elif context.folded(name) is None:
            found = ", ".join(f"{operand} {program.tensors.get(operand)}" for operand in operands)
            yield f"folded {name}", f"found {found or 'no operands'}"


def _stacked(program: Program) -> Faults:
    """Packed tensors have the shape their linears add up to."""
    for packed, members in packed_parts(program).items():
        linears = [program.linears[name] for name in members]
        ragged = [linear.name for linear in linears[:-1] if linear.out_features % 32]
        if ragged:
            yield f"tensor {packed}", f"found {ragged[0]} with rows to spare inside the stack"
        rows = sum(linear.out_features for linear in linears)
        lift = program.lifts.get(linears[0].lift)
        scale = output_scale_name(packed.removesuffix(".packed_weight"))
        expected = TensorSpec((packed_rows(rows), lift.lifted_features if lift else 0), "i32")
        if program.tensors[packed] != expected:
            yield f"tensor {packed}", f"expected {expected}, found {program.tensors[packed]}"
        if scale not in program.tensors or program.tensors[scale].shape != (rows,):
            yield f"tensor {scale}", f"expected [{rows}], found {program.tensors.get(scale)}"


def _computed(program: Program) -> Faults:
    """Each linear is computed exactly once per graph, dense or from its packed rows."""
    owners = {name: packed for packed, members in packed_parts(program).items() for name in members}
    for graph_name, graph in program.graphs.items():
        dense: Counter[str] = Counter()
        packed: Counter[str] = Counter()
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            if node.target is _ATEN.linear.default and len(node.args) > 1:
                weight = weight_of(node.args[1])
                dense[weight[0] if weight else ""] += 1
            elif node.target in (torch.ops.liftc.sign_matmul.default, torch.ops.liftc.lifted_linear.default):
                tensors = [a.target for a in node.all_input_nodes if a.op == "get_attr"]
                packed.update(str(target) for target in tensors if str(target).endswith(packed_name("")))
        for name, linear in program.linears.items():
            count = packed[owners[name]] if name in owners else dense[linear.weight]
            if count != 1:
                yield f"linear {name}", f"expected 1, found {count} in graph {graph_name}"


TABLE_RULES = (
    TableRule("names of tensors, linears and lifts hold letters, digits and _ . + / - only", _names),
    TableRule("a tensor has a known dtype and a shape of whole numbers", _specs),
    TableRule("attributes are text, numbers, True or False", _attrs),
    TableRule("a linear is listed under its own name", _keys),
    TableRule("the weight of a linear has shape [out,in], or [in,out] when transposed", _dense_shapes),
    TableRule("a linear and its lift agree in format and input features", _lift_rows),
    TableRule("a lift serves at least one linear", _used_lifts),
    TableRule(
        "a folded tensor is decode_right of two stored tensors [t2,t2] and [d,D], d dividing t2", _folded
    ),
    TableRule("packed signs and output scales have the shape of the linears they stack", _stacked),
    TableRule("a linear is computed once in every graph", _computed),
)
