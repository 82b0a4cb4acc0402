"""select-linears: which linear layers are lowered."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

from liftc.passes.base import Pass, PassError, compile_pattern
from liftc.passes.nodes import LinearUse, linear_uses
from liftc.program import Program
from liftc.rules import weight_of
from liftc.spec import LinearSpec
from liftc.tensor_names import packed_parts

_FLOATS = ("f64", "f32", "f16", "bf16")


@dataclass(frozen=True)
class SelectLinears(Pass):
    """Fill Program.linears with the linear layers to lower, in order of execution.

    Taken are the linears inside decoder blocks (all linears of a program without blocks) whose stored matrix
    nothing else reads. include: regular expression; linears it finds are taken outside blocks too, such as
    lm_head. exclude: regular expression; linears it finds are left dense. min_features: smaller ones stay
    dense. Names are those of the weights without ".weight".
    """

    name: ClassVar[str] = "select-linears"
    include: str = ""
    exclude: str = ""
    min_features: int = 32

    def apply(self, program: Program) -> Program:
        if packed_parts(program):
            raise PassError("select-linears: the linears of this program are lowered already")
        candidates = _by_weight(program)
        include = _matching(self.include, candidates, "include")
        exclude = _matching(self.exclude, candidates, "exclude")
        blocks = any(use.node.meta.get("block", -1) >= 0 for uses in candidates.values() for use in uses)
        foreign = _foreign_readers(program)
        linears: dict[str, LinearSpec] = {}
        for name, uses in candidates.items():
            linear = _spec(program, name, uses)
            if name in exclude or (blocks and linear.block < 0 and name not in include):
                continue
            reason = self._unfit(program, linear, uses, foreign)
            if reason and name in include:
                raise PassError(f"select-linears: cannot include {name}: {reason}")
            if not reason:
                _in_every_graph(program, name, uses)
                linears[name] = linear
        return replace(program, linears=linears, lifts={})

    def _unfit(
        self, program: Program, linear: LinearSpec, uses: list[LinearUse], foreign: dict[str, str]
    ) -> str | None:
        """Why a linear cannot be lowered, None when it can."""
        if linear.weight in foreign:
            return f"its weight {linear.weight} is also read by {foreign[linear.weight]}"
        if max(Counter(use.graph for use in uses).values()) > 1:
            return f"its weight {linear.weight} is used more than once"
        if len({use.transposed for use in uses}) > 1:
            return f"its weight {linear.weight} is used both as it is and transposed"
        if program.tensors[linear.weight].dtype not in _FLOATS:
            return f"its weight {linear.weight} is {program.tensors[linear.weight].dtype}"
        if min(linear.out_features, linear.in_features) < self.min_features:
            return f"it has fewer than {self.min_features} features"
        return None


def _by_weight(program: Program) -> dict[str, list[LinearUse]]:
    """Uses of each linear by its name, in order of execution of the first graph that has it."""
    uses: dict[str, list[LinearUse]] = {}
    for use in linear_uses(program):
        uses.setdefault(use.weight.removesuffix(".weight"), []).append(use)
    return uses


def _matching(pattern: str, names: dict[str, list[LinearUse]], option: str) -> set[str]:
    """Linears whose name, or the module they were captured from, the expression finds."""
    if not pattern:
        return set()
    expression: re.Pattern[str] = compile_pattern(pattern, f"select-linears, option {option}")
    found = {
        name
        for name, uses in names.items()
        if expression.search(name) or expression.search(uses[0].node.meta.get("source", ""))
    }
    if not found:
        raise PassError(f"select-linears: {option} {pattern!r} matches none of the {len(names)} linears")
    return found


def _foreign_readers(program: Program) -> dict[str, str]:
    """Weights read by something else than a linear -> that op."""
    foreign: dict[str, str] = {}
    for graph in program.graphs.values():
        for node in graph.nodes:
            for position, value in enumerate(node.args if node.op == "call_function" else ()):
                weight = weight_of(value)
                transpose = weight_of(node) is not None
                if (
                    weight
                    and not transpose
                    and not (str(node.target) == "aten.linear.default" and position == 1)
                ):
                    foreign.setdefault(weight[0], str(node.target))
    return foreign


def _spec(program: Program, name: str, uses: list[LinearUse]) -> LinearSpec:
    shape = program.tensors[uses[0].weight].shape
    out, width = shape[::-1] if uses[0].transposed else shape
    blocks = sorted({use.node.meta.get("block", -1) for use in uses})
    if len(blocks) > 1 and len({use.graph for use in uses}) == len(uses):
        raise PassError(f"select-linears: linear {name} is in block {blocks[0]} and in block {blocks[1]}")
    return LinearSpec(name, uses[0].weight, out, width, blocks[0], uses[0].transposed)


def _in_every_graph(program: Program, name: str, uses: list[LinearUse]) -> None:
    missing = [graph for graph in program.graphs if graph not in {use.graph for use in uses}]
    if missing:
        raise PassError(f"select-linears: linear {name} is in graph {uses[0].graph} but not in {missing[0]}")
