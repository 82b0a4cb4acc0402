r"""Learn the shipped mapping matrices on a GPU: check the encoder, train many formats at once, measure them.

    python scripts/gpu_lattice.py --build sm_90                     # on any machine with TVM and nvcc
    python scripts/gpu_lattice.py --out OUT --check --formats d32 --seconds 420
    python scripts/gpu_lattice.py --out OUT --merge liftc/data/mapping.safetensors --formats LQ-154/64 \
        --recipe beam=64 --recipe beam=64,finish_beam=256,steps=1000

Writes OUT/mapping.safetensors (with --merge FILE, the better of FILE's matrix and the new one per format) and
OUT/figures.json after every format, so that a run that is cut short loses nothing that was finished.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import queue
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from liftc.format import LiftFormat
from liftc.quant import beam_cuda, lattice, mapping
from liftc.quant.encode import prepare, project, search, search_reference

PAPER = (
    "16/8 20/8 22/8 24/8 17/8 19/8 20/10 22/10 24/10 25/10 30/10 18/6 21/7 16/7 20/9 16/10 24/12 30/14 "
    "28/14 32/14 32/16 40/16 48/16 32/20 40/20 48/20 8/4 12/4 16/4"
).split()
WIDE = "128/64 154/64 192/64 96/64 112/64 144/64 160/64 176/64 96/48 116/48 144/48".split()
BEAMS = (16, 64, 256, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/lattice"))
    parser.add_argument(
        "--build", metavar="ARCH", help="only build the kernels for ARCH (sm_90); no GPU needed"
    )
    parser.add_argument(
        "--check", action="store_true", help="compare the GPU encoder with the reference first"
    )
    parser.add_argument("--formats", default="", help="d32, paper, wide, or names separated by commas")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16384)
    parser.add_argument(
        "--recipe", action="append", metavar="KEY=VALUE,...",
        help="fields of mapping.Recipe, or lam_scale; repeatable: the best recipe of each format is kept",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--merge", type=Path, help="mapping file to start from")
    parser.add_argument(
        "--continue", dest="resume", action="store_true", help="start from the matrices of --merge"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=480.0, help="start no format after this time")
    a = parser.parse_args()
    if a.build:
        for words in beam_cuda.WORDS:
            print(beam_cuda.build_library(words, a.build))
        return
    a.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    if a.check:
        check(a.device)
    formats = expand(a.formats)
    if formats:
        train(a, formats, began + a.seconds)


def expand(text: str) -> list[LiftFormat]:
    """Formats of a list; the common widths come first, so that a short run has them."""
    first = [77, 64, 96, 80, 72, 112, 128, 88, 104, 120, 48, 56]
    names: list[str] = []
    for part in filter(None, text.split(",")):
        if part == "d32":
            names += [f"{big}/32" for big in first + [b for b in range(32, 129) if b not in first]]
        elif part == "paper":
            names += PAPER
        elif part == "wide":
            names += WIDE
        else:
            names.append(part)
    return [LiftFormat.parse(name) for name in dict.fromkeys(names)]


def check(device: str) -> None:
    """Signs and costs of every kernel against `search_reference` on the same targets, bit for bit."""
    for big, d, beams in ((8, 4, (1, 3, 16)), (77, 32, (1, 16, 48, 64, 100, 256, 1000, 4096)), (128, 64, (64, 512)),
                          (154, 64, (64, 2048)), (256, 64, (32, 4096))):  # fmt: skip
        generator = torch.Generator().manual_seed(big)
        matrix = torch.linalg.qr(torch.randn(big, d, generator=generator))[0].T.contiguous().to(device)
        prepared = prepare(matrix)
        for beam in beams:
            w = torch.randn(200 if beam < 1000 else 40, d, generator=generator).to(device)
            w[1] = 0
            targets = project(w, prepared, beam)
            signs, cost = search(targets, prepared, beam)
            expected, least = search_reference(targets, prepared, beam)
            equal = bool((signs == expected).all()) and bool((cost == least).all())
            print(f"check D={big} d={d} beam={beam}: {'equal' if equal else 'DIFFERENT'}", flush=True)
            if not equal:
                rows = (signs != expected).any(1).nonzero().flatten().tolist()
                print(
                    f"  rows {rows[:10]}, cost {cost[rows[:4]].tolist()} against {least[rows[:4]].tolist()}"
                )


def learn_one(
    a: argparse.Namespace, fmt: LiftFormat, text: str, start: torch.Tensor | None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The matrix one recipe gives for a format, and its provenance with figures for BEAMS."""
    recipe = recipe_of(a, fmt, text)
    began = time.monotonic()
    matrix = mapping.learn_mapping(fmt, recipe, a.device, start)
    seconds = round(time.monotonic() - began, 1)
    mse, error, _ = mapping.evaluate_mapping(
        matrix, recipe.beam, a.samples, recipe.seed + 1, recipe.lam, a.device
    )
    return matrix, {
        **asdict(recipe), "mse": mse, "standard_error": error, "samples": a.samples, "seconds": seconds,
        "device": lattice.device_name(a.device), "continued": start is not None,
        "figures": measure(a, matrix, asdict(recipe)),
    }  # fmt: skip


