"""Lifts that take the input of the norm, the gate or the GELU before them: no kernel between two products.

`fuse` rewrites a loaded graph; the arithmetic, with its roundings, is that of the operations it replaces. Sums of a
norm are added in another order and gelu is computed in another way, so that x, rounded to half precision, may now and
then be one bit off.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch.fx import Graph, Node

from liftc.runtime.factors import PerFactors
from liftc.runtime.planes import GATED, GELUS, Planes, Source

if TYPE_CHECKING:
    from liftc.runtime.ops import Ops

Tensor = torch.Tensor
aten = torch.ops.aten


class FusedLifts:
    """lift_operands behind a norm, a gate or a GELU; where no kernel takes a call, the operations one by one."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self._shifted = PerFactors(lambda gain, shift: torch.cat([gain, shift]))
        self._unshifted = PerFactors(lambda gain, same: torch.cat([gain, torch.zeros_like(same)]))

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

    def layer_norm(
        self, x: Tensor, gain: Tensor, shift: Tensor | None, eps: float, activation_scale: Tensor | None,
        left: Tensor, right: Tensor,
    ) -> tuple[Planes | Tensor, Tensor]:  # fmt: skip
        """Operands of torch's layer_norm over the last axis, of the size of `gain`; without a shift it is 0."""
        both = self._gain_and_shift(x, gain, shift)
        if both is not None:
            source = Source("lift_planes_layer", both, eps)
            done = self._ops.tiles.planes.lift(x, activation_scale, left, right, source)
            if done is not None:
                return done
        x = torch.nn.functional.layer_norm(x, gain.shape, gain, shift, eps)
        return self._ops.lift_operands(x, activation_scale, left, right)

    def gelu(
        self, x: Tensor, choice: int, activation_scale: Tensor | None, left: Tensor, right: Tensor
    ) -> tuple[Planes | Tensor, Tensor]:
        """Operands of gelu(gate) * up, the halves of the last axis of x, or of gelu(x), by `choice` of Source."""
        done = self._ops.tiles.planes.lift(x, activation_scale, left, right, GELUS[choice])
        if done is not None:
            return done
        mode = "tanh" if choice % 2 else "none"
        if choice < 2:
            gate, up = x.chunk(2, -1)
            x = torch.nn.functional.gelu(gate, approximate=mode) * up
        else:
            x = torch.nn.functional.gelu(x, approximate=mode)
        return self._ops.lift_operands(x, activation_scale, left, right)

    def unit_offset_norm(
        self,
        x: Tensor,
        gain: Tensor,
        eps: float,
        activation_scale: Tensor | None,
        left: Tensor,
        right: Tensor,
    ) -> tuple[Planes | Tensor, Tensor]:
        """Operands of cast(x * rsqrt(mean x^2 + eps) * (1 + gain)), all in float32 and cast once."""
        if x.dtype == gain.dtype and x.dtype != torch.float32:
            source = Source("lift_planes_layer", gain, eps, 1)
            done = self._ops.tiles.planes.lift(x, activation_scale, left, right, source)
            if done is not None:
                return done
        wide = x.float()
        root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        normed = (wide * root * (gain.float() + 1.0)).type_as(x)
        return self._ops.lift_operands(normed, activation_scale, left, right)

    def _gain_and_shift(self, x: Tensor, gain: Tensor, shift: Tensor | None) -> Tensor | None:
        """Both as one tensor, made once per pair; None where they are not in half precision as x, or of two shapes."""
        if x.dtype == torch.float32 or gain.dtype != x.dtype or gain.dim() != 1:
            return None
        if shift is None:
            return self._unshifted(gain, gain)
        return self._shifted(gain, shift) if (shift.dtype, shift.shape) == (x.dtype, gain.shape) else None


def fuse(graph: Graph, ops: Ops) -> int:
    """Rewrite the lift_operands calls of a graph whose x is a norm, a gate or a GELU that only they read; how many."""
    fused, count = FusedLifts(ops), 0
    for node in list(graph.nodes):
        if node.target != ops.lift_operands or node.kwargs:
            continue
        x, *rest = node.args
        if not isinstance(x, Node) or any(user.target != ops.lift_operands for user in x.users):
            continue
        if (found := _norm_input(x)) is not None:
            node.target, node.args = fused.norm, (*found, *rest)
        elif (halves := _gate_input(x)) is not None:
            node.target, node.args = fused.gate, (halves, *rest)
        elif (layer := _layer_norm_input(x)) is not None:
            node.target, node.args = fused.layer_norm, (*layer, *rest)
        elif (offset := _unit_offset_norm_input(x)) is not None:
            node.target, node.args = fused.unit_offset_norm, (*offset, *rest)
        elif (chosen := _gelu_input(x)) is not None:
            node.target, node.args = fused.gelu, (*chosen, *rest)
        else:
            continue
        count += 1
        _erase(graph, x)
    graph.lint()
    return count


