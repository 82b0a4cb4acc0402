"""The model card of an artifact: sizes, formats, errors per kind of layer, and how to use it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from liftc.plan import Plan
from liftc.quant.result import Quantized


def model_card(name: str, plan: Plan, facts: Mapping[str, Any], quantized: Quantized) -> str:
    """Markdown text of README.md in an artifact."""
    lines = [
        f"# {name}, compiled by liftc",
        "",
        f"{plan.bits_per_weight:.4f} bits per weight in the lowered linears, everything stored for them counted.",
        f"Calibration: {facts['calibration']}. Effort {facts['effort']}: beam {facts['beam']}, damping "
        f"{facts['damp']}, seed {facts['seed']}, epochs {facts['epochs']} of block correction, "
        f"{facts['dense_epochs']} of dense training, {facts['tune_epochs']} of end-to-end tuning.",
        "",
        "| category | bytes |",
        "|---|---:|",
        *(f"| {category} | {size:,} |" for category, size in plan.bytes_by_category().items()),
        f"| all tensors | {plan.total:,} |",
        "",
        "| layer | format | linears | mean relative error | mean proxy loss |",
        "|---|---|---:|---:|---:|",
    ]
    kinds: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for row in quantized.report:
        kinds[row.name.rpartition(".")[2], row.format].append((row.relative_error, row.proxy_loss))
    for (kind, fmt), errors in kinds.items():
        relative = sum(e for e, _ in errors) / len(errors)
        proxy = sum(p for _, p in errors) / len(errors)
        lines.append(f"| {kind} | {fmt} | {len(errors)} | {relative:.4f} | {proxy:.4f} |")
    lines += [
        "",
        "Relative error is ||W - W'||^2 / ||W||^2; proxy loss weighs it by the inputs seen in calibration.",
        "",
        "```python",
        "import pathlib, liftc",
        'model = liftc.load("THIS FOLDER")',
        'tokenizer = liftc.Tokenizer(pathlib.Path("THIS FOLDER"))',
        'ids = model.generate(tokenizer.encode("Once upon a time"), 64)',
        "print(tokenizer.decode(ids[0].tolist()))",
        "```",
        "",
    ]
    return "\n".join(lines)
