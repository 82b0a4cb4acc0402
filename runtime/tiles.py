"""Signs in tile form on a GPU: made from the portable layout at load, multiplied on tensor cores, read back.

Tiles are int32 (NB, KB, 32, 4), NB = ceil(OC / 16) and KB = ceil(K / 256); four axes tell them from the portable
(G, K). The layout is that of the kernels (codegen/tir_tiles.py); artifacts on disk never hold it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from liftc.errors import LiftcError
from liftc.kernel_object import KernelFunction
from liftc.packing import packed_rows
from liftc.runtime.kernels import Kernels
from liftc.spec import DTYPE_NAMES

TILE_ROWS, TILE_COLUMNS = 16, 256
MOST_PADDING = 1.25
"""Tiles are made of a matrix only when they hold at most this many times its bits."""

_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_MAX_ROW_BLOCKS = 65535  # CUDA limit of the grid axis that counts them
_REFUSALS = (TypeError, ValueError, RuntimeError)

Tensor = torch.Tensor


def tile_shape(out_features: int, lifted_features: int) -> tuple[int, int, int, int]:
    """Shape of the tiles of a matrix of signs."""
    return -(-out_features // TILE_ROWS), -(-lifted_features // TILE_COLUMNS), 32, 4


class TiledSigns:
    """The kernels of one loaded object that work on tiles; `available` tells whether the device has them."""

    def __init__(self, kernels: Kernels) -> None:
        functions = kernels.functions
        self._multiply = [(f, functions[f.symbol]) for f in kernels.of("sign_matmul_tiled")]
        self._tile = [functions[f.symbol] for f in kernels.of("tile_signs")]
        self._unpack = {f.dtype: functions[f.symbol] for f in kernels.of("unpack_tiles")}
        self.available = bool(self._multiply and self._tile)
        self._processors: dict[torch.device, int] = {}

    def accepts(self, out_features: int, lifted_features: int) -> bool:
        """Whether tiles pay for a matrix of this size: kernels are there and padding is small."""
        blocks, width, *_ = tile_shape(out_features, lifted_features)
        bits = blocks * TILE_ROWS * width * TILE_COLUMNS
        fits = blocks <= _MAX_ROW_BLOCKS and bits // 32 < 2**31
        return self.available and fits and bits <= MOST_PADDING * out_features * lifted_features

    def from_packed(self, packed: Tensor, out_features: int) -> Tensor:
        """Tiles of packed int32 (G, K) on its GPU; returns when they are complete. Raises LiftcError."""
        if not self.available:
            raise LiftcError("tiles: these kernels have no tensor-core sign_matmul for this device")
        if packed.dtype != torch.int32 or packed.dim() != 2 or packed.shape[0] != packed_rows(out_features):
            need = f"i32[{packed_rows(out_features)},K]"
            raise LiftcError(f"tiles: packed is {_text(packed)}, {out_features} rows need {need}")
        tiles = torch.empty(
            tile_shape(out_features, packed.shape[1]), dtype=torch.int32, device=packed.device
        )
        try:
            self._tile[0](packed.contiguous(), tiles)
        except _REFUSALS as error:
            raise LiftcError(f"tiles: the kernels refuse packed {_text(packed)} ({_line(error)})") from None
        # The product kernels read signs before the kernels ahead of them have finished.
        torch.cuda.synchronize(packed.device)
        return tiles

    def unpack(self, tiles: Tensor, out: Tensor) -> None:
        """Write the signs, -1 and +1, of whole row blocks: out (OC, K) of f32, f16 or bf16."""
        self._unpack[DTYPE_NAMES[out.dtype]](tiles, out)

    def check(self, tiles: Tensor, out_features: int, lifted_features: int) -> None:
        """LiftcError unless `tiles` are those of a matrix of this size."""
        need = tile_shape(out_features, lifted_features)
        if tiles.dtype != torch.int32 or tuple(tiles.shape) != need or not tiles.is_contiguous():
            dims = ",".join(map(str, need))
            raise LiftcError(
                f"tiles: got {_text(tiles)}, {out_features} x {lifted_features} signs need contiguous i32[{dims}]"
            )

    def sign_matmul(
        self, z: Tensor, z_scale: Tensor, tiles: Tensor, output_scale: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """z int16 (..., K), z_scale f32 (..., 1), output_scale f32 (OC,) -> `dtype` (..., OC). Raises LiftcError."""
        lead, rows, columns = z.shape[:-1], output_scale.numel(), z.shape[-1] if z.dim() else 0
        tokens = z.numel() // columns if columns else 0
        if (
            dtype not in _KINDS or z.dtype != torch.int16 or not columns or output_scale.dim() != 1
            or z_scale.numel() != tokens or z_scale.dtype != torch.float32 or output_scale.dtype != torch.float32
            or not z.device == z_scale.device == tiles.device == output_scale.device or z.device.type != "cuda"
        ):  # fmt: skip
            raise _mistake(z, z_scale, tiles, output_scale, dtype)
        self.check(tiles, rows, columns)
        if not self._multiply:
            raise LiftcError("liftc.sign_matmul: these kernels have no tensor-core form for this device")
        size = dtype.itemsize
        y = torch.empty(tokens * rows * size, dtype=torch.uint8, device=z.device)
        z, z_scale = z.reshape(tokens, columns), z_scale.reshape(tokens, 1)
        if z.data_ptr() % 16 or not z.is_contiguous():
            z = z.clone(memory_format=torch.contiguous_format)
        z_scale, output_scale = z_scale.contiguous(), output_scale.contiguous()
        most = self._multiply[-1][0].max_tokens
        kind, blocks = _KINDS[dtype], tiles.shape[0]
        processors = self._processors_of(z.device)
        for begin in range(0, tokens, most):
            count = min(most, tokens - begin)
            spec, function = self._for(count)
            part = (z, z_scale, y)
            if count != tokens:
                part = (
                    z[begin : begin + count],
                    z_scale[begin : begin + count],
                    y[begin * rows * size : (begin + count) * rows * size],
                )
            waves = -(-blocks // (processors * spec.block_rows))
            grid = min(blocks, processors * waves)
            try:
                function(tiles, part[0], part[1], output_scale, part[2], grid, kind)
            except _REFUSALS as error:
                raise _mistake(z, z_scale, tiles, output_scale, dtype, _line(error)) from None
        return y.view(dtype).view(*lead, rows)

    def _for(self, tokens: int) -> tuple[KernelFunction, Callable[..., None]]:
        return next(entry for entry in self._multiply if entry[0].accepts(tokens, 0, 0))

    def _processors_of(self, device: torch.device) -> int:
        count = self._processors.get(device)
        if count is None:
            count = self._processors[device] = torch.cuda.get_device_properties(device).multi_processor_count
        return count


def _text(value: Tensor) -> str:
    name = DTYPE_NAMES.get(value.dtype, str(value.dtype))
    return f"{name}[{','.join(map(str, value.shape))}] on {value.device}"


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:1] + lines[-1:] if len(lines) > 1 else lines)


def _mistake(
    z: Tensor, z_scale: Tensor, tiles: Tensor, output_scale: Tensor, dtype: torch.dtype, reason: str = ""
) -> LiftcError:
    given = (
        f"z {_text(z)}, z_scale {_text(z_scale)}, tiles {_text(tiles)}, output_scale {_text(output_scale)}"
    )
    need = "i16[..,K], f32[..,1], i32[ceil(OC/16),ceil(K/256),32,4], f32[OC] on one GPU, and f32, f16 or bf16"
    return LiftcError(
        f"liftc.sign_matmul: got {given}, dtype {dtype}; need {need}{f' ({reason})' if reason else ''}"
    )
