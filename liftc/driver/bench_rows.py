"""Measurements of `liftc bench kernels`: a record per kernel, shape, batch and chain; TVM is not imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from liftc.errors import LiftcError
from liftc.format import LiftFormat
from liftc.kernel_records import Record, digits
from liftc.runtime import operands, peers
from liftc.runtime.kernels import Kernels
from liftc.runtime.operands import Linear, Operands
from liftc.runtime.ops import Ops
from liftc.runtime.timing import Clock, machine_facts
from liftc.spec import DTYPE_NAMES

Shape = tuple[int, int]
_MOST_LAUNCHES = 512
_KERNELS = ("lift+sign_matmul", "sign_matmul", "lift")


class Rows:
    """Kernels of one object on one device. Every row is checked first; what is not exact is not timed."""

    def __init__(self, kernels: Kernels, device: torch.device, pool_bytes: int) -> None:
        self.kernels, self.device = kernels, device
        self.ops = Ops(kernels)
        self.cold = pool_bytes > 0
        self.operands = Operands(device, pool_bytes or 64_000_000)
        self.clock = Clock(device)
        self.ceiling = self.clock.read_ceiling(kernels, self.operands.pool)
        self.facts = machine_facts(device)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.arch = _arch(kernels, device)

    def chain(self, shapes: Sequence[Shape], rounds: int, fmt: LiftFormat, batch: int) -> Iterator[Record]:
        """The shapes in order, `rounds` times over; 0 for as often as the pool has distinct signs."""
        rounds = rounds or self.rounds(shapes, fmt, batch)
        linears = self.operands.linears(self.ops, list(shapes) * rounds, fmt, batch, self.dtype)
        status = self._status(linears[: len(shapes)])
        size = sum(linear.sign_bytes for linear in linears)
        for kernel in _KERNELS:
            time = self._time(kernel, linears)
            moved = size if kernel != "lift" else float(sum(linear.lift_bytes for linear in linears))
            yield replace(
                self._record(kernel, fmt, (0, 0), batch, time, moved, status),
                chain=chain_text(shapes, rounds),
            )

    def shape(self, shape: Shape, fmt: LiftFormat, batch: int) -> Iterator[Record]:
        """One shape, cold unless the pool is 0: a launch each of as many copies as the pool holds."""
        rounds = self.rounds([shape], fmt, batch) if self.cold else 1
        linears = self.operands.linears(self.ops, [shape] * rounds, fmt, batch, self.dtype)
        status = self._status(linears[:1])
        for kernel in _KERNELS:
            time = self._time(kernel, linears) / rounds
            size = linears[0].lift_bytes if kernel == "lift" else linears[0].sign_bytes
            yield self._record(kernel, fmt, shape, batch, time, size, status)

    def others(self, shape: Shape, fmt: LiftFormat, batch: int) -> Iterator[Record]:
        """The same linear by other means; those that fail are recorded as failed, with the reason."""
        yield self.attempt(
            "torch.unpack+matmul", shape, fmt, batch, lambda: self._unpacked(shape, fmt, batch)
        )
        for make in peers.peers(*shape, batch, self.operands.pool):
            name = "peer"
            try:
                peer = make()
                name = peer.name
                time = self.clock.microseconds(peer.run) / peer.count
                yield self._record(name, fmt, shape, batch, time, peer.weight_bytes, "ok", knobs={})
            except (RuntimeError, ValueError, TypeError, AssertionError, ImportError) as error:
                yield self._failed(name, shape, fmt, batch, error)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _unpacked(self, shape: Shape, fmt: LiftFormat, batch: int) -> tuple[float, float]:
        (linear,) = self.operands.linears(self.ops, [shape], fmt, batch, self.dtype)
        words = -(-shape[0] // 32) * linear.lifted
        packed = self.operands.words(words).view(-1, linear.lifted)
        unpack = peers.torch_unpacker(packed, shape[0], self.dtype)
        run = peers.unpack_and_multiply(unpack, linear.z.to(self.dtype))
        return self.clock.microseconds(run, 3, graph=False), linear.sign_bytes

    def attempt(
        self, kernel: str, shape: Shape, fmt: LiftFormat, batch: int, work: Callable[[], tuple[float, float] | None],
        dtype: torch.dtype | None = None, knobs: dict[str, Any] | None = None,
    ) -> Record:  # fmt: skip
        """The record of work() -> (microseconds, bytes), or None when the result is wrong; what it raises is recorded.

        dtype: of the activations, that of the other rows by default. knobs: what the record says of how it was done.
        """
        try:
            found = work()
        except (RuntimeError, LiftcError) as error:
            made = self._failed(kernel, shape, fmt, batch, error)
        else:
            time, size = found or (1.0, 0.0)
            status = "ok" if found else "wrong"
            made = self._record(kernel, fmt, shape, batch, time, size, status, knobs=knobs or {})
        return made if dtype is None else replace(made, dtype=DTYPE_NAMES[dtype])

    def rounds(self, shapes: Sequence[Shape], fmt: LiftFormat, batch: int) -> int:
        """How many times over the pool has distinct signs for these linears."""
        once = self.operands.linears(self.ops, shapes, fmt, batch, self.dtype)
        size = sum(linear.signs.nbytes for linear in once)
        return max(1, min(self.operands.pool.nbytes // size, _MOST_LAUNCHES // len(shapes)))

    def _status(self, linears: Sequence[Linear]) -> str:
        for linear in linears:
            exact = operands.product_is_exact(self.ops, linear, self.dtype)
            if not exact or not operands.lift_is_right(self.ops, linear):
                return "wrong"
        return "ok"

    def _time(self, kernel: str, linears: Sequence[Linear]) -> float:
        def run() -> None:
            for linear in linears:
                if kernel == "lift":
                    operands.lift(self.ops, linear)
                elif kernel == "sign_matmul":
                    operands.product(self.ops, linear, self.dtype)
                else:
                    operands.whole(self.ops, linear, self.dtype)

        return self.clock.microseconds(run)

    def knobs(self, kernel: str, batch: int) -> dict[str, Any]:
        """Knobs of the kernels that serve a batch, with the op before the name."""
        found: dict[str, Any] = {}
        for part in kernel.split("+"):
            if part == "lift":
                function = self.ops.tiles.planes.lift_for(batch, self.dtype)
            else:
                function = self.ops.tiles.product_for(batch)
            if function is not None:
                found[f"{function.op}.symbol"] = function.symbol
                found.update(
                    (f"{function.op}.{k}", v)
                    for k, _, v in (t.partition("=") for t in function.knobs.split())
                )
        return found

    def _dtype(self) -> str:
        return DTYPE_NAMES[self.dtype]

    def _record(
        self, kernel: str, fmt: LiftFormat, shape: Shape, batch: int, time: float, size: float, status: str,
        knobs: dict[str, Any] | None = None,
    ) -> Record:  # fmt: skip
        good = status == "ok"
        rate = size / time / 1e3
        return Record(
            kernel=kernel, kernel_version=self.kernels.object.kernel_version, arch=self.arch, format=str(fmt),
            out_features=shape[0], in_features=shape[1], batch=batch,
            knobs=self.knobs(kernel, batch) if knobs is None else knobs, status=status,
            microseconds=digits(time) if good else None, gigabytes_per_second=digits(rate) if good else None,
            read_ceiling_gbs=round(self.ceiling, 1),
            fraction_of_ceiling=digits(rate / self.ceiling) if good else None,
            dtype=self._dtype(), **self.facts,
        )  # fmt: skip

    def _failed(self, kernel: str, shape: Shape, fmt: LiftFormat, batch: int, error: Exception) -> Record:
        line = next((part for part in str(error).splitlines() if part.strip()), type(error).__name__)
        made = self._record(kernel, fmt, shape, batch, 1.0, 0.0, "failed", knobs={})
        return replace(made, reason=line[:300])


def chain_text(shapes: Sequence[Shape], rounds: int) -> str:
    """How a record writes these linears in turn, `rounds` times over."""
    return "+".join(f"{rows}x{features}" for rows, features in shapes) + f"*{rounds}"


def _arch(kernels: Kernels, device: torch.device) -> str:
    """The architecture whose machine code (or PTX) runs."""
    if device.type != "cuda":
        return kernels.object.archs[0]
    major, minor = torch.cuda.get_device_capability(device)
    return next(
        (a for a in kernels.object.archs if a.rstrip("a") == f"sm_{major}{minor}"), kernels.object.archs[-1]
    )
