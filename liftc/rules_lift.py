"""Rules of linears and lift ops: operand shapes agree with each other and with the tables.

Names as in liftc/reference.py: t1 = left, t2 = right, K = lifted_features, OC = out_features.
"""

from __future__ import annotations

import operator

from torch.fx import Node

from liftc.packing import packed_rows
from liftc.rules import Context, NodeRule, mismatch, weight_of
from liftc.spec import MAX_LIFTED_FEATURES, TensorSpec

_LIFT, _SIGN, _LIFTED = "liftc.lift.default", "liftc.sign_matmul.default", "liftc.lifted_linear.default"
_DECODE = "liftc.decode_right.default"
_FLOATS = ("f64", "f32", "f16", "bf16")


def operand(node: Node, name: str) -> object:
    """Value of the argument `name` of a call of a liftc op, positional or not; None when absent."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    index = names.index(name)
    return node.args[index] if index < len(node.args) else node.kwargs.get(name)


def lift_of(node: Node) -> Node | None:
    """The lift whose z and z_scale a sign_matmul reads, None when they do not come from one lift."""
    parts = [operand(node, "z"), operand(node, "z_scale")]
    lifts = []
    for index, part in enumerate(parts):
        if not isinstance(part, Node) or part.target is not operator.getitem or part.args[1] != index:
            return None
        lifts.append(part.args[0])
    first = lifts[0]
    same = isinstance(first, Node) and first is lifts[1] and str(first.target) == _LIFT
    return first if same and isinstance(first, Node) else None


def _lifting(node: Node) -> Node | None:
    """The node that holds x, left and right of a sign_matmul or lifted_linear."""
    return lift_of(node) if str(node.target) == _SIGN else node


def _right(node: Node) -> str:
    """The name of the right factor: lift has it with the mapping multiplied in."""
    return "right" if str(node.target) == _LIFT else "right_inverse"


def _left(context: Context, node: Node) -> str | None:
    kind = context.kind(operand(node, "left"))
    if kind is None:
        return "found no type"
    square = len(kind[1]) == 2 and kind[1][0] == kind[1][1] and kind[0] in _FLOATS
    return None if square else f"expected f32[t1,t1], found {_text(kind)}"


def _covers(context: Context, node: Node) -> str | None:
    left, right = context.shape(operand(node, "left")), context.shape(operand(node, _right(node)))
    x = context.kind(operand(node, "x"))
    if not left or not right or len(right) != 2:
        return "found no shapes"
    if x is None or not x[1] or not x[1][-1].isdigit():
        return "found an x of unknown width"
    if int(x[1][-1]) > left[0] * right[0]:
        return f"expected at most {left[0]} * {right[0]} features, found {_text(x)}"
    return None


def _scale(context: Context, node: Node) -> str | None:
    scale = operand(node, "activation_scale")
    x = context.kind(operand(node, "x"))
    if scale is None or x is None:
        return None
    return mismatch(f"[{x[1][-1]}]", f"[{','.join((context.kind(scale) or ('', ()))[1])}]")


def _lift_type(context: Context, node: Node) -> str | None:
    x, left, right = (context.kind(operand(node, name)) for name in ("x", "left", "right"))
    if not x or not left or not right or not node.meta.get("type"):
        return None
    lead = "".join(f"{dim}," for dim in x[1][:-1])
    expected = f"(i16[{lead}{int(left[1][0]) * int(right[1][1])}], f32[{lead}1])"
    return mismatch(expected, node.meta["type"])


def _from_lift(context: Context, node: Node) -> str | None:
    return None if lift_of(node) else f"found {operand(node, 'z')} and {operand(node, 'z_scale')}"


def _packed(context: Context, node: Node) -> str | None:
    lift = _lifting(node)
    if lift is None:
        return None
    left, right = context.shape(operand(lift, "left")), context.shape(operand(lift, _right(lift)))
    if lift is node:
        mapping = context.shape(operand(node, "mapping_matrix"))
        if not right or not mapping or _decode_shapes(context, node):
            return None  # another rule's sentence
        right = (right[0], right[0] // mapping[0] * mapping[1])
    scale, packed = context.kind(operand(node, "output_scale")), context.kind(operand(node, "packed"))
    if not left or not right or scale is None or len(scale[1]) != 1:
        return "found operands without shapes"
    expected = TensorSpec((packed_rows(int(scale[1][0])), left[0] * right[1]), "i32")
    return mismatch(str(expected), _text(packed))


def _limit(context: Context, node: Node) -> str | None:
    packed = context.shape(operand(node, "packed"))
    if packed and packed[-1] > MAX_LIFTED_FEATURES:
        return f"expected at most {MAX_LIFTED_FEATURES}, found {packed[-1]}"
    return None


def _result(context: Context, node: Node) -> str | None:
    scale, found = context.kind(operand(node, "output_scale")), context.kind(node)
    if found is None or scale is None:
        return None
    return mismatch(",".join(scale[1]), found[1][-1] if found[1] else "a scalar")


def _dense(context: Context, node: Node) -> str | None:
    """The features of an aten.linear on a stored weight, as far as its operands' types are known."""
    read = weight_of(node.args[1])
    spec = context.tensor(read[0]) if read else None
    if read is None or spec is None or len(spec.shape) != 2:
        return None
    out, width = spec.shape[::-1] if read[1] else spec.shape
    for value, features in ((node.args[0], width), (node, out)):
        kind = context.kind(value)
        if kind is not None and kind[1][-1:] != (str(features),):
            return f"expected {features}, found {_text(kind)}"
    return None


