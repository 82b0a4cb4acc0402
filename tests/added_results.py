"""What a product kernel adds to its results, and where these go, for kernels that run on the CPU."""

from __future__ import annotations

import torch

from liftc import reference

Tensor = torch.Tensor

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
CASES = [(0, torch.float32), (2, torch.float16), (3, torch.bfloat16)]
"""adds (1: a bias, 2: a residual) and type of the results."""


def outputs(tokens: int, rows: int, adds: int, dtype: torch.dtype) -> dict[str, Tensor | int]:
    """Arguments of a product: bias, residual, y with one row more, which must stay 7, kind and adds.

    What is not added is not a number.
    """
    g = torch.Generator().manual_seed(rows)
    bias = torch.randn(rows, generator=g) * 100 if adds & 1 else torch.full((rows,), torch.nan)
    residual = torch.randn(tokens, rows, generator=g) * 1000 if adds & 2 else torch.full((rows,), torch.nan)
    y = torch.full((tokens + 1, rows), 7.0, dtype=dtype)
    return {
        "bias": bias.to(dtype), "residual": residual.to(dtype), "y": y, "kind": KINDS[dtype], "adds": adds,
    }  # fmt: skip


def check(given: dict[str, Tensor | int], *operands: Tensor) -> None:
    """Assert that y is the reference's sign_matmul of `operands`, then what is added, each rounded."""
    y, bias, residual, adds = given["y"], given["bias"], given["residual"], given["adds"]
    assert isinstance(y, Tensor) and isinstance(adds, int)
    result = reference.sign_matmul(*operands, y.dtype)
    result = result + bias if adds & 1 else result
    result = result + residual if adds & 2 else result
    assert result.isfinite().all() and torch.equal(y[:-1], result)
    assert (y[-1] == 7.0).all()
