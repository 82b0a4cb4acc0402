"""compile: model -> artifact. Capture, passes, quantize block by block, passes, kernels, files."""

from __future__ import annotations

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
from liftc.capture_file import load_captured
from liftc.codegen.build import check_toolchain
from liftc.driver.calibrate import (
    CalibrationInputs,
    encoder_inputs,
    example_module_inputs,
    language_model_inputs,
)
from liftc.driver.card import model_card
from liftc.driver.inspect import inspect_artifact
from liftc.driver.kernels import choose_kernels, place_kernels, record_folders
from liftc.driver.quantize import EFFORTS, join_ranks, quantize_program
from liftc.driver.shapes import program_work
from liftc.driver.weights import artifact_tensors
from liftc.errors import QuantizeError
from liftc.format import LiftFormat
from liftc.graphjson import graph_to_json
from liftc.kernel_records import read_folders
from liftc.passes.base import PassPipeline
from liftc.passes.pipeline import after_quantize, before_quantize
from liftc.plan import Plan, plan_program
from liftc.program import Program
from liftc.quant.calibration import CalibrationRequest, budget_windows
from liftc.quant.result import Quantized, QuantizeOptions
from liftc.runtime.loader import FOLDED
from liftc.text import print_program

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json",
    "merges.txt", "vocab.txt", "added_tokens.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class CompileOptions:
    """Options of `liftc compile`; the defaults are the command line's.

    bits: bits per weight of the signs, rounded to D/32 (2.4 unless `formats` gives one for all). formats:
    "LQ-D/d" for all linears or "REGEX=LQ-D/d" for the matching ones. targets: "llvm", "cuda". archs: "sm_89",
    ... for cuda. cpu: "native" or an x86-64 level for llvm. calibration_tokens: a budget that replaces
    calibration_windows. effort: a key of EFFORTS, which gives calibration_tokens, beam, epochs, dense_epochs,
    tune_epochs and fisher (QuantizeOptions) where they are None. calibration_length: tokens per window, by default 512
    for language models and 32, about a sentence, for encoders. captured: folder that `liftc capture` wrote.
    resume: refuse to start over. quantize_only: stop before kernels are built; the same call without it
    continues, on a machine that has TVM. device: "cuda" or "cpu", where quantization runs.
    activation_memory: bytes of hidden states held in memory. records: folder of more kernel measurements.
    """

    bits: float | None = None
    formats: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("llvm",)
    archs: tuple[str, ...] = ()
    cpu: str = "native"
    calibration: Path | None = None
    calibration_windows: int | None = None
    calibration_length: int | None = None
    calibration_tokens: int | None = None
    calibration_field: str | None = None
    chat_template: bool = False
    chat_wrap: bool = False
    effort: str = "balanced"
    beam: int | None = None
    epochs: int | None = None
    dense_epochs: int | None = None
    tune_epochs: int | None = None
    fisher: bool | None = None
    damp: float = 0.01
    seed: int = 0
    dtype: str | None = None
    captured: Path | None = None
    include: str | None = None
    exclude: str | None = None
    dump_ir: Path | None = None
    overwrite: bool = False
    resume: bool = False
    quantize_only: bool = False
    device: str | None = None
    activation_memory: int | None = None
    records: Path | None = None
    progress: bool = True
    command: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if self.effort not in EFFORTS:
            raise QuantizeError(f"there is no effort {self.effort!r}: choose from {', '.join(EFFORTS)}")

    def quantize_options(self) -> QuantizeOptions:
        """What the effort says, where no option of its own says otherwise."""
        effort = EFFORTS[self.effort]

        def pick(given: int | None, usual: int) -> int:
            return usual if given is None else given

        return QuantizeOptions(
            beam=pick(self.beam, effort.beam), damp=self.damp, epochs=pick(self.epochs, effort.epochs),
            dense_epochs=pick(self.dense_epochs, effort.dense_epochs),
            tune_epochs=pick(self.tune_epochs, effort.tune_epochs), seed=self.seed,
            fisher=effort.fisher if self.fisher is None else self.fisher,
        )  # fmt: skip

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
    when repeated with the same arguments. Started by torchrun, the processes quantize together and the first
    one writes the artifact. Raises LiftcError subclasses for anything the user can mend.
    """
    options = replace(options or CompileOptions(), **changes)
    out = Path(output)
    options.formats_by_pattern(), options.quantize_options()
    partial = out.with_name(out.name + ".partial")
    ranks = join_ranks(options.device)
    if ranks.first:
        recover_replaced(out, partial)
    ranks.barrier()
    check_output(out, overwrite=options.overwrite)
    if not options.quantize_only:
        check_toolchain(options.targets, options.archs, options.cpu)
        read_folders(record_folders(options.records))  # a bad line is found now, not after quantizing
    started = time.perf_counter()
    job = prepare_job(model, options, example_inputs)
    quantized = quantize_program(
        job.captured, job.program, job.inputs, options.quantize_options(), partial, device=options.device,
        activation_memory=options.activation_memory, resume=options.resume, progress=options.progress,
    )  # fmt: skip
    if options.quantize_only or not ranks.first:
        return partial
    after = PassPipeline(after_quantize(), dump_dir=options.dump_ir or env.dump_dir(), first=job.passes + 1)
    lowered = after.apply(job.program)
    with staging(out, partial, overwrite=options.overwrite) as stage:
        _write(stage, job.captured, lowered, quantized, job.inputs, options)
    shutil.rmtree(partial, ignore_errors=True)
    if options.progress:
        print(f"compiled {out} in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return out


@dataclass(frozen=True)
class Job:
    """A captured model, its program before quantization (after that many passes), and its calibration set."""

    captured: Captured
    program: Program
    inputs: CalibrationInputs
    passes: int


def prepare_job(
    model: str | Path | nn.Module,
    options: CompileOptions,
    example_inputs: Sequence[torch.Tensor] | None = None,
) -> Job:
    """Everything of compile_model that comes before quantization; raises LiftcError."""
    default, overrides = options.formats_by_pattern()
    if options.captured is not None:
        if isinstance(model, nn.Module):
            raise QuantizeError("a captured model belongs to a model folder, not to a live module")
        captured = load_captured(options.captured, model)
    else:
        captured = capture(model, example_inputs, dtype=options.dtype)
    pipeline = before_quantize(default, overrides, include=options.include, exclude=options.exclude)
    program = PassPipeline(pipeline, dump_dir=options.dump_ir or env.dump_dir()).apply(captured.program)
    if not program.linears:
        raise QuantizeError("no linear layer was selected; widen --include or drop --exclude")
    return Job(captured, program, _calibrate(captured, program, options, example_inputs), len(pipeline))


def compile_summary(model: Path, output: Path, options: CompileOptions) -> dict[str, Any]:
    """compile_model, then what `liftc inspect` says of the result."""
    started = time.perf_counter()
    path = compile_model(model, output, options)
    if path != output:
        return {"work": str(path), "seconds": time.perf_counter() - started}
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
    origins: dict[str, list[str]] = {}
    for target in options.targets:
        choices = choose_kernels(target, options.archs, options.cpu, program_work(lowered), options.records)
        place_kernels(target, options.archs, options.cpu, stage, choices)
        origins[target] = list(choices.said)
        if options.progress:
            print("\n".join(f"kernels: {text}" for text in choices.said), file=sys.stderr, flush=True)
    write_json(stage / "plan.json", plan.to_json())
    (stage / "program.txt").write_text(print_program(lowered), encoding="utf-8")
    facts = {
        "route": str(lowered.attrs.get("route", "graph")),
        "formats": {name: str(spec.format) for name, spec in lowered.linears.items()},
        "effort": options.effort, **asdict(options.quantize_options()), "calibration": inputs.description,
        "kernels": origins,
    }  # fmt: skip
    if captured.config is not None:
        write_json(
            stage / "config.json", {**captured.config, "quantization_config": _quantization(plan, facts)}
        )
    if captured.folder is not None:
        for name in TOKENIZER_FILES:
            if (captured.folder / name).is_file():
                shutil.copyfile(captured.folder / name, stage / name)
    write_json(stage / "report.json", quantized.to_json())
    name = lowered.name if captured.folder is None else captured.folder.name
    card = model_card(name, plan, facts, quantized)
    (stage / "README.md").write_text(card, encoding="utf-8")
    write_manifest(
        stage,
        {"liftc": __version__, "kind": captured.kind, "targets": list(options.targets),
         "command": list(options.command), "options": facts, "versions": _versions(), "source": name,
         "run": {"seconds": quantized.seconds, "peak_bytes": quantized.memory}},
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
    length = options.calibration_length or (512 if captured.kind == "causal-lm" else 32)
    budget, windows = options.calibration_tokens, options.calibration_windows
    if budget is not None or windows is None:
        windows = budget_windows(EFFORTS[options.effort].tokens if budget is None else budget, length)
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
