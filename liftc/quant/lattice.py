"""The library behind `liftc lattice`: measure, learn and show mapping matrices."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from liftc.errors import QuantizeError
from liftc.format import LiftFormat
from liftc.quant import mapping
from liftc.quant.encode import DEFAULT_BEAM

EVALUATION_SEED = 123


def default_device() -> torch.device:
    """The GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device | str) -> str:
    """Name of the GPU or of the processor architecture, for records."""
    if torch.device(device).type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"cpu {platform.machine()}"


def bound(fmt: LiftFormat) -> float:
    """Rate-distortion bound of unit Gaussian weights at D/d bits: no code has a lower mse than 2^(-2 D/d)."""
    return float(2.0 ** (-2.0 * float(fmt.bit_width)))


def lattice_eval(
    fmt: LiftFormat,
    beam: int = DEFAULT_BEAM,
    samples: int = 16384,
    seed: int = EVALUATION_SEED,
    *,
    lam: float | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Encode `samples` Gaussian vectors with the format's matrix and measure the error per weight.

    Keys: format, bits, beam, lam, samples (vectors), weights, seed, mse, standard_error, bound,
    seconds_per_million_weights, device. lam None: the one the matrix was learned with. Raises QuantizeError
    as `encode` does.
    """
    matrix = mapping.load_mapping(fmt)
    chosen = torch.device(device) if device is not None else default_device()
    used = mapping.lam_of(fmt) if lam is None else lam
    mse, error, seconds = mapping.evaluate_mapping(matrix, beam, samples, seed, used, chosen)
    return {
        "format": str(fmt),
        "bits": float(fmt.bit_width),
        "beam": beam,
        "lam": used,
        "samples": samples,
        "weights": samples * fmt.subspace_dim,
        "seed": seed,
        "mse": mse,
        "standard_error": error,
        "bound": bound(fmt),
        "seconds_per_million_weights": seconds,
        "device": device_name(chosen),
    }


def lattice_train(
    fmt: LiftFormat,
    output: Path,
    recipe: mapping.Recipe | None = None,
    *,
    device: torch.device | str | None = None,
    samples: int = 16384,
) -> dict[str, Any]:
    """Learn a matrix and add it to the safetensors file `output` (other formats in it are kept).

    Returns the provenance written with it. Raises QuantizeError when `output` exists and is not such a file.
    """
    chosen = torch.device(device) if device is not None else default_device()
    used = recipe if recipe is not None else replace(mapping.Recipe(), lam=mapping.suggested_lam(fmt))
    matrices = read_all(output) if output.exists() else {}
    matrix = mapping.learn_mapping(fmt, used, chosen, progress=mapping.reporter(f"learning {fmt}"))
    made = mapping.provenance_of(matrix, used, samples, chosen)
    made["device"] = device_name(chosen)
    matrices[fmt] = (matrix, made)
    mapping.write_mappings(output, matrices)
    return {"format": str(fmt), "output": str(output), **made}


def lattice_show(fmt: LiftFormat | None = None) -> dict[str, Any]:
    """Provenance and shape of a format's matrix; without a format, one line per shipped matrix."""
    if fmt is None:
        rows = [{"format": str(f), **mapping.mapping_provenance(f)} for f in mapping.shipped_formats()]
        return {"formats": rows}
    matrix = mapping.load_mapping(fmt).double()
    singular = torch.linalg.svdvals(matrix)
    return {
        "format": str(fmt),
        "bits": float(fmt.bit_width),
        "shape": list(matrix.shape),
        "bound": bound(fmt),
        "row_norm": matrix.norm(dim=1).mean().item(),
        "column_norms": [matrix.norm(dim=0).min().item(), matrix.norm(dim=0).max().item()],
        "singular_values": [singular[-1].item(), singular[0].item()],
        **mapping.mapping_provenance(fmt),
    }


def read_all(path: Path) -> dict[LiftFormat, tuple[torch.Tensor, dict[str, Any]]]:
    """Every matrix of a mapping file with its provenance; raises QuantizeError when one is damaged."""
    if not path.is_file():
        raise QuantizeError(f"{path}: there is no such mapping file")
    made = mapping.read_provenance(path)
    formats = {LiftFormat.parse(name): record for name, record in made.items()}
    return {fmt: (mapping.read_mapping(path, fmt), record) for fmt, record in formats.items()}
