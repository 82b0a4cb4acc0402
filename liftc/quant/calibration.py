"""Calibration windows: documents -> one stream of tokens -> windows of equal length."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from liftc.errors import QuantizeError
from liftc.quant.sources import Document, bundled_text

OVERSAMPLE = 4
"""Documents are read until they hold this many times the tokens wanted; the windows are drawn from them."""

T = TypeVar("T")


@dataclass(frozen=True)
class CalibrationRequest:
    """What to calibrate on. path: text file, JSONL file or data set folder (None: the bundled text). field:
    field of its rows. chat_template: render conversations with the model's template; chat_wrap: also make plain
    texts a user's turn. windows x length tokens are used; seed chooses them."""

    path: Path | None = None
    field: str | None = None
    chat_template: bool = False
    chat_wrap: bool = False
    windows: int = 64
    length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if self.windows < 1 or self.length < 2:
            raise QuantizeError(
                f"calibration needs at least 1 window of 2 tokens, got {self.windows} of {self.length}"
            )
        if self.chat_wrap and not self.chat_template:
            raise QuantizeError("--chat-wrap wraps texts in the chat template; give --chat-template with it")

    @property
    def wanted(self) -> int:
        """Tokens to collect before windows are drawn."""
        return OVERSAMPLE * self.windows * self.length

    def describe(self, taken: int) -> str:
        """Words for the manifest and the model card; taken: windows that the text really gave."""
        asked = f" ({self.windows} asked)" if taken < self.windows else ""
        source = self.path.name or str(self.path) if self.path is not None else "the bundled web text"
        field = f", field {self.field}" if self.field else ""
        chat = ", in the chat template" if self.chat_template else ""
        return f"{taken} windows{asked} of {self.length} tokens of {source}{field}{chat}"


def read_text(path: Path | None) -> str:
    """The UTF-8 text of `path`, or the bundled calibration text (liftc/data/SOURCES.md) when None."""
    if path is None:
        return bundled_text()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QuantizeError(f"cannot read {path} as UTF-8 text: {error}") from error


def parse_tokens(text: str) -> int:
    """Number of tokens: "32k" is 32 x 1024, "1M" is 1024 x 1024, "5000" is 5000; raises QuantizeError."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)([kKmM]?)", text.strip())
    count = int(float(match[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[match[2].lower()]) if match else 0
    if count < 1:
        raise QuantizeError(f"{text!r} is no number of tokens; give one such as 5000, 32k or 1M")
    return count


def budget_windows(tokens: int, length: int) -> int:
    """Windows of `length` tokens that a budget of `tokens` pays for; raises QuantizeError for none."""
    if length < 1 or tokens < length:
        raise QuantizeError(
            f"a budget of {tokens} tokens holds no window of {length}; raise it or shorten the windows"
        )
    return tokens // length


def collect_tokens(
    documents: Iterable[Document], encode: Callable[[Document], list[int]], wanted: int
) -> list[int]:
    """Tokens of documents one after the other, whole documents, until there are at least `wanted`.

    Raises QuantizeError when there is no document at all.
    """
    tokens: list[int] = []
    empty = True
    for document in documents:
        empty = False
        tokens += encode(document)
        if len(tokens) >= wanted:
            break
    if empty:
        raise QuantizeError(
            "the calibration set holds no text; give one with at least one non-empty document"
        )
    return tokens


def cut_windows(tokens: list[int], length: int, count: int | None) -> list[torch.Tensor]:
    """Non-overlapping windows of `length` tokens, int64 (1, length) each, at most `count`, from the start."""
    available = len(tokens) // length
    taken = available if count is None else min(count, available)
    if taken < 1:
        raise QuantizeError(f"the text holds {len(tokens)} tokens, too few for one window of {length}")
    flat = torch.tensor(tokens[: taken * length], dtype=torch.int64)
    return list(flat.view(taken, 1, length).unbind(0))


def spread_windows(tokens: list[int], length: int, count: int, seed: int) -> list[torch.Tensor]:
    """`count` of the windows of `cut_windows`, a seeded random choice in the order of the text.

    A text with fewer windows than asked gives all it has.
    """
    windows = cut_windows(tokens, length, None)
    if count >= len(windows):
        return windows
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randperm(len(windows), generator=generator)[:count].sort().values
    return [windows[int(i)] for i in picks]


def split_held_out(windows: Sequence[T], share: float, seed: int) -> tuple[list[T], list[T]]:
    """(train, held out): a seeded random `share` of the windows is held out, both parts in their old order.

    Two windows or more give at least one to each part; a single window trains and nothing is held out.
    Raises QuantizeError for a share outside (0, 1).
    """
    if not 0 < share < 1:
        raise QuantizeError(f"the held-out share must lie between 0 and 1, got {share}")
    if len(windows) < 2:
        return list(windows), []
    count = min(max(1, round(share * len(windows))), len(windows) - 1)
    generator = torch.Generator().manual_seed(seed)
    held = set(torch.randperm(len(windows), generator=generator)[:count].tolist())
    return [w for i, w in enumerate(windows) if i not in held], [windows[i] for i in sorted(held)]
