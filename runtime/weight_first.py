"""Weight-first order of a lifted linear: decode the weight once, then one dense product for many tokens.

In the space of whitened activations the weight is W' = diag(output_scale) B (I ⊗ Mᵀ), and y = W' x' with
x' = left · reshape(x * activation_scale) · right_inverse, two small products per token. The rows of W' are decoded a
chunk at a time, so a second copy of the weights never exists. Products are made in the dtype of x on a GPU and in
float32 on a CPU. (Paper, appendix D.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from liftc.errors import LiftcError
from liftc.packing import packed_rows
from liftc.runtime.kernels import Kernels
from liftc.runtime.tiles import TiledSigns
from liftc.runtime.whiten import Whitening
from liftc.spec import DTYPE_NAMES

DECODED_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
"""Bound of the decoded rows, with what decoding needs beside them, that exist at a time."""

SHIFTS = {torch.float16: 16.0}
"""x' is divided and W' multiplied by this power of two: x' reaches sqrt(IC) times the largest entry of x, while W'
is far from the end of float16."""

_MAX_GRID = 65535  # CUDA limit of the grid axis that counts rows
_WHOLE_ROWS = 256  # chunks are multiples of the rows of a tile of the dense product

Tensor = torch.Tensor


class WeightFirst:
    """The kernels of one loaded object that decode signs. `unpack`: dtype -> the unpack_signs kernel."""

    def __init__(
        self, kernels: Kernels, tiles: TiledSigns, unpack: dict[torch.dtype, Callable[..., None]]
    ) -> None:
        self._tiles = tiles
        self._unpack = unpack
        self._whiten = Whitening(kernels)

    def __call__(
        self,
        x: Tensor,
        activation_scale: Tensor | None,
        left: Tensor,
        right_inverse: Tensor,
        mapping_matrix: Tensor,
        packed: Tensor,
        output_scale: Tensor,
    ) -> Tensor:
        """As reference.lifted_linear: x (..., IC) of f32, f16 or bf16 -> (..., OC) of the same; raises LiftcError."""
        self._check(x, activation_scale, left, right_inverse, mapping_matrix, packed, output_scale)
        rows, tokens = output_scale.shape[0], x.numel() // x.shape[-1]
        work = x.dtype if x.device.type == "cuda" else torch.float32
        shift = SHIFTS.get(work, 1)
        white = self._whiten(x.reshape(tokens, -1), activation_scale, left, right_inverse, work, 1 / shift)
        y = torch.empty((tokens, rows), dtype=x.dtype, device=x.device)
        packed, width = packed.contiguous(), white.shape[1]
        buffer: Tensor | None = None
        for begin, end in self._chunks(rows, width, mapping_matrix, packed, work):
            if buffer is None:
                buffer = torch.empty((end - begin, width), dtype=work, device=x.device)
            weight = buffer[: end - begin]
            self._decode(packed, begin, end, mapping_matrix, output_scale, weight, shift)
            part = y[:, begin:end]
            if work == x.dtype:
                torch.mm(white, weight.t(), out=part)
            else:
                part.copy_(torch.mm(white, weight.t()))
        return y.view(*x.shape[:-1], rows)

    def _chunks(
        self, rows: int, width: int, mapping: Tensor, packed: Tensor, work: torch.dtype
    ) -> list[tuple[int, int]]:
        """Equal runs of rows, each within DECODED_BYTES."""
        bytes_of_row = width * work.itemsize
        if not self._direct(packed, mapping, work):
            bytes_of_row += width // mapping.shape[0] * mapping.shape[1] * 4
        most = max(32, min(DECODED_BYTES[packed.device.type] // bytes_of_row, _MAX_GRID) // 32 * 32)
        step = -(-rows // -(-rows // most))
        unit = _WHOLE_ROWS if most >= _WHOLE_ROWS else 32
        step = min(-(-step // unit) * unit, max(most // unit * unit, 32))
        return [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]

    def _direct(self, packed: Tensor, mapping: Tensor, dtype: torch.dtype) -> bool:
        return packed.dim() == 4 and self._tiles.decodes(mapping, dtype)

    def _decode(
        self,
        packed: Tensor,
        begin: int,
        end: int,
        mapping: Tensor,
        scale: Tensor,
        weight: Tensor,
        times: float,
    ) -> None:
        """Rows begin:end of W', multiplied by `times`, into `weight`."""
        if self._direct(packed, mapping, weight.dtype):
            tiles = packed[begin // 16 : (end + 15) // 16]
            self._tiles.decode(tiles, mapping, scale[begin:end], weight, times)
            return
        lifted = mapping.shape[1]
        columns = weight.shape[1] // mapping.shape[0] * lifted
        signs = torch.empty((end - begin, columns), dtype=torch.float32, device=packed.device)
        if packed.dim() == 4:
            self._tiles.unpack(packed[begin // 16 : (end + 15) // 16], signs)
        else:
            self._unpack[torch.float32](packed[begin // 32 : (end + 31) // 32], signs)
        blocks = torch.mm(signs.view(-1, lifted), mapping.t()).view(weight.shape)
        torch.mul(blocks, scale[begin:end, None] * times, out=weight)

    def _check(
        self, x: Tensor, scale: Tensor | None, left: Tensor, right: Tensor, mapping: Tensor, packed: Tensor,
        output_scale: Tensor,
    ) -> None:  # fmt: skip
        factors = (left, right, mapping)
        shaped = output_scale.dim() == 1 and all(t.dim() == 2 and t.dtype == torch.float32 for t in factors)
        others = (*factors, packed, output_scale, *(() if scale is None else (scale,)))
        if (
            not shaped or any(t.device != x.device for t in others) or x.dtype not in self._unpack
            or (scale is not None and (scale.dtype != torch.float32 or scale.shape != x.shape[-1:]))
            or left.shape[0] != left.shape[1] or right.shape[0] != right.shape[1] or not mapping.shape[0]
            or right.shape[0] % mapping.shape[0] or x.shape[-1] > left.shape[0] * right.shape[0]
            or output_scale.dtype != torch.float32
        ):  # fmt: skip
            raise mistake(x, scale, left, right, mapping, packed, output_scale)
        rows = output_scale.shape[0]
        columns = left.shape[0] * right.shape[0] // mapping.shape[0] * mapping.shape[1]
        if packed.dim() == 4:
            self._tiles.check(packed, rows, columns)
        elif packed.dtype != torch.int32 or packed.shape != (packed_rows(rows), columns):
            raise mistake(x, scale, left, right, mapping, packed, output_scale)


def mistake(
    x: Tensor, scale: Tensor | None, left: Tensor, right: Tensor, mapping: Tensor, packed: Tensor,
    output_scale: Tensor,
) -> LiftcError:  # fmt: skip
    """What a call of lifted_linear got and what it needs, as one sentence."""
    given = {
        "x": x, "activation_scale": scale, "left": left, "right_inverse": right, "mapping_matrix": mapping,
        "packed": packed, "output_scale": output_scale,
    }  # fmt: skip
    need = (
        "x [..,IC] of f32, f16 or bf16, None or f32[IC], f32[t1,t1], f32[t2,t2] with t1 t2 >= IC, f32[d,D] with "
        "d dividing t2, i32[ceil(OC/32),t1 t2 D/d], f32[OC] on one device"
    )
    return LiftcError(
        f"liftc.lifted_linear: got {', '.join(f'{k} {_text(v)}' for k, v in given.items())}; need {need}"
    )


def _text(value: Tensor | None) -> str:
    if value is None:
        return "None"
    name = DTYPE_NAMES.get(value.dtype, str(value.dtype))
    return f"{name}[{','.join(map(str, value.shape))}]"
