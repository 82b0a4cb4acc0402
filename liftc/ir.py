"""The lift ops as real torch ops: schema, fake (shape) implementations, and the table of device kernels.

Importing this module defines the `liftc::` namespace. Without a registered kernel an op runs
`liftc/reference.py`; the runtime registers compiled kernels per device type.

    z, z_scale = liftc.lift(x, activation_scale, left, right)
    y = liftc.sign_matmul(z, z_scale, packed, output_scale, dtype)
    y = liftc.lifted_linear(x, activation_scale, left, right_inverse, mapping_matrix, packed, output_scale)
    right = liftc.decode_right(right_inverse, mapping_matrix)    # folded at load; lifted_linear: weight first
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from liftc import reference

SCHEMAS = {
    "lift": "(Tensor x, Tensor? activation_scale, Tensor left, Tensor right) -> (Tensor z, Tensor z_scale)",
    "sign_matmul": "(Tensor z, Tensor z_scale, Tensor packed, Tensor output_scale, ScalarType dtype) -> Tensor",
    "lifted_linear": (
        "(Tensor x, Tensor? activation_scale, Tensor left, Tensor right_inverse, Tensor mapping_matrix, "
        "Tensor packed, Tensor output_scale) -> Tensor"
    ),
    "decode_right": "(Tensor right_inverse, Tensor mapping_matrix) -> Tensor",
}

_REFERENCE: dict[str, Callable[..., Any]] = {
    "lift": reference.lift,
    "sign_matmul": reference.sign_matmul,
    "lifted_linear": reference.lifted_linear,
    "decode_right": reference.decode_right,
}
_KERNELS: dict[tuple[str, str], Callable[..., Any]] = {}


def register_kernel(op: str, device_type: str, kernel: Callable[..., Any]) -> None:
    """Use `kernel` for `liftc::op` on tensors of `device_type` ("cpu", "cuda")."""
    if op not in SCHEMAS:
        raise KeyError(f"liftc has no op {op!r}")
    _KERNELS[op, device_type] = kernel


def unregister_kernel(op: str, device_type: str) -> None:
    """Go back to the reference implementation."""
    _KERNELS.pop((op, device_type), None)


def _dispatch(op: str) -> Callable[..., Any]:
    fallback = _REFERENCE[op]

    def call(first: torch.Tensor, *rest: Any) -> Any:
        return _KERNELS.get((op, first.device.type), fallback)(first, *rest)

    return call


def _fake_lift(
    x: torch.Tensor, activation_scale: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    lead = x.shape[:-1]
    z = x.new_empty((*lead, left.shape[0] * right.shape[1]), dtype=torch.int16)
    return z, x.new_empty((*lead, 1), dtype=torch.float32)


def _fake_sign_matmul(
    z: torch.Tensor,
    z_scale: torch.Tensor,
    packed: torch.Tensor,
    output_scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    return z.new_empty((*z.shape[:-1], output_scale.shape[0]), dtype=dtype)


def _fake_lifted_linear(
    x: torch.Tensor,
    activation_scale: torch.Tensor | None,
    left: torch.Tensor,
    right_inverse: torch.Tensor,
    mapping_matrix: torch.Tensor,
    packed: torch.Tensor,
    output_scale: torch.Tensor,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], output_scale.shape[0]))


def _fake_decode_right(right_inverse: torch.Tensor, mapping_matrix: torch.Tensor) -> torch.Tensor:
    t2, (d, lifted) = right_inverse.shape[0], mapping_matrix.shape
    return right_inverse.new_empty((t2, t2 // d * lifted), dtype=torch.float32)


_LIBRARY: Any = torch.library.Library("liftc", "DEF")  # type: ignore[no-untyped-call]
for _op, _schema in SCHEMAS.items():
    _LIBRARY.define(_op + _schema)
    _LIBRARY.impl(_op, _dispatch(_op), "CompositeExplicitAutograd")
_FAKES: dict[str, Callable[..., Any]] = {
    "lift": _fake_lift,
    "sign_matmul": _fake_sign_matmul,
    "lifted_linear": _fake_lifted_linear,
    "decode_right": _fake_decode_right,
}
for _op, _fake in _FAKES.items():
    torch.library.register_fake(f"liftc::{_op}", _fake, lib=_LIBRARY)

lift = torch.ops.liftc.lift.default
sign_matmul = torch.ops.liftc.sign_matmul.default
lifted_linear = torch.ops.liftc.lifted_linear.default
decode_right = torch.ops.liftc.decode_right.default
