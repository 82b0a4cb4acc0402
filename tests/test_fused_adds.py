"""Which additions a loaded graph gives to its products, and that it computes the same."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES
from torch.fx import Graph, Node

from liftc import ir, reference
from liftc.capture import capture_config
from liftc.format import LiftFormat
from liftc.packing import pack_signs
from liftc.passes.base import PassPipeline
from liftc.passes.pipeline import after_quantize, before_quantize
from liftc.runtime.executor import BoundGraph
from liftc.runtime.fused_adds import STACKED, FusedAdds, fuse_adds
from liftc.spec import DTYPES, Z_MAX

aten = torch.ops.aten
ROWS, COLUMNS = 12, 20
SIZES = [5, 4, 3]
DTYPE = torch.bfloat16

Make = Callable[[Graph, Node, Node], Node]


class TilesOfTests:
    """Multiplies by hand and remembers what is added in the kernel."""

    def __init__(self) -> None:
        self.added: list[tuple[bool, bool]] = []

    def sign_matmul(self, z: Any, z_scale: Any, tiles: Any, scale: Any, dtype: Any, *addends: Any) -> Any:
        bias, residual = (*addends, None, None)[:2]
        self.added.append((bias is not None, residual is not None))
        y = reference.sign_matmul(z, z_scale, tiles, scale, dtype)
        y = y if bias is None else y + bias
        return y if residual is None else y + residual


def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    held = {
        "signs": pack_signs(torch.randn(ROWS, COLUMNS, generator=g)),
        "scale": torch.rand(ROWS, generator=g),
        "bias": (torch.randn(ROWS, generator=g) * 1e5).to(DTYPE),
        "row": torch.randn(1, ROWS, generator=g).to(DTYPE),
        "wide_bias": torch.randn(ROWS, generator=g),
    }
    parts = torch.randn(ROWS, generator=g).to(DTYPE).split(SIZES)
    return held | {f"bias_{i}": part.clone() for i, part in enumerate(parts)}


def add(graph: Graph, a: Node, b: Any, **kwargs: Any) -> Node:
    return graph.call_function(aten.add.Tensor, (a, b), kwargs)


def bias(graph: Graph, y: Node, name: str = "bias") -> Node:
    return add(graph, y, graph.get_attr(name))


def parts(graph: Graph, y: Node, biased: tuple[int, ...], name: str = "bias_{}", joined: bool = True) -> Node:
    split = graph.call_function(aten.split_with_sizes.default, (y, SIZES, -1))
    pieces = [graph.call_function(operator.getitem, (split, i)) for i in range(3)]
    pieces = [bias(graph, p, name.format(i)) if i in biased else p for i, p in enumerate(pieces)]
    return graph.call_function(aten.cat.default, (pieces, -1))


def build(tiles: TilesOfTests, make: Make) -> Graph:
    graph = Graph()
    x, z, z_scale = (graph.placeholder(name) for name in ("x", "z", "z_scale"))
    residual = graph.call_function(aten.mul.Tensor, (x, 2.0))
    operands = (z, z_scale, graph.get_attr("signs"), graph.get_attr("scale"), DTYPE)
    graph.output((make(graph, graph.call_function(tiles.sign_matmul, operands), residual),))
    return graph


def run(graph: Graph, held: dict[str, torch.Tensor], rows: int = 2) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    z = torch.randint(-Z_MAX, Z_MAX + 1, (rows, COLUMNS), generator=g).to(torch.int16)
    x = torch.randn(2, ROWS, generator=g).to(DTYPE)
    return BoundGraph(graph, held, torch.device("cpu")).call(x, z, torch.rand(rows, 1, generator=g))  # type: ignore[return-value]


@pytest.mark.parametrize(
    "make, gone, in_kernel",
    [
        (lambda g, y, r: add(g, y, r), 1, (False, True)),
        (lambda g, y, r: add(g, r, y), 1, (False, True)),
        (lambda g, y, r: bias(g, y), 1, (True, False)),
        (lambda g, y, r: add(g, r, bias(g, y)), 2, (True, True)),
        (lambda g, y, r: add(g, add(g, y, r), r), 1, (False, True)),
        (lambda g, y, r: bias(g, bias(g, y)), 1, (True, False)),
        (lambda g, y, r: bias(g, add(g, y, r)), 1, (False, True)),
        (lambda g, y, r: parts(g, y, (0, 1, 2)), 3, (True, False)),
        (lambda g, y, r: parts(g, y, (1,)), 1, (True, False)),
    ],
)
def test_additions_move_into_the_product(make: Make, gone: int, in_kernel: tuple[bool, bool]) -> None:
    tiles, held = TilesOfTests(), tensors()
    graph = build(tiles, make)
    adds = sum(n.target is aten.add.Tensor for n in graph.nodes)
    want = run(graph, held)
    assert fuse_adds(graph, held, tiles) == gone  # type: ignore[arg-type]
    assert sum(n.target is aten.add.Tensor for n in graph.nodes) == adds - gone
    tiles.added.clear()
    assert torch.equal(run(graph, held), want) and tiles.added == [in_kernel]
    assert fuse_adds(graph, held, tiles) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [
        lambda g, y, r: y,
        lambda g, y, r: add(g, y, y),
        lambda g, y, r: add(g, y, 1.0),
        lambda g, y, r: add(g, y, r, alpha=2),
        lambda g, y, r: bias(g, y, "row"),
        lambda g, y, r: bias(g, y, "wide_bias"),
        lambda g, y, r: g.call_function(aten.sub.Tensor, (y, r)),
        lambda g, y, r: add(g, add(g, y, r), g.call_function(aten.neg.default, (y,))),
        lambda g, y, r: parts(g, y, (0, 1), "bias_1"),
        lambda g, y, r: parts(g, y, ()),
    ],
)
def test_other_graphs_stay(make: Make) -> None:
    tiles, held = TilesOfTests(), tensors()
    graph = build(tiles, make)
    nodes, names = len(graph.nodes), set(held)
    assert fuse_adds(graph, held, tiles) == 0  # type: ignore[arg-type]
    assert len(graph.nodes) == nodes and set(held) == names


@pytest.mark.parametrize("what", ["broadcast", "wider type"])
def test_a_residual_of_another_shape_or_type_is_added_by_itself(what: str) -> None:
    def make(graph: Graph, y: Node, r: Node) -> Node:
        if what == "wider type":
            return add(graph, y, graph.call_function(aten.to.dtype, (r, torch.float32)))
        return add(graph, y, r)

    tiles, held, rows = TilesOfTests(), tensors(), 1 if what == "broadcast" else 2
    graph = build(tiles, make)
    want = run(graph, held, rows)
    assert fuse_adds(graph, held, tiles) == 1  # type: ignore[arg-type]
    tiles.added.clear()
    got = run(graph, held, rows)
    assert got.dtype == want.dtype and torch.equal(got, want) and tiles.added == [(False, False)]


def test_parts_without_a_bias_keep_the_sign_of_zero() -> None:
    tiles, held = TilesOfTests(), tensors()
    held["scale"].zero_()
    graph = build(tiles, lambda g, y, r: parts(g, y, (1,)))
    want = run(graph, held)
    assert want.signbit().any()
    fuse_adds(graph, held, tiles)  # type: ignore[arg-type]
    assert torch.equal(run(graph, held).signbit(), want.signbit())


def test_products_keep_the_lead_of_planes() -> None:
    """What FusedAdds compares a residual with, where z is in the form of the kernels."""
    from liftc.runtime.planes import Planes

    class Tiles:
        def sign_matmul(self, z: Planes, *rest: Any) -> torch.Tensor:
            return torch.full((*z.lead, ROWS), float(len(rest)))

    planes = Planes(torch.empty(0), torch.empty(1, 2), torch.Size((1, 2)), COLUMNS)
    fused = FusedAdds(Tiles())  # type: ignore[arg-type]
    operands = (planes, torch.ones(1, 2, 1), torch.empty(0), torch.ones(ROWS), torch.float32, None)
    assert (fused.product(*operands, torch.full((1, 2, ROWS), 0.5)) == 6).all()
    assert (fused.product(*operands, torch.full((2, ROWS), 0.5)) == 5.5).all()


@pytest.mark.parametrize(
    "family, changes, gone",
    [
        ("llama", {}, 4), ("phi3", {}, 4), ("qwen2", {}, 6), ("qwen2", {"head_dim": 16}, 10), ("gpt2", {}, 12),
        ("gemma2", {}, 0),
    ],
)  # fmt: skip
def test_captured_models_lose_additions(family: str, changes: dict[str, int], gone: int) -> None:
    """Residuals of two layers; biases of q, of q, k and v stacked, of all four linears; norms in between."""
    config = FAMILIES[family]()
    config.update(changes)
    program = capture_config(config).program
    pipeline = PassPipeline([*before_quantize(LiftFormat(19, 8)), *after_quantize()])
    program = pipeline.apply(program)
    held = {name: torch.zeros(spec.shape, dtype=DTYPES[spec.dtype]) for name, spec in program.tensors.items()}
    tiles, graph = TilesOfTests(), program.graphs["decode"]
    for node in graph.nodes:
        if node.target is ir.sign_matmul:
            node.target = tiles.sign_matmul
    assert fuse_adds(graph, held, tiles) == gone  # type: ignore[arg-type]
    stacked = [name for name in held if name.endswith(STACKED)]
    assert len(stacked) == (2 if changes else 0) and all(held[name].shape == (128,) for name in stacked)
