"""Which norms, gates and GELUs a loaded graph hands to its lifts, and that it computes the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graphs_before_lifts import (
    FEATURES,
    GATES,
    LAYERS,
    OpsOfTests,
    build,
    chunk_gate,
    gate,
    gelu,
    gelu_gate,
    layer_norm,
    norm,
    offset_norm,
    tensors,
)
from tiny_models import FAMILIES
from torch.fx import Graph, Node

from liftc import ir
from liftc.capture import capture_config
from liftc.format import LiftFormat
from liftc.passes.base import PassPipeline
from liftc.passes.pipeline import after_quantize, before_quantize
from liftc.runtime.executor import BoundGraph
from liftc.runtime.fused_lifts import FusedLifts, fuse
from liftc.runtime.planes import GATED, GELUS

aten = torch.ops.aten


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lifts", [1, 2])
@pytest.mark.parametrize("what", ["norm", "norm with swapped factors", "gate", "chunk gate"])
def test_fused_graphs_compute_the_same(what: str, lifts: int, dtype: torch.dtype) -> None:
    ops = OpsOfTests()
    width = FEATURES * (2 if "gate" in what else 1)

    def make(graph: Graph, x: Node) -> Node:
        if "gate" in what:
            return gate(graph, x) if what == "gate" else chunk_gate(graph, x)
        return norm(graph, x, dtype, "swapped" in what)

    graph, held = build(ops, make, lifts), tensors(dtype)
    before = BoundGraph(graph, held, torch.device("cpu"))
    assert fuse(graph, ops) == lifts  # type: ignore[arg-type]
    assert not [n for n in graph.nodes if n.target in (aten.mul.Tensor, aten.to.dtype, aten.silu.default)]
    after = BoundGraph(graph, held, torch.device("cpu"))
    for rows in (1, 3):  # taken by the kernels of this test, and done by separate operations
        x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)
        for got, want in zip(after.call(x), before.call(x), strict=True):
            torch.testing.assert_close(got, want)
    assert len(ops.planes.sources) == lifts
    if "gate" in what:
        assert ops.planes.sources[0] == GATED
    else:
        source = ops.planes.sources[0]
        assert (
            source.op == "lift_planes_norm" and source.eps == 1e-5 and torch.equal(source.gain, held["gain"])
        )  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lifts", [1, 2])
@pytest.mark.parametrize("what", [*LAYERS, *GATES])
def test_fused_layer_norms_and_gelus_compute_the_same(what: str, lifts: int, dtype: torch.dtype) -> None:
    ops = OpsOfTests()
    kind, make = GATES[what] if what in GATES else LAYERS[what]
    width = FEATURES * (2 if "gate" in what else 1)
    graph, held = build(ops, make, lifts), tensors(dtype)
    before = BoundGraph(graph, held, torch.device("cpu"))
    assert fuse(graph, ops) == lifts  # type: ignore[arg-type]
    targets = {n.target for n in graph.nodes}
    assert not targets & {aten.mul.Tensor, aten.layer_norm.default, aten.gelu.default, aten.type_as.default}
    after = BoundGraph(graph, held, torch.device("cpu"))
    for rows in (1, 3):  # taken by the kernels of this test, and done by separate operations
        x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)
        for got, want in zip(after.call(x), before.call(x), strict=True):
            assert torch.equal(got, want)
    assert len(ops.planes.sources) == lifts
    for source in ops.planes.sources:
        if what in GATES:
            assert source == GELUS[kind]
        elif what == "unit offset":
            assert (source.op, source.eps, source.choice) == ("lift_planes_layer", 1e-5, 1)
            assert source.gain is not None and torch.equal(source.gain, held["gain"])
        else:
            shift = held["shift"] if kind else torch.zeros_like(held["gain"])
            assert source.op == "lift_planes_layer" and source.eps == 1e-5 and source.gain is not None
            assert torch.equal(source.gain, torch.cat([held["gain"], shift]))


def test_gain_and_shift_are_joined_once() -> None:
    ops, held = OpsOfTests(), tensors(torch.bfloat16)
    fused = FusedLifts(ops)  # type: ignore[arg-type]
    x = torch.ones(1, FEATURES, dtype=torch.bfloat16)
    for shift in (held["shift"], None):
        ops.planes.sources.clear()
        for _ in range(2):
            fused.layer_norm(x, held["gain"], shift, 1e-5, None, held["left"], held["right"])
        first, second = (source.gain for source in ops.planes.sources)
        assert first is second
    held["gain"] += 1
    fused.layer_norm(x, held["gain"], None, 1e-5, None, held["left"], held["right"])
    changed = ops.planes.sources[-1].gain
    assert changed is not None and torch.equal(changed[:FEATURES], held["gain"]), "made again when it changes"


@pytest.mark.parametrize(
    "make",
    [
        lambda g, x: gate(g, x, (FEATURES + 4, FEATURES - 4)),
        lambda g, x: gate(g, x, first=1),
        lambda g, x: chunk_gate(g, x, 3, -1),
        lambda g, x: chunk_gate(g, x, 2, 1),
        lambda g, x: chunk_gate(g, x, 2),
        lambda g, x: g.call_function(aten.mul.Tensor, (x, x)),
        lambda g, x: g.call_function(aten.add.Tensor, (norm(g, x, torch.bfloat16), x)),
        lambda g, x: x,
        # LayerNorm over two axes, with a gain or a shift that is computed, without a gain, with something after it
        lambda g, x: layer_norm(g, x, [3, FEATURES]),
        lambda g, x: layer_norm(g, x, [FEATURES], x),
        lambda g, x: layer_norm(g, x, [FEATURES], g.get_attr("gain"), x),
        lambda g, x: layer_norm(g, x, [FEATURES], None),
        lambda g, x: g.call_function(aten.add.Tensor, (layer_norm(g, x), x)),
        # another offset, an offset of something computed, a cast to the type of something else
        lambda g, x: offset_norm(g, x, 2.0),
        lambda g, x: offset_norm(g, x, gain=g.call_function(aten.neg.default, (g.get_attr("gain"),))),
        lambda g, x: offset_norm(g, x, like=g.get_attr("gain")),
        # gelu of the second half, of halves of other sizes or of another axis, and times something else
        lambda g, x: gelu_gate(g, x, first=1),
        lambda g, x: gelu_gate(g, x, sizes=[FEATURES + 4, FEATURES - 4]),
        lambda g, x: gelu_gate(g, x, axis=0),
        lambda g, x: g.call_function(aten.mul.Tensor, (gelu(g, x), x)),
        lambda g, x: g.call_function(aten.mul.Tensor, (gelu(g, x), 2.0)),
        lambda g, x: gelu(g, x, "other"),
    ],
)
def test_other_inputs_stay(make: Callable[[Graph, Node], Node]) -> None:
    ops = OpsOfTests()
    graph = build(ops, make)
    nodes = len(graph.nodes)
    assert fuse(graph, ops) == 0 and len(graph.nodes) == nodes  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make", [layer_norm, offset_norm, gelu, gelu_gate, gate], ids=lambda make: make.__name__
)
def test_what_others_read_stays(make: Callable[[Graph, Node], Node]) -> None:
    ops = OpsOfTests()
    graph = build(ops, make, returned=True)
    nodes = len(graph.nodes)
    assert fuse(graph, ops) == 0 and len(graph.nodes) == nodes  # type: ignore[arg-type]


def test_gelu_in_a_gate_that_others_read_is_computed_for_them() -> None:
    """The product is only the lift's, the gelu is not: it stays, and the lift takes gate and up."""
    ops, seen = OpsOfTests(), []

    def make(graph: Graph, x: Node) -> Node:
        made = gelu_gate(graph, x)
        seen.append(made.args[0])
        return made

    graph = build(ops, make)
    (output,) = (n for n in graph.nodes if n.op == "output")
    output.args = ((*output.args[0], seen[0]),)
    before = BoundGraph(graph, tensors(torch.bfloat16), torch.device("cpu"))
    assert fuse(graph, ops) == 1  # type: ignore[arg-type]
    assert [n for n in graph.nodes if n.target is aten.gelu.default] == seen
    x = torch.randn(1, 2 * FEATURES, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    after = BoundGraph(graph, tensors(torch.bfloat16), torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(after.call(x), before.call(x), strict=True))


def test_a_norm_that_others_read_stays() -> None:
    ops = OpsOfTests()
    graph = build(ops, lambda g, x: norm(g, x, torch.bfloat16), returned=True)
    assert fuse(graph, ops) == 0  # type: ignore[arg-type]


def test_a_norm_to_another_dtype_is_done_by_separate_operations() -> None:
    ops = OpsOfTests()
    graph, held = build(ops, lambda g, x: norm(g, x, torch.bfloat16)), tensors(torch.bfloat16)
    x = torch.randn(1, FEATURES, generator=torch.Generator().manual_seed(1))
    want = BoundGraph(graph, held, torch.device("cpu")).call(x)
    assert fuse(graph, ops) == 1  # type: ignore[arg-type]
    got = BoundGraph(graph, held, torch.device("cpu")).call(x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)) and not ops.planes.sources


