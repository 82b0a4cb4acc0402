"""Measurements of `liftc bench kernels` for many tokens: prefill beside the dense product, and decoding of signs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from liftc.driver.bench_rows import Rows, Shape, chain_text
from liftc.format import LiftFormat
from liftc.kernel_records import Record
from liftc.packing import packed_rows, unpack_signs
from liftc.runtime.operands import Linear
from liftc.runtime.tiles import TILE_COLUMNS, TILE_ROWS
from liftc.spec import transform_shape

Tensor = torch.Tensor

MOST_ERROR = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Largest distance of a result from the float64 one, as a share of its norm, by type of the activations."""

_CHECKED_TOKENS, _CHECKED_ROWS = 4, 64
_DECODED_BYTES = 2 << 30  # of results per timing


@dataclass(frozen=True)
class Case:
    """One linear with the operands of lifted_linear."""

    linear: Linear
    x: Tensor
    left: Tensor
    inverse: Tensor
    mapping: Tensor

    def operands(self) -> tuple[Tensor, None, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Arguments of lifted_linear."""
        return self.x, None, self.left, self.inverse, self.mapping, self.linear.signs, self.linear.scale


class ManyRows:
    """Rows of many tokens, in float16 on a GPU and float32 on a CPU, with the kernels, operands and clock of `rows`."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.ops, self.device = rows, rows.ops, rows.device
        self.dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        self.dense = "cublas.float16" if self.device.type == "cuda" else "torch.linear.float32"

    def prefill(self, shapes: Sequence[Shape], fmt: LiftFormat, tokens: int) -> Iterator[Record]:
        """lifted_linear of these linears, one after the other in one timing, and the dense products they stand for."""
        chain = chain_text(shapes, 1) if len(shapes) > 1 else ""
        shape = (0, 0) if chain else shapes[0]
        for kernel, work in (
            ("lifted_linear", lambda: self._lifted(shapes, fmt, tokens)),
            (self.dense, lambda: self._dense(shapes, tokens)),
        ):
            record = self.rows.attempt(kernel, shape, fmt, tokens, work, self.dtype)
            yield replace(record, chain=chain)
            self._free()

    def decode(self, shape: Shape, fmt: LiftFormat) -> Iterator[Record]:
        """All signs of a linear as -1 and +1, and its weight in the space of whitened activations, both in float16.

        GB/s are of what is written; the knobs have the rate of filling the same memory in the same run, and the share
        of it. batch is 1. Nothing where signs stay packed.
        """
        (linear,) = self.rows.operands.linears(self.ops, [shape], fmt, 1, self.dtype)
        if linear.signs.dim() != 4:
            return
        mapping = self._mapping(fmt)
        kernels: list[tuple[str, int, Callable[[Tensor, Tensor], None]]] = [
            ("unpack_tiles", linear.lifted, lambda tiles, out: self.ops.tiles.unpack(tiles, out))
        ]
        if self.ops.tiles.decodes(mapping, self.dtype):
            width = linear.lifted // fmt.lifted_dim * fmt.subspace_dim
            kernels.append(("decode_tiles", width, lambda tiles, out: self.ops.tiles.decode(
                tiles, mapping, linear.scale[: out.shape[0]], out)))  # fmt: skip
        for kernel, width, run in kernels:
            yield self._decoding(kernel, shape, fmt, linear, width, mapping, run)
            self._free()

    def _decoding(
        self, kernel: str, shape: Shape, fmt: LiftFormat, linear: Linear, width: int, mapping: Tensor,
        run: Callable[[Tensor, Tensor], None],
    ) -> Record:  # fmt: skip
        most = max(TILE_ROWS, _DECODED_BYTES // (2 * width) // TILE_ROWS * TILE_ROWS)
        rows = min(linear.rows, most)
        found: dict[str, Any] = {}

        def work() -> tuple[float, float] | None:
            tiles = linear.signs[: -(-rows // TILE_ROWS)]
            out = torch.empty((rows, width), dtype=self.dtype, device=self.device)
            run(tiles, out)
            if not self._decoded(kernel, tiles, mapping, linear.scale, out):
                return None
            filling = min(self.rows.clock.microseconds(lambda: out.fill_(1)) for _ in range(2))
            time = self.rows.clock.microseconds(lambda: run(tiles, out))
            found["write_ceiling_gbs"] = round(out.nbytes / filling / 1e3, 1)
            found["fraction_of_write_ceiling"] = round(filling / time, 4)
            found["rows"] = rows
            return time, out.nbytes

        record = self.rows.attempt(kernel, shape, fmt, 1, work, self.dtype)
        return replace(record, knobs=found)

    def _decoded(self, kernel: str, tiles: Tensor, mapping: Tensor, scale: Tensor, out: Tensor) -> bool:
        """Whether the first and the last rows are right."""
        for begin in {0, max(0, out.shape[0] - _CHECKED_ROWS) // 32 * 32}:
            got = out[begin : begin + _CHECKED_ROWS]
            signs = signs_of_tiles(
                tiles[begin // TILE_ROWS :], got.shape[0], self._lifted_width(out, kernel, mapping)
            )
            if kernel == "unpack_tiles":
                if not torch.equal(got, signs.to(got.dtype)):
                    return False
                continue
            blocks = signs.double().view(got.shape[0], -1, mapping.shape[1]) @ mapping.double().t()
            want = blocks.reshape(got.shape) * scale[begin : begin + _CHECKED_ROWS, None].double()
            if not _near(got, want):
                return False
        return True

    def _lifted_width(self, out: Tensor, kernel: str, mapping: Tensor) -> int:
        return (
            out.shape[1] if kernel == "unpack_tiles" else out.shape[1] // mapping.shape[0] * mapping.shape[1]
        )

    def _lifted(self, shapes: Sequence[Shape], fmt: LiftFormat, tokens: int) -> tuple[float, float] | None:
        cases = self._cases(shapes, fmt, tokens)
        if not all(self._right(case) for case in cases):
            return None

        def run() -> None:
            for case in cases:
                self.ops.lifted_linear(*case.operands())

        return self.rows.clock.microseconds(run, 5), sum(case.linear.sign_bytes for case in cases)

    def _cases(self, shapes: Sequence[Shape], fmt: LiftFormat, tokens: int) -> list[Case]:
        linears = self.rows.operands.linears(self.ops, list(shapes), fmt, 1, self.dtype)
        mapping, cases = self._mapping(fmt), []
        for linear in linears:
            left, right = transform_shape(linear.features, fmt)
            x = self._normal(tokens, linear.features).to(self.dtype)
            factor, inverse = self._normal(left, left) / left**0.5, self._normal(right, right) / right**0.5
            scaled = replace(linear, scale=linear.scale / linear.features**0.5)
            cases.append(Case(scaled, x, factor, inverse, mapping))
        return cases

    def _right(self, case: Case) -> bool:
        """Whether the first tokens of the first and the last rows agree with float64."""
        y = self.ops.lifted_linear(*case.operands())
        left, inverse = case.left.double(), case.inverse.double()
        x = case.x[:_CHECKED_TOKENS].double()
        t1, t2 = left.shape[0], inverse.shape[0]
        x = torch.nn.functional.pad(x, (0, t1 * t2 - x.shape[1])).view(-1, t1, t2)
        white = (left @ x @ inverse).reshape(x.shape[0], -1)
        linear = case.linear
        for begin in {0, max(0, linear.rows - _CHECKED_ROWS) // 32 * 32}:
            end = min(begin + _CHECKED_ROWS, linear.rows)
            if linear.signs.dim() == 4:
                signs = signs_of_tiles(linear.signs[begin // TILE_ROWS :], end - begin, linear.lifted)
            else:
                signs = unpack_signs(linear.signs[begin // 32 : packed_rows(end)], end - begin)
            blocks = signs.double().view(end - begin, -1, case.mapping.shape[1]) @ case.mapping.double().t()
            weight = blocks.reshape(end - begin, -1) * linear.scale[begin:end, None].double()
            if not _near(y[:_CHECKED_TOKENS, begin:end], white @ weight.t()):
                return False
        return True

    def _dense(self, shapes: Sequence[Shape], tokens: int) -> tuple[float, float]:
        pairs = [
            (self._normal(tokens, features).to(self.dtype), self._normal(rows, features).to(self.dtype) / features**0.5)
            for rows, features in shapes
        ]  # fmt: skip

        def run() -> None:
            for x, weight in pairs:
                torch.nn.functional.linear(x, weight)

        return self.rows.clock.microseconds(run, 5), sum(weight.nbytes for _, weight in pairs)

    def _mapping(self, fmt: LiftFormat) -> Tensor:
        return self._normal(fmt.subspace_dim, fmt.lifted_dim) / math.sqrt(fmt.lifted_dim)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(list(shape), generator=self.rows.operands.generator, device=self.device)

    def _free(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def signs_of_tiles(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """Tiles int32 (NB, KB, 32, 4) -> f32 (rows, columns) of -1 and +1, by torch's shifts; rows <= 16 NB.

    Bit 8 b + j of word 2 h + s of lane 4 g + t is row 8 s + g and column 64 (j div 2) + 16 t + 8 (j mod 2) + 4 h + b.
    """
    tiles = tiles[: -(-rows // TILE_ROWS)]
    bits = (tiles[..., None] >> torch.arange(32, device=tiles.device, dtype=torch.int32)) & 1
    # row block, column block, g, t, h, s, b, j div 2, j mod 2
    parts = bits.view(*tiles.shape[:2], 8, 4, 2, 2, 4, 4, 2).permute(0, 5, 2, 1, 7, 3, 8, 4, 6)
    flat: Tensor = parts.reshape(tiles.shape[0] * TILE_ROWS, tiles.shape[1] * TILE_COLUMNS)
    signs: Tensor = flat[:rows, :columns].float() * 2 - 1
    return signs


def _near(got: Tensor, want: Tensor) -> bool:
    error = (got.double() - want).norm() / want.norm()
    return bool(error <= MOST_ERROR[got.dtype])
