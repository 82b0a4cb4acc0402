"""opt: run a pipeline of passes over a program text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from liftc.errors import LiftcError
from liftc.passes.base import PassPipeline
from liftc.passes.pipeline import parse_pipeline
from liftc.passes.registry import describe_passes
from liftc.text import parse_program, print_program


def optimise_text(
    program: Path | None, pipeline: str, *, dump_ir: Path | None = None, list_passes: bool = False
) -> dict[str, Any]:
    """Parse, verify, apply the passes of `pipeline` ("a,b{option=1}"), print. With list_passes: their names."""
    if list_passes:
        return {"passes": describe_passes(), "text": "\n".join(describe_passes())}
    if program is None:
        raise LiftcError("give a program text to work on, or --list to see the passes")
    try:
        source = program.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LiftcError(f"cannot read {program}: {error}") from error
    result = PassPipeline(parse_pipeline(pipeline), dump_dir=dump_ir).apply(parse_program(source))
    text = print_program(result)
    return {"program": text, "text": text}
