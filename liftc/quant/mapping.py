"""Mapping matrices M (d, D): learned by this project, shipped in liftc/data/mapping.safetensors.

A matrix is learned for unit Gaussian weights by alternating two steps (Lloyd's algorithm for a codebook that
is linear in the signs): encode a fresh batch with the beam, then move M towards the least-squares solution
E[w b'] E[b b']^-1 of that batch, with momentum and a step that falls along a cosine.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from liftc import env
from liftc.errors import QuantizeError
from liftc.format import LiftFormat
from liftc.quant.encode import DEFAULT_BEAM, DEFAULT_LAM, decode, encode_prepared, prepare

SHIPPED = Path(__file__).parent.parent / "data" / "mapping.safetensors"
_MOMENTUM = 0.9
_RIDGE = 1e-4
_WARMUP_BEAM = 16


@dataclass(frozen=True)
class Recipe:
    """How a matrix is learned: `warmup` steps at beam 16, then `steps` at `beam`, each on `batch` vectors.

    band: width of the Gaussian window, in weights, that concentrates the random start around the diagonal
    (0: an orthonormal start without a window). step: first step of the cosine. finish_beam: beam of the last
    third of the steps (0: the same beam).
    """

    seed: int = 0
    warmup: int = 60
    steps: int = 400
    batch: int = 4096
    beam: int = DEFAULT_BEAM
    lam: float = DEFAULT_LAM
    band: float = 0.0
    step: float = 0.1
    finish_beam: int = 0


ON_THE_SPOT = Recipe(steps=100, batch=2048, beam=32)
"""The recipe of a format without a shipped matrix: under a minute on two cores."""


@lru_cache(maxsize=64)
def load_mapping(fmt: LiftFormat) -> torch.Tensor:
    """M float32 (d, D) of a format: shipped, or learned on the spot with ON_THE_SPOT and cached.

    The cache is `env.cache_dir()`; learning reports to stderr. The tensor is shared: do not write to it.
    Raises QuantizeError when the shipped file is damaged.
    """
    if str(fmt) in _shipped_provenance():
        return read_mapping(SHIPPED, fmt)
    path = _cache_path(fmt)
    if path.is_file():
        try:
            return read_mapping(path, fmt)
        except QuantizeError:
            path.unlink()
    recipe = _on_the_spot(fmt)
    say = reporter(f"learning a mapping matrix for {fmt}, which liftc does not ship")
    matrix = learn_mapping(fmt, recipe, progress=say)
    write_mappings(path, {fmt: (matrix, provenance_of(matrix, recipe))})
    return matrix


def mapping_provenance(fmt: LiftFormat) -> dict[str, Any]:
    """How the matrix of `load_mapping` was made: the recipe, mse, standard_error, samples, source."""
    shipped = _shipped_provenance().get(str(fmt))
    if shipped is not None:
        return {**shipped, "source": "shipped"}
    load_mapping(fmt)
    return {**read_provenance(_cache_path(fmt))[str(fmt)], "source": "learned on the spot"}


def suggested_lam(fmt: LiftFormat) -> float:
    """lam close to the error that will be left, 1.25 * 2^(-2 D/d): what minimum mean square error asks for."""
    lam: float = 1.25 * 2.0 ** (-2.0 * float(fmt.bit_width))
    return round(lam, 4)


def lam_of(fmt: LiftFormat) -> float:
    """The lam a format's matrix was learned with, which is the one to search it with."""
    return float(mapping_provenance(fmt)["lam"])


def shipped_formats() -> list[LiftFormat]:
    """Formats with a shipped matrix, ordered by d, then D."""
    formats = [LiftFormat.parse(name) for name in _shipped_provenance()]
    return sorted(formats, key=lambda fmt: (fmt.subspace_dim, fmt.lifted_dim))


def learn_mapping(
    fmt: LiftFormat,
    recipe: Recipe,
    device: torch.device | str = "cpu",
    start: torch.Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
    deadline: float = math.inf,
) -> torch.Tensor:
    """Learn M float32 (d, D) on `device`, from `start` or from the recipe's random start.

    Deterministic for a recipe, a device and a start, unless the deadline (seconds of `time.monotonic`) cuts
    it short. `progress(step, steps)` is called after every step.
    """
    generator = torch.Generator(device).manual_seed(recipe.seed)
    warmup = 0 if start is not None else recipe.warmup
    matrix = _random_start(fmt, recipe) if start is None else start
    matrix = matrix.to(device, torch.float64)
    velocity = torch.zeros_like(matrix)
    ridge = _RIDGE * torch.eye(fmt.lifted_dim, dtype=torch.float64, device=device)
    total = warmup + recipe.steps
    for step in range(total):
        beam = recipe.beam if 3 * (step - warmup) < 2 * recipe.steps else recipe.finish_beam or recipe.beam
        beam = min(_WARMUP_BEAM, beam) if step < warmup else beam
        w = torch.randn(recipe.batch, fmt.subspace_dim, generator=generator, device=device)
        b = encode_prepared(w, prepare(matrix.float(), None, recipe.lam), beam).double()
        solution = torch.linalg.solve(b.T @ b / recipe.batch + ridge, b.T @ w.double() / recipe.batch).T
        if step < warmup:
            matrix = solution
        else:
            size = recipe.step * 0.5 * (1 + math.cos(math.pi * (step - warmup) / recipe.steps))
            velocity = _MOMENTUM * velocity + size * (solution - matrix)
            matrix = matrix + velocity
        if progress is not None:
            progress(step + 1, total)
        if time.monotonic() > deadline:
            break
    return matrix.float().cpu().contiguous()


