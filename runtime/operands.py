"""Random lifted linears to measure and to check kernels on: cold signs from a pool, everything else shared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from liftc import reference
from liftc.format import LiftFormat
from liftc.packing import packed_rows, unpack_signs
from liftc.runtime.ops import Ops
from liftc.runtime.planes import Planes
from liftc.runtime.tiles import TILE_COLUMNS, TILE_ROWS, tile_shape
from liftc.spec import Z_MAX, transform_shape

Tensor = torch.Tensor
_ROWS_AT_ONCE = 2048
_ALIGNED_WORDS = 32
MOST_STEP_ERROR = 0.75
"""Largest distance of a lift's z from the real value, in steps of z: rounding gives 0.5, float32 sums a little."""


@dataclass(frozen=True)
class Linear:
    """One lifted linear. signs: tiles or packed words of its own; the other operands are shared by equal sizes."""

    rows: int
    features: int
    lifted: int
    signs: Tensor
    left: Tensor
    right: Tensor
    x: Tensor
    scale: Tensor
    z: Tensor
    operand: Planes | Tensor
    z_scale: Tensor

    @property
    def sign_bytes(self) -> float:
        """Bytes of the signs, padding left out."""
        return self.rows * self.lifted / 8

    @property
    def lift_bytes(self) -> int:
        """Bytes a lift must move: its factors, x and z."""
        return self.left.nbytes + self.right.nbytes + self.x.nbytes + 2 * self.z.numel()


