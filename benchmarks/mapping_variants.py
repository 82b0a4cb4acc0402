"""Mapping matrices learned another way, against the plain ones, in one run on one GPU.

    python benchmarks/mapping_variants.py collect MODEL_FOLDER --text calibration.txt -o metrics.pt     # CPU, minutes
    python benchmarks/mapping_variants.py run --metrics metrics.pt -o variants.json                     # one GPU

`collect` stores the metrics A that block LDLQ presents to the encoder (d = 32) and some layers' rows and grams.
`run` learns, with the same start, steps, batch and beam: matrices tied to a structure (signed cyclic shifts of
a few generators, banded, Kronecker product, block-diagonal times an orthogonal mix), matrices learned under
the even layers' metrics (judged on the odd layers'), and longer or noisier schedules at 2.0 bits. Every task
prints one line with mean squared errors and their standard errors; the file holds all figures.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from mapping_structures import RIDGE, structure

from liftc.format import LiftFormat
from liftc.quant import lattice, mapping
from liftc.quant.encode import decode, encode_prepared, prepare
from liftc.quant.ldlq import feedback_factor
from liftc.quant.whitening import damped

DAMP = 0.01


@dataclass
class Task:
    """One matrix to learn; `kind` as in `structure`, `metrics` "", "given" or "aligned" (see `aligned`)."""

    name: str
    group: str
    kind: str = "free"
    metrics: str = ""
    noise: float = 0.0
    shipped_start: bool = False
    recipe: dict[str, Any] = field(default_factory=dict)


def learn(
    task: Task, metrics: torch.Tensor | None, device: str, **changes: Any
) -> tuple[torch.Tensor, mapping.Recipe]:
    """`mapping.learn_mapping` with a structure, sampled metrics (16 a step) or noise on what is encoded.

    changes: fields of the recipe for all tasks, such as a smaller batch on a CPU.
    """
    fmt = LiftFormat.parse(task.name)
    d, big = fmt.subspace_dim, fmt.lifted_dim
    recipe = mapping.Recipe(
        steps=300, batch=16384, lam=mapping.suggested_lam(fmt), band=min(8.0, d / 4), step=0.1
    )
    recipe = replace(recipe, **task.recipe, **changes)
    solve, matrix = structure(task.kind, d, big, device)
    warmup = recipe.warmup
    if task.shipped_start:
        matrix, warmup = mapping.load_mapping(fmt).to(device, torch.float64), 0
    generator = torch.Generator(device).manual_seed(recipe.seed)
    velocity = torch.zeros_like(matrix)
    for step in range(warmup + recipe.steps):
        at = step - warmup
        beam = recipe.beam if 3 * at < 2 * recipe.steps else recipe.finish_beam or recipe.beam
        beam = min(16, beam) if at < 0 else beam
        w = torch.randn(recipe.batch, d, generator=generator, device=device)
        if metrics is not None and at >= 0:
            solution = weighted_update(matrix, w, metrics, recipe.lam, beam, generator)
        else:
            size = task.noise * max(0.0, 1 - 2 * at / recipe.steps) if at >= 0 else 0.0
            extra = size * torch.randn(w.shape, generator=generator, device=device) if size else 0.0
            b = encode_prepared(w + extra, prepare(matrix.float(), None, recipe.lam), beam).double()
            solution = solve(b.T @ b / len(w), w.double().T @ b / len(w))
        if at < 0:
            matrix = solution
        else:
            size = recipe.step * 0.5 * (1 + math.cos(math.pi * at / recipe.steps))
            velocity = 0.9 * velocity + size * (solution - matrix)
            matrix = matrix + velocity
    return matrix.float().cpu().contiguous(), recipe


def weighted_update(
    matrix: torch.Tensor,
    w: torch.Tensor,
    metrics: torch.Tensor,
    lam: float,
    beam: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """argmin over M of the sum of ||A (w - M b)||^2 over 16 sampled metrics: (sum of A'A x C) vec M = vec A'A X."""
    d, big = matrix.shape
    picked = torch.randint(len(metrics), (16,), generator=generator, device=w.device).tolist()
    system = RIDGE * torch.eye(d * big, dtype=torch.float64, device=w.device).view(d, big, d, big)
    right = torch.zeros_like(matrix)
    for part, which in zip(w.chunk(16), picked, strict=True):
        metric = metrics[which]
        b = encode_prepared(part, prepare(matrix.float(), metric, lam), beam).double()
        gram = (metric.double().T @ metric.double()).to(w.device)
        system = system + torch.einsum("rs,ij->risj", gram / len(w), b.T @ b)
        right = right + gram @ (part.double().T @ b) / len(w)
    solution: torch.Tensor = torch.linalg.solve(system.reshape(d * big, -1), right.reshape(-1))
    return solution.view(d, big)


def metric_error(matrix: torch.Tensor, metrics: torch.Tensor, lam: float, beam: int) -> torch.Tensor:
    """Mean of ||A (w - M b)||^2 / d per metric (CPU), 512 vectors each, the same vectors for every matrix."""
    errors = []
    for number, metric in enumerate(metrics):
        w = torch.randn(512, matrix.shape[0], generator=torch.Generator().manual_seed(number))
        w = w.to(matrix.device)
        b = encode_prepared(w, prepare(matrix, metric, lam), beam)
        errors.append(((w - decode(b, matrix)) @ metric.to(w).T).square().mean())
    return torch.stack(errors).cpu().double()


def aligned(metrics: torch.Tensor) -> torch.Tensor:
    """Metrics (n, d, d) turned to their own axes, strongest first: what a rotation per block would leave."""
    return torch.diag_embed(torch.linalg.svdvals(metrics.float()))


def ldlq_loss(matrix: torch.Tensor, weight: torch.Tensor, gram: torch.Tensor, lam: float, beam: int) -> float:
    """Proxy loss tr(E H E') / tr(W H W') of block LDLQ, rows scaled by their root mean square."""
    d = matrix.shape[0]
    factor, h = feedback_factor(gram, DAMP), damped(gram, DAMP)
    original = weight.to(matrix.device, torch.float32)
    work, done = original.clone(), torch.zeros_like(original)
    scale = work.square().mean(1, keepdim=True).sqrt()
    for first in range(0, work.shape[1], d):
        part = slice(first, first + d)
        inverse = torch.linalg.inv(factor[part, part])
        metric = inverse.T / (inverse.square().sum() / d).sqrt()
        b = encode_prepared(work[:, part] / scale, prepare(matrix, metric, lam), beam)
        done[:, part] = decode(b, matrix) * scale
        push = (inverse @ factor[part, first + d :]).float().to(work)
        work[:, first + d :] -= (work[:, part] - done[:, part]) @ push
    h = h.to(work.device)
    error, energy = (original - done).double(), original.double()
    return (((error @ h) * error).sum() / ((energy @ h) * energy).sum()).item()


def collect(a: argparse.Namespace) -> None:
    """Grams of the original model -> block metrics of every layer, and problems of a few layers, whitened."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from liftc.quant.whitening import orthogonal_whitening

    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(a.model)(a.text.read_text(), return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // 512 * 512].view(-1, 512)
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[: a.windows]]
    groups = {
        "self_attn.q_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "self_attn.o_proj": ["self_attn.o_proj"],
        "mlp.gate_proj": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.down_proj": ["mlp.down_proj"],
    }
    grams: dict[tuple[int, str], torch.Tensor] = {}

    def watch(key: tuple[int, str]) -> Callable[..., None]:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            x = inputs[0].flatten(0, 1)
            grams[key] = grams.get(key, torch.zeros(x.shape[1], x.shape[1])) + x.T @ x

        return hook

    layers = model.model.layers
    for number, layer in enumerate(layers):
        for name in groups:
            layer.get_submodule(name).register_forward_pre_hook(watch((number, name)))
    with torch.no_grad():
        for batch in windows.split(4):
            model.model(batch)
    metrics, problems = {}, {}
    shown = (len(layers) // 7, len(layers) // 2, len(layers) - 4)
    for (number, name), gram in grams.items():
        whitening = orthogonal_whitening(gram.shape[0] // 32, 32, 0)
        whitened = whitening.whiten_gram(gram.double() / gram.diagonal().mean().double())
        factor = feedback_factor(whitened, DAMP)
        for first in range(0, len(factor), 32):
            inverse = torch.linalg.inv(factor[first : first + 32, first : first + 32])
            metrics[f"{number}/{name}/{first}"] = (inverse.T / (inverse.square().sum() / 32).sqrt()).half()
        if number in shown and (gram.shape[0] < 1024 or number == shown[1]):
            weight = torch.cat([layers[number].get_submodule(part).weight.detach() for part in groups[name]])
            rows = torch.randperm(len(weight), generator=torch.Generator().manual_seed(number))[:384]
            lower = torch.tril_indices(*whitened.shape)
            half = whitened[lower[0], lower[1]].to(torch.float32 if gram.shape[0] < 1024 else torch.float16)
            problems[f"{number}/{name}"] = (whitening.whiten_weight(weight[rows]).bfloat16(), half)
    torch.save({"metrics": metrics, "problems": problems}, a.output)
    print(f"{len(metrics)} metrics, {len(problems)} problems: {a.output}")


def whole(half: torch.Tensor) -> torch.Tensor:
    """The symmetric float64 matrix of a stored lower triangle."""
    size = (math.isqrt(8 * len(half) + 1) - 1) // 2
    lower = torch.tril_indices(size, size)
    gram = torch.zeros(size, size, dtype=torch.float64)
    gram[lower[0], lower[1]] = half.double()
    return gram + gram.tril(-1).T


def tasks() -> list[Task]:
    """All tasks, the longest first."""
    todo = [
        Task("128/64", "schedule", shipped_start=True, recipe={"beam": 1024, "steps": 250, "step": 0.2}),
        Task("128/64", "schedule", recipe={"beam": 256, "steps": 1000, "step": 0.2, "finish_beam": 1024}),
        Task("64/32", "schedule", recipe={"steps": 4000, "step": 0.2}),
        Task("64/32", "schedule", recipe={"steps": 3000, "step": 0.4}),
        Task("64/32", "schedule", noise=0.2, recipe={"steps": 3000, "step": 0.2}),
    ]
    todo += [Task(name, "metric", metrics="given") for name in ("77/32", "64/32", "96/32")]
    todo += [Task(name, "metric", metrics="aligned") for name in ("77/32", "64/32")]
    todo += [Task("64/32", "schedule", recipe={"steps": 2000, "step": 0.2, "beam": 32, "finish_beam": 64})]
    todo += [Task("128/64", "schedule", noise=0.2, recipe={"steps": 600, "step": 0.2, "beam": 256})]
    kinds = ["free", "signed:4", "signed:8", "band:8", "mix", "kron", "cyclic:4", "signed:1", "band:16"]
    todo += [
        Task(name, "structure", kind) for kind in ("free", "signed:4", "signed:16", "band:16", "mix")
        for name in ("128/64", "154/64")
    ]  # fmt: skip
    return todo + [Task(name, "structure", kind) for kind in kinds for name in ("77/32", "64/32", "96/32")]


def run_task(task: Task, stored: dict[str, Any], a: argparse.Namespace) -> dict[str, Any]:
    """Learn one matrix and measure it on unit Gaussians, and in groups that need it on metrics and problems."""
    began = time.monotonic()
    odd = [metric.float() for name, metric in stored["metrics"].items() if int(name.split("/")[0]) % 2]
    even = [metric.float() for name, metric in stored["metrics"].items() if int(name.split("/")[0]) % 2 == 0]
    taught = {"": None, "given": torch.stack(even), "aligned": aligned(torch.stack(even))}[task.metrics]
    changes = {key: getattr(a, key) for key in ("batch", "steps") if getattr(a, key)}
    matrix, recipe = learn(task, taught, a.device, **changes)
    row: dict[str, Any] = {
        "format": task.name, "group": task.group, "kind": task.kind, "metrics": task.metrics,
        "noise": task.noise, "shipped_start": task.shipped_start, "recipe": task.recipe,
        "learning_seconds": round(time.monotonic() - began, 1), "gaussian": {},
    }  # fmt: skip
    for beam in map(int, a.beams.split(",")):
        mse, error, _ = mapping.evaluate_mapping(
            matrix, beam, 100_000, lattice.EVALUATION_SEED, recipe.lam, a.device
        )
        row["gaussian"][beam] = (mse, error)
    plain = task.kind == "free" and task.group == "structure" and task.name.endswith("/32")
    if task.metrics or plain:
        placed = matrix.to(a.device)
        held = torch.stack(odd)[torch.randperm(len(odd), generator=torch.Generator().manual_seed(0))[:160]]
        for name, seen in (("held_out", held), ("held_out_aligned", aligned(held))):
            row[name] = {b: metric_error(placed, seen, recipe.lam, b).tolist() for b in (64, 256)}
        row["ldlq"] = {
            name: ldlq_loss(placed, weight, whole(half), recipe.lam, 64)
            for name, (weight, half) in stored["problems"].items()
        }
    row["matrix"] = matrix.tolist()
    row["seconds"] = round(time.monotonic() - began, 1)
    return row


def worker(a: argparse.Namespace, todo: Any, done: Any, deadline: float) -> None:
    torch.set_num_threads(2)
    stored = torch.load(a.metrics, weights_only=True)
    while time.monotonic() < deadline:
        try:
            task = todo.get_nowait()
        except queue.Empty:
            break
        done.put(run_task(task, stored, a))
    done.put(None)


def run(a: argparse.Namespace) -> None:
    """Spread the tasks over worker processes; print and store a row as soon as it is there."""
    print(lattice.device_name(a.device), torch.__version__, flush=True)
    deadline = time.monotonic() + a.seconds
    context = multiprocessing.get_context("spawn")
    todo, done = context.Queue(), context.Queue()
    for task in tasks():
        wanted = task.group in a.only.split(",") and task.name in (a.formats or task.name).split(",")
        if wanted and task.kind in (a.kinds or task.kind).split(","):
            todo.put(task)
    time.sleep(0.5)
    processes = [context.Process(target=worker, args=(a, todo, done, deadline)) for _ in range(a.workers)]
    for process in processes:
        process.start()
    rows: list[dict[str, Any]] = []
    running = len(processes)
    while running:
        try:
            row = done.get(timeout=5)
        except queue.Empty:
            running = min(running, sum(process.is_alive() for process in processes))
            continue
        if row is None:
            running -= 1
            continue
        rows.append(row)
        a.output.write_text(json.dumps(rows))
        figures = "  ".join(f"{beam}: {m:.5f} ({e:.5f})" for beam, (m, e) in row["gaussian"].items())
        told = {k: row[k] for k in ("metrics", "noise", "shipped_start", "recipe") if row[k]}
        about = row["kind"] + (" " + json.dumps(told) if told else "")
        print(f"{row['format']:8s}{row['seconds']:6.1f} s  {figures}  {about}", flush=True)
        if "ldlq" in row:
            held, turned = (
                {b: round(sum(e) / len(e), 5) for b, e in row[name].items()}
                for name in ("held_out", "held_out_aligned")
            )
            loss = {name: round(value, 6) for name, value in row["ldlq"].items()}
            print(f"         held-out metrics {held}, aligned {turned}, LDLQ {json.dumps(loss)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(required=True)
    first = actions.add_parser("collect")
    first.add_argument("model", type=Path)
    first.add_argument("--text", type=Path, required=True)
    first.add_argument("--windows", type=int, default=24, help="windows of 512 tokens")
    first.add_argument("-o", "--output", type=Path, required=True)
    first.set_defaults(action=collect)
    second = actions.add_parser("run")
    second.add_argument("--metrics", type=Path, required=True)
    second.add_argument("-o", "--output", type=Path, required=True)
    second.add_argument("--device", default="cuda")
    second.add_argument("--only", default="schedule,metric,structure", help="groups of tasks")
    second.add_argument("--formats", default="", help="for example 64/32,77/32; default: all")
    second.add_argument("--beams", default="16,64,256,1024", help="to measure with")
    second.add_argument("--batch", type=int, default=0, help="vectors per step (default 16384)")
    second.add_argument(
        "--steps", type=int, default=0, help="steps of every task (default: its own, 300 or more)"
    )
    second.add_argument("--kinds", default="", help="structures, for example free,signed:4 (default: all)")
    second.add_argument("--workers", type=int, default=6)
    second.add_argument("--seconds", type=float, default=150.0, help="start no task after this time")
    second.set_defaults(action=run)
    a = parser.parse_args()
    a.action(a)


if __name__ == "__main__":
    main()
