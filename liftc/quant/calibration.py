"""Calibration set: text -> token sequences of equal length; and the bundled default text."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import torch

from liftc.errors import QuantizeError

DEFAULT_TEXT = "calibration.txt"


def read_text(path: Path | None) -> str:
    """The UTF-8 text of `path`, or the bundled calibration text (liftc/data/SOURCES.md) when None."""
    if path is None:
        return (resources.files("liftc.data") / DEFAULT_TEXT).read_text(encoding="utf-8")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QuantizeError(f"cannot read {path} as UTF-8 text: {error}") from error


def cut_windows(tokens: list[int], length: int, count: int | None) -> list[torch.Tensor]:
    """Non-overlapping windows of `length` tokens, int64 (1, length) each, at most `count`, from the start."""
    available = len(tokens) // length
    taken = available if count is None else min(count, available)
    if taken < 1:
        raise QuantizeError(f"the text holds {len(tokens)} tokens, too few for one window of {length}")
    flat = torch.tensor(tokens[: taken * length], dtype=torch.int64)
    return list(flat.view(taken, 1, length).unbind(0))


def spread_windows(tokens: list[int], length: int, count: int, seed: int) -> list[torch.Tensor]:
    """`count` windows spread evenly over the text at a seeded offset, int64 (1, length) each.

    A text with fewer windows than asked gives all it has.
    """
    windows = cut_windows(tokens, length, None)
    if count >= len(windows):
        return windows
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randperm(len(windows), generator=generator)[:count].sort().values
    return [windows[int(i)] for i in picks]