def evaluate_mapping(
    matrix: torch.Tensor,
    beam: int,
    samples: int,
    seed: int,
    lam: float = DEFAULT_LAM,
    device: torch.device | str = "cpu",
    batch: int = 16384,
) -> tuple[float, float, float]:
    """(mse per weight, its standard error, seconds per million weights) on `samples` Gaussian vectors.

    The time is that of encoding alone, after one batch to warm up. Raises QuantizeError when samples < 2.
    """
    if samples < 2:
        raise QuantizeError(f"lattice eval: a standard error needs at least 2 samples, got {samples}")
    matrix = matrix.to(device)
    d = matrix.shape[0]
    prepared = prepare(matrix, None, lam)
    generator = torch.Generator(device).manual_seed(seed)
    encode_prepared(torch.randn(min(64, samples), d, device=device), prepared, beam)
    errors, seconds = [], 0.0
    for first in range(0, samples, batch):
        w = torch.randn(min(batch, samples - first), d, generator=generator, device=device)
        _wait(w)
        began = time.perf_counter()
        signs = encode_prepared(w, prepared, beam)
        _wait(w)
        seconds += time.perf_counter() - began
        errors.append((w - decode(signs, matrix)).double().square().mean(1).cpu())
    error = torch.cat(errors)
    return error.mean().item(), (error.std() / math.sqrt(samples)).item(), seconds / (samples * d) * 1e6


def provenance_of(
    matrix: torch.Tensor, recipe: Recipe, samples: int = 8192, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """The recipe with the measured mse at its own beam (evaluation seed = recipe seed + 1)."""
    mse, error, _ = evaluate_mapping(matrix, recipe.beam, samples, recipe.seed + 1, recipe.lam, device)
    return {**asdict(recipe), "mse": mse, "standard_error": error, "samples": samples}


def write_mappings(path: Path, matrices: dict[LiftFormat, tuple[torch.Tensor, dict[str, Any]]]) -> None:
    """Write a safetensors file of matrices, with their provenance as one JSON object per format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {str(fmt): matrix.float().cpu().contiguous() for fmt, (matrix, _) in matrices.items()}
    metadata = {str(fmt): json.dumps(made, sort_keys=True) for fmt, (_, made) in matrices.items()}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, unfinished, metadata)
        unfinished.chmod(0o644)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_mapping(path: Path, fmt: LiftFormat) -> torch.Tensor:
    """M float32 (d, D) of a file of `write_mappings`; QuantizeError when it is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            matrix: torch.Tensor = file.get_tensor(str(fmt))
    except (SafetensorError, OSError) as error:
        raise QuantizeError(f"{path}: cannot read the mapping matrix of {fmt}: {error}") from error
    shape = (fmt.subspace_dim, fmt.lifted_dim)
    if tuple(matrix.shape) != shape or matrix.dtype != torch.float32 or not bool(matrix.isfinite().all()):
        raise QuantizeError(
            f"{path}: the mapping matrix of {fmt} is not a finite float32 matrix of shape {shape}"
        )
    return matrix


def read_provenance(path: Path) -> dict[str, dict[str, Any]]:
    """Provenance per format name of a mapping file; raises QuantizeError when it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
        return {name: json.loads(text) for name, text in metadata.items()}
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise QuantizeError(f"{path}: cannot read the mapping matrices: {error}") from error


@lru_cache(maxsize=1)
def _shipped_provenance() -> dict[str, dict[str, Any]]:
    return read_provenance(SHIPPED)


def _random_start(fmt: LiftFormat, recipe: Recipe) -> torch.Tensor:
    """Orthonormal rows, or rows of unit norm under a Gaussian window around the diagonal; float64 (d, D)."""
    d, big = fmt.subspace_dim, fmt.lifted_dim
    noise = torch.randn(d, big, generator=torch.Generator().manual_seed(recipe.seed), dtype=torch.float64)
    if recipe.band <= 0:
        orthonormal: torch.Tensor = torch.linalg.qr(noise.T)[0].T
        return orthonormal
    distance = torch.arange(d)[:, None] - torch.arange(big)[None] * (d / big)
    windowed = noise * torch.exp(-((distance / recipe.band) ** 2))
    unit: torch.Tensor = windowed / windowed.norm(dim=1, keepdim=True)
    return unit


def _on_the_spot(fmt: LiftFormat) -> Recipe:
    return replace(ON_THE_SPOT, lam=suggested_lam(fmt))


def _cache_path(fmt: LiftFormat) -> Path:
    made = _on_the_spot(fmt)
    name = f"LQ-{fmt.lifted_dim}-{fmt.subspace_dim}-{made.steps}-{made.beam}-{made.lam}.safetensors"
    return env.cache_dir() / "mapping" / name


def reporter(title: str) -> Callable[[int, int], None]:
    """A progress callback that writes a title, then a line every twenty steps, to stderr."""

    def report(step: int, steps: int) -> None:
        if step == 1:
            print(f"liftc: {title}", file=sys.stderr, flush=True)
        if step % 20 == 0 or step == steps:
            print(f"liftc: step {step} of {steps}", file=sys.stderr, flush=True)

    return report


def _wait(tensor: torch.Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
