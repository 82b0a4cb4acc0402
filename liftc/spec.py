"""Frozen records that passes, quantizer, artifact and runtime share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from liftc.errors import LiftcError
from liftc.format import LiftFormat

DTYPES: dict[str, torch.dtype] = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
    "i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8,
    "bool": torch.bool,
}  # fmt: skip
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

ROWS_PER_WORD = 32
"""Rows that share one word of the portable packed layout."""

Z_MAX = 2**14 - 1
"""Largest magnitude of a fixed-point lifted activation: 131072 of them still sum inside an int32."""

MAX_LIFTED_FEATURES = (2**31 - 1) // Z_MAX


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype name (a key of DTYPES) of a stored tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class LiftSpec:
    """Shape of one lift: x (in_features) -> z (lifted_features), shared by every linear that reads x.

    The whitening transform is a Kronecker product of a (left, left) and a (right, right) factor
    (paper section 3.2); in_features is padded with zeros to left * right, and right is a multiple of d.
    """

    format: LiftFormat
    in_features: int
    left: int
    right: int

    def __post_init__(self) -> None:
        if self.right % self.format.subspace_dim:
            raise LiftcError(f"lift: right factor {self.right} is not a multiple of d in {self.format}")
        if self.left * self.right < self.in_features or self.in_features < 1:
            raise LiftcError(f"lift: {self.left} x {self.right} does not cover {self.in_features} features")
        if self.lifted_features > MAX_LIFTED_FEATURES:
            raise LiftcError(
                f"lift: {self.lifted_features} lifted features would overflow 32-bit sums (limit "
                f"{MAX_LIFTED_FEATURES}); use a smaller D/d for {self.in_features} inputs"
            )

    @property
    def padded_in_features(self) -> int:
        return self.left * self.right

    @property
    def lifted_right(self) -> int:
        """Columns of the fused right factor: (right / d) * D."""
        return self.right // self.format.subspace_dim * self.format.lifted_dim

    @property
    def lifted_features(self) -> int:
        return self.left * self.lifted_right


@dataclass(frozen=True)
class LinearSpec:
    """One linear layer selected for lowering. The table of them is part of the Program.

    `weight` names the checkpoint tensor, of shape (out_features, in_features), or its transpose when
    `transposed` (GPT-2's Conv1D). `lift` is the name of the shared lift in Program.lifts, or "" before
    share-transforms; `format` is None before assign-formats. `block` is the decoder block, or -1.
    """

    name: str
    weight: str
    out_features: int
    in_features: int
    block: int
    transposed: bool = False
    lift: str = ""
    format: LiftFormat | None = None


def transform_shape(in_features: int, fmt: LiftFormat) -> tuple[int, int]:
    """(left, right) of the Kronecker factors: right a multiple of d near sqrt(in_features), least padding.

    Among multiples of d up to 4 sqrt(in_features) the one with the least padding wins, then the one
    nearest to the square root (the cost of a lift is about in_features * (left + right D/d)).
    """
    d, root = fmt.subspace_dim, math.sqrt(in_features)
    limit = max(1, int(4 * root) // d)
    candidates = [d * k for k in range(1, limit + 1)]
    right = min(candidates, key=lambda r: (-(-in_features // r) * r, abs(math.log(r / root))))
    return -(-in_features // right), right
