"""The whole GPU check in one command, on a machine with torch, tvm_ffi and pytest but neither TVM nor a registry.

    python scripts/gpu_check.py --artifact ARTIFACT --out OUT
    python scripts/gpu_check.py --artifact ARTIFACT --out OUT --parts kernels,sanitize --bundle BUNDLE --budget 5m
    python scripts/gpu_check.py ... --model FOLDER --captured DIR --text T --row best:2.4 --row best:2.0 --row fast:2.4

artifact: a language model compiled with --target cuda --target llvm; its CUDA object, copied to build/kernels, is
what the tests use. Parts: `tests` runs the tests marked gpu and checks the encoder against its reference bit for bit;
`model` compares quantizing and generation on GPU and CPU and times decoding; `kernels` measures them (liftc bench
kernels) and, with --bundle, sweeps their knobs (liftc tune --run), records in OUT/records; `sanitize` runs
scripts/call_kernels.py under memcheck and racecheck of compute-sanitizer, and what both must find
(scripts/sanitizer_control.py), logs in OUT. With --model also quantizes it once per --row NAME:BITS
(benchmarks/ablation.py) and the first of them a second time, which must give the same bytes. --captured: where torch is
older than capture needs (liftc capture).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import liftc
from liftc.kernel_object import read_kernel_object
from liftc.quant.ldlq import quantize_group
from liftc.quant.mapping import lam_of, load_mapping
from liftc.quant.whitening import orthogonal_whitening
from liftc.spec import LiftSpec, transform_shape

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("tests", "model", "kernels", "sanitize")
FOUND = 9
"""Exit code of compute-sanitizer that has found something."""

VARIANTS = {
    "separate": {"LIFTC_FUSED": "0", "LIFTC_CUDA_GRAPH": "0"},
    "fused": {"LIFTC_CUDA_GRAPH": "0"},
    "captured": {},
}
"""How a model is loaded for the comparison of generation: norms, gates and additions as operations of their own, in the
kernels, and those launched by a CUDA graph."""

CONTROL = {"memcheck": "Invalid __global__ read", "racecheck": "Race reported"}
"""What compute-sanitizer says of scripts/sanitizer_control.py."""


def run_tests() -> dict[str, Any]:
    """The GPU tests of the kernels (on build/kernels/cuda-*.so), and the encoder against its reference."""
    tests = [sys.executable, "-m", "pytest", "-q", "--noconftest", "tests/test_kernels_gpu.py"]
    tests += ["tests/test_tiles_gpu.py", "tests/test_weight_first_gpu.py", "tests/test_formats_gpu.py"]
    tests += ["tests/test_decoding_gpu.py"]
    code = subprocess.run(tests, cwd=ROOT).returncode
    check = [sys.executable, "scripts/gpu_lattice.py", "--check", "--out", "build/gpu-check"]
    encoder = subprocess.run(check, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
    return {"kernel_tests_exit_code": code, "encoder_equal": encoder.count(": equal"),
            "encoder_different": encoder.count("DIFFERENT")}  # fmt: skip


def compare_generation(artifact: Path) -> dict[str, Any]:
    """Greedy tokens and prefill logits of one artifact on GPU and CPU, and how fast the GPU decodes in each variant."""
    prompt = list(range(2, 40))
    cpu = liftc.load(artifact, "cpu")
    theirs = cpu.generate(prompt, 24, stop_tokens=())
    answer: dict[str, Any] = {}
    tokens: dict[str, list[int]] = {}
    for name, setting in VARIANTS.items():
        os.environ.update(setting)
        gpu = liftc.load(artifact, "cuda", check=False)
        for variable in setting:
            del os.environ[variable]
        ours = gpu.generate(prompt, 24, stop_tokens=())
        difference = (gpu(ours).cpu().float() - cpu(ours.cpu()).float()).abs()
        for _ in range(2):  # the second time with a CUDA graph that is there
            torch.cuda.synchronize()
            started = time.perf_counter()
            tokens[name] = list(gpu.stream(prompt, 192, stop_tokens=()))
            seconds = time.perf_counter() - started
        answer[name] = {
            "tokens_equal": bool(torch.equal(ours.cpu(), theirs)),
            "logit_difference": {"median": float(difference.median()), "most": float(difference.max())},
            "tokens_per_second": len(tokens[name]) / seconds,
        }
    answer["captured_equal"] = tokens["captured"] == tokens["fused"]
    return answer


def compare_quantizer() -> dict[str, Any]:
    """One group quantized on GPU and CPU: the errors must agree, and the time of the GPU."""
    fmt = liftc.LiftFormat.parse("LQ-77/32")
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(2048, 1024, generator=generator), torch.randn(4096, 1024, generator=generator)
    gram = x.T @ x / 4096
    left, right = transform_shape(1024, fmt)
    spec, white = LiftSpec(fmt, 1024, left, right), orthogonal_whitening(left, right, 0)
    answer: dict[str, Any] = {}
    for device, rows in (("cuda", 2048), ("cuda", 2048), ("cpu", 64)):
        torch.cuda.synchronize()
        started = time.perf_counter()
        try:
            result = quantize_group(
                weight[:rows], gram, spec, white, load_mapping(fmt),
                beam=64, damp=0.01, lam=lam_of(fmt), device=torch.device(device),
            )  # fmt: skip
        except liftc.LiftcError as error:  # the CPU encoder needs TVM
            answer[device] = str(error)
            continue
        seconds = time.perf_counter() - started
        answer[device] = {
            "relative_error": result.relative_error, "proxy_loss": result.proxy_loss,
            "seconds_per_million_weights": seconds / (rows * 1024) * 1e6,
        }  # fmt: skip
    return answer


def quantize_rows(a: argparse.Namespace) -> dict[str, Any]:
    """The ablation rows one after the other, and whether the first, run again, gives the same bytes."""
    found: dict[str, Any] = {}
    for number, name in enumerate([*a.row, a.row[0]]):
        row, _, bits = name.partition(":")
        path = a.out / f"row-{number}-{row}-{bits}.json"
        command = [sys.executable, "benchmarks/ablation.py", str(a.model), "--row", row, "--bits", bits or "2.4",
                   "--json", str(path), *(f"--text={t}" for t in a.text)]  # fmt: skip
        if a.captured:
            command += ["--captured", str(a.captured)]
        if subprocess.run(command, cwd=ROOT, env=_environment()).returncode == 0:
            answer = json.loads(path.read_text())
            found.setdefault(name, answer)
            found["same_bytes"] = answer["digest"] == found[a.row[0]]["digest"]
    return found


def measure_kernels(kernels: Path, out: Path, bundle: Path | None, budget: str) -> dict[str, int]:
    """Exit codes of liftc bench kernels and, with a bundle, of liftc tune --run."""
    records = ["--records", str(out / "records")]
    commands = {
        "bench": ["bench", "kernels", str(kernels), "--json", str(out / "kernels.json"), *records],
        "tune": ["tune", "--run", str(bundle), "--budget", budget, *records],
    }
    if bundle is None:
        del commands["tune"]
    return {
        name: subprocess.run(
            [sys.executable, "-m", "liftc", *command], cwd=ROOT, env=_environment()
        ).returncode
        for name, command in commands.items()
    }


def sanitize(kernels: Path, out: Path) -> dict[str, int]:
    """Exit codes of memcheck and racecheck over every kernel, and of what they must find; logs go to OUT.

    All four run at once. torch's kernels are left out. Every tensor has memory of its own, so that a read past its end
    is found. The code of a control is 0 when its mistake was found. Exits where the tool is absent.
    """
    tool = find_sanitizer()
    if tool is None:
        sys.exit("--sanitize: there is no compute-sanitizer on this machine")
    names = sorted({f"kns={function.op}" for function in read_kernel_object(kernels).functions})
    ours = [word for name in names for word in ("--kernel-name", name)]
    environment = {**_environment(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    running = {}
    for check in ("memcheck", "racecheck"):
        command = [str(tool), "--tool", check, "--error-exitcode", str(FOUND), *ours, sys.executable]
        scripts = {
            check: ["scripts/call_kernels.py"],
            f"{check}-control": ["scripts/sanitizer_control.py", check],
        }
        for name, script in scripts.items():
            with (out / f"sanitizer-{name}.txt").open("w") as log:
                words = [*command, *script, str(kernels)]
                running[name] = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log, env=environment)
    codes = {name: process.wait() for name, process in running.items()}
    for check in ("memcheck", "racecheck"):
        text = (out / f"sanitizer-{check}-control.txt").read_text()
        found = codes[f"{check}-control"] == FOUND and CONTROL[check] in text
        codes[f"{check}-control"] = 0 if found else 1
    for name, code in codes.items():
        print(f"{name}: exit code {code}, {out / f'sanitizer-{name}.txt'}")
    return codes


def find_sanitizer() -> Path | None:
    """compute-sanitizer of PATH, of a CUDA toolkit, or of a pip package."""
    roots = [Path("/usr/local/cuda"), *Path("/usr/local").glob("cuda-*")]
    places = [root / "bin" / "compute-sanitizer" for root in roots]
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        places += sorted(Path(root).rglob("compute-sanitizer"))
    found = shutil.which("compute-sanitizer")
    return Path(found) if found else next((p for p in places if p.is_file()), None)


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    return {**os.environ, "PYTHONPATH": path}


def main() -> None:
    """Run everything, print one JSON object, exit with 1 when something disagreed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="Hugging Face folder to quantize")
    parser.add_argument("--captured", type=Path)
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--parts", default="tests,model,kernels", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--bundle", type=Path, help="of liftc tune --build-only, to sweep in part kernels")
    parser.add_argument("--budget", default="5m", help="of the sweep")
    parser.add_argument("--row", action="append", default=[], metavar="NAME:BITS")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    parts = set(a.parts.split(","))
    if unknown := parts - set(PARTS):
        parser.error(f"there is no part {min(unknown)}: choose from {', '.join(PARTS)}")
    facts: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    kernels = next((a.artifact / "kernels").glob("cuda-*.so"))
    if "tests" in parts:
        facts.update(run_tests())
    if "kernels" in parts:
        facts["kernels_exit_codes"] = measure_kernels(kernels, a.out, a.bundle, a.budget)
    if "model" in parts:
        facts["quantizer"] = compare_quantizer()
        facts["generation"] = compare_generation(a.artifact)
    if "sanitize" in parts:
        facts["sanitizer"] = sanitize(kernels, a.out)
    if a.model and a.row:
        facts["rows"] = quantize_rows(a)
    (a.out / "gpu_check.json").write_text(json.dumps(facts, indent=1))
    print(json.dumps(facts, indent=1))
    good = (
        facts.get("kernel_tests_exit_code", 0) == 0 and not facts.get("encoder_different")
        and facts.get("encoder_equal", 1) and facts.get("generation", {}).get("separate", {}).get("tokens_equal", True)
        and facts.get("generation", {}).get("captured_equal", True)
        and facts.get("rows", {}).get("same_bytes", True)
        and not any(facts.get("kernels_exit_codes", {}).values()) and not any(facts.get("sanitizer", {}).values())
    )  # fmt: skip
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
