"""Figures of the mapping matrices, as recorded with them, and the published figures to set beside them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from liftc.errors import QuantizeError
from liftc.format import LiftFormat
from liftc.quant import mapping

BEAMS = (16, 64, 256, 1024)

TRELLIS = {2.0: 0.0710, 2.5: 0.0363, 3.0: 0.0189, 4.0: 0.0059}
"""Bits -> mse on unit Gaussian weights: Q-Palette's published TCQ figures."""

PAPER = (
    ("LQ-32/20", 0.146), ("LQ-16/8", 0.089), ("LQ-32/16", 0.082), ("LQ-30/14", 0.070), ("LQ-24/10", 0.053),
    ("LQ-24/8", 0.025),
)  # fmt: skip
"""Format and mse of the LiftQuant paper (Table 1); the one of LQ-24/8 is approximate."""


@dataclass(frozen=True)
class Measured:
    """One format: mse and standard error per beam over `samples` vectors."""

    fmt: LiftFormat
    samples: int
    device: str
    mse: dict[int, float]
    standard_error: dict[int, float]

    @property
    def bits(self) -> float:
        return float(self.fmt.bit_width)


def measured(source: Path = mapping.SHIPPED) -> list[Measured]:
    """Figures of every format in a mapping file, ordered by d, then D; QuantizeError when some are missing."""
    rows = []
    for name, made in mapping.read_provenance(source).items():
        try:
            figures = {beam: made["figures"][str(beam)] for beam in BEAMS}
            mse = {beam: float(row["mse"]) for beam, row in figures.items()}
            errors = {beam: float(row["standard_error"]) for beam, row in figures.items()}
            row = Measured(LiftFormat.parse(name), int(made["samples"]), str(made["device"]), mse, errors)
        except (KeyError, TypeError, ValueError) as error:
            raise QuantizeError(
                f"{source}: {name} has no figures for beams {', '.join(map(str, BEAMS))}; "
                "measure it with scripts/gpu_lattice.py"
            ) from error
        if row.samples < 2 or not all(0 < value < math.inf for value in (*mse.values(), *errors.values())):
            raise QuantizeError(f"{source}: the figures of {name} are not positive numbers; measure it again")
        rows.append(row)
    if not rows:
        raise QuantizeError(f"{source}: the file holds no mapping matrix; nothing to report")
    return sorted(rows, key=lambda row: (row.fmt.subspace_dim, row.fmt.lifted_dim))


def trellis_mix(bits: float) -> float | None:
    """mse at `bits` of a share of weights at each of two neighbouring TCQ rates half a bit apart, else None.

    That is time sharing: the mean of both errors weighted by the shares.
    """
    rates = sorted(TRELLIS)
    for low, high in pairwise(rates):
        if low <= bits <= high and high - low <= 0.5:
            share = (bits - low) / (high - low)
            return (1 - share) * TRELLIS[low] + share * TRELLIS[high]
    return TRELLIS.get(bits)


def excess_db(mse: float, bits: float) -> float:
    """How far an mse lies above the bound 2^(-2 bits), in dB."""
    return 10 * math.log10(mse) + 20 * bits * math.log10(2)
