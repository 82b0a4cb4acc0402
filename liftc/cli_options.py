"""Options that commands share, and the types of their values: what to calibrate on, how to quantize."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from liftc.errors import LiftcError


def add_calibration(c: Any) -> None:
    """--calibration and what goes with it."""
    c.add_argument(
        "--calibration",
        type=Path,
        metavar="PATH",
        help="text file, .jsonl, .parquet, .arrow or a data set folder (default: the bundled web text)",
    )
    c.add_argument(
        "--calibration-field", metavar="NAME", help="field of its rows (default: text, then messages)"
    )
    c.add_argument(
        "--chat-template", action="store_true", help="render rows of messages with the model's chat template"
    )
    c.add_argument(
        "--chat-wrap", action="store_true", help="with --chat-template, also make plain texts a user's turn"
    )
    amount = c.add_mutually_exclusive_group()
    amount.add_argument("--calibration-windows", type=int, metavar="N", help="number (default: the effort's)")
    amount.add_argument(
        "--calibration-tokens", type=count_of_tokens, metavar="N", help="a budget: 5000, 32k, 1M"
    )
    c.add_argument("--calibration-length", type=int, help="tokens per window (default 512, encoders 32)")


def add_quantization(c: argparse.ArgumentParser) -> None:
    """--effort, what it stands for, one by one, and where to quantize."""
    c.add_argument(
        "--effort",
        choices=("fast", "balanced", "best"),
        default="balanced",
        help="signs only; with block correction; with dense training and end-to-end tuning too",
    )
    for option, text in (
        ("--beam", "beam width of the encoder"),
        ("--epochs", "passes of block correction over the calibration set"),
        ("--dense-epochs", "passes that train the weights of a block still dense"),
        ("--tune-epochs", "passes of end-to-end tuning (holds the whole model)"),
    ):
        c.add_argument(option, type=int, metavar="N", help=f"{text}, instead of the effort's")
    c.add_argument(
        "--fisher",
        action=argparse.BooleanOptionalAction,
        help="weigh tokens and outputs by the model's own gradients (default: the effort's)",
    )
    c.add_argument("--damp", type=float, default=0.01, help="damping of the input gram (default 0.01)")
    c.add_argument(
        "--device", choices=("cuda", "cpu"), help="where to quantize (default: a GPU where there is one)"
    )
    c.add_argument(
        "--activation-memory",
        type=size_in_bytes,
        metavar="SIZE",
        help="hidden states held in memory before they go to disk: 500M, 16G (default: half of the memory)",
    )


def number_of_bits(text: str) -> float:
    """Bits per weight, such as 2.4."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number; give bits such as 2.4") from None


def size_in_bytes(text: str) -> int:
    """500M, 16G and the like, in bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)i?B?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected a size such as 500M or 16G, got {text!r}")
    return int(float(match[1]) * 1024 ** " kMGT".index(match[2] or " "))


def count_of_tokens(text: str) -> int:
    """5000, 32k, 1M: a number of tokens."""
    from liftc.quant.calibration import parse_tokens

    try:
        return parse_tokens(text)
    except LiftcError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
