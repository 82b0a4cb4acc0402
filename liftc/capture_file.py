"""A captured model on disk: its program as text and the buffers its model computes; the weights stay where they are.

Capture needs the newest torch and transformers, quantization does not: capture on one machine, quantize on
another that has the GPU.

    save_captured(capture("models/smollm2"), "smollm2.captured")
    captured = load_captured("smollm2.captured", "models/smollm2")
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from liftc.artifact import write_json
from liftc.capture import Captured
from liftc.checkpoint import CastCheckpoint, OverlayCheckpoint, load_json, open_checkpoint
from liftc.errors import CaptureError, CheckpointError
from liftc.text import parse_program, print_program
from liftc.verify import verify

VERSION = 1
PROGRAM, BUFFERS, FACTS = "program.txt", "buffers.safetensors", "captured.json"


def save_captured(captured: Captured, folder: str | Path) -> Path:
    """Write a captured model folder; raises CaptureError for a live module, whose weights are on no disk."""
    if captured.folder is None:
        raise CaptureError("only a model folder can be captured to disk; save the module's weights first")
    assert isinstance(captured.checkpoint, OverlayCheckpoint)
    out = Path(folder)
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: value.contiguous() for name, value in captured.checkpoint.extra.items()}, out / BUFFERS
        )
        (out / PROGRAM).write_text(print_program(captured.program), encoding="utf-8")
        write_json(out / FACTS, {
            "version": VERSION, "kind": captured.kind, "config": captured.config,
            "aliases": dict(captured.checkpoint.aliases),
        })  # fmt: skip
    except (OSError, SafetensorError) as error:
        raise CaptureError(f"cannot write {out}: {error}") from error
    return out


def load_captured(folder: str | Path, model: str | Path) -> Captured:
    """The captured model of `folder` over the weights of the model folder `model`.

    Raises CaptureError for a folder that save_captured did not write, CheckpointError for weights that are not
    the program's.
    """
    where, weights = Path(folder), Path(model)
    try:
        facts = load_json(where / FACTS)
        text = (where / PROGRAM).read_text(encoding="utf-8")
        buffers = load_file(where / BUFFERS)
    except (OSError, UnicodeDecodeError, SafetensorError, CheckpointError) as error:
        raise CaptureError(
            f"{where} is not a captured model ({error}); write it with liftc capture"
        ) from error
    if facts.get("version") != VERSION or facts.get("kind") not in ("causal-lm", "module"):
        raise CaptureError(f"{where} was captured by another version of liftc; capture the model again")
    program = parse_program(text)
    verify(program)
    aliases = facts.get("aliases")
    if not isinstance(aliases, dict) or not all(isinstance(v, str) for v in aliases.values()):
        raise CaptureError(f"{where / FACTS}: aliases must map names to names; capture the model again")
    stored = open_checkpoint(weights)
    dtypes = {name: spec.dtype for name, spec in program.tensors.items() if name not in buffers}
    checkpoint = OverlayCheckpoint(CastCheckpoint(stored, dtypes), buffers, aliases)
    for name, spec in program.tensors.items():
        if checkpoint.spec(name) != spec:
            raise CheckpointError(
                f"{weights}: tensor {name} is {checkpoint.spec(name)}, the captured program needs {spec}; give the "
                "folder that was captured"
            )
    return Captured(program, checkpoint, facts.get("config"), facts["kind"], weights)
