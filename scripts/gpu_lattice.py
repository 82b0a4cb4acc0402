"""Learn the shipped mapping matrices on a GPU: check the encoder, train many formats at once, measure them.

    python scripts/gpu_lattice.py --out OUT --check --formats d32 --seconds 420
    python scripts/gpu_lattice.py --out OUT --formats LQ-128/64,LQ-154/64 --beam 256 --steps 1000 --keep-better

Writes OUT/mapping.safetensors (with --merge FILE, the better of FILE's matrix and the new one per format) and
OUT/figures.json after every format, so that a run that is cut short loses nothing that was finished.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue
import time
from pathlib import Path
from typing import Any

import torch

from liftc.format import LiftFormat
from liftc.quant import lattice, mapping
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
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--check", action="store_true", help="compare the GPU encoder with the reference first"
    )
    parser.add_argument("--formats", default="", help="d32, paper, wide, or names separated by commas")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--warmup", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16384)
    parser.add_argument("--beam", type=int, default=64)
    parser.add_argument("--band", type=float, default=8.0)
    parser.add_argument("--step", type=float, default=0.1)
    parser.add_argument("--lam", type=float, help="default: 1.25 * 2^(-2 bits)")
    parser.add_argument("--seeds", type=int, default=1, help="starts per format; the best at --judge is kept")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--judge", type=int, default=256, help="beam at which starts and files are compared")
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--merge", type=Path, help="mapping file to start from")
    parser.add_argument(
        "--continue", dest="resume", action="store_true", help="start from the matrices of --merge"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=480.0, help="start no format after this time")
    a = parser.parse_args()
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
    a: argparse.Namespace, fmt: LiftFormat, start: torch.Tensor | None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The best of the starts of one format and its provenance with figures for BEAMS."""
    candidates = []
    lam = a.lam if a.lam is not None else mapping.suggested_lam(fmt)
    for seed in range(a.first_seed, a.first_seed + a.seeds):
        recipe = mapping.Recipe(
            seed, a.warmup, a.steps, a.batch, a.beam, lam, min(a.band, fmt.subspace_dim / 4), a.step
        )
        began = time.monotonic()
        matrix = mapping.learn_mapping(fmt, recipe, a.device, start)
        seconds = time.monotonic() - began
        mse = mapping.evaluate_mapping(matrix, a.judge, 20_000, 7, lam, a.device)[0]
        candidates.append((mse, seconds, matrix, recipe))
    _, seconds, matrix, recipe = min(candidates, key=lambda candidate: candidate[0])
    made = mapping.provenance_of(matrix, recipe, a.samples, a.device)
    made["device"], made["seconds"] = lattice.device_name(a.device), round(seconds, 1)
    made["starts"] = [round(candidate[0], 6) for candidate in candidates]
    made["continued"] = start is not None
    figures = {}
    for beam in BEAMS:
        mse, error, speed = mapping.evaluate_mapping(
            matrix, beam, a.samples, lattice.EVALUATION_SEED, lam, a.device
        )
        figures[str(beam)] = {"mse": mse, "standard_error": error, "seconds_per_million_weights": speed}
    return matrix, {**made, "figures": figures}


def work(a: argparse.Namespace, todo: Any, done: Any, deadline: float) -> None:
    """One worker process: formats from `todo` to results in `done`, None at the end."""
    torch.set_num_threads(2)
    known = lattice.read_all(a.merge) if a.merge else {}
    longest = 0.0
    while time.monotonic() + longest < deadline:
        try:
            fmt = todo.get_nowait()
        except queue.Empty:
            break
        began = time.monotonic()
        start = known[fmt][0] if a.resume and fmt in known else None
        matrix, made = learn_one(a, fmt, start)
        longest = max(longest, time.monotonic() - began)
        done.put((str(fmt), matrix.numpy(), made))
    done.put(None)


def train(a: argparse.Namespace, formats: list[LiftFormat], deadline: float) -> None:
    """Spread the formats over worker processes and write both files after each result."""
    context = multiprocessing.get_context("spawn")
    todo, done = context.Queue(), context.Queue()
    for fmt in formats:
        todo.put(fmt)
    time.sleep(0.5)  # let the queue's feeder thread publish before workers ask without waiting
    workers = [
        context.Process(target=work, args=(a, todo, done, deadline), daemon=True)
        for _ in range(min(a.workers, len(formats)))
    ]
    for process in workers:
        process.start()
    known = lattice.read_all(a.merge) if a.merge else {}
    figures: dict[str, Any] = {}
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
        name, array, made = result
        fmt, matrix = LiftFormat.parse(name), torch.from_numpy(array)
        old = known.get(fmt)
        better = True
        if old is not None:
            before = mapping.evaluate_mapping(
                old[0], a.judge, a.samples, lattice.EVALUATION_SEED, old[1]["lam"], a.device
            )
            made["before"] = before[0]
            now = mapping.evaluate_mapping(
                matrix, a.judge, a.samples, lattice.EVALUATION_SEED, made["lam"], a.device
            )
            better = now[0] < before[0]
        figures[name] = {**made, "kept": better}
        if better:
            known[fmt] = (matrix, {key: value for key, value in made.items() if key != "figures"})
        mapping.write_mappings(a.out / "mapping.safetensors", known)
        (a.out / "figures.json").write_text(json.dumps(figures, indent=1))
        line = "  ".join(f"{beam}: {row['mse']:.5f}" for beam, row in made["figures"].items())
        speed = made["figures"]["64"]["seconds_per_million_weights"]
        print(
            f"{name:10s} {line}  ({made['seconds']} s, beam 64 {speed:.4f} s/M) {'' if better else 'not kept'}",
            flush=True,
        )
    failed = [process.exitcode for process in workers if process.exitcode not in (0, None)]
    print(f"{len(figures)} of {len(formats)} formats, worker failures: {failed}", flush=True)


if __name__ == "__main__":
    main()
