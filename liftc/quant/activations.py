"""Hidden states of all calibration sequences between two blocks: in memory up to a limit, on disk past it."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from liftc.errors import QuantizeError

_COUNTER = itertools.count()


class ActivationStore:
    """Values by batch number and key, tensors kept on the CPU.

    limit: bytes held in memory over all stores that share `budget`; what goes past it is written to `folder`
    as safetensors, one file per batch. No limit without a folder. Raises QuantizeError when the disk is full.
    """

    def __init__(self, budget: Budget | None = None, folder: Path | None = None) -> None:
        self.budget, self.folder = budget or Budget(None), folder
        self._memory: dict[int, dict[str, Any]] = {}
        self._files: dict[int, Path] = {}
        self._name = f"activations-{next(_COUNTER)}"

    def __len__(self) -> int:
        return len(self._memory)

    def put(self, number: int, values: dict[str, Any]) -> None:
        """Replace the values of a batch."""
        self._release(number)
        tensors = {k: v.to("cpu", copy=False) for k, v in values.items() if isinstance(v, torch.Tensor)}
        rest = {k: v for k, v in values.items() if k not in tensors}
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        if self.folder is None or self.budget.take(size):
            self._memory[number] = {**rest, **tensors}
            return
        self._memory[number] = rest
        path = self.folder / f"{self._name}-{number:05d}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({k: v.contiguous() for k, v in tensors.items()}, path)
        except (OSError, SafetensorError) as error:
            path.unlink(missing_ok=True)
            raise QuantizeError(
                f"cannot write activations to {path}: {error}; free some disk space, raise --activation-memory, "
                "or use fewer calibration windows"
            ) from error
        self._files[number] = path
        self.budget.spilled += size

    def get(self, number: int, device: torch.device) -> dict[str, Any]:
        """Values of a batch, tensors on `device`."""
        values = dict(self._memory[number])
        if number in self._files:
            values.update(load_file(self._files[number]))
        return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in values.items()}

    def clear(self) -> None:
        """Drop everything, files included."""
        for number in list(self._memory):
            self._release(number)
            del self._memory[number]

    def _release(self, number: int) -> None:
        path = self._files.pop(number, None)
        if path is not None:
            path.unlink(missing_ok=True)
            return
        held = self._memory.get(number, {}).values()
        if self.folder is not None:
            self.budget.give(sum(t.numel() * t.element_size() for t in held if isinstance(t, torch.Tensor)))


def default_limit() -> int:
    """Half of the memory this process may use: of the machine, or of its control group where that has less."""
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        group = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        group = "max"
    return min(size, int(group) if group.isdigit() else size) // 2


class Budget:
    """Bytes of activations that may stay in memory; None is without limit. spilled: bytes written to disk."""

    def __init__(self, limit: int | None) -> None:
        self.limit, self.used, self.peak, self.spilled = limit, 0, 0, 0

    def take(self, size: int) -> bool:
        """Reserve `size` bytes; False when that would go past the limit."""
        if self.limit is not None and self.used + size > self.limit:
            return False
        self.used += size
        self.peak = max(self.peak, self.used)
        return True

    def give(self, size: int) -> None:
        """Return bytes taken before."""
        self.used -= size
