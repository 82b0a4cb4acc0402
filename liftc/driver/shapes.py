"""Shapes of the linears of a model as they reach the kernels, after row-group fusion."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from liftc.bundle import Work
from liftc.errors import LiftcError
from liftc.format import LiftFormat
from liftc.program import Program
from liftc.tensor_names import packed_parts

MODELS: dict[str, tuple[tuple[str, int, int], ...]] = {
    "llama-2-7b": (("qkv", 12288, 4096), ("o", 4096, 4096), ("gate+up", 22016, 4096), ("down", 4096, 11008)),
    "llama-2-13b": (("qkv", 15360, 5120), ("o", 5120, 5120), ("gate+up", 27648, 5120), ("down", 5120, 13824)),
    "llama-2-70b": (("qkv", 10240, 8192), ("o", 8192, 8192), ("gate+up", 57344, 8192), ("down", 8192, 28672)),
    "llama-3-8b": (("qkv", 6144, 4096), ("o", 4096, 4096), ("gate+up", 28672, 4096), ("down", 4096, 14336)),
    "smollm2-135m": (("qkv", 960, 576), ("o", 576, 576), ("gate+up", 3072, 576), ("down", 576, 1536)),
}
"""(name, out_features, in_features) of one decoder block, in the order they run."""

_SHAPE = re.compile(r"(\d{1,9})\s*[xX*,\s]\s*(\d{1,9})")
_MOST_SHAPES = 256


def program_work(program: Program) -> tuple[Work, ...]:
    """Linears of a lowered program, each shape and format once, in order of first use."""
    found: dict[Work, None] = {}
    for members in packed_parts(program).values():
        linears = [program.linears[name] for name in members]
        first = linears[0]
        if first.format is not None:
            rows = sum(linear.out_features for linear in linears)
            found[Work(str(first.format), rows, first.in_features)] = None
    return tuple(found)


def find_work(source: str, formats: Sequence[str]) -> tuple[Work, ...]:
    """The linears that MODEL_OR_SHAPES of `liftc tune` and `liftc bench kernels` names.

    source: a name of MODELS, an artifact folder (its own formats), a Hugging Face folder or .gguf file, a file
    with shapes (JSON [[OC, IC], ...], or a line "OC x IC" each), or such shapes separated by commas. formats: what
    to measure them in, default LQ-77/32. Raises LiftcError.
    """
    path = Path(source)
    if source.lower() not in MODELS and path.is_dir() and (path / "manifest.json").is_file():
        if formats:
            raise LiftcError(f"{source} is an artifact and has its own formats; leave --format out")
        return artifact_work(path)
    chosen = [str(LiftFormat.parse(text)) for text in formats or ("LQ-77/32",)]
    if source.lower() in MODELS:
        shapes = [(rows, columns) for _, rows, columns in MODELS[source.lower()]]
    elif path.is_dir() or path.suffix == ".gguf":
        return tuple(w for text in chosen for w in _model_work(path, text))
    elif path.is_file():
        shapes = _file_shapes(path)
    else:
        shapes = _text_shapes(
            source.split(","), f"{source!r} is neither a file nor a name ({', '.join(MODELS)});"
        )
    return tuple(dict.fromkeys(Work(fmt, *shape) for fmt in chosen for shape in shapes))


def artifact_work(folder: Path) -> tuple[Work, ...]:
    """Linears of an artifact, in its formats; raises LiftcError."""
    from liftc.text import parse_program

    try:
        text = (folder / "program.txt").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LiftcError(f"cannot read {folder / 'program.txt'}: {error}") from None
    work = program_work(parse_program(text))
    if not work:
        raise LiftcError(f"{folder} has no lowered linear")
    return work


def _model_work(model: Path, fmt: str) -> tuple[Work, ...]:
    """A model that is not compiled yet: its graphs are captured and lowered, weights are not read."""
    from liftc.capture import capture
    from liftc.passes.base import PassPipeline
    from liftc.passes.pipeline import after_quantize, before_quantize

    passes = [*before_quantize(LiftFormat.parse(fmt)), *after_quantize()]
    work = program_work(PassPipeline(passes).apply(capture(model).program))
    if not work:
        raise LiftcError(f"{model} has no linear that would be lowered")
    return work


def _file_shapes(path: Path) -> list[tuple[int, int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LiftcError(f"cannot read {path}: {error}") from None
    if text.lstrip().startswith("["):
        try:
            rows = [f"{a}x{b}" for a, b in json.loads(text)]
        except (ValueError, TypeError, RecursionError):
            raise LiftcError(f"{path} is not a JSON list of [out_features, in_features]") from None
        return _text_shapes(rows, f"{path}:")
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return _text_shapes([line for line in lines if line], f"{path}:")


def _text_shapes(texts: Sequence[str], where: str) -> list[tuple[int, int]]:
    shapes = []
    for text in texts:
        match = _SHAPE.fullmatch(text.strip())
        if not match or not int(match[1]) or not int(match[2]):
            raise LiftcError(
                f"{where} cannot read the shape {text.strip()!r}; write out_features x in_features"
            )
        shapes.append((int(match[1]), int(match[2])))
    if not 0 < len(shapes) <= _MOST_SHAPES:
        raise LiftcError(f"{where} {len(shapes)} shapes; give 1 to {_MOST_SHAPES}")
    return shapes