def _norm_input(x: Node) -> tuple[Node, Node, float, torch.dtype] | None:
    """(x, gain, eps, dtype) where the node is gain * to(to(x, float32) * rsqrt(mean(pow(., 2)) + eps), dtype)."""
    for gain, cast in _factors(x):
        if gain.op == "get_attr" and _calls(cast, aten.to.dtype) and len(cast.args) == 2:
            if (normed := _normed(cast.args[0])) is not None:
                return normed[0], gain, normed[1], cast.args[1]
    return None


def _unit_offset_norm_input(x: Node) -> tuple[Node, Node, float] | None:
    """(x, gain, eps) where the node is type_as(to(x, float32) * rsqrt(..) * (to(gain, float32) + 1), x)."""
    if not _calls(x, aten.type_as.default):
        return None
    for product, offset in _factors(x.args[0]):
        if not (_calls(offset, aten.add.Tensor) and offset.args[1:] == (1.0,) and not offset.kwargs):
            continue
        wide = offset.args[0]
        stored = (
            _calls(wide, aten.to.dtype)
            and wide.args[1:] == (torch.float32,)
            and wide.args[0].op == "get_attr"
        )
        if stored and (normed := _normed(product)) is not None and normed[0] is x.args[1]:
            return normed[0], wide.args[0], normed[1]
    return None


def _normed(node: Any) -> tuple[Node, float] | None:
    """(x, eps) where the node is to(x, float32) * rsqrt(mean(pow(to(x, float32), 2)) + eps)."""
    for wide, root in _factors(node):
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
            return wide.args[0], total.args[1]
    return None


def _gate_input(x: Node) -> Node | None:
    """The node whose two halves are gate and up where x is silu(gate) * up."""
    for silu, up in _factors(x):
        if _calls(silu, aten.silu.default) and (whole := _whole(silu.args[0], up)) is not None:
            return whole
    return None


def _layer_norm_input(x: Any) -> tuple[Node, Node, Node | None, float] | None:
    """(x, gain, shift, eps) where the node is a LayerNorm over the last axis with stored gain and shift, or none."""
    if not _calls(x, aten.layer_norm.default) or x.kwargs:
        return None
    given, axes, *rest = x.args
    gain, shift, eps = (*rest, *(None, None, 1e-5)[len(rest) :])[:3]
    if not (isinstance(gain, Node) and gain.op == "get_attr" and len(axes) == 1):
        return None
    if shift is not None and not (isinstance(shift, Node) and shift.op == "get_attr"):
        return None
    return given, gain, shift, eps


def _gelu_input(x: Any) -> tuple[Node, int] | None:
    """(x, choice) where the node is gelu of x, or gelu(gate) * up of the halves of x; choice as in Source."""
    if (choice := _gelu_choice(x)) is not None:
        return x.args[0], 2 + choice
    for gelu, up in _factors(x):
        choice = _gelu_choice(gelu)
        if choice is not None and (whole := _whole(gelu.args[0], up)) is not None:
            return whole, choice
    return None


def _gelu_choice(node: Any) -> int | None:
    """0 for gelu with erf, 1 for the tanh approximation, None for another node."""
    if not _calls(node, aten.gelu.default) or not isinstance(node.args[0], Node):
        return None
    return {"none": 0, "tanh": 1}.get(node.kwargs.get("approximate", "none"))


def _whole(gate: Any, up: Any) -> Node | None:
    """The node of which these are the first and the second half of the last axis, as a split or a chunk makes them."""
    if not (_calls(gate, operator.getitem) and _calls(up, operator.getitem)):
        return None
    split = gate.args[0]
    if (gate.args, up.args) != ((split, 0), (split, 1)) or split.kwargs or split.args[2:] != (-1,):
        return None
    whole, sizes, _ = split.args
    halves = isinstance(sizes, (list, tuple)) and len(sizes) == 2 and sizes[0] == sizes[1]
    if (_calls(split, aten.split_with_sizes.default) and halves) or (
        _calls(split, aten.chunk.default) and sizes == 2
    ):
        return whole if isinstance(whole, Node) else None
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
    aten.silu.default, aten.gelu.default, operator.getitem, aten.split_with_sizes.default, aten.chunk.default,
    aten.type_as.default,
}  # fmt: skip
