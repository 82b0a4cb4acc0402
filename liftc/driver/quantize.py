"""From calibration inputs to quantized tensors in a work folder: efforts, resuming, memory, end-to-end tuning."""

from __future__ import annotations

import atexit
import hashlib
import json
import resource
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from liftc import __version__, env
from liftc.artifact import write_json
from liftc.capture import Captured
from liftc.driver.calibrate import CalibrationInputs, digest
from liftc.errors import ArtifactError, QuantizeError
from liftc.program import Program
from liftc.quant.activations import ActivationStore, Budget, default_limit
from liftc.quant.blocks import BlockRunner
from liftc.quant.fisher import measure
from liftc.quant.mapping import load_mapping
from liftc.quant.parallel import Ranks
from liftc.quant.result import Quantized, QuantizeOptions
from liftc.quant.stream import StreamQuantizer
from liftc.quant.trainable import Trainable
from liftc.quant.tune import tune, whole_model
from liftc.text import print_program

TOKENS_PER_STEP = 4096
"""Tokens of one batch of calibration windows, as far as there remain MIN_BATCHES batches."""
MIN_BATCHES = 8
WINDOWS_PER_STEP = 16
"""Most windows of a batch: training on the short windows of encoders wants steps more than large batches."""


@dataclass(frozen=True)
class Effort:
    """What --effort stands for: beam width, calibration tokens, passes over the calibration set for
    intra-block correction, dense training and end-to-end tuning, and weighing by Fisher information
    (QuantizeOptions)."""

    beam: int
    tokens: int
    epochs: int
    dense_epochs: int
    tune_epochs: int
    fisher: bool


EFFORTS = {
    "fast": Effort(beam=16, tokens=32768, epochs=0, dense_epochs=0, tune_epochs=0, fisher=False),
    "balanced": Effort(beam=64, tokens=32768, epochs=2, dense_epochs=0, tune_epochs=0, fisher=True),
    "best": Effort(beam=256, tokens=98304, epochs=3, dense_epochs=2, tune_epochs=8, fisher=True),
}
"""docs/method.md says what each ingredient buys and docs/results.md what each effort costs."""


def quantize_program(
    captured: Captured,
    program: Program,
    inputs: CalibrationInputs,
    options: QuantizeOptions,
    work: Path,
    *,
    device: str | None,
    activation_memory: int | None,
    resume: bool,
    progress: bool,
) -> Quantized:
    """Quantize a program that has passed the passes before quantization; finished parts in `work` are kept.

    device: "cuda", "cpu", or None for a GPU where there is one. activation_memory: bytes of hidden states held
    in memory before they go to disk, by default half of the machine's. resume: refuse, naming what changed,
    instead of starting over. Raises QuantizeError and ArtifactError.
    """
    ranks = Ranks.current()
    if ranks.first:
        fingerprint = _fingerprint(captured, program, inputs, options)
        _resume_or_clear(work, fingerprint, resume=resume, announce=progress)
    ranks.barrier()
    budget = Budget(default_limit() if activation_memory is None else activation_memory)
    stream = make_stream(captured, program, inputs, options, work, device, budget)
    language_model, shared = inputs.graph == "prefill", all_positions(inputs)
    if options.fisher and not stream.finished:
        started = time.perf_counter()
        stream.fisher = measure(
            stream, language_model=language_model, shared=shared, progress=progress and ranks.first
        )
        stream.result.seconds["fisher"] = time.perf_counter() - started
    quantized = stream.run(progress=progress and ranks.first)
    if options.tune_epochs:
        tune(stream, quantized, language_model=language_model, shared=shared)
    quantized.memory = peak_memory(stream.device, budget)
    ranks.barrier()
    if ranks.first:
        shutil.rmtree(work / "activations", ignore_errors=True)
    return quantized


def join_ranks(device: str | None) -> Ranks:
    """Join the processes that torchrun started, if it did; each takes the GPU of its local rank."""
    count, local = env.processes()
    if count > 1 and not distributed.is_initialized():
        gpu = device != "cpu" and torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(local)
            distributed.init_process_group("nccl", device_id=torch.device("cuda", local))
        else:
            distributed.init_process_group("gloo")
        atexit.register(distributed.destroy_process_group)
    return Ranks.current()


def whole_model_of(
    captured: Captured,
    program: Program,
    inputs: CalibrationInputs,
    quantized: Quantized,
    device: str | None = None,
) -> Trainable:
    """The quantized model as dense weights on a device, for measuring it without kernels."""
    folder = quantized.folder.parent
    return whole_model(
        make_stream(captured, program, inputs, QuantizeOptions(), folder, device, Budget(None)), quantized
    )


