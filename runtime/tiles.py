"""Signs in tile form on a GPU: made from the portable layout at load, multiplied on tensor cores, read back.

Tiles are int32 (NB, KB, 32, 4), NB = ceil(OC / 16) and KB = ceil(K / 256); four axes tell them from the portable
(G, K). The layout is that of the kernels (codegen/tir_tiles.py); artifacts on disk never hold it.
"""

from __future__ import annotations

import torch

from liftc.errors import LiftcError
from liftc.kernel_object import KernelFunction
from liftc.packing import packed_rows
from liftc.runtime.kernels import Kernels
from liftc.runtime.planes import PlaneKernels, Planes
from liftc.spec import DTYPE_NAMES

TILE_ROWS, TILE_COLUMNS = 16, 256
PRODUCTS = ("sign_matmul_popcount", "sign_matmul_binary", "sign_matmul_tiled")
"""Ops whose kernels multiply tiles with planes, the preferred one first."""

MOST_PADDING = 1.25
"""Tiles are made of a matrix only when they hold at most this many times its bits."""

_DECODE_TILES = 24  # of a row of blocks that a thread block of decode_tiles has at a time
_DECODE_BLOCKS = 4  # of its thread blocks per processor
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
        products = [f for op in PRODUCTS for f in kernels.of(op)]
        products.sort(key=lambda f: f.max_tokens)  # of equal size the first of PRODUCTS stays first
        self._multiply = [(f, functions[f.symbol]) for f in products]
        self._tile = [functions[f.symbol] for f in kernels.of("tile_signs")]
        self._unpack = {f.dtype: functions[f.symbol] for f in kernels.of("unpack_tiles")}
        self._decode = {f.dtype: (f, functions[f.symbol]) for f in kernels.of("decode_tiles")}
        self.planes = PlaneKernels(kernels, tuple(products))
        self.available = bool(self._tile and self.planes.most_tokens)
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

    def product_for(self, tokens: int) -> KernelFunction | None:
        """The kernel that multiplies so many tokens at once, or None where there is none."""
        return next((f for f, _ in self._multiply if f.accepts(tokens, 0, 0)), None)

    def unpack(self, tiles: Tensor, out: Tensor) -> None:
        """Write the signs, -1 and +1, of whole row blocks: out (OC, K) of f32, f16 or bf16."""
        grid = min(-(-tiles.shape[0] * tiles.shape[1] // 8), 8 * self._processors_of(tiles.device))
        self._unpack[DTYPE_NAMES[out.dtype]](tiles, out, max(grid, 1))

    def decodes(self, mapping: Tensor, dtype: torch.dtype) -> bool:
        """Whether `decode` takes a mapping of this shape: its parts of 16 x 32 must fit the kernel's memory."""
        spec, _ = self._decode.get(DTYPE_NAMES.get(dtype, ""), (None, None))
        d, lifted = mapping.shape
        pieces = -(-lifted // 128)
        parts = -(-lifted // (16 * pieces)) * pieces * -(-d // 32) * (2 if dtype == torch.float32 else 1)
        return spec is not None and parts <= spec.block_results

    def decode(self, tiles: Tensor, mapping: Tensor, scale: Tensor, out: Tensor, times: float = 1) -> None:
        """Write times * scale[r] * (signs of block b of row r) · mappingᵀ to out[r, b d : (b + 1) d].

        tiles of whole row blocks, mapping f32 (d, D) that `decodes` takes, scale f32 (OC,), out (OC, P) of f32, f16
        or bf16, contiguous, d dividing P. Raises LiftcError.
        """
        function = self._decode[DTYPE_NAMES[out.dtype]][1]
        grid = _DECODE_BLOCKS * self._processors_of(tiles.device)
        runs = _runs(out.shape[1] // mapping.shape[0], tiles.shape[0], mapping.shape[1], grid)
        try:
            function(
                tiles,
                mapping.contiguous(),
                scale.contiguous(),
                out,
                float(times),
                runs,
                min(grid, tiles.shape[0] * runs),
            )
        except _REFUSALS as error:
            given = ", ".join(_text(t) for t in (tiles, mapping, scale, out))
            raise LiftcError(f"liftc.lifted_linear: the kernels refuse {given} ({_line(error)})") from None

    def check(self, tiles: Tensor, out_features: int, lifted_features: int) -> None:
        """LiftcError unless `tiles` are those of a matrix of this size."""
        need = tile_shape(out_features, lifted_features)
        if tiles.dtype != torch.int32 or tuple(tiles.shape) != need or not tiles.is_contiguous():
            dims = ",".join(map(str, need))
            raise LiftcError(
                f"tiles: got {_text(tiles)}, {out_features} x {lifted_features} signs need contiguous i32[{dims}]"
            )

    def sign_matmul(
        self, z: Tensor | Planes, z_scale: Tensor, tiles: Tensor, output_scale: Tensor, dtype: torch.dtype,
        bias: Tensor | None = None, residual: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """z int16 (..., K) or Planes, z_scale f32 (..., 1), output_scale f32 (OC,) -> `dtype` (..., OC).

        bias (OC,) and then residual (..., OC), both of `dtype`, are added in the kernel; each sum is rounded. Raises
        LiftcError.
        """
        if not isinstance(z, Planes):
            return self._in_groups(z, z_scale, tiles, output_scale, dtype, bias, residual)
        rows, tokens = output_scale.numel(), z.tokens
        if bias is not None or residual is not None:
            bias, residual = _addends((bias, residual), ((rows,), (*z.lead, rows)), dtype, tiles.device)
        self.check(tiles, rows, z.columns)
        size = dtype.itemsize
        y = torch.empty(tokens * rows * size, dtype=torch.uint8, device=tiles.device)
        spec, function = next(entry for entry in self._multiply if entry[0].accepts(tokens, 0, 0))
        blocks, clusters = tiles.shape[0], self._processors_of(tiles.device) // spec.cluster_blocks
        grid = spec.cluster_blocks * min(blocks, clusters * -(-blocks // (clusters * spec.block_rows)))
        operands = (tiles, z.data, z.totals, z_scale.reshape(tokens, 1), output_scale.contiguous())
        added = [y if t is None else t for t in (bias, residual)]
        adds = (bias is not None) + 2 * (residual is not None)
        try:
            function(*operands, *added, y, grid, _KINDS[dtype], adds)
        except _REFUSALS as error:
            raise _mistake(z.data, z_scale, tiles, output_scale, dtype, _line(error)) from None
        return y.view(dtype).view(*z.lead, rows)

    def _in_groups(
        self, z: Tensor, z_scale: Tensor, tiles: Tensor, output_scale: Tensor, dtype: torch.dtype,
        bias: Tensor | None, residual: Tensor | None,
    ) -> Tensor:  # fmt: skip
        lead, columns = z.shape[:-1], z.shape[-1] if z.dim() else 0
        tokens = z.numel() // columns if columns else 0
        if (
            dtype not in _KINDS or z.dtype != torch.int16 or not columns or output_scale.dim() != 1
            or z_scale.numel() != tokens or z_scale.dtype != torch.float32 or output_scale.dtype != torch.float32
            or not z.device == z_scale.device == tiles.device == output_scale.device or z.device.type != "cuda"
        ):  # fmt: skip
            raise _mistake(z, z_scale, tiles, output_scale, dtype)
        self.check(tiles, output_scale.shape[0], columns)
        if not self.available:
            raise LiftcError("liftc.sign_matmul: these kernels have no tensor-core form for this device")
        z, z_scale = z.reshape(tokens, columns), z_scale.reshape(tokens, 1)
        most, shape = self.planes.most_tokens, (*lead, output_scale.shape[0])
        if residual is not None:
            if residual.shape != shape:
                raise _addend_mistake("residual", residual, shape, dtype, tiles.device)
            residual = residual.reshape(tokens, shape[-1])
        parts = [
            self.sign_matmul(
                self.planes.split(z[i : i + most]), z_scale[i : i + most], tiles, output_scale, dtype, bias,
                None if residual is None else residual[i : i + most],
            )
            for i in range(0, tokens, most)
        ]  # fmt: skip
        if not parts:
            return torch.empty(shape, dtype=dtype, device=z.device)
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(shape)

    def _processors_of(self, device: torch.device) -> int:
        count = self._processors.get(device)
        if count is None:
            count = self._processors[device] = torch.cuda.get_device_properties(device).multi_processor_count
        return count


def _runs(blocks: int, row_blocks: int, lifted: int, grid: int) -> int:
    """Into how many runs the pairs of blocks of columns are cut: few, and such that thread blocks finish together."""
    pairs = -(-blocks // 2)
    fewest = -(-pairs // ((_DECODE_TILES * TILE_COLUMNS - TILE_COLUMNS + 1) // lifted // 2))
    choices = range(fewest, min(pairs, 4 * fewest) + 1)

    def cost(runs: int) -> float:
        work = row_blocks * runs
        return -(-work // grid) * min(grid, work) / work * (1 + 0.02 * (runs - fewest))

    return min(choices, key=cost)


def _addends(
    given: tuple[Tensor | None, ...],
    shapes: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    device: torch.device,
) -> list[Tensor | None]:
    """Bias and residual as the bytes that the kernels read, after a check of what these do not see."""
    result: list[Tensor | None] = []
    for name, value, shape in zip(("bias", "residual"), given, shapes, strict=True):
        if value is not None:
            if value.shape != shape or value.dtype != dtype or value.device != device:
                raise _addend_mistake(name, value, shape, dtype, device)
            value = value.contiguous()
            if value.data_ptr() % 4:
                value = value.clone()
            value = value.view(-1).view(torch.uint8)
        result.append(value)
    return result


def _addend_mistake(
    name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> LiftcError:
    need = f"{DTYPE_NAMES.get(dtype, dtype)}[{','.join(map(str, shape))}] on {device}"
    return LiftcError(f"liftc.sign_matmul: {name} is {_text(value)}; need {need}")


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