def recipe_of(a: argparse.Namespace, fmt: LiftFormat, text: str) -> mapping.Recipe:
    """The recipe of the options, changed by "key=value,key=value"; lam_scale multiplies the suggested lam."""
    base = mapping.Recipe(batch=a.batch, steps=a.steps, lam=mapping.suggested_lam(fmt), band=8.0)
    changes: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key == "lam_scale":
            changes["lam"] = base.lam * float(value)
        else:
            changes[key] = type(getattr(base, key))(value)
    recipe = replace(base, **changes)
    return replace(recipe, band=min(recipe.band, fmt.subspace_dim / 4))


def measure(a: argparse.Namespace, matrix: torch.Tensor, made: dict[str, Any]) -> dict[str, dict[str, float]]:
    """mse and standard error for BEAMS, on the same vectors for every matrix of a format."""
    figures = {}
    for beam in BEAMS:
        mse, error, _ = mapping.evaluate_mapping(
            matrix, beam, a.samples, lattice.EVALUATION_SEED, made["lam"], a.device
        )
        figures[str(beam)] = {"mse": mse, "standard_error": error}
    return figures


def score(figures: dict[str, dict[str, float]]) -> float:
    """What matrices of a format are compared by: the mean error over beams 64, 256 and 1024."""
    return statistics.mean(figures[str(beam)]["mse"] for beam in BEAMS[1:])


def work(a: argparse.Namespace, todo: Any, done: Any, deadline: float) -> None:
    """One worker process: (format, recipe) pairs from `todo` to results in `done`, None at the end."""
    torch.set_num_threads(2)
    known = lattice.read_all(a.merge) if a.merge else {}
    longest = 0.0
    while time.monotonic() + longest < deadline:
        try:
            fmt, text = todo.get_nowait()
        except queue.Empty:
            break
        began = time.monotonic()
        start = known[fmt][0] if a.resume and fmt in known else None
        matrix, made = learn_one(a, fmt, text, start)
        longest = max(longest, time.monotonic() - began)
        done.put((fmt, text, matrix.numpy(), made))
    done.put(None)


def train(a: argparse.Namespace, formats: list[LiftFormat], deadline: float) -> None:
    """Spread formats and recipes over worker processes; write both files after each result."""
    context = multiprocessing.get_context("spawn")
    todo, done = context.Queue(), context.Queue()
    tasks = [(fmt, text) for text in a.recipe or [""] for fmt in formats]
    for task in tasks:
        todo.put(task)
    time.sleep(0.5)  # let the queue's feeder thread publish before workers ask without waiting
    workers = [
        context.Process(target=work, args=(a, todo, done, deadline), daemon=True)
        for _ in range(min(a.workers, len(tasks)))
    ]
    for process in workers:
        process.start()
    known = lattice.read_all(a.merge) if a.merge else {}
    best = {fmt: score(measure(a, *known[fmt])) for fmt in formats if fmt in known}
    trials: list[dict[str, Any]] = []
    running = len(workers)
    while running:
        try:
            result = done.get(timeout=5)
        except queue.Empty:
            running = min(running, sum(process.is_alive() for process in workers))
            continue
        if result is None:
            running -= 1
            continue
        fmt, text, array, made = result
        kept = score(made["figures"]) < best.get(fmt, math.inf)
        trials.append({"format": str(fmt), "recipe_text": text, "kept": kept, **made})
        if kept:
            best[fmt] = score(made["figures"])
            known[fmt] = torch.from_numpy(array), made
        mapping.write_mappings(a.out / "mapping.safetensors", known)
        (a.out / "figures.json").write_text(json.dumps(trials, indent=1))
        line = "  ".join(f"{beam}: {row['mse']:.5f}" for beam, row in made["figures"].items())
        mark = "*" if kept else " "
        print(f"{fmt!s:10s} {line} {mark} {made['seconds']:6.1f} s  {text}", flush=True)
    failed = [process.exitcode for process in workers if process.exitcode not in (0, None)]
    print(f"{len(trials)} of {len(tasks)} trials, worker failures: {failed}", flush=True)


if __name__ == "__main__":
    main()
