"""Schedule choices of the generated kernels. They change speed, never results."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class CpuKnobs:
    """token_tiles: tokens that share one pass over the signs, one kernel each, largest first, ending in 1.
    pair_lanes: int32 lanes of a register for the column-pair form of sign_matmul (4 for SSE, 8 for AVX2), or
    0 for the mask form (AVX-512). row_lanes: rows of a word (a divisor of 32) that the mask form sums in one
    pass over the columns.
    lift_rows, lift_lanes: register tile of the lift's two products.
    """

    token_tiles: tuple[int, ...] = (4, 1)
    pair_lanes: int = 0
    row_lanes: int = 32
    lift_rows: int = 6
    lift_lanes: int = 16

    def describe(self) -> tuple[str, ...]:
        """One text "name=value" per knob."""
        return tuple(f"{name}={value}" for name, value in asdict(self).items())


@dataclass(frozen=True)
class CudaKnobs:
    """column_slices: warps of a block that split the lifted columns of one word row. threads: block size of
    the element-wise kernels. lift_threads: columns that a block of the lift's products computes.
    """

    column_slices: int = 8
    threads: int = 256
    lift_threads: int = 64

    def describe(self) -> tuple[str, ...]:
        """One text "name=value" per knob."""
        return tuple(f"{name}={value}" for name, value in asdict(self).items())


CPU_KNOBS: dict[str, CpuKnobs] = {
    "x86-64-v2": CpuKnobs(pair_lanes=4, lift_rows=4, lift_lanes=8),
    "x86-64-v3": CpuKnobs(pair_lanes=8),
    "x86-64-v4": CpuKnobs(),
}
"""Measured choices per CPU level (docs/kernels.md)."""
