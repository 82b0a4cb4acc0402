"""plan-layout: freeze what is stored, in which order and how many bytes it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from liftc.passes.base import Pass, PassError
from liftc.plan import plan_program
from liftc.program import Program
from liftc.tensor_names import packed_parts


@dataclass(frozen=True)
class PlanLayout(Pass):
    """Drop tensors nobody reads, put the rest in order of storage, and note the totals as attributes.

    `plan_program` gives the full plan of the result.
    """

    name: ClassVar[str] = "plan-layout"

    def apply(self, program: Program) -> Program:
        lowered = {name for members in packed_parts(program).values() for name in members}
        waiting = [name for name in program.linears if name not in lowered]
        if waiting:
            raise PassError(f"plan-layout: linear {waiting[0]} is not lowered yet; run lower-linears first")
        read = _read(program)
        tensors = {name: spec for name, spec in program.tensors.items() if name in read}
        folded = {name: made for name, made in program.folded.items() if name in read}
        plan = plan_program(replace(program, tensors=tensors, folded=folded))
        return replace(
            program,
            tensors={entry.name: tensors[entry.name] for entry in plan.entries},
            folded=folded,
            attrs={
                **program.attrs,
                "plan.bytes": plan.total,
                "plan.bits_per_weight": plan.bits_per_weight,
            },
        )


def _read(program: Program) -> set[str]:
    """Tensors read by a graph or by a folded tensor that a graph reads."""
    read = {str(n.target) for graph in program.graphs.values() for n in graph.nodes if n.op == "get_attr"}
    for name in list(read):
        read.update(program.folded.get(name, ("", ()))[1])
    return read
