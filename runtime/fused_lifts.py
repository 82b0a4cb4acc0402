"""Lifts that take the input of the norm or of the gate before them: no kernel between two products.

`fuse` rewrites a loaded graph; the arithmetic, with its roundings, is that of the operations it replaces. Sums of a
norm are added in another order, so that x, rounded to half precision, may now and then be one bit off.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch.fx import Graph, Node

from liftc.runtime.planes import GATED, Planes, Source

if TYPE_CHECKING:
    from liftc.runtime.ops import Ops

Tensor = torch.Tensor
aten = torch.ops.aten


class FusedLifts:
    """lift_operands behind a norm or a gate; where no kernel takes a call, the operations one by one."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def norm(
        self, x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype, activation_scale: Tensor | None,
        left: Tensor, right: Tensor,
    ) -> tuple[Planes | Tensor, Tensor]:  # fmt: skip
        """Operands of gain * cast(x * rsqrt(mean x^2 + eps)), the norm in float32 and cast to `dtype`."""
        if x.dtype == dtype == gain.dtype and x.dtype != torch.float32:
            source = Source("lift_planes_norm", gain, eps)
            done = self._ops.tiles.planes.lift(x, activation_scale, left, right, source)
            if done is not None:
                return done
        wide = x.float()
        root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return self._ops.lift_operands(gain * (wide * root).to(dtype), activation_scale, left, right)

    def gate(
        self, gate_and_up: Tensor, activation_scale: Tensor | None, left: Tensor, right: Tensor
    ) -> tuple[Planes | Tensor, Tensor]:
        """Operands of silu(gate) * up, the halves of the last axis."""
        done = self._ops.tiles.planes.lift(gate_and_up, activation_scale, left, right, GATED)
        if done is not None:
            return done
        gate, up = gate_and_up.chunk(2, -1)
        x = torch.nn.functional.silu(gate) * up
        return self._ops.lift_operands(x, activation_scale, left, right)


def fuse(graph: Graph, ops: Ops) -> int:
    """Rewrite the lift_operands calls of a graph whose x is a norm or a gate that only they read; how many."""
    fused, count = FusedLifts(ops), 0
    for node in list(graph.nodes):
        if node.target != ops.lift_operands or node.kwargs:
            continue
        x, *rest = node.args
        if not isinstance(x, Node) or any(
            user.target not in (ops.lift_operands, fused.norm) for user in x.users
        ):
            continue
        if (found := _norm_input(x)) is not None:
            node.target, node.args = fused.norm, (*found, *rest)
        elif (halves := _gate_input(x)) is not None:
            node.target, node.args = fused.gate, (halves, *rest)
        else:
            continue
        count += 1
        _erase(graph, x)
    graph.lint()
    return count


def _norm_input(x: Node) -> tuple[Node, Node, float, torch.dtype] | None:
    """(x, gain, eps, dtype) where the node is gain * to(to(x, float32) * rsqrt(mean(pow(., 2)) + eps), dtype)."""
    for gain, cast in _factors(x):
        if gain.op != "get_attr" or not _calls(cast, aten.to.dtype) or len(cast.args) != 2:
            continue
        for wide, root in _factors(cast.args[0]):
            total = root.args[0] if _calls(root, aten.rsqrt.default) else None
            if not (_calls(total, aten.add.Tensor) and isinstance(total.args[1], float) and not total.kwargs):
                continue
            mean = total.args[0]
            if not (_calls(mean, aten.mean.dim) and list(mean.args[1:]) == [[-1], True] and not mean.kwargs):
                continue
            square = mean.args[0]
            if not (_calls(square, aten.pow.Tensor_Scalar) and square.args == (wide, 2)):
                continue
            if _calls(wide, aten.to.dtype) and wide.args[1:] == (torch.float32,):
                return wide.args[0], gain, total.args[1], cast.args[1]
    return None


def _gate_input(x: Node) -> Node | None:
    """The node whose two halves are gate and up where x is silu(gate) * up."""
    for silu, up in _factors(x):
        gate = silu.args[0] if _calls(silu, aten.silu.default) else None
        if not (_calls(gate, operator.getitem) and _calls(up, operator.getitem)):
            continue
        split = gate.args[0]
        if (gate.args, up.args) != ((split, 0), (split, 1)) or not _calls(
            split, aten.split_with_sizes.default
        ):
            continue
        sizes, axis = split.args[1], split.args[2] if len(split.args) > 2 else 0
        if isinstance(sizes, (list, tuple)) and len(sizes) == 2 and sizes[0] == sizes[1] and axis == -1:
            whole: Node = split.args[0]
            return whole
    return None


def _calls(node: Any, target: Any) -> TypeGuard[Any]:
    return isinstance(node, Node) and node.op == "call_function" and node.target is target


def _factors(node: Any) -> Iterable[tuple[Any, Any]]:
    """The two nodes that a product multiplies, in both orders."""
    if _calls(node, aten.mul.Tensor) and all(isinstance(a, Node) for a in node.args) and not node.kwargs:
        return (node.args, node.args[::-1])
    return ()


def _erase(graph: Graph, node: Node) -> None:
    """Remove a pure operation that nobody reads any more, and those that only it read."""
    if node._erased or node.users or node.op not in ("call_function", "get_attr"):
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for one in inputs:
        if one.target in _PURE or one.op == "get_attr":
            _erase(graph, one)


_PURE = {
    aten.mul.Tensor, aten.to.dtype, aten.rsqrt.default, aten.add.Tensor, aten.mean.dim, aten.pow.Tensor_Scalar,
    aten.silu.default, operator.getitem, aten.split_with_sizes.default,
}  # fmt: skip
