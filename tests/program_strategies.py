"""Hypothesis strategies for whole programs: any value a node may hold, nested at will; nothing need run."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch.fx import Graph, Node

from liftc.format import LiftFormat
from liftc.opnames import op_target
from liftc.program import Program
from liftc.spec import DTYPES, LiftSpec, LinearSpec, TensorSpec
from liftc.values import is_node_name

OPS = (
    "aten.linear.default", "aten.add.Tensor", "aten.index_copy_.default", "aten.split_with_sizes.default",
    "aten.arange.default", "operator.getitem", "operator.floordiv", "torch.sym_max", "liftc.lift.default",
    "liftc.sign_matmul.default",
)  # fmt: skip
SEGMENT = st.text("abcxyz_019", min_size=1, max_size=5)
NODE_NAME = st.from_regex(r"[a-z_][a-z0-9_]{0,6}", fullmatch=True).filter(is_node_name)
TENSOR_NAME = st.lists(SEGMENT, min_size=1, max_size=3).map(".".join) | st.just("m.q+k-v/77x32")
DIM = st.integers(0, 9999).map(str) | st.sampled_from(("t", "s27 + 1", "2*t", "Mod(t, 2)", "(s0*s1)//4"))
ONE_TYPE = st.builds(
    lambda dtype, dims: f"{dtype}[{','.join(dims)}]",
    st.sampled_from(sorted(DTYPES)),
    st.lists(DIM, max_size=4),
)
TYPE = st.just("") | ONE_TYPE | st.lists(ONE_TYPE, min_size=1, max_size=3).map(lambda t: f"({', '.join(t)})")
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        (torch.bfloat16, torch.complex64, torch.device("cpu"), torch.strided, torch.contiguous_format, ...)
    )
)
META = st.builds(
    lambda kind, block, source: {"type": kind, "block": block, "source": source},
    TYPE, st.integers(-1, 3), st.just("") | TENSOR_NAME,
)  # fmt: skip
FORMATS = (LiftFormat(77, 32), LiftFormat(3, 2), LiftFormat(8, 8))


def values(references: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    """An argument: references and plain values, in lists, tuples and slices."""
    leaf = references | PLAIN
    sizes = st.none() | st.integers() | references
    return st.recursive(
        leaf | st.builds(slice, sizes, sizes, sizes),
        lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
        max_leaves=6,
    )


@st.composite
def graphs(draw: st.DrawFn, tensors: list[str]) -> Graph:
    """A graph whose get_attr nodes appear anywhere, once or several times per tensor."""
    graph = Graph()
    names = draw(st.lists(NODE_NAME, min_size=1, max_size=7, unique=True))
    inputs = draw(st.integers(0, len(names)))
    made: list[Node] = []
    for i, name in enumerate(names):
        if tensors and draw(st.booleans()):
            made.append(graph.create_node("get_attr", draw(st.sampled_from(tensors)), name=f"{name}_attr"))
        if i < inputs:
            node = graph.create_node("placeholder", name, name=name)
        else:
            references = st.sampled_from(made) if made else st.nothing()
            args = tuple(draw(st.lists(values(references), max_size=4)))
            kwargs = draw(
                st.dictionaries(st.sampled_from(("dim", "dtype", "alpha")), values(references), max_size=2)
            )
            node = graph.create_node(
                "call_function", op_target(draw(st.sampled_from(OPS))), args, kwargs, name
            )
        if node.name != name:  # fx renumbers a few names, x_0 after x_attr for one; nothing to test there
            node.name = name
        node.meta = draw(META)
        made.append(node)
    graph.output(draw(values(st.sampled_from(made))))
    return graph


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """A program with every table filled at random."""
    specs = st.builds(
        TensorSpec, st.lists(st.integers(0, 5000), max_size=3).map(tuple), st.sampled_from(sorted(DTYPES))
    )
    tensors = draw(st.dictionaries(TENSOR_NAME, specs, max_size=4))
    names = draw(st.lists(TENSOR_NAME, max_size=3, unique=True))
    formats = st.sampled_from(FORMATS)
    lifts = {name: draw(formats.flatmap(_lifts)) for name in names}
    linears = {
        name: LinearSpec(
            name, draw(TENSOR_NAME), draw(st.integers(1, 99)), draw(st.integers(1, 99)),
            draw(st.integers(-1, 4)), draw(st.booleans()), draw(st.just("") | TENSOR_NAME),
            draw(st.none() | formats),
        )
        for name in names
    }  # fmt: skip
    folded = draw(
        st.dictionaries(
            TENSOR_NAME,
            st.tuples(st.just("decode_right"), st.lists(TENSOR_NAME, max_size=3).map(tuple)),
            max_size=2,
        )
    )
    number = st.integers() | st.floats().filter(lambda x: not math.isnan(x))
    plain = st.text(max_size=9) | number | st.booleans()
    attrs = draw(st.dictionaries(SEGMENT.map("a{}".format), plain, max_size=3))
    names = draw(st.lists(st.sampled_from(("prefill", "decode", "forward")), max_size=2, unique=True))
    return Program(
        draw(st.text(max_size=9)), {name: draw(graphs(sorted(tensors))) for name in names},
        tensors, linears, lifts, folded, attrs,
    )  # fmt: skip


def _lifts(fmt: LiftFormat) -> st.SearchStrategy[LiftSpec]:
    sizes = st.tuples(st.integers(1, 9), st.integers(1, 4).map(lambda k: k * fmt.subspace_dim))
    return sizes.flatmap(
        lambda s: st.integers(1, s[0] * s[1]).map(lambda width: LiftSpec(fmt, width, left=s[0], right=s[1]))
    )
