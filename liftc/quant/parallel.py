"""Several processes that quantize one model together, each with a share of the calibration set and of the rows.

Start them with torchrun, one per GPU; grams, gradients and held-out losses are summed, the rows of a group are
encoded by all, and the first process writes the files. One process alone needs no torch.distributed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import distributed

from liftc.errors import QuantizeError
from liftc.spec import ROWS_PER_WORD

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process (rank) among `size`."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """The processes of the default group of torch.distributed, or this one alone."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Every size-th item; all shares have the same length. Raises QuantizeError for too few items."""
        if len(items) < self.size:
            raise QuantizeError(
                f"{self.size} processes cannot share {len(items)} calibration windows; start fewer or use more text"
            )
        return list(items[self.rank :: self.size])[: len(items) // self.size]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over all processes, in place."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def mean(self, value: float, device: torch.device) -> float:
        """Mean of a number over all processes."""
        if self.size == 1:
            return value
        return self.sum(torch.tensor(value, dtype=torch.float64, device=device)).item() / self.size

    def rows(self, count: int) -> slice:
        """The rows of `count` this process encodes: whole words of packed signs, in order of rank."""
        words = -(-count // ROWS_PER_WORD)
        edges = [words * r // self.size * ROWS_PER_WORD for r in (self.rank, self.rank + 1)]
        return slice(edges[0], min(edges[1], count))

    def concatenate(self, part: torch.Tensor) -> torch.Tensor:
        """Parts of all processes joined along the first axis, which may differ in length."""
        if self.size == 1:
            return part
        lengths = [torch.zeros(1, dtype=torch.int64, device=part.device) for _ in range(self.size)]
        distributed.all_gather(lengths, torch.tensor([len(part)], dtype=torch.int64, device=part.device))
        longest = max(int(n) for n in lengths)
        padded = part.new_zeros(longest, *part.shape[1:])
        padded[: len(part)] = part
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        distributed.all_gather(gathered, padded)
        return torch.cat([whole[: int(n)] for whole, n in zip(gathered, lengths)])

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            distributed.barrier()
