"""inspect: what an artifact holds, from its manifest, plan and config; nothing is loaded."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from liftc.artifact import read_json, read_manifest
from liftc.plan import Plan


def inspect_artifact(
    artifact: Path, *, graph: bool = False, tensors: bool = False, check: bool = True
) -> dict[str, Any]:
    """{"bits_per_weight", "bytes", "targets", "formats", ...} of an artifact.

    bits_per_weight counts every stored bit of the lowered linears: signs with padding, output scales,
    transforms, mapping matrices. bytes: per category and "total" (tensors), and "files" (all files).
    """
    manifest = read_manifest(artifact, check=check)
    plan = Plan.from_json(read_json(artifact / "plan.json"))
    kernels = [
        read_json(artifact / name)
        for name in sorted(manifest["files"])
        if name.startswith("kernels/") and name.endswith(".json")
    ]
    sizes = {**plan.bytes_by_category(), "total": plan.total}
    sizes["files"] = sum(entry["bytes"] for entry in manifest["files"].values())
    quantization = manifest["options"]
    answer: dict[str, Any] = {
        "kind": manifest["kind"], "route": quantization["route"], "bits_per_weight": plan.bits_per_weight,
        "bytes": sizes, "targets": [_target(kernel) for kernel in kernels],
        "formats": dict(sorted(Counter(quantization["formats"].values()).items())),
        "options": {k: v for k, v in quantization.items() if k != "formats"},
        "versions": manifest["versions"],
    }  # fmt: skip
    if tensors:
        answer["tensors"] = [
            {
                "name": e.name,
                "category": e.category,
                "dtype": e.dtype,
                "shape": list(e.shape),
                "bytes": e.nbytes,
            }
            for e in plan.entries
        ]
    text = _text(answer)
    if graph:
        text += "\n\n" + (artifact / "program.txt").read_text(encoding="utf-8")
    return {**answer, "text": text}


def _target(kernel: dict[str, Any]) -> dict[str, Any]:
    return {key: kernel[key] for key in ("target", "archs", "toolchain", "kernel_version") if key in kernel}


def _text(answer: dict[str, Any]) -> str:
    lines = [f"kind             {answer['kind']} ({answer['route']} route)",
             f"bits_per_weight  {answer['bits_per_weight']:.4f}  (lowered linears, all stored bits)"]  # fmt: skip
    lines += [f"format           {name} x {count}" for name, count in answer["formats"].items()]
    lines += [
        f"target           {t.get('target')} {' '.join(t.get('archs', []))}  [{t.get('toolchain', '')}]"
        for t in answer["targets"]
    ]
    lines.append("bytes")
    lines += [f"  {name:16s} {size:14,d}" for name, size in answer["bytes"].items()]
    for entry in answer.get("tensors", ()):
        lines.append(
            f"  {entry['category']:14s} {entry['bytes']:12,d}  {entry['name']} {entry['dtype']}{entry['shape']}"
        )
    return "\n".join(lines)
