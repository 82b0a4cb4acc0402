"""opt: run a pipeline of passes over a program text."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from liftc.errors import LiftcError
from liftc.passes.base import PassPipeline
from liftc.passes.pipeline import parse_pipeline
from liftc.passes.registry import PASSES, get_pass
from liftc.text import parse_program, print_program


def optimise_text(
    program: Path | None, pipeline: str, *, dump_ir: Path | None = None, list_passes: bool = False
) -> dict[str, Any]:
    """Parse, verify, apply the passes of `pipeline` ("a,b{option=1}"), print. With list_passes: their names."""
    if list_passes:
        lines = [_describe(name) for name in PASSES]
        return {"passes": list(PASSES), "text": "\n".join(lines)}
    if program is None:
        raise LiftcError("give a program text to work on, or --list to see the passes")
    try:
        source = program.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LiftcError(f"cannot read {program}: {error}") from error
    result = PassPipeline(parse_pipeline(pipeline), dump_dir=dump_ir).apply(parse_program(source))
    text = print_program(result)
    return {"program": text, "text": text}


def _describe(name: str) -> str:
    cls = get_pass(name)
    options = ", ".join(f.name.replace("_", "-") for f in fields(cls) if f.init)
    summary = (cls.__doc__ or "").strip().splitlines()[0]
    return f"{name}{{{options}}}: {summary}" if options else f"{name}: {summary}"
