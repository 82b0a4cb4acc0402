"""lattice: learn, evaluate, show and report mapping matrices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from liftc.errors import LiftcError
from liftc.format import LiftFormat
from liftc.quant import lattice

ACTIONS = ("eval", "show", "train", "report")
DEFAULT_FORMAT = "LQ-77/32"


def run_lattice(
    action: str,
    formats: Sequence[str],
    beams: Sequence[int],
    *,
    samples: int,
    seed: int,
    device: str | None = None,
    output: Path | None = None,
    steps: int | None = None,
) -> dict[str, Any]:
    """One `liftc lattice` action over formats and beams; a single row is returned flat, several as "rows"."""
    chosen = [LiftFormat.parse(text) for text in formats or (DEFAULT_FORMAT,)]
    widths = tuple(beams or (64,))
    if samples < 1:
        raise LiftcError(f"--samples must be at least 1, got {samples}")
    if action == "eval":
        rows = [
            lattice.lattice_eval(fmt, beam, samples, seed, device=device) for fmt in chosen for beam in widths
        ]
    elif action == "show":
        rows = [lattice.lattice_show(fmt) for fmt in chosen]
    elif action == "train":
        rows = [
            lattice.lattice_train(fmt, seed=seed, steps=steps, device=device, output=output) for fmt in chosen
        ]
    else:
        rows = [lattice.lattice_report(output=output)]
    return {**(rows[0] if len(rows) == 1 else {"rows": rows}), "text": "\n\n".join(map(_text, rows))}


def _text(row: dict[str, Any]) -> str:
    return "\n".join(f"{key:28s}{value}" for key, value in row.items())
