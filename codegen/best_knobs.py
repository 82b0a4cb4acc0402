"""Which knobs to build with, derived from records every time and never stored.

Of the records of one op, kernel version and architecture, a candidate counts that was never wrong, failed or refused.
Candidates are compared by the geometric mean of time / least time over the shapes asked for; a shape
that nobody measured is stood in for by the nearest measured one. Where a chain made of these shapes was timed, or one
with a shape that stands in, it takes the place of the shapes in it: launches that overlap show in chains only, and what
is fastest alone need not be there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from liftc.bundle import Work
from liftc.codegen import library
from liftc.codegen.default_knobs import CPU_KNOBS, chip_family
from liftc.codegen.knobs import CpuKnobs
from liftc.format import LiftFormat
from liftc.kernel_records import Record, chain_shapes

NOISE = 0.005
"""Share of the time by which others must beat the default: by less, the same knobs differ from run to run."""

Item = tuple[str, int, int, int, str]
"""What a timing is of: format, out_features, in_features, batch, chain."""


@dataclass(frozen=True)
class ShapeRequest:
    """A linear to be compiled, after row-group fusion."""

    format: LiftFormat
    out_features: int
    in_features: int


@dataclass(frozen=True)
class Choice:
    """The best knobs, how many candidates were compared, and how many of the shapes asked for were measured."""

    knobs: Any
    candidates: int
    shapes: int
    measured: int
    arch: str

    def describe(self) -> str:
        """Where the choice comes from, in words."""
        if self.measured == self.shapes:
            where = "these shapes"
        else:
            where = f"{self.measured} of {self.shapes} shapes, the nearest measured ones for the rest"
        return f"best of {self.candidates} on {self.arch}, {where}"


def requests_of(work: Iterable[Work]) -> tuple[ShapeRequest, ...]:
    """The linears of a model as requests."""
    return tuple(ShapeRequest(LiftFormat.parse(w.format), w.out_features, w.in_features) for w in work)


def knobs_to_json(knobs: Any) -> dict[str, Any]:
    """Knobs as plain data of a record: tuples become lists."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(knobs).items()}


def knobs_from_json(kind: type[Any], values: Mapping[str, Any]) -> Any | None:
    """The knobs of a record, or None where they are not those that `kind` has today."""
    usual = {f.name: f.default for f in fields(kind)}
    made = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    if set(made) != set(usual) or any(type(made[name]) is not type(usual[name]) for name in usual):
        return None
    return kind(**made)


def best_knobs(
    records: Iterable[Record],
    op: str,
    kind: type[Any],
    arch: str,
    requests: Sequence[ShapeRequest],
    tokens: tuple[int, int] | None,
    default: Any = None,
) -> Choice | None:
    """The best knobs of `kind` for an op on an architecture, or None where nothing of use was measured.

    tokens: (least, most) batch of the kernel, whose knobs then have tokens = most; None for any batch. default: the
    choice unless others are faster by more than NOISE; only knobs for factors as large as those of it count, where they
    are limited.
    """
    times = {
        knobs: found
        for knobs, found in _times(records, op, kind, arch, tokens).items()
        if all(getattr(knobs, name, 0) == getattr(default, name, 0) for name in ("most_left", "most_right"))
    }
    requests = list(dict.fromkeys(_asked(op, r) for r in requests))
    measured = {item for found in times.values() for item in found if not item[4]}
    if not requests or not measured:
        return None
    weights: dict[Item, int] = {}
    exact = 0
    stand_ins = set()
    for request in requests:
        near = _nearest(request, measured)
        if (str(request.format), request.out_features, request.in_features) == near[0][:3]:
            exact += 1
        else:
            stand_ins.add(near[0][:3])
        weights.update(dict.fromkeys(near, 1))
    # A lift for factors of some size is measured alone on some of the shapes, and in a chain of all.
    kept = {(i[0], i[1], i[2]) for i in weights} | {
        (str(r.format), r.out_features, r.in_features) for r in requests
    }
    for item in {i for found in times.values() for i in found if i[4]}:
        shapes = [_of_op(op, shape) for shape in chain_shapes(item[4])]
        if all((item[0], *s) in kept for s in shapes) or any((item[0], *s) in stand_ins for s in shapes):
            weights[item] = len(shapes)
            for shape in shapes:
                weights.pop((item[0], *shape, item[3], ""), None)
    least = {i: min(found[i] for found in times.values() if i in found) for i in weights}
    most = max(len(weights.keys() & found.keys()) for found in times.values())

    def score(found: Mapping[Item, float]) -> float:
        items = [i for i in weights if i in found]
        return sum(weights[i] * math.log(found[i] / least[i]) for i in items) / sum(weights[i] for i in items)

    full = {knobs: found for knobs, found in times.items() if len(weights.keys() & found.keys()) == most}
    winner = min(full, key=lambda knobs: (score(full[knobs]), str(knobs)))
    if default in full and score(full[default]) <= score(full[winner]) + math.log1p(NOISE):
        winner = default
    return Choice(winner, len(full), len(requests), exact, arch)


