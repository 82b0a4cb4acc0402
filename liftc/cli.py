"""Command line: parses arguments, calls one driver function, prints its answer. Nothing else."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from liftc import __version__, cli_kernels, cli_options, env
from liftc.errors import LiftcError

Answer = dict[str, Any]


def _compile(a: argparse.Namespace) -> Answer:
    from liftc.driver.compile import CompileOptions, compile_summary

    options = CompileOptions(
        bits=a.bits, formats=tuple(a.format or ()), targets=tuple(a.target or ("llvm",)), archs=tuple(a.arch or ()),
        cpu=a.cpu, calibration=a.calibration, calibration_windows=a.calibration_windows,
        calibration_length=a.calibration_length, calibration_tokens=a.calibration_tokens,
        calibration_field=a.calibration_field, chat_template=a.chat_template, chat_wrap=a.chat_wrap,
        effort=a.effort, beam=a.beam, epochs=a.epochs, dense_epochs=a.dense_epochs, tune_epochs=a.tune_epochs,
        fisher=a.fisher,
        damp=a.damp, seed=a.seed, dtype=a.dtype, captured=a.captured, include=a.include, exclude=a.exclude,
        dump_ir=a.dump_ir, overwrite=a.overwrite, resume=a.resume, quantize_only=a.quantize_only, device=a.device,
        activation_memory=a.activation_memory, records=a.records, progress=not a.quiet,
        command=tuple(sys.argv[1:]),
    )  # fmt: skip
    return compile_summary(a.model, a.output, options)


def _capture(a: argparse.Namespace) -> Answer:
    from liftc.capture import capture
    from liftc.capture_file import save_captured

    return {"output": str(save_captured(capture(a.model, dtype=a.dtype), a.output))}


def _generate(a: argparse.Namespace) -> Answer:
    from liftc.driver.generate import generate_text

    return generate_text(
        a.artifact, a.prompt, chat=a.chat, device=a.device, max_new_tokens=a.max_new_tokens,
        temperature=a.temperature, top_k=a.top_k, top_p=a.top_p, seed=a.seed, stop=tuple(a.stop or ()),
        echo=None if a.json else sys.stdout,
    )  # fmt: skip


def _eval(a: argparse.Namespace) -> Answer:
    if a.tasks:
        from liftc.driver.lm_eval import tasks_answer

        return tasks_answer(
            a.artifact, a.tasks.split(","), reference=a.reference, task_dir=a.task_dir, few_shot=a.num_fewshot,
            limit=a.limit, chat=a.chat, device=a.device, dtype=a.dtype,
        )  # fmt: skip
    from liftc.driver.evaluate import evaluate_artifact

    return evaluate_artifact(
        a.artifact, a.text, reference=a.reference, context=a.ctx, windows=a.windows, layers=a.layers,
        device=a.device, dtype=a.dtype, progress=not a.quiet,
    )  # fmt: skip


def _inspect(a: argparse.Namespace) -> Answer:
    from liftc.driver.inspect import inspect_artifact, inspect_object

    if a.artifact.suffix == ".so":
        return inspect_object(a.artifact, check=not a.no_check)
    return inspect_artifact(a.artifact, graph=a.graph, tensors=a.tensors, check=not a.no_check)


def _opt(a: argparse.Namespace) -> Answer:
    from liftc.driver.opt import optimise_text

    return optimise_text(a.program, a.passes, dump_ir=a.dump_ir, list_passes=a.list)


def _convert(a: argparse.Namespace) -> Answer:
    from liftc.gguf import convert_gguf

    convert_gguf(a.gguf, a.output)
    return {"output": str(a.output)}


def _lattice(a: argparse.Namespace) -> Answer:
    from liftc.driver.lattice import run_lattice

    return run_lattice(
        a.action, tuple(a.format or ()), tuple(a.beam or ()), samples=a.samples, seed=a.seed, device=a.device,
        output=a.output, steps=getattr(a, "steps", None),
    )  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The parser of every subcommand."""
    parser = argparse.ArgumentParser(
        prog="liftc", description="Compile language models to fractional bit-widths."
    )
    parser.add_argument("--version", action="version", version=f"liftc {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    c = _command(commands, "compile", _compile, "quantize and compile a model into an artifact folder")
    c.add_argument("model", type=Path, help="Hugging Face folder (safetensors) or a .gguf file")
    c.add_argument("-o", "--output", type=Path, required=True, help="artifact folder to create")
    c.add_argument(
        "-b",
        "--bits",
        type=cli_options.number_of_bits,
        help="bits per weight, 1 to 8 (default 2.4); D/32 nearest to it",
    )
    c.add_argument(
        "--format",
        action="append",
        metavar="[REGEX=]LQ-D/d",
        help="format of all, or of matching linears; repeatable",
    )
    c.add_argument(
        "--target", action="append", choices=("llvm", "cuda"), help="repeatable; default llvm (this CPU)"
    )
    c.add_argument("-arch", "--arch", action="append", metavar="sm_XX", help="CUDA architectures; repeatable")
    c.add_argument("--cpu", default="native", help="CPU level: native, x86-64-v2, x86-64-v3, x86-64-v4")
    c.add_argument(
        "--records", type=Path, metavar="DIR", help="more records of liftc tune to choose kernels by"
    )
    cli_options.add_calibration(c)
    cli_options.add_quantization(c)
    c.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="activations (default: the model's)"
    )
    c.add_argument("--captured", type=Path, metavar="DIR", help="use the graphs liftc capture wrote there")
    c.add_argument(
        "--include", metavar="REGEX", help="also lower linears outside the decoder blocks that match"
    )
    c.add_argument("--exclude", metavar="REGEX", help="keep matching linears as they are")
    c.add_argument("--seed", type=int, default=0)
    c.add_argument(
        "--resume", action="store_true", help="continue an interrupted run; refuse if anything changed since"
    )
    c.add_argument(
        "--quantize-only",
        action="store_true",
        help="stop before kernels are built; the same command continues",
    )
    c.add_argument("--dump-ir", type=Path, metavar="DIR", help="write the program after every pass")
    c.add_argument(
        "--overwrite", action="store_true", help="replace an existing artifact once the new one is done"
    )

    k = _command(commands, "capture", _capture, "write a model's graphs, to quantize it where torch is older")
    k.add_argument("model", type=Path, help="Hugging Face folder (safetensors) or a .gguf file")
    k.add_argument("-o", "--output", type=Path, required=True, help="folder to create")
    k.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="activations (default: the model's)"
    )

    g = _command(commands, "generate", _generate, "continue a prompt")
    g.add_argument("artifact", type=Path)
    g.add_argument("-p", "--prompt", required=True)
    g.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    g.add_argument("-n", "--max-new-tokens", type=int, default=128)
    g.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    g.add_argument("--top-k", type=int, default=0)
    g.add_argument("--top-p", type=float, default=1.0)
    g.add_argument("--seed", type=int)
    g.add_argument("--stop", action="append", metavar="TEXT", help="end when this text appears; repeatable")
    g.add_argument("--device")

    _add_eval(commands)

    i = _command(
        commands, "inspect", _inspect, "formats, byte ledger, targets of an artifact; kernels of an object"
    )
    i.add_argument("artifact", type=Path, metavar="ARTIFACT|KERNELS.so")
    i.add_argument("--graph", action="store_true", help="print the program text")
    i.add_argument("--tensors", action="store_true", help="list every tensor")
    i.add_argument("--no-check", action="store_true", help="skip the sha256 of the files")

    o = _command(commands, "opt", _opt, "run passes over a program text")
    o.add_argument(
        "program", type=Path, nargs="?", help="program text, as written by --dump-ir or program.txt"
    )
    o.add_argument(
        "-p", "--passes", default="", metavar="PIPELINE", help="for example 'assign-formats{bits=2.4}'"
    )
    o.add_argument("--dump-ir", type=Path, metavar="DIR")
    o.add_argument("--list", action="store_true", help="list the passes and their options")

    v = _command(commands, "convert", _convert, "turn a GGUF file into a Hugging Face folder")
    v.add_argument("gguf", type=Path)
    v.add_argument("-o", "--output", type=Path, required=True)

    _add_lattice(commands)
    cli_kernels.add_commands(commands, _command)
    return parser


