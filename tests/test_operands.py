"""Operands that kernels are measured and checked on, and the layouts that they are read back from."""

from __future__ import annotations

import pytest
import torch
from operand_layouts import group_planes, tile_layout, z_of

from liftc.packing import pack_signs
from liftc.runtime.operands import last_columns, planes_to_z
from liftc.runtime.planes import Planes
from liftc.spec import Z_MAX


def run_planes(z: torch.Tensor, columns: int) -> torch.Tensor:
    """Planes int8 (KB, 4, columns, 64) of z, column by column; other columns hold 99."""
    tokens, width = z.shape
    planes = torch.full((-(-width // 256), 4, columns, 64), 99, dtype=torch.int8)
    for token in range(tokens):
        for k in range(width):
            high = (int(z[token, k]) + 128) // 256
            at = (k // 256, k // 64 % 4)
            planes[at][2 * token, k % 64] = high
            planes[at][2 * token + 1, k % 64] = int(z[token, k]) - 256 * high
    return planes


@pytest.mark.parametrize("layout", [run_planes, group_planes])
@pytest.mark.parametrize("tokens, width, columns", [(1, 70, 8), (3, 300, 16), (2, 256, 4)])
def test_z_is_read_back_from_both_layouts(layout: object, tokens: int, width: int, columns: int) -> None:
    g = torch.Generator().manual_seed(width)
    z = torch.randint(-Z_MAX, Z_MAX + 1, (tokens, width), generator=g).to(torch.int16)
    z[0, :3] = torch.tensor([Z_MAX, -Z_MAX, -128])
    data = layout(z, columns)  # type: ignore[operator]
    totals = z.sum(1, dtype=torch.int32)[None]
    assert torch.equal(z_of(data, tokens, width), z)
    assert torch.equal(planes_to_z(Planes(data, totals, torch.Size([tokens]), width)), z)


@pytest.mark.parametrize("columns", [1, 64, 77, 255, 256, 300, 1386])
def test_last_columns_are_those_that_tiles_fill(columns: int) -> None:
    full = tile_layout(pack_signs(torch.ones(32, columns)))
    assert torch.equal(full[0, -1], last_columns(columns, torch.device("cpu")))
    assert (full[:, :-1] == -1).all()
