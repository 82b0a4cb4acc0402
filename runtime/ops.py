"""Compiled kernels behind the liftc ops: allocate results, call, and turn misuse into one sentence.

The common call costs one attempt: the kernels check dtypes, shapes, strides and devices themselves, and only
when they refuse are arguments made contiguous, or the mistake named. What they cannot see (a packed matrix
with too few rows for its scales) is checked before every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch

from liftc import ir, reference
from liftc.errors import LiftcError
from liftc.kernel_object import KernelFunction
from liftc.runtime.factors import PerFactors, factor_bound
from liftc.runtime.kernels import Kernels
from liftc.runtime.planes import Planes
from liftc.runtime.tiles import TiledSigns
from liftc.runtime.weight_first import WeightFirst, mistake
from liftc.spec import DTYPE_NAMES

WEIGHT_FIRST_TOKENS = {"cpu": 256, "cuda": 64}
"""Tokens of one call from which lifted_linear decodes the weight instead of lifting the activations: where both cost
about the same for the layers of SmolLM2 on a CPU, and for a layer of Llama-2-70B on an H100, three of its four linears
measured and one estimated (docs/kernels.md)."""

CHUNK_BYTES = 64 << 20
"""Bound of the scratch of one kernel call."""

_MAX_GRID = 65535  # CUDA limit of the grid axes that count tokens and rows
_MAX_INDEX = 2**31 - 1  # kernels index with 32 bits
_REFUSALS = (TypeError, ValueError, RuntimeError)

Tensor = torch.Tensor


def register(kernels: Kernels) -> Ops:
    """Use `kernels` for liftc.lift, sign_matmul and lifted_linear on their device type."""
    ops = Ops(kernels)
    for name in ("lift", "sign_matmul", "lifted_linear"):
        ir.register_kernel(name, kernels.device_type, getattr(ops, name))
    return ops


class Ops:
    """The ops of one loaded object; arguments as in liftc/reference.py. All raise LiftcError on misuse."""

    def __init__(self, kernels: Kernels) -> None:
        self.device_type = kernels.device_type
        self._lift = _by_dtype(kernels, "lift")
        self._sign_matmul = _by_dtype(kernels, "sign_matmul")
        self._unpack = {dtype: table[0][1] for dtype, table in _by_dtype(kernels, "unpack_signs").items()}
        self.tiles = TiledSigns(kernels)
        self._right = PerFactors(reference.decode_right)
        self._weight_first = WeightFirst(kernels, self.tiles, self._unpack)
        self._bound = PerFactors(factor_bound)
        self._ones: dict[tuple[torch.device, int], Tensor] = {}
        self._plan = lru_cache(maxsize=4096)(self._make_plan)

    def lift(
        self, x: Tensor, activation_scale: Tensor | None, left: Tensor, right: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x f32/f16/bf16 (..., IC) -> z int16 (..., K), z_scale f32 (..., 1); factors are float32."""
        if not (left.dim() == 2 == right.dim() and x.dim()):
            raise _lift_mistake(x, activation_scale, left, right)
        t1, (t2, lifted), shape = left.shape[0], right.shape, list(x.shape)
        features, width = shape[-1], t1 * lifted
        tokens = x.numel() // features if features else 0
        if features > t1 * t2 or x.dtype not in self._lift:
            raise _lift_mistake(x, activation_scale, left, right)
        if activation_scale is None:
            activation_scale = self._ones_for(x.device, features)
        device = x.device
        shape[-1] = width
        z = torch.empty(shape, dtype=torch.int16, device=device)
        shape[-1] = 1
        z_scale = torch.empty(shape, dtype=torch.float32, device=device)
        if not tokens:
            return z, z_scale
        flat = (x, z, z_scale)
        if len(shape) != 3 or shape[0] != 1:
            flat = (x.reshape(1, tokens, features), z.view(1, tokens, width), z_scale.view(1, tokens, 1))
        limit = max(1, min(_MAX_GRID, CHUNK_BYTES // (4 * (t1 * t2 + width))))
        function = next(f for spec, f in self._lift[x.dtype] if spec.accepts(tokens, 0, 0))
        bound = self._bound(left, right)
        for begin in range(0, tokens, limit):
            part = flat if tokens <= limit else tuple(t[:, begin : begin + limit] for t in flat)
            scratch: tuple[Tensor, ...] = ()
            if self.device_type == "cuda":
                n = part[0].shape[1]
                scratch = (
                    x.new_empty((n, t1, t2), dtype=torch.float32),
                    x.new_empty((n, width), dtype=torch.float32),
                )
            try:
                function(part[0], activation_scale, left, right, bound, *scratch, part[1], part[2])
            except _REFUSALS:
                arguments = _contiguous(part[0], activation_scale, left, right)
                try:
                    function(*arguments, bound, *scratch, part[1], part[2])
                except _REFUSALS as error:
                    raise _lift_mistake(x, activation_scale, left, right, error) from None
        return z, z_scale

    def sign_matmul(
        self, z: Tensor, z_scale: Tensor, packed: Tensor, output_scale: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """z int16 (..., K), z_scale f32 (..., 1), packed i32 (G, K), output_scale f32 (OC,) -> (..., OC).

        `packed` may be in tile form (runtime/tiles.py), four axes instead of two.
        """
        if packed.dim() == 4:
            return self.tiles.sign_matmul(z, z_scale, packed, output_scale, dtype)
        if not (packed.dim() == 2 and output_scale.dim() == 1 and z.dim()):
            raise _sign_mistake(z, z_scale, packed, output_scale, dtype)
        shape, rows = list(z.shape), output_scale.shape[0]
        columns = shape[-1]
        if packed.shape[0] != (rows + 31) // 32 or dtype not in self._sign_matmul:
            raise _sign_mistake(z, z_scale, packed, output_scale, dtype)
        tokens = z.numel() // columns if columns else 0
        shape[-1] = rows
        y = torch.empty(shape, dtype=dtype, device=z.device)
        for function, begin, end, tile in self._plan(dtype, tokens, rows, columns):
            part = (z, z_scale, y)
            if end - begin != tokens or len(shape) != 3 or shape[1] != tile:
                if z_scale.numel() != tokens:
                    raise _sign_mistake(z, z_scale, packed, output_scale, dtype)
                part = tuple(
                    t.reshape(tokens, size)[begin:end].view(-1, tile, size)
                    for t, size in ((z, columns), (z_scale, 1), (y, rows))
                )  # type: ignore[assignment]
            try:
                function(part[0], part[1], packed, output_scale, part[2])
            except _REFUSALS:
                try:
                    function(*_contiguous(part[0], part[1], packed, output_scale), part[2])
                except _REFUSALS as error:
                    raise _sign_mistake(z, z_scale, packed, output_scale, dtype, error) from None
        return y

    def lift_operands(
        self, x: Tensor, activation_scale: Tensor | None, left: Tensor, right: Tensor
    ) -> tuple[Planes | Tensor, Tensor]:
        """As lift, but z as Planes where the kernels have that form; for graphs whose products take both."""
        return self.tiles.planes.lift(x, activation_scale, left, right) or self.lift(
            x, activation_scale, left, right
        )

    def lifted_linear(
        self,
        x: Tensor,
        activation_scale: Tensor | None,
        left: Tensor,
        right_inverse: Tensor,
        mapping_matrix: Tensor,
        packed: Tensor,
        output_scale: Tensor,
    ) -> Tensor:
        """x (..., IC) -> (..., OC) of x.dtype. Few tokens are lifted; for many the weight is decoded first."""
        tokens = x.numel() // max(x.shape[-1], 1) if x.dim() else 0
        operands = (right_inverse, mapping_matrix, packed, output_scale)
        if tokens >= WEIGHT_FIRST_TOKENS[self.device_type]:
            return self._weight_first(x, activation_scale, left, *operands)
        fits = right_inverse.dim() == 2 == mapping_matrix.dim() and mapping_matrix.shape[0]
        if not fits or right_inverse.shape[0] % mapping_matrix.shape[0]:
            raise mistake(x, activation_scale, left, *operands)
        right = self._right(right_inverse, mapping_matrix)
        most = self.tiles.planes.most_tokens
        if packed.dim() != 4 or not tokens or not most:
            z, z_scale = self.lift(x, activation_scale, left, right)
            return self.sign_matmul(z, z_scale, packed, output_scale, x.dtype)
        parts = []
        for part in torch.split(x.reshape(tokens, -1), most):  # as many as a launch takes
            operand, step = self.lift_operands(part, activation_scale, left, right)
            parts.append(self.tiles.sign_matmul(operand, step, packed, output_scale, x.dtype))
        return torch.cat(parts).view(*x.shape[:-1], -1)

    def _make_plan(
        self, dtype: torch.dtype, tokens: int, rows: int, columns: int
    ) -> list[tuple[Callable[..., None], int, int, int]]:
        """(function, first token, end, tokens per tile) that together cover the tokens."""
        table = self._sign_matmul[dtype]
        limit = max(1, min(_MAX_GRID, _MAX_INDEX // max(rows, 1), CHUNK_BYTES // (4 * max(columns, 1))))
        plan: list[tuple[Callable[..., None], int, int, int]] = []
        begin = 0
        while begin < tokens:
            for spec, function in table:
                count = min(tokens - begin, limit, spec.max_tokens or limit)
                count -= count % spec.token_multiple
                if count and spec.accepts(count, rows, columns):
                    plan.append((function, begin, begin + count, spec.token_multiple))
                    begin += count
                    break
            else:
                raise LiftcError(f"liftc.sign_matmul: no kernel takes {tokens} tokens of {columns} -> {rows}")
        return plan

    def _ones_for(self, device: torch.device, features: int) -> Tensor:
        ones = self._ones.get((device, features))
        if ones is None:
            ones = self._ones[device, features] = torch.ones(features, device=device)
        return ones


def _by_dtype(
    kernels: Kernels, op: str
) -> dict[torch.dtype, list[tuple[KernelFunction, Callable[..., None]]]]:
    table: dict[torch.dtype, list[tuple[KernelFunction, Callable[..., None]]]] = {}
    for dtype, name in DTYPE_NAMES.items():
        if entries := [(f, kernels.functions[f.symbol]) for f in kernels.of(op) if f.dtype == name]:
            table[dtype] = entries
    return table


def _contiguous(*tensors: Tensor) -> Iterator[Tensor]:
    """Dense copies: `.contiguous()` would keep odd strides of axes of length one."""
    return (t.clone(memory_format=torch.contiguous_format) for t in tensors)


def _text(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    name = DTYPE_NAMES.get(value.dtype, str(value.dtype))
    return f"{name}[{','.join(map(str, value.shape))}] on {value.device}"


def _lift_mistake(
    x: Tensor, activation_scale: Tensor | None, left: Tensor, right: Tensor, error: Exception | None = None
) -> LiftcError:
    named = {"x": x, "activation_scale": activation_scale, "left": left, "right": right}
    need = "x [..,IC] of f32, f16 or bf16, f32[IC], f32[t1,t1], f32[t2,C] with t1 t2 >= IC, on one device"
    return _mistake("lift", named, need, error)


def _sign_mistake(
    z: Tensor,
    z_scale: Tensor,
    packed: Tensor,
    output_scale: Tensor,
    dtype: torch.dtype,
    error: Exception | None = None,
) -> LiftcError:
    named = {"z": z, "z_scale": z_scale, "packed": packed, "output_scale": output_scale, "dtype": dtype}
    need = "i16[..,K], f32[..,1], i32[ceil(OC/32),K], f32[OC] on one device, and f32, f16 or bf16"
    return _mistake("sign_matmul", named, need, error)


def _mistake(op: str, named: dict[str, Any], need: str, error: Exception | None) -> LiftcError:
    given = ", ".join(f"{name} {_text(value)}" for name, value in named.items())
    return LiftcError(f"liftc.{op}: got {given}; need {need}{_reason(error)}")


def _reason(error: Exception | None) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] if error else []
    return f" ({' '.join(lines[:1] + lines[-1:] if len(lines) > 1 else lines)})" if lines else ""
