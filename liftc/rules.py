"""What a rule of the verifier is, and what its check may look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch.fx import Node

from liftc.program import Program, split_type
from liftc.spec import DTYPES, TensorSpec


@dataclass
class Context:
    """The program under verification, the graph being walked and its nodes seen so far."""

    program: Program
    graph: str = ""
    seen: set[Node] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    calls: int = 0

    def tensor(self, name: str) -> TensorSpec | None:
        """Shape and dtype of a stored or folded tensor; None when it is undeclared or its operands misfit."""
        return self.program.tensors.get(name) or self.folded(name)

    def folded(self, name: str) -> TensorSpec | None:
        """Shape and dtype of a folded tensor: decode_right of (t2, t2) and (d, D) is f32 (t2, t2 / d D)."""
        _, operands = self.program.folded.get(name, ("", ()))
        specs = [self.program.tensors.get(operand) for operand in operands]
        if len(specs) != 2 or specs[0] is None or specs[1] is None:
            return None
        right, mapping = specs[0].shape, specs[1].shape
        if len(right) != 2 or len(mapping) != 2 or not mapping[0] or right[0] % mapping[0]:
            return None
        return TensorSpec((right[0], right[0] // mapping[0] * mapping[1]), "f32")

    def kind(self, value: object) -> tuple[str, tuple[str, ...]] | None:
        """(dtype, dimensions) of an argument that is one tensor of known type, else None."""
        if not isinstance(value, Node):
            return None
        if value.op == "get_attr":
            spec = self.tensor(str(value.target))
            return parse_type(str(spec)) if spec else None
        return parse_type(value.meta.get("type", ""))

    def shape(self, value: object) -> tuple[int, ...] | None:
        """Dimensions of an argument when all of them are numbers, else None."""
        kind = self.kind(value)
        if kind is None or not all(dim.isdigit() for dim in kind[1]):
            return None
        return tuple(map(int, kind[1]))


@dataclass(frozen=True)
class NodeRule:
    """`sentence` holds for every node of `ops` (fx opcodes or op names; "*" for all).

    check returns None when it holds, else the details as "expected ..., found ...".
    """

    ops: tuple[str, ...]
    sentence: str
    check: Callable[[Context, Node], str | None]


@dataclass(frozen=True)
class TableRule:
    """`sentence` holds for the tables of a program; check yields (entry at fault, details)."""

    sentence: str
    check: Callable[[Program], Iterator[tuple[str, str]]]


@lru_cache(maxsize=8192)
def parse_type(text: str) -> tuple[str, tuple[str, ...]] | None:
    """(dtype, dimensions) of the type text of one tensor, else None."""
    try:
        dtype, dims = split_type(text)
    except ValueError:
        return None
    return (dtype, dims) if dtype in DTYPES and all(dims) else None


def mismatch(expected: object, found: object) -> str | None:
    """None when both are equal, else "expected ..., found ..."."""
    return None if expected == found else f"expected {expected}, found {found}"


def weight_of(value: object) -> tuple[str, bool] | None:
    """(tensor, transposed) of the weight operand of aten.linear: `@w` or `aten.t(@w)`; None for others."""
    if not isinstance(value, Node):
        return None
    if value.op == "get_attr":
        return str(value.target), False
    inner = value.args[0] if value.target is torch.ops.aten.t.default else None
    return (str(inner.target), True) if isinstance(inner, Node) and inner.op == "get_attr" else None