def batches_of(family: str, op: str, tokens: int) -> tuple[int, int]:
    """(least, most) batch that the runtime gives a kernel of an op for `tokens`: smaller ones go to smaller kernels.

    Products of all forms (sign_matmul_...) share the batches, and so do lifts.
    """
    kind = op.partition("_")[0]
    sizes = [
        choice.tokens
        for tuned in library.TUNED_TEMPLATES
        if tuned.op.partition("_")[0] == kind
        for choice in tuned.choices().get(family, ())
    ]
    return max((size for size in sizes if size < tokens), default=0) + 1, tokens


def cuda_choices(
    records: Sequence[Record], archs: Sequence[str], requests: Sequence[ShapeRequest]
) -> tuple[library.Chosen, tuple[str, ...]]:
    """Knobs for the tensor-core kernels of an object, and one sentence per family and template on their origin."""
    chosen: dict[tuple[str, str], tuple[Any, ...]] = {}
    said = []
    families: dict[str, list[str]] = {}
    for arch in archs:
        families.setdefault(chip_family(arch), []).append(arch)
    for family, members in families.items():
        for tuned in library.TUNED_TEMPLATES:
            usual = tuned.choices().get(family, ())
            picked = []
            for default in usual:
                span = batches_of(family, tuned.op, default.tokens)
                found = (
                    best_knobs(records, tuned.op, tuned.knobs, arch, requests, span, default)
                    for arch in members
                )
                choice = next((c for c in found if c is not None), None)
                picked.append(default if choice is None else choice.knobs)
                origin = f"the defaults of {family}" if choice is None else choice.describe()
                said.append(f"{family} {tuned.op} up to batch {default.tokens}: {origin}")
            if usual:
                chosen[family, tuned.op] = tuple(picked)
    return chosen, tuple(said)


def cpu_choice(
    records: Sequence[Record], level: str, requests: Sequence[ShapeRequest]
) -> tuple[CpuKnobs, tuple[str, ...]]:
    """Knobs of a CPU level: those of sign_matmul and those of lift come from records of their own."""
    knobs, said = CPU_KNOBS[level], []
    for op, names in (("sign_matmul", ("token_tiles", "pair_lanes", "row_lanes")),
                      ("lift", ("lift_rows", "lift_lanes"))):  # fmt: skip
        choice = best_knobs(records, op, CpuKnobs, level, requests, None)
        if choice is not None:
            knobs = replace(knobs, **{name: getattr(choice.knobs, name) for name in names})
        said.append(f"{level} {op}: {f'the defaults of {level}' if choice is None else choice.describe()}")
    return knobs, tuple(said)


def _times(
    records: Iterable[Record], op: str, kind: type[Any], arch: str, tokens: tuple[int, int] | None
) -> dict[Any, dict[Item, float]]:
    """knobs -> item -> least microseconds measured, of candidates that never misbehaved."""
    times: dict[Any, dict[Item, float]] = {}
    dropped = set()
    for r in records:
        if (
            r.kernel != op
            or r.kernel_version != library.KERNEL_VERSION
            or r.arch.rstrip("a") != arch.rstrip("a")
        ):
            continue
        knobs = knobs_from_json(kind, r.knobs)
        if knobs is None or (tokens and knobs.tokens != tokens[1]):
            continue
        if r.status != "ok":
            dropped.add(knobs)
        elif r.microseconds and (tokens is None or tokens[0] <= r.batch <= tokens[1]):
            item = (r.format, r.out_features, r.in_features, r.batch, r.chain)
            found = times.setdefault(knobs, {})
            found[item] = min(found.get(item, math.inf), r.microseconds)
    return {knobs: found for knobs, found in times.items() if knobs not in dropped}


def _asked(op: str, request: ShapeRequest) -> ShapeRequest:
    return ShapeRequest(request.format, *_of_op(op, (request.out_features, request.in_features)))


def _of_op(op: str, shape: tuple[int, int]) -> tuple[int, int]:
    """A lift does not depend on the rows."""
    return (0, shape[1]) if op.startswith("lift") else shape


def _nearest(request: ShapeRequest, measured: Iterable[Item]) -> list[Item]:
    """Items, one per batch, of the measured shape nearest in rows, columns and bits."""

    def distance(item: Item) -> tuple[float, str, int, int]:
        bits = float(LiftFormat.parse(item[0]).bit_width) / float(request.format.bit_width)
        rows = (item[1] or 1) / (request.out_features or 1)
        apart = sum(abs(math.log(x)) for x in (rows, item[2] / request.in_features, bits))
        other = item[0] != str(request.format)
        return (apart + 1e-9 * other, *item[:3])

    best = min(measured, key=distance)
    return sorted(item for item in measured if item[:3] == best[:3])
