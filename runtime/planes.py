"""Operands of the tensor-core sign_matmul: z as bytes, from one lift launch or split from int16.

Planes are int8 (KB, 4, COLS, 64), two columns per token, and the sums of z (codegen/tensorcore_lift.py). They pass
between the fused ops of a loaded graph only (runtime/loader.py); `liftc.lift` itself returns z.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from liftc.errors import LiftcError
from liftc.kernel_object import KernelFunction
from liftc.runtime.kernels import Kernels
from liftc.spec import DTYPES

GROUP_COLUMNS = 256
_SLOTS = 1 << 15
_STATE_WORDS = 16
_REFUSALS = (TypeError, ValueError, RuntimeError)

Tensor = torch.Tensor


@dataclass(frozen=True)
class Planes:
    """z of tokens with the leading shape `lead` and `columns` values each, ready to be multiplied."""

    data: Tensor
    totals: Tensor
    lead: torch.Size
    columns: int

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.totals.shape[1]


class BarrierStates:
    """Zeroed counters for kernels with a barrier of all blocks; a counter serves one launch at a time.

    Launches on one stream follow each other, so they share a counter, and a stream waits for the one that used
    lifts before it: two such kernels that each hold half of the GPU would wait for each other for ever. Launches
    captured in CUDA graphs take a counter each, in turn; graphs of one GPU must not be replayed at the same time.
    """

    def __init__(self, device: torch.device) -> None:
        self._slots = torch.zeros(_SLOTS, _STATE_WORDS, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)
        self._streams: dict[int, Tensor] = {}
        self._last: torch.cuda.Stream | None = None
        self._next = 0

    def of_current_stream(self, device: torch.device) -> Tensor:
        """int32 (16,) for a launch on the current stream of the device."""
        if torch.cuda.is_current_stream_capturing():
            return self._take()
        stream = torch.cuda.current_stream(device)
        if self._last is not None and self._last != stream:
            stream.wait_stream(self._last)
        self._last = stream
        state = self._streams.get(stream.cuda_stream)
        if state is None:
            state = self._streams[stream.cuda_stream] = self._take()
        return state

    def _take(self) -> Tensor:
        state = self._slots[self._next % _SLOTS]
        self._next += 1
        return state


class PlaneKernels:
    """The kernels of one loaded object that make planes; `most_tokens` is 0 where the device has none."""

    def __init__(self, kernels: Kernels, most_tokens: tuple[int, ...]) -> None:
        """most_tokens: the batch sizes that the product kernels are made for, rising."""
        functions = kernels.functions
        self._split = [functions[f.symbol] for f in kernels.of("split_z")]
        self._lift: dict[torch.dtype, list[tuple[KernelFunction, Callable[..., None]]]] = {}
        for f in kernels.of("lift_planes"):
            self._lift.setdefault(DTYPES[f.dtype], []).append((f, functions[f.symbol]))
        self._sizes = most_tokens
        self.most_tokens = most_tokens[-1] if most_tokens and self._split else 0
        self._states: dict[torch.device, BarrierStates] = {}
        self._ones: dict[torch.device, Tensor] = {}
        self._room: dict[torch.device, tuple[int, int]] = {}

    def empty(
        self, lead: torch.Size, tokens: int, columns: int, device: torch.device, parts: int = 1
    ) -> Planes:
        """Planes to be filled by `parts` blocks, with room for the columns of the product kernel that reads them."""
        size = next(s for s in self._sizes if tokens <= s)
        shape = (-(-columns // GROUP_COLUMNS), 4, 2 * size, 64)
        data = torch.empty(shape, dtype=torch.int8, device=device)
        return Planes(data, torch.empty(parts, tokens, dtype=torch.int32, device=device), lead, columns)

    def split(self, z: Tensor) -> Planes:
        """Planes of z int16 (tokens, K), 1 to most_tokens tokens."""
        tokens, columns = z.shape
        planes = self.empty(z.shape[:-1], tokens, columns, z.device)
        if z.data_ptr() % 16 or not z.is_contiguous():
            z = z.clone(memory_format=torch.contiguous_format)
        self._split[0](z, planes.data, planes.totals)
        return planes

    def lift(
        self, x: Tensor, activation_scale: Tensor | None, left: Tensor, right: Tensor
    ) -> tuple[Planes, Tensor] | None:
        """Planes and z_scale f32 (..., 1) of x (..., IC), or None where no kernel takes this call."""
        features = x.shape[-1] if x.dim() else 0
        tokens = x.numel() // features if features else 0
        if not 0 < tokens <= self.most_tokens or left.dim() != 2 or right.dim() != 2:
            return None
        t1, (t2, lifted) = left.shape[0], right.shape
        if features > t1 * t2:
            return None
        for spec, function in self._lift.get(x.dtype, ()):
            if spec.accepts(tokens, 0, 0) and t1 <= spec.most_left and t2 <= spec.most_right:
                grid = self._grid(spec, t1, lifted, x.device)
                if grid is not None:
                    return self._lift_with(function, grid, tokens, x, activation_scale, left, right)
        return None

    def _lift_with(
        self, function: Callable[..., None], grid: tuple[int, int], tokens: int, x: Tensor,
        activation_scale: Tensor | None, left: Tensor, right: Tensor,
    ) -> tuple[Planes, Tensor]:  # fmt: skip
        device = x.device
        states = self._states.get(device)
        if states is None:
            states = self._states[device] = BarrierStates(device)
            self._ones[device] = torch.ones(1, device=device)
        planes = self.empty(x.shape[:-1], tokens, left.shape[0] * right.shape[1], device, grid[0])
        z_scale = torch.empty(tokens, 1, dtype=torch.float32, device=device)
        found = torch.empty(grid[0] * tokens, dtype=torch.int32, device=device)
        scale = self._ones[device] if activation_scale is None else activation_scale.contiguous()
        arguments = (x.reshape(tokens, -1).contiguous(), scale, left.contiguous(), right.contiguous())
        try:
            function(
                *arguments,
                planes.data,
                planes.totals,
                z_scale,
                states.of_current_stream(device),
                found,
                *grid,
            )
        except _REFUSALS as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
            raise LiftcError(f"liftc.lift: the kernels refuse this call ({lines[-1]})") from None
        return planes, z_scale.view(*x.shape[:-1], 1)

    def _grid(
        self, spec: KernelFunction, left: int, lifted: int, device: torch.device
    ) -> tuple[int, int] | None:
        """(blocks, column blocks) of a lift, all resident at once, or None where they do not fit."""
        room = self._room.get(device)
        if room is None:
            properties: Any = torch.cuda.get_device_properties(device)
            shared = properties.shared_memory_per_multiprocessor
            room = self._room[device] = (properties.multi_processor_count, shared)
        rows = -(-left // spec.block_rows)
        most_width = spec.block_results // spec.block_rows
        for blocks in range(1, 1 + min(2, room[1] // (spec.shared_bytes + 1024))):
            columns = min(room[0] * blocks // rows, lifted)
            if columns and -(-lifted // columns) <= most_width:
                return rows * columns, columns
        return None
