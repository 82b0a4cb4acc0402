"""The knobs worth trying, most promising first: the present choice, then what differs from it in few knobs.

No hardware is asked: shared memory is known from the knobs, registers from the accumulators they imply.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

from liftc.codegen import library
from liftc.codegen.best_knobs import batches_of
from liftc.codegen.default_knobs import CPU_KNOBS, SHARED_BYTES, chip_family
from liftc.codegen.knobs import CpuKnobs

AXES: dict[str, dict[str, tuple[Any, ...]]] = {
    "sign_matmul_tiled": {
        "ring": (3, 4, 5, 6, 7, 8, 10, 12, 14),
        "chunk_blocks": (3, 6, 9, 12, 16, 20, 28, 40, 72, 104, 136),
        "warps": (8, 12, 16),
        "sets": (1, 2, 4, 8),
        "row_blocks": (1, 2),
        "block_rows": (24, 32, 40),
        "z_buffers": (2, 3),
        "prefetch_tiles": (0, 4),
        "first_tiles": (0, 2, 3),
    },
    "sign_matmul_popcount": {
        "ring": (3, 4, 6, 8, 9, 10, 12, 16),
        "early_tiles": (0, 4, 6, 8),
        "first_tiles": (0, 2, 3, 4),
        "chunk_blocks": (40, 56, 80, 104, 112, 136),
        "warps": (16, 20, 24, 28),
        "block_rows": (24, 32, 40),
    },
    "sign_matmul_binary": {
        "cutters": (1, 2, 4, 5, 6, 8, 9, 10, 13),
        "z_stages": (2, 3, 4, 5, 6, 7, 8, 9, 10),
        "ring": (2, 3, 4, 5, 6, 8),
        "teams": (1, 2, 3),
        "stage_blocks": (2, 3, 4, 5, 6, 8),
        "first_stages": (0, 1, 2),
        "lanes": (1, 2, 4),
        "split": (1, 2),
        "block_rows": (28, 56),
    },
    "lift_planes_grouped": {
        "tiles": (1, 2, 3, 4, 5),
        "trigger": (0, 1, 2),
        "copied": (False, True),
        "registers": (0, 128, 160),
    },
    "lift_planes": {
        "trigger": (0, 1, 2),
        "blocks_per_processor": (1, 2, 3, 4),
        "ahead": (2, 4, 8),
        "left_depth": (1, 2, 4, 8, 16),
        "left_kept": (0, 2, 4, 6, 8),
        "group": (1, 2, 4),
        "units": (1, 2, 4),
        "tiles": (1, 2, 4),
    },
}
"""Values of the knobs that are varied; the others keep the family's choice."""

CPU_AXES: dict[str, dict[str, tuple[Any, ...]]] = {
    "sign_matmul": {"row_lanes": (16, 32), "token_tiles": ((1,), (2, 1), (4, 1), (8, 1))},
    "lift": {"lift_rows": (2, 4, 6, 8), "lift_lanes": (8, 16)},
}

_REGISTER_FILE = 65536
_REGISTERS_BESIDE = 48


@dataclass(frozen=True)
class Candidate:
    """Knobs of one op to compile and measure; rank 0 is the present choice."""

    op: str
    knobs: Any
    rank: int


def cuda_candidates(
    arch: str,
    batches: Sequence[int],
    most: int,
    *,
    ops: Sequence[str] = (),
    shared_bytes: int | None = None,
    known_good: Mapping[tuple[str, int], Iterable[Any]] | None = None,
) -> list[Candidate]:
    """At most `most` candidates per op and batch size of the kernels that serve `batches`, best guesses first.

    ops: only these (default all). shared_bytes: limit of a block instead of the family's. known_good: (op, tokens)
    -> knobs to try right after the present choice, such as the best of other records.
    """
    family = chip_family(arch)
    limit = min(shared_bytes or SHARED_BYTES[family], SHARED_BYTES[family])
    found: list[Candidate] = []
    for tuned in library.TUNED_TEMPLATES:
        if ops and tuned.op not in ops:
            continue
        usual = tuned.choices().get(family, ())
        for present in usual:
            least, most_tokens = batches_of(family, tuned.op, present.tokens)
            if not any(least <= batch <= most_tokens for batch in batches):
                continue
            starts = [present, *(known_good or {}).get((tuned.op, present.tokens), ())]
            order = dict.fromkeys([*starts, *_neighbours(present, AXES.get(tuned.op, {}))])
            fitting = [_apart(k, limit) for k in order if _fits(k, limit)]
            unique = list(dict.fromkeys(fitting))[:most]
            found += [Candidate(tuned.op, knobs, rank) for rank, knobs in enumerate(unique)]
    return sorted(found, key=lambda c: c.rank)


