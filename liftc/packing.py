"""The portable packed layout of signs: 32 rows share a word, one word per lifted column.

`packed[g, k]` is an int32 whose bit r (little-endian, r = 0 least significant) is 1 when the sign of row
32 g + r at lifted column k is +1. Rows past the last one are 0 bits. Columns need no padding, which is
what keeps a 576-wide layer at 2.41 stored bits where padding every row to whole words would cost 2.44.
"""

from __future__ import annotations

import torch

from liftc.errors import LiftcError
from liftc.spec import ROWS_PER_WORD


def packed_rows(out_features: int) -> int:
    """Row groups of the packed layout, ceil(out_features / 32)."""
    return -(-out_features // ROWS_PER_WORD)


def pack_signs(signs: torch.Tensor) -> torch.Tensor:
    """Pack signs (out_features, lifted_features), any dtype, > 0 meaning +1, into int32 (groups, lifted)
    on the same device."""
    if signs.ndim != 2:
        raise LiftcError(f"pack_signs: need a matrix of signs, got shape {tuple(signs.shape)}")
    rows, columns = signs.shape
    groups = packed_rows(rows)
    bits = torch.zeros(groups * ROWS_PER_WORD, columns, dtype=torch.int32, device=signs.device)
    bits[:rows] = (signs > 0).to(torch.int32)
    shifts = torch.arange(ROWS_PER_WORD, dtype=torch.int32, device=signs.device)
    words = bits.view(groups, ROWS_PER_WORD, columns) << shifts[None, :, None]
    return words.sum(1, dtype=torch.int64).to(torch.int32)


def unpack_signs(packed: torch.Tensor, out_features: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Inverse of pack_signs: (out_features, lifted_features) of -1 and +1."""
    groups, columns = packed.shape
    if packed_rows(out_features) != groups:
        raise LiftcError(f"unpack_signs: {groups} row groups cannot hold exactly {out_features} rows")
    shifts = torch.arange(ROWS_PER_WORD, dtype=torch.int32, device=packed.device)
    bits = (packed[:, None, :] >> shifts[None, :, None]) & 1
    return (bits.view(groups * ROWS_PER_WORD, columns)[:out_features] * 2 - 1).to(dtype)


def concatenate_packed(parts: list[torch.Tensor], rows: list[int]) -> torch.Tensor:
    """Stack packed matrices of `rows[i]` rows each into one, in order.

    Every part but the last must fill its words (rows % 32 == 0); raises LiftcError otherwise.
    """
    for part, count in zip(parts[:-1], rows[:-1], strict=True):
        if count % ROWS_PER_WORD or packed_rows(count) != part.shape[0]:
            raise LiftcError(f"concatenate_packed: a part of {count} rows does not fill its words")
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def slice_packed(packed: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Rows start:stop of a packed matrix as a packed matrix of its own."""
    if start % ROWS_PER_WORD:
        return pack_signs(unpack_signs(packed, packed.shape[0] * ROWS_PER_WORD, torch.int8)[start:stop])
    words = packed[start // ROWS_PER_WORD : packed_rows(stop)].clone()
    tail = (stop - start) % ROWS_PER_WORD
    if tail:
        words[-1] &= (1 << tail) - 1
    return words