def _registered(context: Context, node: Node) -> str | None:
    """The packed tensor is one of the table, so that the quantizer and the artifact know its rows."""
    packed = operand(node, "packed")
    if not isinstance(packed, Node) or packed.op != "get_attr":
        return f"found {packed}"
    owner = str(packed.target).removesuffix(".packed_weight")
    known = owner in context.program.linears or owner in context.program.lifts
    return None if known and owner != packed.target else f"found @{packed.target}"


def _decode_shapes(context: Context, node: Node) -> str | None:
    right, mapping = (context.shape(operand(node, name)) for name in ("right_inverse", "mapping_matrix"))
    if not right or not mapping or len(right) != 2 or len(mapping) != 2:
        return "found operands without shapes"
    fits = right[0] == right[1] and mapping[0] and right[0] % mapping[0] == 0
    return None if fits else f"found [{right[0]},{right[1]}] and [{mapping[0]},{mapping[1]}]"


def _decode_type(context: Context, node: Node) -> str | None:
    right, mapping = (context.shape(operand(node, name)) for name in ("right_inverse", "mapping_matrix"))
    if not right or not mapping or not node.meta.get("type"):
        return None
    return mismatch(f"f32[{right[0]},{right[0] // mapping[0] * mapping[1]}]", node.meta["type"])


def _text(kind: tuple[str, tuple[str, ...]] | None) -> str:
    return f"{kind[0]}[{','.join(kind[1])}]" if kind else "no type"


LIFT_RULES = (
    NodeRule(("aten.linear.default",), "x and the result must have the features of the weight", _dense),
    NodeRule((_LIFT, _LIFTED), "left must be square, one row per left factor", _left),
    NodeRule((_LIFT, _LIFTED), "left times right must cover the features of x", _covers),
    NodeRule((_LIFT, _LIFTED), "activation_scale must have one entry per feature of x", _scale),
    NodeRule((_LIFT,), "the type must be (i16[...,lifted_features], f32[...,1])", _lift_type),
    NodeRule((_SIGN,), "z and z_scale must be results 0 and 1 of one lift", _from_lift),
    NodeRule((_SIGN, _LIFTED), "packed shape must be [ceil(out/32), lifted_features]", _packed),
    NodeRule((_SIGN, _LIFTED), "lifted_features must keep sums inside 32 bits", _limit),
    NodeRule((_SIGN, _LIFTED), "the result must have one feature per entry of output_scale", _result),
    NodeRule(
        (_SIGN, _LIFTED), "packed must be the packed tensor of a linear or lift in the tables", _registered
    ),
    NodeRule(
        (_DECODE, _LIFTED),
        "right_inverse must be square and a multiple of d rows, mapping_matrix [d,D]",
        _decode_shapes,
    ),
    NodeRule((_DECODE,), "the type must be f32[t2, t2 / d D]", _decode_type),
)
