"""inspect: what an artifact or a kernel object holds, from its descriptions; nothing is loaded."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from liftc.artifact import read_json, read_manifest
from liftc.kernel_object import KernelObject, read_kernel_object
from liftc.plan import Plan


def inspect_object(path: Path, *, check: bool = True) -> dict[str, Any]:
    """{"target", "archs", "functions", ...} of a kernel object; CUDA kernels with registers, spills, shared memory.

    registers and spilled bytes are per thread, as the assembler reported them when the object was built. Raises
    ArtifactError.
    """
    kernels = read_kernel_object(path, verify_hash=check)
    rows = [row for function in kernels.functions for row in _function_rows(kernels, function.symbol)]
    answer: dict[str, Any] = {
        "object": path.name, "target": kernels.target, "archs": list(kernels.archs), "ptx": kernels.ptx,
        "kernel_version": kernels.kernel_version, "toolchain": kernels.toolchain, "functions": rows,
    }  # fmt: skip
    lines = [
        f"{path.name}: {kernels.target} {' '.join(kernels.archs)} {kernels.ptx}, version {kernels.kernel_version}",
        kernels.toolchain,
        "",
        "| kernel | arch | registers | spilled bytes | shared memory of a block |",
        "|---|---|---:|---:|---:|",
    ]
    lines += [
        f"| {r['symbol']} | {r['arch']} | {r['registers']} | {r['spill_bytes']} | {r['shared_bytes']} |"
        if r["registers"] else f"| {r['symbol']} | {r['arch']} | | | |"
        for r in rows
    ]  # fmt: skip
    return {**answer, "text": "\n".join(lines)}


def _function_rows(kernels: KernelObject, symbol: str) -> list[dict[str, Any]]:
    """One row per architecture a function was compiled for; none of a CPU object has resources."""
    function = next(f for f in kernels.functions if f.symbol == symbol)
    found = [r for r in kernels.resources if r.symbol == symbol]
    facts = {"symbol": symbol, "op": function.op, "max_tokens": function.max_tokens, "knobs": function.knobs}
    if not found:
        return [
            {**facts, "arch": ",".join(kernels.archs), "registers": 0, "spill_bytes": 0, "shared_bytes": 0}
        ]
    return [
        {**facts, "arch": r.arch, "registers": r.registers, "spill_bytes": r.spill_bytes,
         "shared_bytes": function.shared_bytes + r.static_shared}
        for r in found
    ]  # fmt: skip


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
