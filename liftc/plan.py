"""The byte plan: every stored tensor, what it is for and how many bytes it takes.

Planned bytes are data bytes: the files of an artifact hold exactly these, plus their headers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from liftc.errors import ArtifactError
from liftc.program import Program
from liftc.rules import Context
from liftc.spec import DTYPES, TensorSpec
from liftc.tensor_names import (
    activation_scale_name,
    output_scale_name,
    packed_parts,
    transform_names,
)
from liftc.values import is_tensor_name

CATEGORIES = (
    "signs", "output_scale", "transform", "mapping", "embedding", "head", "norm", "bias", "other"
)  # fmt: skip
"""In the order of storage. `transform` holds whitening factors and activation scales; an embedding that is
also the head counts as embedding; `other` is everything unlowered that no other word fits."""

LIFT_CATEGORIES = frozenset(CATEGORIES[:4])
"""Categories that exist because of the lowered linears; bits_per_weight counts all of them."""

VERSION = 1
_KEYS = {"version", "weights", "bits_per_weight", "bytes", "computed_at_load", "entries"}
_ATEN = torch.ops.aten
_NORMS = (_ATEN.layer_norm, _ATEN.native_layer_norm, _ATEN.rms_norm, _ATEN._fused_rms_norm, _ATEN.group_norm,
          _ATEN.batch_norm)  # fmt: skip
_CASTS = (_ATEN.to, _ATEN._to_copy, _ATEN.type_as)


@dataclass(frozen=True)
class PlanEntry:
    """One stored tensor. dtype is a key of DTYPES; nbytes are the bytes of its data."""

    name: str
    category: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Plan:
    """All stored tensors in order of storage.

    weights: weights of the lowered linears. computed_at_load: bytes of folded tensors, which take memory but
    no disk.
    """

    entries: tuple[PlanEntry, ...]
    weights: int
    computed_at_load: int = 0

    def bytes_by_category(self) -> dict[str, int]:
        """Bytes of every category, zero included, in order of storage."""
        totals = dict.fromkeys(CATEGORIES, 0)
        for entry in self.entries:
            totals[entry.category] += entry.nbytes
        return totals

    @property
    def total(self) -> int:
        """Bytes of all entries."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of signs (padding included), output scales, transforms and mappings per lowered weight.

        Biases are left out: they were there before and stay as they are. 0.0 when no linear is lowered.
        """
        stored = sum(entry.nbytes for entry in self.entries if entry.category in LIFT_CATEGORIES)
        return 8 * stored / self.weights if self.weights else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data for plan.json; totals are included for readers and checked by from_json."""
        return {
            "version": VERSION,
            "weights": self.weights,
            "bits_per_weight": self.bits_per_weight,
            "bytes": {**self.bytes_by_category(), "total": self.total},
            "computed_at_load": self.computed_at_load,
            "entries": [[e.name, e.category, e.dtype, list(e.shape), e.nbytes] for e in self.entries],
        }

    @classmethod
    def from_json(cls, data: object) -> Plan:
        """Inverse of to_json for data of unknown origin; raises ArtifactError."""
        if not isinstance(data, dict) or set(data) != _KEYS or data["version"] != VERSION:
            raise ArtifactError(
                f"plan: expected an object of version {VERSION} with the keys {sorted(_KEYS)}"
            )
        if not isinstance(data["entries"], list):
            raise ArtifactError("plan: entries must be an array")
        entries = tuple(_entry(index, row) for index, row in enumerate(data["entries"]))
        plan = cls(entries, _count(data, "weights"), _count(data, "computed_at_load"))
        if len({entry.name for entry in entries}) != len(entries):
            raise ArtifactError("plan: a tensor is listed twice")
        totals = {**plan.bytes_by_category(), "total": plan.total}
        if data["bytes"] != totals or data["bits_per_weight"] != plan.bits_per_weight:
            raise ArtifactError("plan: the totals do not belong to the entries; the file was altered")
        return plan


def plan_program(program: Program) -> Plan:
    """The plan of a program: its tensors by category, inside a category in order of Program.tensors."""
    categories = _categories(program)
    entries = [
        PlanEntry(name, categories[name], spec.dtype, spec.shape) for name, spec in program.tensors.items()
    ]
    entries.sort(key=lambda entry: CATEGORIES.index(entry.category))
    lowered = {name for members in packed_parts(program).values() for name in members}
    weights = sum(
        linear.out_features * linear.in_features
        for name, linear in program.linears.items()
        if name in lowered
    )
    context = Context(program)
    folded = sum(spec.nbytes for spec in map(context.folded, program.folded) if spec)
    return Plan(tuple(entries), weights, folded)


