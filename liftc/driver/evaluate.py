"""eval: quality of an artifact (or of a model folder) on a text file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from liftc.artifact import MANIFEST
from liftc.capture import capture
from liftc.errors import LiftcError
from liftc.evaluate import evaluate
from liftc.passes.base import PassPipeline
from liftc.passes.canonicalize import Canonicalize
from liftc.quant.calibration import cut_windows, read_text
from liftc.runtime.loader import load
from liftc.runtime.module import CausalLM
from liftc.runtime.tokenizer import Tokenizer


def load_dense(folder: Path, dtype: str | None = None, device: str | None = None) -> CausalLM:
    """A model folder as a CausalLM with its original weights, from its captured graphs."""
    captured = capture(folder, dtype=dtype)
    if captured.kind != "causal-lm":
        raise LiftcError(f"{folder} is not a causal language model; perplexity is defined for those only")
    program = PassPipeline([Canonicalize()]).apply(captured.program)
    place = torch.device(device or "cpu")
    tensors = {name: captured.checkpoint.tensor(name).to(place) for name in program.tensors}
    return CausalLM(program.graphs, tensors, captured.config or {}, place)


def load_any(path: Path, dtype: str | None = None, device: str | None = None) -> CausalLM:
    """An artifact, or a model folder with its original weights, as a CausalLM."""
    if (path / MANIFEST).is_file():
        model = load(path, device)
        if not isinstance(model, CausalLM):
            raise LiftcError(f"{path} is not a causal language model; perplexity is defined for those only")
        return model
    return load_dense(path, dtype, device)


def evaluate_artifact(
    artifact: Path,
    text: Path,
    *,
    reference: Path | None = None,
    context: int = 2048,
    windows: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Perplexity, and KL divergence and top-1 agreement when `reference` is given; see liftc.evaluate.

    Windows are cut from the start of the text without overlap and without special tokens.
    """
    if context < 2 or (windows is not None and windows < 1):
        raise LiftcError(f"--ctx must be at least 2 and --windows at least 1, got {context} and {windows}")
    model = load_any(artifact, dtype, device)
    original = load_any(reference, dtype, device) if reference is not None else None
    tokens = Tokenizer(artifact).encode(read_text(text), special_tokens=False)
    started = time.perf_counter()
    result = evaluate(cut_windows(tokens, context, windows), model, original, progress=progress)
    return {**result.to_json(), "text": _table(result.to_json()), "seconds": time.perf_counter() - started}


def _table(values: dict[str, float | int | None]) -> str:
    return "\n".join(
        f"{name:22s} {value:.4f}" if isinstance(value, float) else f"{name:22s} {value}"
        for name, value in values.items()
        if value is not None
    )