def make_stream(
    captured: Captured,
    program: Program,
    inputs: CalibrationInputs,
    options: QuantizeOptions,
    work: Path,
    device: str | None,
    budget: Budget,
) -> StreamQuantizer:
    """The quantizer of a program, with runners over this process's share of the calibration windows."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda" and not torch.cuda.is_available():
        raise QuantizeError("--device cuda needs an NVIDIA GPU that torch can use; choose --device cpu")
    graph = program.graphs[inputs.graph]

    ranks = Ranks.current()
    sequences = ranks.share(inputs.sequences)

    def stores() -> ActivationStore:
        return ActivationStore(budget, work / "activations" / str(ranks.rank))

    def new_runner(store: ActivationStore) -> BlockRunner:
        return BlockRunner(
            graph, sequences, inputs.shared, inputs.scratch, device=place, batch=batch_size(sequences), store=store,
        )  # fmt: skip

    return StreamQuantizer(
        program, inputs.graph, captured.checkpoint, new_runner, options, work / "quantized", device=place,
        stores=stores,
    )  # fmt: skip


def batch_size(sequences: Sequence[Mapping[str, Any]]) -> int:
    """Sequences per batch."""
    longest = max(
        (v.numel() for s in sequences for v in s.values() if isinstance(v, torch.Tensor)), default=1
    )
    return max(1, min(TOKENS_PER_STEP // max(1, longest), WINDOWS_PER_STEP, len(sequences) // MIN_BATCHES))


def peak_memory(device: torch.device, budget: Budget) -> dict[str, int]:
    """Peak bytes of the process, of the GPU and of hidden states in memory, and bytes of them that went to disk."""
    scale = 1 if sys.platform == "darwin" else 1024
    found = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale,
             "activations": budget.peak, "spilled": budget.spilled}  # fmt: skip
    if device.type == "cuda":
        found["gpu"] = torch.cuda.max_memory_allocated(device)
    return found


def all_positions(inputs: CalibrationInputs) -> dict[str, Any]:
    """Shared inputs that make a prefill graph give the logits of every position."""
    positions = inputs.shared.get("cache_position")
    return {} if positions is None else {"logit_positions": positions}


def _fingerprint(
    captured: Captured, program: Program, inputs: CalibrationInputs, options: QuantizeOptions
) -> dict[str, Any]:
    """What must not change between an interrupted compile and the one that continues it."""
    weights = hashlib.sha256()
    for name in program.tensors:
        weights.update(name.encode() + digest([captured.checkpoint.tensor(name)]).encode())
    formats = sorted({spec.format for spec in program.lifts.values()})
    return {
        "model": weights.hexdigest(),
        "program": hashlib.sha256(print_program(program).encode()).hexdigest(),
        "calibration": inputs.digest,
        "options": asdict(options),
        "mapping matrices": digest([load_mapping(fmt) for fmt in formats]),
        "version": __version__,
    }


def _resume_or_clear(partial: Path, fingerprint: Mapping[str, Any], *, resume: bool, announce: bool) -> None:
    """Keep the finished blocks of an interrupted run of the same compile; drop anything else, or refuse."""
    marker = partial / "fingerprint.json"
    if resume and not marker.is_file():
        raise ArtifactError(f"there is nothing to resume at {partial}; run without --resume")
    if partial.exists():
        try:
            previous = json.loads(marker.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            previous = {}
        changed = [key for key in fingerprint if previous.get(key) != fingerprint[key]]
        if changed and not previous and any(partial.iterdir()):
            raise ArtifactError(
                f"{partial} is not a liftc work folder; move it away or choose another output"
            )
        if changed and resume:
            raise ArtifactError(
                f"cannot resume {partial}: {', '.join(_named(previous, fingerprint, changed))} changed since; "
                "repeat the first command exactly, or run without --resume to start over"
            )
        if changed:
            shutil.rmtree(partial)
            named = ", ".join(changed)
            said = f"starting over: {named} differ from the interrupted run in {partial}" if previous else ""
        else:
            done = len(list((partial / "quantized").glob("block-*.safetensors")))
            said = f"continuing the interrupted run in {partial}: {done} blocks are done"
        if announce and said:
            print(said, file=sys.stderr)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        write_json(marker, fingerprint)
    except OSError as error:
        raise ArtifactError(f"cannot write {partial}: {error.strerror or error}") from error


def _named(previous: Mapping[str, Any], now: Mapping[str, Any], changed: list[str]) -> list[str]:
    """The changed keys, options one by one with their values."""
    names: list[str] = []
    for key in changed:
        old, new = previous.get(key), now[key]
        if isinstance(old, dict) and isinstance(new, dict):
            names += [f"{key} {k} ({old.get(k)} -> {new[k]})" for k in new if old.get(k) != new[k]]
        else:
            names.append(key)
    return names
