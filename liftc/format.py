"""Formats LQ-D/d: D signs carry d weights, so a weight costs exactly D/d bits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from liftc.errors import FormatError

MAX_LIFTED_DIM = 256
DEFAULT_SUBSPACE_DIM = 32
_PATTERN = re.compile(r"(?:LQ-)?(\d{1,4})/(\d{1,4})")


@dataclass(frozen=True, order=True)
class LiftFormat:
    """LQ-`lifted_dim`/`subspace_dim` (paper section 3.1: D and d).

    Raises FormatError unless 1 <= d <= D <= 256 and D/d <= 8.
    """

    lifted_dim: int
    subspace_dim: int

    def __post_init__(self) -> None:
        big, small = self.lifted_dim, self.subspace_dim
        if not (1 <= small <= big <= MAX_LIFTED_DIM and big <= 8 * small):
            raise FormatError(
                f"format LQ-{big}/{small} does not exist: need 1 <= d <= D <= {MAX_LIFTED_DIM} and D/d <= 8"
            )

    @property
    def bit_width(self) -> Fraction:
        """Bits per weight of the signs alone, exactly D/d."""
        return Fraction(self.lifted_dim, self.subspace_dim)

    def __str__(self) -> str:
        return f"LQ-{self.lifted_dim}/{self.subspace_dim}"

    @classmethod
    def parse(cls, text: str) -> LiftFormat:
        """Read "LQ-77/32" or "77/32"; raises FormatError."""
        match = _PATTERN.fullmatch(text.strip())
        if not match:
            raise FormatError(f"cannot read format {text!r}: write it as LQ-D/d, for example LQ-77/32")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def from_bits(cls, bits: float, subspace_dim: int = DEFAULT_SUBSPACE_DIM) -> LiftFormat:
        """The D/d nearest to `bits` for the given d; raises FormatError outside [1, 8]."""
        if not 1.0 <= bits <= 8.0:  # also refuses NaN
            raise FormatError(f"bits must lie between 1 and 8, got {bits:g}")
        return cls(round(bits * subspace_dim), subspace_dim)