def _categories(program: Program) -> dict[str, str]:
    """Category of each tensor: by its name in the tables for what lowering made, else by who reads it."""
    made: dict[str, str] = {}
    for packed in packed_parts(program):
        made[packed] = "signs"
        made[output_scale_name(packed.removesuffix(".packed_weight"))] = "output_scale"
    for lift, spec in program.lifts.items():
        names = transform_names(lift, spec)
        made.update({names.left: "transform", names.right: "transform", names.mapping: "mapping"})
        made[activation_scale_name(lift)] = "transform"
    roles = _roles(program)
    return {
        name: made.get(name) or _category(spec, roles.get(name, set()))
        for name, spec in program.tensors.items()
    }


def _category(spec: TensorSpec, roles: set[str]) -> str:
    for role in ("embedding", "head", "bias", "norm"):
        if role in roles and (role != "norm" or len(spec.shape) == 1):
            return role
    return "other"


def _roles(program: Program) -> dict[str, set[str]]:
    """What the readers of each tensor use it for."""
    roles: dict[str, set[str]] = {}
    nodes = [node for graph in program.graphs.values() for node in graph.nodes]
    blocks = any(node.meta.get("block", -1) >= 0 for node in nodes)
    for node in nodes:
        if node.op == "get_attr":
            found = roles.setdefault(str(node.target), set())
            found.update(role for user in node.users for role in _uses(node, user, blocks))
    return roles


def _uses(value: Node, user: Node, blocks: bool) -> Iterable[str]:
    """Roles that `value` plays in the call `user`; casts, transposes and `1 + w` are looked through."""
    packet = getattr(user.target, "overloadpacket", None)
    position = user.args.index(value) if value in user.args else -1
    alone = sum(isinstance(argument, Node) for argument in user.args) == 1
    if packet in _CASTS or packet is _ATEN.t or (packet is _ATEN.add and alone):
        for further in user.users:
            yield from _uses(user, further, blocks)
    elif packet is _ATEN.embedding and position == 0:
        yield "embedding"
    elif packet in (_ATEN.linear, _ATEN.addmm) and position == (1 if packet is _ATEN.linear else 2):
        yield "head" if blocks and user.meta.get("block", -1) < 0 else "other"
    elif (packet is _ATEN.linear and position == 2) or (packet is _ATEN.addmm and position == 0):
        yield "bias"
    elif packet in _NORMS or (packet is _ATEN.mul and any(map(_is_normalised, user.args))):
        yield "norm"
    elif packet is _ATEN.add:
        yield "bias"


def _is_normalised(value: object) -> bool:
    """True for x / rms(x) as models write it: a product or quotient with a root, casts looked through."""
    while isinstance(value, Node) and getattr(value.target, "overloadpacket", None) in _CASTS:
        value = value.args[0]
    packet = getattr(value.target, "overloadpacket", None) if isinstance(value, Node) else None
    if not isinstance(value, Node) or packet not in (_ATEN.mul, _ATEN.div):
        return False
    factors = [getattr(f.target, "overloadpacket", None) for f in value.args if isinstance(f, Node)]
    return any(factor in (_ATEN.rsqrt, _ATEN.sqrt, _ATEN.pow, _ATEN.reciprocal) for factor in factors)


def _entry(index: int, row: object) -> PlanEntry:
    where = f"plan: entries[{index}]"
    if not isinstance(row, list) or len(row) != 5:
        raise ArtifactError(f"{where} must be [name, category, dtype, shape, bytes]")
    name, category, dtype, shape, nbytes = row
    if not is_tensor_name(name) or category not in CATEGORIES or dtype not in DTYPES:
        raise ArtifactError(f"{where} has an impossible name, category or dtype")
    if not isinstance(shape, list) or not all(type(dim) is int and dim >= 0 for dim in shape):
        raise ArtifactError(f"{where} has an impossible shape")
    entry = PlanEntry(name, category, dtype, tuple(shape))
    if type(nbytes) is not int or nbytes != entry.nbytes:
        raise ArtifactError(f"{where} states {nbytes!r} bytes, its shape and dtype make {entry.nbytes}")
    return entry


def _count(data: dict[str, Any], key: str) -> int:
    value = data[key]
    if type(value) is not int or value < 0:
        raise ArtifactError(f"plan: {key} must be a count, got {value!r}")
    return value