class Operands:
    """Random operands on a device from one seed. The pool is int32 words, handed out in turn."""

    def __init__(self, device: torch.device, pool_bytes: int, seed: int = 0) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.pool = torch.empty(max(1, pool_bytes // 4), dtype=torch.int32, device=device)
        for start in range(0, self.pool.numel(), 1 << 26):
            self.pool[start : start + (1 << 26)].random_(-(2**31), 2**31, generator=self.generator)
        self._at = 0

    def words(self, count: int) -> Tensor:
        """The next `count` words, 128 bytes aligned, from the start again where the pool ends; it grows if it must."""
        if count > self.pool.numel():
            self._grow(count)
        if self._at + count > self.pool.numel():
            self._at = 0
        start, self._at = self._at, self._at + -(-count // _ALIGNED_WORDS) * _ALIGNED_WORDS
        return self.pool[start : start + count]

    def _grow(self, count: int) -> None:
        more = torch.empty(count - self.pool.numel(), dtype=torch.int32, device=self.device)
        self.pool = torch.cat([self.pool, more.random_(-(2**31), 2**31, generator=self.generator)])

    def linears(
        self, ops: Ops, shapes: Sequence[tuple[int, int]], fmt: LiftFormat, tokens: int, dtype: torch.dtype
    ) -> list[Linear]:
        """One linear per (out_features, in_features), signs in the form that `ops` multiplies fastest.

        The same arguments give the same values. Signs are distinct as long as the pool lasts.
        """
        self._at = 0
        self.generator.manual_seed(tokens)
        shared: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = {}
        operand: dict[tuple[int, int], Planes | Tensor] = {}
        made = []
        for rows, features in shapes:
            left, right = transform_shape(features, fmt)
            lifted = right // fmt.subspace_dim * fmt.lifted_dim
            width = left * lifted
            if (rows, features) not in shared:
                z = torch.empty((tokens, width), dtype=torch.int16, device=self.device)
                shared[rows, features] = (
                    self._normal(left, left), self._normal(right, lifted), self._normal(tokens, features).to(dtype),
                    torch.rand(rows, generator=self.generator, device=self.device),
                    z.random_(-Z_MAX, Z_MAX + 1, generator=self.generator),
                )  # fmt: skip
            mixed = shared[rows, features]
            tiled = self.device.type == "cuda" and ops.tiles.accepts(rows, width)
            if (rows, features) not in operand:
                operand[rows, features] = ops.tiles.planes.split(mixed[4]) if tiled else mixed[4]
            shape: tuple[int, ...] = tile_shape(rows, width) if tiled else (packed_rows(rows), width)
            z_scale = torch.full((tokens, 1), 2.0**-10, device=self.device)
            signs = self.words(math.prod(shape)).view(shape)
            if tiled and width % TILE_COLUMNS:  # lifts leave what is past the last column as it was
                signs[:, -1] &= last_columns(width, self.device)
            made.append(Linear(rows, features, width, signs, *mixed, operand[rows, features], z_scale))
        return made

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)


def last_columns(columns: int, device: torch.device) -> Tensor:
    """int32 (32, 4): the bits of a tile in the last block of `columns` columns that stand for one of them.

    Bit 8 b + 2 j + i of word 2 h + r of lane 4 g + t is column 64 j + 16 t + 8 i + 4 h + b (codegen/tir_tiles.py).
    """
    lane, word, bit = (torch.arange(n, device=device) for n in (32, 4, 32))
    column = (
        bit // 2 % 4 * 64 + bit % 2 * 8 + bit // 8 + (word // 2 * 4)[:, None] + (lane % 4 * 16)[:, None, None]
    )
    held = (column <= (columns - 1) % TILE_COLUMNS).long() << bit
    words = held.sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def product(ops: Ops, linear: Linear, dtype: torch.dtype) -> Tensor:
    """sign_matmul of operands that are ready: (tokens, OC)."""
    if linear.signs.dim() == 4:
        return ops.tiles.sign_matmul(linear.operand, linear.z_scale, linear.signs, linear.scale, dtype)
    return ops.sign_matmul(linear.z, linear.z_scale, linear.signs, linear.scale, dtype)


def lift(ops: Ops, linear: Linear) -> tuple[Planes | Tensor, Tensor]:
    """The lift as a loaded graph does it: planes for tiles, int16 for packed signs."""
    if linear.signs.dim() == 4:
        return ops.lift_operands(linear.x, None, linear.left, linear.right)
    return ops.lift(linear.x, None, linear.left, linear.right)


def whole(ops: Ops, linear: Linear, dtype: torch.dtype) -> Tensor:
    """lift and sign_matmul: (tokens, OC)."""
    z, z_scale = lift(ops, linear)
    if linear.signs.dim() == 4:
        return ops.tiles.sign_matmul(z, z_scale, linear.signs, linear.scale, dtype)
    return ops.sign_matmul(z, z_scale, linear.signs, linear.scale, dtype)  # type: ignore[arg-type]


def product_is_exact(ops: Ops, linear: Linear, dtype: torch.dtype) -> bool:
    """Whether the product is bit for bit the exact integer sums with their two scales."""
    return _equals(ops, linear, linear.z, linear.z_scale, product(ops, linear, dtype))


def lift_is_right(ops: Ops, linear: Linear) -> bool:
    """Whether z is within MOST_STEP_ERROR steps of the float64 value, and what the product needs beside z fits."""
    operand, z_scale = lift(ops, linear)
    z = planes_to_z(operand) if isinstance(operand, Planes) else operand
    factors = (linear.left.double(), linear.right.double())
    real = reference.lift_real(linear.x.double(), None, *factors)
    step = reference.lift_scale(linear.x.double(), None, *factors).double()
    near = ((z * z_scale.double() - real).abs() <= MOST_STEP_ERROR * step).all()
    scaled = ((z_scale.double() - step).abs() <= 1e-5 * step).all()
    if not bool(near & scaled):
        return False
    if linear.signs.dim() != 4:
        return True
    y = ops.tiles.sign_matmul(operand, z_scale, linear.signs, linear.scale, torch.float32)
    return _equals(ops, linear, z, z_scale, y)


def planes_to_z(planes: Planes) -> Tensor:
    """int16 (tokens, columns) that planes stand for: 256 h + l, two columns of the product per token.

    int8 (KB, 4, COLS, 64) has runs of 64 columns; (KB, 16, COLS, 16) of each 64 four times four, four apart.
    """
    tokens, data = planes.tokens, planes.data[:, :, : 2 * planes.tokens].to(torch.int32)
    if data.shape[3] == 64:
        parts = data.permute(2, 0, 1, 3).reshape(2 * tokens, -1)
    else:
        blocks = data.shape[0]
        parts = data.reshape(blocks, 4, 4, 2 * tokens, 4, 4).permute(3, 0, 1, 4, 2, 5).reshape(2 * tokens, -1)
    z = 256 * parts[0::2] + parts[1::2]
    return z[:, : planes.columns].to(torch.int16)


def _equals(ops: Ops, linear: Linear, z: Tensor, z_scale: Tensor, got: Tensor) -> bool:
    for begin in range(0, linear.rows, _ROWS_AT_ONCE):
        end = min(begin + _ROWS_AT_ONCE, linear.rows)
        total = z.double() @ _signs(ops, linear, begin, end).double().T
        want = (total.float() * z_scale) * linear.scale[begin:end]
        if not torch.equal(got[:, begin:end], want.to(got.dtype)):
            return False
    return True


def _signs(ops: Ops, linear: Linear, begin: int, end: int) -> Tensor:
    """Signs of rows begin (a multiple of 32) to end."""
    if linear.signs.dim() == 4:
        out = torch.empty((end - begin, linear.lifted), dtype=torch.float32, device=linear.signs.device)
        ops.tiles.unpack(linear.signs[begin // TILE_ROWS : -(-end // TILE_ROWS)], out)
        return out
    return unpack_signs(linear.signs[begin // 32 : packed_rows(end)], end - begin)
