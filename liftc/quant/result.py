"""What quantization is asked to do, and what it leaves behind: options, reports, files of the work folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from liftc.errors import QuantizeError
from liftc.quant.encode import MAX_BEAM
from liftc.quant.trainable import Rates
from liftc.quant.whitening import Whitening

FACTS = "facts"


@dataclass(frozen=True)
class QuantizeOptions:
    """How a program is quantized.

    beam: beam width of the encoder. damp: share of the gram's mean diagonal added to it. epochs: passes of
    intra-block correction over the calibration set. dense_epochs: passes over it, before each further group
    of a block is quantized, that train the weights still dense. tune_epochs: passes of end-to-end tuning
    (tune.py). fisher: weigh tokens and outputs by the Fisher information (fisher.py). held_out: share of the
    set that only decides when training stops. seed: of the whitening, of training and of drawn tokens. The
    weight lam of the tree search is the one each mapping matrix was learned with.
    """

    beam: int = 64
    damp: float = 0.01
    epochs: int = 0
    dense_epochs: int = 0
    tune_epochs: int = 0
    fisher: bool = False
    held_out: float = 0.125
    rates: Rates = field(default_factory=Rates)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.beam <= MAX_BEAM or not self.damp > 0:
            raise QuantizeError(
                f"--beam must lie between 1 and {MAX_BEAM} and --damp above 0, got {self.beam} and {self.damp:g}"
            )
        if min(self.epochs, self.dense_epochs, self.tune_epochs) < 0:
            raise QuantizeError("--epochs, --dense-epochs and --tune-epochs must be 0 or more")

    @property
    def corrects(self) -> bool:
        """Whether blocks are trained, which needs the original model's hidden states too."""
        return self.epochs > 0 or self.dense_epochs > 0


@dataclass(frozen=True)
class LinearReport:
    """Errors of one linear: relative weight error and proxy loss of its group (see GroupResult)."""

    name: str
    format: str
    relative_error: float
    proxy_loss: float


@dataclass(frozen=True)
class BlockReport:
    """Held-out relative error of a block's output before and after correction; 0 when it was not corrected."""

    block: int
    error_before: float = 0.0
    error_after: float = 0.0


@dataclass(frozen=True)
class TuneReport:
    """End-to-end tuning: held-out loss before and after (KL divergence in nats for a language model), and the
    epochs kept."""

    before: float
    after: float
    epochs: int


@dataclass
class Quantized:
    """What quantization produced: files in order (a later one overrides an earlier one), the shared
    transforms, and the reports. seconds: of each part done in this run, "fisher", "block-00003" or "tuned";
    memory: peak bytes. These two differ from run to run, so no hashed file holds them."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    whitenings: dict[tuple[int, int], Whitening] = field(default_factory=dict)
    report: list[LinearReport] = field(default_factory=list)
    blocks: list[BlockReport] = field(default_factory=list)
    tuned: TuneReport | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data for report.json."""
        return {
            "linears": [asdict(row) for row in self.report],
            "blocks": [asdict(row) for row in self.blocks],
            "tuned": asdict(self.tuned) if self.tuned else None,
        }

    def tensors(self) -> dict[str, Path]:
        """Name of every quantized or trained tensor -> the file that holds it."""
        found: dict[str, Path] = {}
        for path in self.files:
            with safe_open(path, "pt") as handle:
                found.update(dict.fromkeys(handle.keys(), path))
        return found


def write_atomically(path: Path, tensors: dict[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Write a safetensors file under a temporary name, flush it to disk and rename it.

    facts: plain data, kept as JSON under the single metadata key FACTS: safetensors writes several keys in an
    order that differs from run to run.
    """
    temporary = path.with_suffix(".tmp")
    try:
        save_file(tensors, temporary, metadata={FACTS: json.dumps(facts, sort_keys=True)})
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise QuantizeError(f"cannot write {path}: {error}; free some disk space and run again") from error
