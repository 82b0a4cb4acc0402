"""lattice: learn, evaluate, show and report mapping matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from liftc.errors import LiftcError
from liftc.format import LiftFormat
from liftc.quant import lattice, mapping, report
from liftc.quant.encode import DEFAULT_BEAM

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
    """One `liftc lattice` action over formats and beams; a single row is returned flat, several as "rows".

    samples counts weights, rounded up to whole vectors (at least two). `show` without a format lists what is
    shipped. Raises LiftcError for options that the action does not take or cannot use.
    """
    if action not in ACTIONS:
        raise LiftcError(f"lattice: there is no action {action!r}; choose one of {', '.join(ACTIONS)}")
    if samples < 1:
        raise LiftcError(f"--samples must be at least 1, got {samples}")
    if not 0 <= seed < 2**63:
        raise LiftcError(f"--seed must lie between 0 and 2^63 - 1, got {seed}")
    if output is not None and action in ("eval", "show"):
        raise LiftcError(f"lattice {action}: writes no file; leave -o {output} out")
    chosen = [LiftFormat.parse(text) for text in formats]
    if action == "report":
        if formats or beams:
            raise LiftcError("lattice report: covers every format and beam; leave --format and --beam out")
        answer = report.lattice_report(output)
        text = answer.pop("markdown")
        return {**answer, "text": _written(answer) if output is not None else text}
    if action == "show":
        rows = [lattice.lattice_show(fmt) for fmt in chosen] or [lattice.lattice_show()]
    elif action == "eval":
        used = _device(device)
        rows = [
            lattice.lattice_eval(fmt, beam, _vectors(samples, fmt), seed, device=used)
            for fmt in chosen or [LiftFormat.parse(DEFAULT_FORMAT)]
            for beam in beams or (DEFAULT_BEAM,)
        ]
    else:
        rows = _train(chosen, beams, samples, seed, _device(device), output, steps)
    return {**(rows[0] if len(rows) == 1 else {"rows": rows}), "text": "\n\n".join(map(_text, rows))}


def _train(
    formats: list[LiftFormat],
    beams: Sequence[int],
    samples: int,
    seed: int,
    device: torch.device | None,
    output: Path | None,
    steps: int | None,
) -> list[dict[str, Any]]:
    if output is None or output.is_dir():
        raise LiftcError("lattice train: name the file to write with -o, for example -o mine.safetensors")
    if not formats:
        raise LiftcError(f"lattice train: name a format with --format, for example --format {DEFAULT_FORMAT}")
    if steps is not None and steps < 1:
        raise LiftcError(f"--steps must be at least 1, got {steps}")
    if len(beams) > 1:
        raise LiftcError(f"lattice train: learns with one beam, got {len(beams)}; give --beam once")
    recipe = mapping.Recipe(seed=seed, beam=beams[0] if beams else DEFAULT_BEAM)
    if steps is not None:
        recipe = replace(recipe, steps=steps)
    rows = []
    for fmt in formats:
        own = replace(recipe, lam=mapping.suggested_lam(fmt))
        try:
            rows.append(
                lattice.lattice_train(fmt, output, own, device=device, samples=_vectors(samples, fmt))
            )
        except (OSError, SafetensorError) as error:
            raise LiftcError(f"{output}: cannot write the mapping file: {error}") from error
    return rows


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise LiftcError(f"--device {name}: there is no such device; give cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise LiftcError(f"--device {name}: the encoder runs on cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise LiftcError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def _vectors(weights: int, fmt: LiftFormat) -> int:
    return max(2, -(-weights // fmt.subspace_dim))


def _written(answer: dict[str, Any]) -> str:
    lines = [f"wrote {path}" for path in answer["files"]]
    lines.append(f"{answer['formats']} formats, {answer['samples']} vectors per figure")
    return "\n".join([*lines, "", report.targets_table(answer["targets"])])


def _text(row: dict[str, Any]) -> str:
    if "formats" in row:
        return "\n".join(
            f"{made['format']:12s}mse {made['mse']:.5f} +- {made['standard_error']:.5f}  beam {made['beam']}  "
            f"samples {made['samples']}"
            for made in row["formats"]
        )
    return "\n".join(f"{key:28s}{value}" for key, value in row.items())
