"""compile: model -> artifact. Capture, passes, quantize block by block, passes, kernels, files."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from liftc import __version__, env
from liftc.artifact import check_output, recover_replaced, save_shards, staging, write_json, write_manifest
from liftc.capture import Captured, capture
from liftc.codegen.build import check_toolchain
from liftc.driver.calibrate import (
    CalibrationInputs,
    digest,
    encoder_inputs,
    example_module_inputs,
    language_model_inputs,
)
from liftc.driver.card import model_card
from liftc.driver.inspect import inspect_artifact
from liftc.driver.kernels import place_kernels
from liftc.driver.weights import artifact_tensors
from liftc.errors import ArtifactError, QuantizeError
from liftc.format import LiftFormat
from liftc.graphjson import graph_to_json
from liftc.passes.base import PassPipeline
from liftc.passes.pipeline import after_quantize, before_quantize
from liftc.plan import Plan, plan_program
from liftc.program import Program
from liftc.quant.blocks import BlockRunner
from liftc.quant.calibration import CalibrationRequest, budget_windows
from liftc.quant.mapping import load_mapping
from liftc.quant.stream import Quantized, QuantizeOptions, StreamQuantizer
from liftc.runtime.loader import FOLDED
from liftc.text import print_program

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json",
    "merges.txt", "vocab.txt", "added_tokens.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


EFFORTS = {"fast": 16, "balanced": 64, "best": 1024}
"""Beam width of the encoder by --effort; its time grows about linearly with it (docs/encoder.md)."""


@dataclass(frozen=True)
class CompileOptions:
    """Options of `liftc compile`; the defaults are the command line's.

    bits: bits per weight of the signs, rounded to D/32 (2.4 unless `formats` gives one for all). formats:
    "LQ-D/d" for all linears or "REGEX=LQ-D/d" for the matching ones. targets: "llvm", "cuda". archs: "sm_89",
    ... for cuda. cpu: "native" or an x86-64 level for llvm. calibration_tokens: a budget that replaces
    calibration_windows. effort: a key of EFFORTS, the beam width of the
    encoder unless `beam` states one.
    """

    bits: float | None = None
    formats: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("llvm",)
    archs: tuple[str, ...] = ()
    cpu: str = "native"
    calibration: Path | None = None
    calibration_windows: int = 64
    calibration_length: int = 512
    calibration_tokens: int | None = None
    calibration_field: str | None = None
    chat_template: bool = False
    chat_wrap: bool = False
    effort: str = "balanced"
    beam: int | None = None
    damp: float = 0.01
    seed: int = 0
    dtype: str | None = None
    include: str | None = None
    exclude: str | None = None
    dump_ir: Path | None = None
    overwrite: bool = False
    progress: bool = True
    command: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if self.effort not in EFFORTS:
            raise QuantizeError(f"there is no effort {self.effort!r}: choose from {', '.join(EFFORTS)}")

    @property
    def beam_width(self) -> int:
        """`beam`, or that of the effort."""
        return EFFORTS[self.effort] if self.beam is None else self.beam

    def formats_by_pattern(self) -> tuple[LiftFormat, dict[str, LiftFormat]]:
        """(format of all linears, regex -> format); raises FormatError and QuantizeError."""
        default: LiftFormat | None = None
        overrides: dict[str, LiftFormat] = {}
        for text in self.formats:
            pattern, equals, fmt = text.rpartition("=")
            if equals:
                overrides[pattern] = LiftFormat.parse(fmt)
            elif default is None:
                default = LiftFormat.parse(fmt)
            else:
                raise QuantizeError(f"--format gives two formats for all linears, {default} and {fmt}")
        if default is not None and self.bits is not None:
            raise QuantizeError("give either --bits or one --format for all linears, not both")
        return default or LiftFormat.from_bits(2.4 if self.bits is None else self.bits), overrides


def compile_model(
    model: str | Path | nn.Module,
    output: str | Path,
    options: CompileOptions | None = None,
    *,
    example_inputs: Sequence[torch.Tensor] | None = None,
    **changes: Any,
) -> Path:
    """Compile a model into an artifact folder and return its path.

    model: Hugging Face folder, .gguf file, or any module (then example_inputs are its positional inputs and
    also the calibration set). Keyword arguments override fields of `options`. An interrupted call continues
    when repeated with the same arguments. Raises LiftcError subclasses for anything the user can mend.
    """
    options = replace(options or CompileOptions(), **changes)
    out = Path(output)
    default, overrides = options.formats_by_pattern()
    quantize = QuantizeOptions(beam=options.beam_width, damp=options.damp, seed=options.seed)
    partial = out.with_name(out.name + ".partial")
    recover_replaced(out, partial)
    check_output(out, overwrite=options.overwrite)
    check_toolchain(options.targets, options.archs, options.cpu)
    started = time.perf_counter()
    captured = capture(model, example_inputs, dtype=options.dtype)
    pipeline = before_quantize(default, overrides, include=options.include, exclude=options.exclude)
    dump = options.dump_ir or env.dump_dir()
    program = PassPipeline(pipeline, dump_dir=dump).apply(captured.program)
    if not program.linears:
        raise QuantizeError("no linear layer was selected; widen --include or drop --exclude")
    inputs = _calibrate(captured, program, options, example_inputs)
    _resume_or_clear(partial, _fingerprint(captured, program, inputs, quantize), announce=options.progress)
    runner = BlockRunner(program.graphs[inputs.graph], inputs.sequences, inputs.shared, inputs.scratch)
    quantized = StreamQuantizer(
        program, inputs.graph, captured.checkpoint, runner, quantize, partial / "quantized"
    ).run(progress=options.progress)
    after = PassPipeline(after_quantize(), dump_dir=dump, first=len(pipeline) + 1)
    lowered = after.apply(program)
    with staging(out, partial, overwrite=options.overwrite) as stage:
        _write(stage, captured, lowered, quantized, inputs, options)
    shutil.rmtree(partial, ignore_errors=True)
    if options.progress:
        print(f"compiled {out} in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return out


def compile_summary(model: Path, output: Path, options: CompileOptions) -> dict[str, Any]:
    """compile_model, then what `liftc inspect` says of the result."""
    started = time.perf_counter()
    path = compile_model(model, output, options)
    return {
        "output": str(path),
        "seconds": time.perf_counter() - started,
        **inspect_artifact(path, check=False),
    }


def _write(
    stage: Path,
    captured: Captured,
    lowered: Program,
    quantized: Quantized,
    inputs: CalibrationInputs,
    options: CompileOptions,
) -> None:
    plan = plan_program(lowered)
    tensors = artifact_tensors(lowered, quantized, captured.checkpoint)
    save_shards(stage, tensors, {entry.name: entry.nbytes for entry in plan.entries})
    (stage / "graph").mkdir()
    for name, graph in lowered.graphs.items():
        write_json(stage / "graph" / f"{name}.json", graph_to_json(graph))
    write_json(stage / FOLDED, {name: [op, list(args)] for name, (op, args) in lowered.folded.items()})
    for target in options.targets:
        place_kernels(target, options.archs, options.cpu, stage)
    write_json(stage / "plan.json", plan.to_json())
    (stage / "program.txt").write_text(print_program(lowered), encoding="utf-8")
    facts = {
        "route": str(lowered.attrs.get("route", "graph")),
        "formats": {name: str(spec.format) for name, spec in lowered.linears.items()},
        "beam": options.beam_width, "damp": options.damp, "seed": options.seed, "calibration": inputs.description,
    }  # fmt: skip
    if captured.config is not None:
        write_json(
            stage / "config.json", {**captured.config, "quantization_config": _quantization(plan, facts)}
        )
    if captured.folder is not None:
        for name in TOKENIZER_FILES:
            if (captured.folder / name).is_file():
                shutil.copyfile(captured.folder / name, stage / name)
    write_json(stage / "report.json", {"linears": [asdict(row) for row in quantized.report]})
    name = lowered.name if captured.folder is None else captured.folder.name
    card = model_card(name, plan, facts, quantized)
    (stage / "README.md").write_text(card, encoding="utf-8")
    write_manifest(
        stage,
        {"liftc": __version__, "kind": captured.kind, "targets": list(options.targets),
         "command": list(options.command), "options": facts, "versions": _versions(), "source": name},
    )  # fmt: skip


def _quantization(plan: Plan, facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "quant_method": "liftq",
        "version": 1,
        "bits_per_weight": round(plan.bits_per_weight, 5),
        "formats": sorted(set(facts["formats"].values())),
        "calibration": facts["calibration"],
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "apache-tvm", "apache-tvm-ffi", "transformers", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _calibrate(
    captured: Captured,
    program: Program,
    options: CompileOptions,
    example_inputs: Sequence[torch.Tensor] | None,
) -> CalibrationInputs:
    budget, length = options.calibration_tokens, options.calibration_length
    windows = options.calibration_windows if budget is None else budget_windows(budget, length)
    request = CalibrationRequest(
        options.calibration, options.calibration_field, options.chat_template, options.chat_wrap, windows, length,
        options.seed,
    )  # fmt: skip
    if captured.kind == "causal-lm":
        if captured.folder is None:
            raise QuantizeError("a live language model has no tokenizer; save it and compile the folder")
        return language_model_inputs(program, captured.folder, request)
    if example_inputs is not None:
        return example_module_inputs(program, example_inputs)
    if captured.folder is not None:
        return encoder_inputs(program, captured.folder, request)
    raise QuantizeError("a module needs example_inputs: they trace it and calibrate it")


def _fingerprint(
    captured: Captured, program: Program, inputs: CalibrationInputs, quantize: QuantizeOptions
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
        "options": asdict(quantize),
        "mapping matrices": digest([load_mapping(fmt) for fmt in formats]),
        "version": __version__,
    }


def _resume_or_clear(partial: Path, fingerprint: Mapping[str, Any], *, announce: bool) -> None:
    """Keep the finished blocks of an interrupted run of the same compile; drop anything else."""
    marker = partial / "fingerprint.json"
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
        if changed:
            shutil.rmtree(partial)
            said = f"starting over: {', '.join(changed)} differ from the interrupted run in {partial}"
        else:
            done = len(list((partial / "quantized").glob("block-*.safetensors")))
            said = f"continuing the interrupted run in {partial}: {done} blocks are done"
        if announce:
            print(said, file=sys.stderr)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        write_json(marker, fingerprint)
    except OSError as error:
        raise ArtifactError(f"cannot write {partial}: {error.strerror or error}") from error