def _add_eval(commands: Any) -> None:
    e = _command(commands, "eval", _eval, "perplexity, KL divergence, per-layer errors, benchmark tasks")
    e.add_argument("artifact", type=Path, help="artifact folder, or a model folder to evaluate unquantized")
    e.add_argument("--reference", type=Path, help="the original model folder")
    what = e.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", type=Path, action="append", help="UTF-8 text; repeatable")
    what.add_argument("--tasks", metavar="NAME,NAME", help="tasks of lm-evaluation-harness")
    e.add_argument("--ctx", type=int, default=2048, help="tokens per window (default 2048)")
    e.add_argument("--windows", type=int, help="windows from the start of each text (default: all)")
    e.add_argument("--layers", action="store_true", help="also the error of every decoder block")
    e.add_argument("--task-dir", type=Path, metavar="DIR", help="folder with YAML files of more tasks")
    e.add_argument("--num-fewshot", type=int, help="examples in the prompt of a task (default: the task's)")
    e.add_argument("--limit", type=int, help="examples per task (default: all)")
    e.add_argument("--chat", action="store_true", help="put the prompts of tasks into the chat template")
    e.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="dtype of model folders")
    e.add_argument("--device")


def _add_lattice(commands: Any) -> None:
    lattice = _command(commands, "lattice", _lattice, "learn, evaluate and show mapping matrices")
    actions = lattice.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in (("eval", "mean squared error on Gaussian samples"), ("show", "provenance of a matrix"),
                       ("train", "learn a mapping matrix"), ("report", "rate-distortion table and plot")):  # fmt: skip
        sub = actions.add_parser(name, help=text, description=text)
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS)
        sub.add_argument("-q", "--quiet", action="store_true", default=argparse.SUPPRESS)
        sub.add_argument("--format", action="append", metavar="LQ-D/d", help="repeatable")
        sub.add_argument("--beam", type=int, action="append", help="repeatable (default 64)")
        sub.add_argument("--samples", type=int, default=100_000, help="weights, rounded up to whole vectors")
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--device")
        sub.add_argument("-o", "--output", type=Path)
        if name == "train":
            sub.add_argument("--steps", type=int, help="training steps after the warm-up (default 400)")


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], Answer], text: str) -> Any:
    parser = commands.add_parser(name, help=text, description=text)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else on stdout"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    arguments = build_parser().parse_args(argv)
    shown = {
        k: str(v) for k, v in vars(arguments).items() if k not in {"run", "command", "json", "quiet"} and v
    }
    if not arguments.quiet and env.first_process():
        print(
            f"liftc {arguments.command}: " + " ".join(f"{k}={v}" for k, v in shown.items()), file=sys.stderr
        )
    try:
        answer: Answer = arguments.run(arguments)
    except LiftcError as error:
        if env.debug_level() >= 5:
            raise
        print(f"liftc {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"liftc {arguments.command}: interrupted", file=sys.stderr)
        return 130
    if not env.first_process():
        return 0
    if arguments.json:
        print(json.dumps({k: v for k, v in answer.items() if k != "text"}, sort_keys=True))
    else:
        print(answer["text"] if "text" in answer else "\n".join(f"{k}: {v}" for k, v in answer.items()))
    return 0
