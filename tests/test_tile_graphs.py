"""How a loaded graph is rewritten for tiles: which signs become tiles, which lifts hand over operands."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from operand_layouts import tile_layout
from torch.fx import Graph, Node

from liftc import ir, reference
from liftc.packing import pack_signs
from liftc.runtime.executor import BoundGraph
from liftc.runtime.loader import _pass_operands, _tile_signs

ROWS, FEATURES, LIFTED = 40, 12, 18


class TilesOfTests:
    """Stands in for the GPU's tiles: the same interface, computed by the reference."""

    available = True

    def __init__(self, packed: dict[int, torch.Tensor]) -> None:
        self.packed = packed
        self.products = 0
        self.added = 0

    def accepts(self, rows: int, columns: int) -> bool:
        return rows >= 33

    def from_packed(self, packed: torch.Tensor, rows: int) -> torch.Tensor:
        tiles = tile_layout(packed)[: -(-rows // 16)].contiguous()
        self.packed[tiles.data_ptr()] = packed
        return tiles

    def sign_matmul(self, z: Any, z_scale: torch.Tensor, tiles: torch.Tensor, *rest: Any) -> torch.Tensor:
        self.products += 1
        value = z[0] if isinstance(z, tuple) else z
        scale, dtype, *added = rest
        y = reference.sign_matmul(value, z_scale, self.packed[tiles.data_ptr()], scale, dtype)
        self.added += sum(addend is not None for addend in added)
        return sum((addend for addend in added if addend is not None), y)


class OpsOfTests:
    """lift_operands wraps z, so that a product that expects a tensor would fail."""

    def __init__(self) -> None:
        self.tiles = TilesOfTests({})
        self.lifts = 0

    def lift_operands(self, *arguments: Any) -> tuple[tuple[torch.Tensor], torch.Tensor]:
        self.lifts += 1
        z, z_scale = reference.lift(*arguments)
        return (z,), z_scale


def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    made = {"left": torch.randn(3, 3, generator=g), "right": torch.randn(4, 6, generator=g)}
    for name, rows in (("a", ROWS), ("b", 64), ("small", 7)):
        made[name] = pack_signs(torch.randn(rows, LIFTED, generator=g))
        made[f"{name}.output_scale"] = torch.rand(rows, generator=g)
    return made


def graph(*names: str, also_returned: bool = False) -> Graph:
    """x -> the products of one lift with the signs of these names."""
    graph = Graph()
    x = graph.placeholder("x")
    lifted = graph.call_function(ir.lift, (x, None, graph.get_attr("left"), graph.get_attr("right")))
    z = graph.call_function(operator.getitem, (lifted, 0))
    z_scale = graph.call_function(operator.getitem, (lifted, 1))
    results: list[Node] = []
    for name in names:
        operands = (z, z_scale, graph.get_attr(name), graph.get_attr(f"{name}.output_scale"), torch.float32)
        results.append(graph.call_function(ir.sign_matmul, operands))
    graph.output((*results, z) if also_returned else tuple(results))
    return graph


def as_tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def rewritten(made: Graph, values: dict[str, torch.Tensor], ops: Any) -> tuple[Any, ...]:
    x = torch.randn(2, FEATURES, generator=torch.Generator().manual_seed(1))
    want = BoundGraph(made, values, torch.device("cpu")).call(x)
    _tile_signs({"decode": made}, values, ops.tiles)
    _pass_operands({"decode": made}, values, ops)
    got = BoundGraph(made, values, torch.device("cpu")).call(x)
    assert all(torch.equal(a, b) for a, b in zip(as_tuple(got), as_tuple(want), strict=True))
    return as_tuple(got)


def test_products_of_one_lift_take_its_operands() -> None:
    values, ops = tensors(), OpsOfTests()
    rewritten(graph("a", "b"), values, ops)
    assert values["a"].shape == (3, 1, 32, 4) and values["b"].shape == (4, 1, 32, 4)
    assert values["small"].dim() == 2 and ops.lifts == 1 and ops.tiles.products == 2


def test_a_lift_with_a_portable_product_or_another_reader_keeps_z() -> None:
    for made in (graph("a", "small"), graph("a", also_returned=True)):
        values, ops = tensors(), OpsOfTests()
        ir.register_kernel("sign_matmul", "cpu", _mixed(ops))
        try:
            rewritten(made, values, ops)
        finally:
            ir.unregister_kernel("sign_matmul", "cpu")
        assert values["a"].dim() == 4 and ops.lifts == 0


def _mixed(ops: OpsOfTests) -> Any:
    def sign_matmul(z: torch.Tensor, z_scale: torch.Tensor, packed: torch.Tensor, *rest: Any) -> torch.Tensor:
        product = ops.tiles.sign_matmul if packed.dim() == 4 else reference.sign_matmul
        return product(z, z_scale, packed, *rest)

    return sign_matmul


@pytest.mark.parametrize("setting, added", [(None, 1), ("0", 0), ("1", 1)])
def test_products_add_unless_told_otherwise(
    setting: str | None, added: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LIFTC_FUSED", raising=False)
    if setting is not None:
        monkeypatch.setenv("LIFTC_FUSED", setting)
    values, ops, made = tensors(), OpsOfTests(), graph("a")
    values["bias"] = torch.randn(ROWS, generator=torch.Generator().manual_seed(2))
    (output,) = (node for node in made.nodes if node.op == "output")
    with made.inserting_before(output):
        bias = made.get_attr("bias")
        output.args = (made.call_function(torch.ops.aten.add.Tensor, (output.args[0][0], bias)),)
    rewritten(made, values, ops)
    assert ops.tiles.added == added and ops.tiles.products == 1


def test_signs_that_anything_else_reads_stay_portable() -> None:
    values, ops = tensors(), OpsOfTests()
    made = graph("a")
    output = next(node for node in made.nodes if node.op == "output")
    packed = next(node for node in made.nodes if node.op == "get_attr" and node.target == "a")
    output.args = ((*output.args[0], packed),)
    rewritten(made, values, ops)
    assert values["a"].dim() == 2 and ops.lifts == 0