def cpu_candidates(level: str, most: int, *, ops: Sequence[str] = ()) -> list[Candidate]:
    """At most `most` candidates per op of a CPU level, best guesses first."""
    found = []
    present = CPU_KNOBS[level]
    for op, axes in CPU_AXES.items():
        if ops and op not in ops:
            continue
        order = [k for k in dict.fromkeys([present, *_neighbours(present, axes)]) if _cpu_fits(k)][:most]
        found += [Candidate(op, knobs, rank) for rank, knobs in enumerate(order)]
    return sorted(found, key=lambda c: c.rank)


def _neighbours(present: Any, axes: Mapping[str, tuple[Any, ...]]) -> Iterator[Any]:
    """Knobs that differ in one value, nearest first, then in two, then in three."""
    names = [name for name in axes if hasattr(present, name)]
    for count in (1, 2, 3):
        made = []
        for chosen in combinations(names, count):
            values = [[v for v in axes[name] if v != getattr(present, name)] for name in chosen]
            for combination in product(*values):
                steps = sum(
                    _steps(axes[name], getattr(present, name), v) for name, v in zip(chosen, combination)
                )
                made.append((steps, replace(present, **dict(zip(chosen, combination)))))
        yield from (knobs for _, knobs in sorted(made, key=lambda pair: pair[0]))


def _steps(axis: tuple[Any, ...], before: Any, after: Any) -> int:
    places = sorted({*axis, before})
    return abs(places.index(before) - places.index(after))


def _apart(knobs: Any, limit: int) -> Any:
    """The knobs with enough unused shared memory that one block fills more than half of a processor's."""
    if not hasattr(knobs, "pad_bytes"):
        return knobs
    bare = replace(knobs, pad_bytes=0)
    return replace(bare, pad_bytes=max(0, (limit // 2 + 1024 - bare.shared_bytes()) // 16 * 16))


def _fits(knobs: Any, limit: int) -> bool:
    if (knobs.shared_bytes("gate") if getattr(knobs, "copied", False) else knobs.shared_bytes()) > limit:
        return False  # a lift that copies x is also built for gates, with two halves of x
    if hasattr(knobs, "sets"):  # accumulators: 4 per set, 16 rows and 8 columns, two columns a token
        accumulators = 4 * knobs.sets * knobs.row_blocks * -(-2 * knobs.tokens // 8)
        return bool((accumulators + _REGISTERS_BESIDE) * knobs.warps * 32 <= _REGISTER_FILE)
    if hasattr(knobs, "lanes"):  # one accumulator per row of 8 and bit of a token
        tokens, rest = divmod(knobs.tokens, 4 * knobs.lanes)
        if knobs.multiply_registers and knobs.threads() % 128:
            return False  # warps take and give registers by fours, and one alone would wait for ever
        if rest or knobs.launch_registers() * knobs.threads() > _REGISTER_FILE:
            return False
        given = knobs.multiply_registers or _REGISTER_FILE // knobs.threads()
        return bool(32 * tokens + 4 * knobs.stage_blocks + _REGISTERS_BESIDE // 2 <= given)
    return bool(getattr(knobs, "group", 1) <= knobs.tokens)


def _cpu_fits(knobs: CpuKnobs) -> bool:
    return knobs.pair_lanes == 0 or knobs.row_lanes == 32  # row_lanes is a knob of the mask form only
