"""Quality, time and memory of the quantizer with each ingredient on or off, measured without any kernel.

    python benchmarks/ablation.py MODEL --text eval_wiki.txt --text eval_web.txt --row best --bits 2.4
    python benchmarks/ablation.py --list

One row a call: quantizes MODEL (a Hugging Face folder) on the GPU when there is one, decodes the signs to
dense weights of the model's dtype, and prints perplexity, KL divergence and top-1 agreement against the
original on windows of each text, seconds, and peak memory. The artifact `liftc compile` writes for the same
options holds the same signs, scales and vectors.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from liftc.driver.calibrate import prefill_inputs
from liftc.driver.compile import CompileOptions, Job, prepare_job
from liftc.driver.quantize import quantize_program, whole_model_of
from liftc.evaluate import evaluate
from liftc.quant.blocks import BlockRunner
from liftc.quant.calibration import cut_windows, read_text
from liftc.quant.tune import run_whole
from liftc.runtime.tokenizer import Tokenizer

SIGNS: dict[str, Any] = {"epochs": 0, "dense_epochs": 0, "tune_epochs": 0, "fisher": False}
ROWS: dict[str, dict[str, Any]] = {
    "no-feedback": {**SIGNS, "damp": 1e9},
    "beam-16": {**SIGNS, "beam": 16},
    "signs": SIGNS,
    "beam-256": {**SIGNS, "beam": 256},
    "fisher": {**SIGNS, "fisher": True},
    "correction": {**SIGNS, "epochs": 2},
    "dense": {**SIGNS, "epochs": 3, "dense_epochs": 2},
    "fisher-dense": {**SIGNS, "epochs": 3, "dense_epochs": 2, "fisher": True},
    "tuned": {**SIGNS, "tune_epochs": 8},
    "fisher-tuned": {**SIGNS, "fisher": True, "tune_epochs": 8},
    "fast": {"effort": "fast"},
    "balanced": {"effort": "balanced"},
    "best": {"effort": "best"},
}
"""Options of CompileOptions by row; what a row leaves open is as in --effort balanced."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--row", choices=ROWS, default="balanced")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--bits", type=float, default=2.4)
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="option as JSON")
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--ctx", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--captured", type=Path, help="folder that liftc capture wrote")
    parser.add_argument("--work", type=Path, help="keep the work folder here")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    if a.list or a.model is None:
        print("\n".join(f"{name:18} {options}" for name, options in ROWS.items()))
        return
    extra = {key: json.loads(value) for key, value in (item.split("=", 1) for item in a.set)}
    options = CompileOptions(bits=a.bits, captured=a.captured, **{**ROWS[a.row], **extra})
    started = time.perf_counter()
    job = prepare_job(a.model, options)
    captured = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        work = a.work or Path(folder)
        quantized = quantize_program(
            job.captured, job.program, job.inputs, options.quantize_options(), work, device=options.device,
            activation_memory=None, resume=False, progress=False,
        )  # fmt: skip
        done = time.perf_counter()
        tuned = quantized.tuned
        row = {
            "row": a.row, "bits": a.bits, "set": extra, "options": asdict(options.quantize_options()),
            "calibration": job.inputs.description, "seconds": {"capture": captured - started,
            "blocks": sum(v for k, v in quantized.seconds.items() if k.startswith("block")),
            "fisher": quantized.seconds.get("fisher", 0.0),
            "tune": quantized.seconds.get("tuned", 0.0),
            "all": done - captured}, "memory": quantized.memory, "tuned": asdict(tuned) if tuned else None,
            "block_error": [(b.error_before, b.error_after) for b in quantized.blocks],
            "proxy_loss": sum(r.proxy_loss for r in quantized.report) / len(quantized.report),
            "digest": digest(quantized.files), "texts": {},
        }  # fmt: skip
        weights = whole_model_of(job.captured, job.program, job.inputs, quantized)
        for text in a.text:
            row["texts"][text.stem] = measure(job, weights, text, a.ctx, a.windows)
    said = " | ".join(
        f"{name}: ppl {r['perplexity']:.2f} ({r['reference_perplexity']:.2f}) KL {r['kl']:.4f} top-1 {r['top1']:.3f}"
        for name, r in row["texts"].items()
    )
    print(
        f"{a.row} {a.bits} {extra or ''} {said} | {row['seconds']} {row['memory']} {row['digest'][:12]}",
        flush=True,
    )
    if a.json:
        a.json.write_text(json.dumps(row, indent=1), encoding="utf-8")


def digest(files: list[Path]) -> str:
    """sha256 over the bytes of the work folder's files: the same on every run on one kind of device."""
    state = hashlib.sha256()
    for path in files:
        state.update(path.read_bytes())
    return state.hexdigest()


def measure(job: Job, weights: Any, text: Path, ctx: int, count: int) -> dict[str, Any]:
    """Evaluation of decoded weights against the checkpoint's, both through the captured prefill graph."""
    assert job.captured.folder is not None
    tokens = Tokenizer(job.captured.folder).encode(read_text(text), special_tokens=False)
    windows = cut_windows(tokens, ctx, min(count, len(tokens) // ctx))
    graph = job.program.graphs["prefill"]
    inputs = prefill_inputs(job.program, windows, text.name, all_logits=True)
    runner = BlockRunner(graph, inputs.sequences, inputs.shared, inputs.scratch, device=weights.device)
    names = {str(n.target) for n in graph.find_nodes(op="get_attr")}
    original = {name: job.captured.checkpoint.tensor(name).to(weights.device) for name in names}
    numbers = {id(w): i for i, w in enumerate(windows)}

    def logits(held: Any) -> Any:
        return lambda ids: next(iter(run_whole(runner, numbers[id(ids)], held).values()))

    with torch.no_grad():
        return evaluate(windows, logits(weights.weights()), logits(original)).to_json()


if __name__ == "__main__":
    main()
