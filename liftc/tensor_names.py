"""Names of the tensors that lowering creates, decided here and nowhere else.

Transforms are data-free and shared by every lift of the same width, so they cost next to nothing;
`transform_names` is the single place to change when lifts get factors of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from liftc.program import Program
from liftc.spec import LiftSpec


@dataclass(frozen=True)
class TransformNames:
    """Tensors of one lift's transform: inverted factors left (t1, t1) and right (t2, t2), mapping (d, D)."""

    left: str
    right: str
    mapping: str


def transform_names(lift: str, spec: LiftSpec) -> TransformNames:
    """Names of the factors that lift `lift` of shape `spec` reads."""
    del lift  # every lift of one width shares its factors
    fmt = spec.format
    return TransformNames(
        left=f"whitening.left.{spec.left}",
        right=f"whitening.right.{spec.right}",
        mapping=f"mapping.{fmt.lifted_dim}x{fmt.subspace_dim}",
    )


def folded_name(operands: tuple[str, ...]) -> str:
    """Name of the tensor folded from `operands`, e.g. "whitening.right.32.mapping.77x32"."""
    return ".".join(operands)


def packed_name(owner: str) -> str:
    """Packed signs int32 (ceil(rows / 32), lifted_features) of a linear, or of a lift with fused rows."""
    return f"{owner}.packed_weight"


def output_scale_name(owner: str) -> str:
    """Output scale (rows,) of a linear, or of a lift with fused rows."""
    return f"{owner}.output_scale"


def activation_scale_name(lift: str) -> str:
    """Optional scale (in_features,) a lift applies to its input."""
    return f"{lift}.activation_scale"


def lift_members(program: Program) -> dict[str, list[str]]:
    """Linears of each lift in the order of Program.linears; a linear without a lift is left out."""
    members: dict[str, list[str]] = {lift: [] for lift in program.lifts}
    for name, linear in program.linears.items():
        if linear.lift:
            members.setdefault(linear.lift, []).append(name)
    return members


def packed_parts(program: Program) -> dict[str, list[str]]:
    """For each packed tensor the program declares, the linears whose rows it stacks, in order.

    The quantizer works linear by linear; the writer of an artifact concatenates its results along the rows
    as this table says. `output_scale` tensors stack the same linears in the same order. Empty before
    lowering.
    """
    parts: dict[str, list[str]] = {}
    for lift, members in lift_members(program).items():
        if len(members) > 1 and packed_name(lift) in program.tensors:
            parts[packed_name(lift)] = members
            continue
        for name in members:
            if packed_name(name) in program.tensors:
                parts[packed_name(name)] = [name]
    return parts
