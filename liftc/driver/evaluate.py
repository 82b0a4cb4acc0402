"""eval: quality of an artifact (or of a model folder) on text files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from liftc.artifact import MANIFEST
from liftc.capture import capture
from liftc.driver.layers import BlockProbe, layer_errors, layer_report, layer_table, outputs_of
from liftc.errors import LiftcError
from liftc.evaluate import evaluate
from liftc.passes.base import PassPipeline
from liftc.passes.canonicalize import Canonicalize
from liftc.quant.calibration import cut_windows, read_text
from liftc.runtime.loader import load
from liftc.runtime.module import CausalLM
from liftc.runtime.tokenizer import Tokenizer

LAYER_WINDOWS = 4
"""Windows that the per-layer report looks at."""


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
    texts: Sequence[Path],
    *,
    reference: Path | None = None,
    context: int = 2048,
    windows: int | None = None,
    layers: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Perplexity on each text, and KL divergence and top-1 agreement when `reference` is given; see
    liftc.evaluate. layers: also the error of every decoder block, on the first windows of the first text.

    Windows are cut from the start of a text without overlap and without special tokens. The answer holds
    "texts", one entry per file; the figures of a single text also stand beside it.
    """
    if context < 2 or (windows is not None and windows < 1):
        raise LiftcError(f"--ctx must be at least 2 and --windows at least 1, got {context} and {windows}")
    if layers and reference is None:
        raise LiftcError("--layers compares with the original model; name its folder with --reference")
    if not texts:
        raise LiftcError("name at least one text file with --text")
    tokenizer = Tokenizer(artifact)
    cut = [_windows(tokenizer, text, context, windows) for text in texts]  # before the models are loaded
    model = load_any(artifact, dtype, device)
    if context > model.max_length:
        raise LiftcError(f"--ctx {context} is longer than the {model.max_length} tokens this model can read")
    original = load_any(reference, dtype, device) if reference is not None else None
    started = time.perf_counter()
    answer: dict[str, Any] = {"texts": [], "text": ""}
    for path, part in zip(texts, cut):
        figures = evaluate(part, model, original, progress=progress).to_json()
        answer["texts"].append({"file": str(path), **figures})
        answer["text"] += (f"{path}\n" if len(texts) > 1 else "") + _table(figures) + "\n"
    if len(texts) == 1:
        answer |= figures
    if layers and original is not None and reference is not None:
        probes = (
            BlockProbe(model, outputs_of(artifact, model)),
            BlockProbe(original, outputs_of(reference, original)),
        )
        errors = layer_errors(cut[0][:LAYER_WINDOWS], *probes, progress=progress)
        answer["layers"] = layer_report(artifact, errors)
        answer["text"] += "\n" + layer_table(answer["layers"]) + "\n"
    return {**answer, "text": answer["text"].rstrip("\n"), "seconds": time.perf_counter() - started}


def _windows(tokenizer: Tokenizer, text: Path, context: int, count: int | None) -> list[torch.Tensor]:
    tokens = tokenizer.encode(read_text(text), special_tokens=False)
    try:
        return cut_windows(tokens, context, count)
    except LiftcError as error:
        raise LiftcError(f"{text}: {error}") from error


def _table(values: dict[str, float | int | None]) -> str:
    return "\n".join(
        f"{name:22s} {value:.4f}" if isinstance(value, float) else f"{name:22s} {value}"
        for name, value in values.items()
        if value is not None
    )
