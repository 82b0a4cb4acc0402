"""Capture: a model folder, a GGUF file or a live module becomes a Program plus a lazy view of its weights.

    captured = capture("models/smollm2")                      # two graphs, prefill and decode
    captured = capture(module, example_inputs=(x,))           # one graph, forward
    captured = capture_config(config)                         # graphs only, no weights anywhere

Graphs read weights by checkpoint name and name no device: every `torch.device` in a graph is `cpu` and is to
be replaced by the loader's device. Nothing of the model's weights is read or copied here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from liftc import env
from liftc.checkpoint import Checkpoint, StateDictCheckpoint, load_json, open_checkpoint
from liftc.errors import CaptureError, CheckpointError
from liftc.opnames import ALLOWED_OPERATORS
from liftc.program import Program

__all__ = ["ALLOWED_OPERATORS", "Captured", "capture", "capture_config"]


@dataclass(frozen=True)
class Captured:
    """A captured model.

    program: its graphs. checkpoint: every tensor they read, tied names and computed buffers included.
    config: config.json as it was read, or None. kind: "causal-lm" (graphs prefill and decode) or "module"
    (graph forward). folder: where the tokenizer files lie, or None.
    """

    program: Program
    checkpoint: Checkpoint
    config: dict[str, Any] | None
    kind: str
    folder: Path | None = None


def capture(
    model: str | Path | torch.nn.Module,
    example_inputs: Sequence[Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    dtype: str | None = None,
    attention: str | None = None,
) -> Captured:
    """Capture a Hugging Face folder, a GGUF file, or a module.

    model: folder with config.json and safetensors; a .gguf file (converted once into the cache folder); a
        transformers model (captured from its config, weights shared); any module, with example_inputs.
    example_inputs, dynamic_shapes: as in torch.export, for modules only.
    dtype: "float32", "bfloat16" or "float16" to work in; default: what the config states. For HF models only.
    attention: "sdpa" or "eager"; default: sdpa where the model allows it.
    Raises CaptureError when the model cannot become a graph, CheckpointError for unreadable or
    foreign weights.
    """
    if isinstance(model, torch.nn.Module):
        return _capture_live(model, example_inputs, dynamic_shapes, dtype, attention)
    if example_inputs is not None or dynamic_shapes is not None:
        raise CaptureError(
            "example_inputs and dynamic_shapes belong to modules; a model folder needs neither"
        )
    path = Path(model)
    folder = _converted(path) if path.suffix == ".gguf" else path
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such model folder")
    settings = load_json(folder / "config.json")
    checkpoint = open_checkpoint(folder)
    from liftc.capture_hf import capture_hf, parse_config

    where = str(folder)
    config = parse_config(settings, where)
    layers = getattr(config, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > len(checkpoint.names()):
        raise CheckpointError(
            f"{where}: config.json states {layers} layers but the checkpoint has {len(checkpoint.names())} "
            "tensors; the config and the weights are not of the same model"
        )
    captured = capture_hf(config, checkpoint, settings, where, dtype, attention)
    return replace(captured, folder=folder)


def capture_config(config: Any, *, dtype: str | None = None, attention: str | None = None) -> Captured:
    """Capture the graphs of a config without any weights: planning a 70B model needs no download.

    config: a transformers config object or the dict of a config.json. The result's checkpoint holds only
    the buffers that the model computes, such as rotary frequencies. Raises CaptureError.
    """
    from liftc.capture_hf import capture_hf, parse_config

    settings = dict(config) if isinstance(config, Mapping) else config.to_dict()
    return capture_hf(parse_config(settings, "config"), None, settings, "config", dtype, attention)


def _capture_live(
    model: torch.nn.Module,
    example_inputs: Sequence[Any] | None,
    dynamic_shapes: Any,
    dtype: str | None,
    attention: str | None,
) -> Captured:
    if example_inputs is not None:
        from liftc.capture_module import capture_module

        if dtype is not None or attention is not None:
            raise CaptureError(
                "dtype and attention apply to model folders; convert the module itself instead"
            )
        program, checkpoint = capture_module(model, example_inputs, dynamic_shapes)
        return Captured(program, checkpoint, None, "module")
    config = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        raise CaptureError(
            f"{type(model).__name__} needs example_inputs: a tuple of the tensors forward() takes"
        )
    from liftc.capture_hf import capture_hf, parse_config

    assert config is not None
    if getattr(model, "base_model", model) is not model and not hasattr(model, "generate"):
        raise CaptureError(f"{type(model).__name__} has a head of its own and needs example_inputs")
    settings = config.to_dict() | {"architectures": [type(model).__name__]}
    return capture_hf(
        parse_config(settings, type(model).__name__),
        StateDictCheckpoint(model),
        settings,
        type(model).__name__,
        dtype or str(next(model.parameters()).dtype).removeprefix("torch."),
        attention,
    )


def _converted(path: Path) -> Path:
    """Folder with the converted GGUF file, made on first use; the key is path, size and time of change."""
    from liftc.gguf import convert_gguf

    try:
        stat = path.resolve().stat()
    except OSError:
        raise CheckpointError(f"{path}: no such GGUF file") from None
    key = hashlib.sha256(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = env.cache_dir() / "gguf" / f"{path.stem}-{key}"
    if not folder.is_dir():
        convert_gguf(path, folder)
    return folder