def test_a_layer_norm_of_several_dtypes_is_done_by_separate_operations() -> None:
    ops = OpsOfTests()
    graph, held = build(ops, layer_norm), tensors(torch.float32)
    for dtype in (torch.float32, torch.bfloat16):  # of x: no kernels; and of half of the operands only
        x = torch.randn(1, FEATURES, generator=torch.Generator().manual_seed(1)).to(dtype)
        arguments = (held["gain"], held["shift"], 1e-5, None, held["left"], held["right"])
        if dtype == torch.float32:
            want = BoundGraph(graph, held, torch.device("cpu")).call(x)
            got = FusedLifts(ops).layer_norm(x, *arguments)  # type: ignore[arg-type]
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        else:
            fused = FusedLifts(ops)  # type: ignore[arg-type]
            assert fused._gain_and_shift(x, held["gain"].to(dtype), held["shift"]) is None
            assert fused._gain_and_shift(x, held["gain"], held["shift"].to(dtype)) is None
            assert fused._gain_and_shift(x, held["gain"].to(dtype), held["shift"][:4].to(dtype)) is None
    assert not ops.planes.sources


@pytest.mark.parametrize(
    "family, taken",
    [
        ("llama", {"norm": 2}), ("qwen3", {"norm": 4}), ("phi3", {"norm": 4, "gate": 2}), ("gpt2", {"layer_norm": 4}),
        ("gemma2", {"unit_offset_norm": 4, "gelu": 2}), ("gemma3", {"unit_offset_norm": 4, "gelu": 2}),
    ],
)  # fmt: skip
def test_captured_models(family: str, taken: dict[str, int]) -> None:
    """Two layers. What stays: norms that dense linears read too, a GELU that is spelled out, gates not of one split."""
    config = FAMILIES[family]()
    config.dtype = torch.bfloat16
    if family.startswith("gemma"):
        config.intermediate_size = 96
    pipeline = PassPipeline([*before_quantize(LiftFormat(19, 8)), *after_quantize()])
    graph = pipeline.apply(capture_config(config).program).graphs["decode"]
    ops = OpsOfTests()
    for node in graph.nodes:
        if node.target is ir.lift:
            node.target = ops.lift_operands
    assert fuse(graph, ops) == sum(taken.values())  # type: ignore[arg-type]
    made = [
        n.target.__name__ for n in graph.nodes if isinstance(getattr(n.target, "__self__", None), FusedLifts)
    ]
    assert {name: made.count(name) for name in made} == taken
