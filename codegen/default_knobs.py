"""Which schedule choices the kernels are built with where no records say better, by family of chips."""

from __future__ import annotations

from dataclasses import replace

from liftc.codegen.knobs import (
    BinaryKnobs,
    CpuKnobs,
    GroupLiftKnobs,
    LiftKnobs,
    PopcountKnobs,
    TensorCoreKnobs,
)

CPU_KNOBS: dict[str, CpuKnobs] = {
    "x86-64-v2": CpuKnobs(pair_lanes=4, lift_rows=4, lift_lanes=8),
    "x86-64-v3": CpuKnobs(pair_lanes=8),
    "x86-64-v4": CpuKnobs(),
}
"""Measured choices per CPU level (docs/kernels.md)."""

SHARED_BYTES = {
    "ampere": 163 << 10, "ada": 99 << 10, "server": 227 << 10, "hopper": 227 << 10, "blackwell": 99 << 10,
}  # fmt: skip
"""Most shared memory of a block, by family of chips: "hopper" is sm_90a with its warp-group instructions, "server" the
other chips from sm_90 on that have as much shared memory, "blackwell" sm_120."""

TENSOR_CORE_KNOBS: dict[str, tuple[TensorCoreKnobs, ...]] = {
    "ampere": (
        TensorCoreKnobs(4, ring=8, chunk_blocks=20),
        TensorCoreKnobs(8, ring=8, chunk_blocks=9, sets=4),
        TensorCoreKnobs(16, warps=8, ring=6, chunk_blocks=6, sets=4),
    ),
    "ada": (
        TensorCoreKnobs(4, ring=5, chunk_blocks=12),
        TensorCoreKnobs(8, ring=4, chunk_blocks=6, sets=4),
        TensorCoreKnobs(16, warps=8, ring=4, chunk_blocks=3, block_rows=24, sets=4),
    ),
    "hopper": (),
    "server": (
        TensorCoreKnobs(1, ring=6, chunk_blocks=136, dependent_launch=True),
        TensorCoreKnobs(4, ring=6, chunk_blocks=40, dependent_launch=True),
        TensorCoreKnobs(8, ring=6, chunk_blocks=16, sets=4, dependent_launch=True),
        TensorCoreKnobs(16, 8, ring=5, row_blocks=2, sets=1, chunk_blocks=8, dependent_launch=True),
    ),
    "blackwell": (
        TensorCoreKnobs(1, ring=6, chunk_blocks=40, block_rows=40, dependent_launch=True),
        TensorCoreKnobs(4, ring=5, chunk_blocks=12, dependent_launch=True),
        TensorCoreKnobs(8, ring=4, chunk_blocks=6, sets=4, dependent_launch=True),
        TensorCoreKnobs(16, warps=8, ring=4, chunk_blocks=3, block_rows=24, sets=4, dependent_launch=True),
    ),
}
"""Choices per family, fewest tokens first: server measured on an H100, the others chosen to fit. Hopper has binary
forms for all of them."""

POPCOUNT_KNOBS: dict[str, tuple[PopcountKnobs, ...]] = {
    "ampere": (PopcountKnobs(1, ring=8),),
    "ada": (PopcountKnobs(1, ring=4, chunk_blocks=80),),
    "hopper": (
        PopcountKnobs(1, ring=9, chunk_blocks=112, early_tiles=6, first_tiles=2, dependent_launch=True),
    ),
}
"""One token, on chips whose tensor cores count bits: those of sm_100, which share a family with sm_90, and of sm_120 do
not. Hopper measured on an H100, so that a block of the lift fits beside one of the product; others chosen to fit."""

BINARY_KNOBS: dict[str, tuple[BinaryKnobs, ...]] = {
    "hopper": (
        BinaryKnobs(
            4, stage_blocks=8, ring=3, z_stages=5, prefetch=3, multiply_registers=120, helper_registers=56
        ),
        BinaryKnobs(
            8, stage_blocks=5, ring=3, z_stages=5, prefetch=3, multiply_registers=128, helper_registers=48
        ),
        BinaryKnobs(
            16,
            stage_blocks=3,
            ring=3,
            cutters=9,
            z_stages=5,
            first_stages=2,
            multiply_registers=168,
            helper_registers=48,
        ),
    ),
}
"""More tokens than POPCOUNT_KNOBS has, measured on an H100: with 4 and 8 a block of the lift fits beside one of the
product."""

_ANY_LIFT = (
    LiftKnobs(8, blocks_per_processor=2),
    LiftKnobs(16, tiles=2, units=2, left_depth=2, most_right=512, blocks_per_processor=1),
)
_SMALL_LIFT = LiftKnobs(1, most_left=64, most_right=128, left_kept=4, left_depth=1, blocks_per_processor=3)
_LARGE_LIFT = LiftKnobs(
    1, most_left=128, most_right=128, left_kept=8, left_depth=1, blocks_per_processor=3, cluster=2
)

LIFT_KNOBS: dict[str, tuple[LiftKnobs, ...]] = {
    family: tuple(
        replace(
            choice,
            dependent_launch=family in ("server", "blackwell"),
            blocks_per_processor=1 if family in ("server", "blackwell") else choice.blocks_per_processor,
        )
        for choice in _ANY_LIFT
    )
    for family in ("ampere", "ada", "server", "blackwell")
} | {
    "hopper": tuple(
        replace(choice, dependent_launch=True)
        for choice in (
            _SMALL_LIFT,
            _LARGE_LIFT,
            replace(_LARGE_LIFT, most_right=224, ahead=7),
            replace(_SMALL_LIFT, tokens=4),
            *_ANY_LIFT,
        )
    )
}
"""Choices of the lift per family, fewest tokens first, then smallest factors. Hopper measured on an H100: the first 4
leave room for a block of the product beside theirs. Server and blackwell would spill with two blocks."""

_SMALL_GROUP_LIFT = GroupLiftKnobs(8, most_left=64, copied=False, registers=160)

GROUP_LIFT_KNOBS: dict[str, tuple[GroupLiftKnobs, ...]] = {
    "hopper": (
        GroupLiftKnobs(4),
        GroupLiftKnobs(4, most_right=224),
        replace(_SMALL_GROUP_LIFT, most_right=64),
        _SMALL_GROUP_LIFT,
        GroupLiftKnobs(8, tiles=3),
        GroupLiftKnobs(8, tiles=3, most_right=224),
        replace(_SMALL_GROUP_LIFT, tokens=16, tiles=3, registers=0),
        GroupLiftKnobs(16, tiles=5),
        GroupLiftKnobs(16, tiles=5, most_right=224),
    ),
}
"""Several tokens and factors as language models have them, measured on an H100. Small ones for 8 tokens leave room for
a block of the product beside theirs; blocks of large ones fill a processor, and are fewer than processors."""


def chip_family(arch: str) -> str:
    """Which knobs an architecture ("sm_90a") gets: by its instructions and shared memory."""
    if arch == "sm_90a":
        return "hopper"
    number = int(arch.removeprefix("sm_").rstrip("a"))
    if number < 90:
        return "ampere" if number in (80, 87) else "ada"
    return "server" if number < 120 else "blackwell"
