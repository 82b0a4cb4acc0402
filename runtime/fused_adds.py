"""Products that add a bias and a residual to their results: no kernel for either.

`fuse_adds` rewrites a loaded graph. Results keep their bits: the kernels round before each addition, as the separate
operations do.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import torch
from torch.fx import Graph, Node

from liftc.runtime.planes import Planes

if TYPE_CHECKING:
    from liftc.runtime.tiles import TiledSigns

Tensor = torch.Tensor
aten = torch.ops.aten

STACKED = ".stacked_bias"
"""Ends the name of the biases of stacked linears as one tensor; the first bias' name comes before."""


class FusedAdds:
    """sign_matmul with an addition behind it, in the kernel where the addend has the shape and type of the results."""

    def __init__(self, tiles: TiledSigns) -> None:
        self._tiles = tiles

    def product(
        self, z: Tensor | Planes, z_scale: Tensor, tiles: Tensor, output_scale: Tensor, dtype: torch.dtype,
        bias: Tensor | None, residual: Tensor,
    ) -> Tensor:  # fmt: skip
        """(sign_matmul + bias) + residual; bias (OC,) of `dtype` or None, residual of any shape and type."""
        lead = z.lead if isinstance(z, Planes) else z.shape[:-1]
        operands = (z, z_scale, tiles, output_scale, dtype, bias)
        if residual.dtype == dtype and residual.shape == (*lead, output_scale.shape[0]):
            return self._tiles.sign_matmul(*operands, residual)
        return self._tiles.sign_matmul(*operands) + residual


def fuse_adds(graph: Graph, tensors: dict[str, Tensor], tiles: TiledSigns) -> int:
    """Give the tiled products of a graph the additions that follow them; how many additions are gone.

    Taken are biases, dense vectors among `tensors` that have a product's rows and type, also one for each part of
    stacked linears (they become one tensor of `tensors`), and then another node's result. Each must be the only
    reader of what it adds to.
    """
    fused, count = FusedAdds(tiles), 0
    for node in list(graph.nodes):
        if (
            node.op != "call_function"
            or node.target != tiles.sign_matmul
            or len(node.args) != 5
            or node.kwargs
        ):
            continue
        count += _take_parts(graph, node, tensors)
        while (add := _only_add(node)) is not None:
            addend = _other(add, node)
            if addend is None:
                break
            has_bias = len(node.args) > 5
            if not has_bias and _is_bias(addend, tensors, *_rows_and_type(node, tensors)):
                node = _move(graph, node, add, node.target, (*node.args, addend))
                count += 1
                continue
            if addend.op != "get_attr":
                bias = node.args[5] if has_bias else None
                _move(graph, node, add, fused.product, (*node.args[:5], bias, addend))
                count += 1
            break
    graph.lint()
    return count


def _move(graph: Graph, node: Node, add: Node, target: object, args: tuple[object, ...]) -> Node:
    """`add` computes the product itself, with these arguments; all of them come before it."""
    add.target, add.args = target, args  # type: ignore[assignment]
    graph.erase_node(node)
    return add


def _only_add(node: Node) -> Node | None:
    """The addition that is the only reader of a node."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    plain = user.op == "call_function" and user.target is aten.add.Tensor and not user.kwargs
    return user if plain and len(user.args) == 2 else None


def _other(add: Node, node: Node) -> Node | None:
    """What is added to a node, where that is another node."""
    others = [a for a in add.args if a is not node]
    return others[0] if len(others) == 1 and isinstance(others[0], Node) else None


def _rows_and_type(product: Node, tensors: dict[str, Tensor]) -> tuple[int, object]:
    scale = product.args[3]
    assert isinstance(scale, Node)
    held = tensors.get(str(scale.target)) if scale.op == "get_attr" else None
    return held.shape[0] if held is not None else -1, product.args[4]


def _is_bias(node: Node | None, tensors: dict[str, Tensor], rows: int, dtype: object) -> bool:
    held = tensors.get(str(node.target)) if node is not None and node.op == "get_attr" else None
    return held is not None and held.shape == (rows,) and held.dtype == dtype and held.is_contiguous()


def _take_parts(graph: Graph, product: Node, tensors: dict[str, Tensor]) -> int:
    """Stack the biases of the parts into which a product of stacked linears is split."""
    if len(product.users) != 1:
        return 0
    (split,) = product.users
    if split.target is not aten.split_with_sizes.default or split.args[2:] != (-1,) or split.kwargs:
        return 0
    given, dtype = split.args[1], product.args[4]
    if not isinstance(given, (list, tuple)) or not isinstance(dtype, torch.dtype):
        return 0
    sizes = [size for size in given if isinstance(size, int)]
    adds: dict[int, tuple[Node, Node]] = {}
    for part in split.users:
        index = part.args[1] if part.target is operator.getitem else None
        add = _only_add(part)
        bias = _other(add, part) if add is not None else None
        if isinstance(index, int) and add is not None and bias is not None:
            if index in adds or not _is_bias(bias, tensors, sizes[index], dtype):
                return 0
            adds[index] = add, bias
    if not adds:
        return 0
    name = str(adds[min(adds)][1].target) + STACKED
    if name not in tensors:
        biases = {index: tensors[str(bias.target)] for index, (_, bias) in adds.items()}
        like = biases[min(biases)]  # x + -0 is x, for zeros of both signs
        tensors[name] = torch.cat([biases.get(i, like.new_full((n,), -0.0)) for i, n in enumerate(sizes)])
    with graph.inserting_before(product):
        stacked = graph.get_attr(name)
    product.args = (*product.args, stacked)
    for add, _ in adds.values():
        part = next(a for a in add.args if isinstance(a, Node) and a.target is operator.getitem)
        add.replace_all_uses_with(part)
        graph.erase_node(add)
    return len(adds)
