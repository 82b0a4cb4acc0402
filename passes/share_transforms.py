"""share-transforms: linears that read one activation share its lift."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import takewhile
from typing import ClassVar

from liftc.errors import LiftcError
from liftc.format import LiftFormat
from liftc.passes.base import Pass, PassError
from liftc.passes.nodes import linear_uses
from liftc.program import Program
from liftc.spec import LiftSpec, transform_shape
from liftc.tensor_names import packed_parts

_NAMED_LEAVES = 8


@dataclass(frozen=True)
class ShareTransforms(Pass):
    """Fill Program.lifts: one lift for all linears that read the same node in every graph in the same format.

    The lift of q_proj, k_proj and v_proj of one attention is called `...self_attn.q_proj+k_proj+v_proj`.
    """

    name: ClassVar[str] = "share-transforms"

    def apply(self, program: Program) -> Program:
        if packed_parts(program):
            raise PassError("share-transforms: the linears of this program are lowered already")
        inputs: dict[str, list[tuple[str, str]]] = {name: [] for name in program.linears}
        names = {linear.weight: name for name, linear in program.linears.items()}
        for use in linear_uses(program):
            if use.weight in names:
                inputs[names[use.weight]].append((use.graph, use.x.name))
        groups: dict[tuple[LiftFormat, tuple[tuple[str, str], ...]], list[str]] = {}
        for name, linear in program.linears.items():
            if linear.format is None:
                raise PassError(f"share-transforms: linear {name} has no format; run assign-formats first")
            groups.setdefault((linear.format, tuple(inputs[name])), []).append(name)
        lifts: dict[str, LiftSpec] = {}
        linears = dict(program.linears)
        for (fmt, _), members in groups.items():
            lift = lift_name(members)
            if lift in lifts:
                raise PassError(f"share-transforms: two lifts would be called {lift}")
            lifts[lift] = _spec(fmt, program.linears[members[0]].in_features, lift)
            for name in members:
                linears[name] = replace(linears[name], lift=lift)
        return replace(program, linears=linears, lifts=lifts)


def lift_name(members: list[str]) -> str:
    """Common path of the linears, then what sets them apart: a.q_proj and a.k_proj give a.q_proj+k_proj."""
    if len(members) == 1:
        return members[0]
    paths = [name.split(".") for name in members]
    columns = zip(*(path[:-1] for path in paths))
    common = len(list(takewhile(lambda words: len(set(words)) == 1, columns)))
    leaves = [".".join(path[common:]) for path in paths]
    if len(leaves) > _NAMED_LEAVES:
        leaves = [leaves[0], f"{len(leaves) - 1}_more"]
    return ".".join((*paths[0][:common], "+".join(leaves)))


def _spec(fmt: LiftFormat, width: int, lift: str) -> LiftSpec:
    try:
        return LiftSpec(fmt, width, *transform_shape(width, fmt))
    except LiftcError as error:
        raise PassError(f"share-transforms: {lift}: {error}") from error
