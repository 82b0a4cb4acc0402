"""Ways to break a valid program, one per rule of the verifier; each changes the program it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from liftc.program import Program
from liftc.spec import LinearSpec, TensorSpec

Break = Callable[[Program], None]


def node(program: Program, name: str, graph: str = "decode") -> Node:
    return next(n for n in program.graphs[graph].nodes if n.name == name)


def first(program: Program, op: str, graph: str = "decode") -> Node:
    return next(n for n in program.graphs[graph].nodes if str(n.target) == f"liftc.{op}.default")


def read(program: Program, target: str) -> Node:
    return next(n for n in program.graphs["decode"].nodes if n.op == "get_attr" and n.target == target)


def set_args(item: Node, **changes: Any) -> None:
    """Replace arguments by position, arg0=..."""
    args = list(item.args)
    for key, value in changes.items():
        args[int(key[3:])] = value
    item.args = tuple(args)


def use_before_definition(p: Program) -> None:
    node(p, "q").append(node(p, "scaled"))


def use_of_another_graph(p: Program) -> None:
    set_args(node(p, "act"), arg0=node(p, "gate", "prefill"))


def second_name(p: Program) -> None:
    node(p, "act").name = "gate"


def odd_name(p: Program) -> None:
    node(p, "act").name = "x; import os"


def module_call(p: Program) -> None:
    node(p, "act").op = "call_module"


def odd_value(p: Program) -> None:
    node(p, "kv").args = ([node(p, "k"), object()], -1)


def odd_metadata(p: Program) -> None:
    node(p, "act").meta["val"] = "x"


def text_block(p: Program) -> None:
    node(p, "act").meta["block"] = "0"


def default_input(p: Program) -> None:
    node(p, "ids").args = (1,)


def renamed_input(p: Program) -> None:
    node(p, "ids").target = "other"


def late_input(p: Program) -> None:
    graph = p.graphs["decode"]
    with graph.inserting_after(node(p, "act")):
        graph.placeholder("late").meta = {}


def undeclared(p: Program) -> None:
    del p.tensors["lm_head.weight"]


def other_read_type(p: Program) -> None:
    read(p, "q.bias").meta["type"] = "f32[65]"


def unknown_function(p: Program) -> None:
    node(p, "act").target = print


def file_op(p: Program) -> None:
    node(p, "act").target = torch.ops.aten.from_file.default


def too_many(p: Program) -> None:
    node(p, "act").args = (node(p, "gate"), 1)


def too_few(p: Program) -> None:
    node(p, "down").args = (node(p, "product"),)


def strange_keyword(p: Program) -> None:
    node(p, "act").kwargs = {"approximate": "tanh"}


def operator_keyword(p: Program) -> None:
    item = first(p, "lift").next
    item.kwargs = {"b": 0}


def cuda(p: Program) -> None:
    item = node(p, "act")
    item.target, item.args, item.kwargs = (
        torch.ops.aten.arange.default,
        (3,),
        {"device": torch.device("cuda")},
    )


def two_outputs(p: Program) -> None:
    p.graphs["decode"].create_node("output", "output", (None,))


def output_not_last(p: Program) -> None:
    graph = p.graphs["decode"]
    graph.output_node().append(node(p, "act"))


def narrow_weight(p: Program) -> None:
    p.tensors["lm_head.weight"] = TensorSpec((128, 32), "f32")
    for graph in p.graphs.values():
        for item in graph.nodes:
            if item.target == "lm_head.weight":
                item.meta["type"] = "f32[128,32]"


def set_tensor(name: str, shape: tuple[int, ...], dtype: str = "f32") -> Break:
    def change(p: Program) -> None:
        assert name in p.tensors
        p.tensors[name] = TensorSpec(shape, dtype)
        for graph in p.graphs.values():
            for item in graph.nodes:
                if item.op == "get_attr":
                    item.meta.pop("type", None)

    return change


def set_kind(op: str, kind: str, graph: str = "decode") -> Break:
    def change(p: Program) -> None:
        first(p, op, graph).meta["type"] = kind

    return change


def mixed_lifts(p: Program) -> None:
    products = [n for n in p.graphs["decode"].nodes if n.name.startswith("sign_matmul")]
    set_args(products[-1], arg1=products[0].args[1])


def swapped_results(p: Program) -> None:
    item = first(p, "sign_matmul")
    set_args(item, arg0=item.args[1], arg1=item.args[0])


def foreign_packed(p: Program) -> None:
    target = str(first(p, "sign_matmul").args[2].target)  # type: ignore[union-attr]
    for graph in p.graphs.values():
        for item in graph.nodes:
            item.target = "free.packed_weight" if item.target == target else item.target
    p.tensors["free.packed_weight"] = p.tensors[target]


def wide_lift(p: Program) -> None:
    """Shapes that agree with each other but overflow 32-bit sums."""
    item = first(p, "sign_matmul")
    set_tensor("whitening.left.2", (1000, 1000))(p)
    set_tensor("whitening.right.32", (64, 64))(p)
    set_tensor("mapping.77x32", (32, 77))(p)
    set_tensor(str(item.args[2].target), (2, 154000), "i32")(p)  # type: ignore[union-attr]
    for graph in p.graphs.values():
        for other in graph.nodes:
            if other.name.startswith("lift"):
                other.meta.pop("type")
            if other.name.startswith("decode_right"):
                other.meta["type"] = "f32[64,154]"


def rename_tensor(p: Program) -> None:
    p.tensors["bad name"] = TensorSpec((1,), "f32")


def odd_dtype(p: Program) -> None:
    p.tensors["extra"] = TensorSpec((1,), "f7")


def negative_shape(p: Program) -> None:
    p.tensors["extra"] = TensorSpec((-1,), "f32")


def list_attribute(p: Program) -> None:
    p.attrs["x"] = [1]  # type: ignore[assignment]


def change_linear(**changes: Any) -> Break:
    def change(p: Program) -> None:
        p.linears["layers.0.mlp.up"] = replace(p.linears["layers.0.mlp.up"], **changes)

    return change


def idle_lift(p: Program) -> None:
    p.lifts["idle"] = p.lifts["layers.0.attn.o"]


def fold(op: str, *operands: str, name: str = "extra") -> Break:
    def change(p: Program) -> None:
        p.folded[name] = (op, operands)

    return change


def stack_ragged(p: Program) -> None:
    change_linear(out_features=96)(p)
    gate = p.linears["layers.0.mlp.gate"]
    p.linears["layers.0.mlp.gate"] = replace(gate, out_features=95)


def uncomputed(p: Program) -> None:
    name = "layers.0.extra"
    p.linears[name] = LinearSpec(name, "embed.weight", 128, 64, 0)


def computed_twice(p: Program) -> None:
    item = node(p, "up")
    item.replace_all_uses_with(node(p, "gate"))
    set_args(item, arg1=node(p, "gate").args[1])
