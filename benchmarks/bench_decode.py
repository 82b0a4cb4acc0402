"""Tokens per second of one sequence: launches one by one or as a CUDA graph, operations apart or in the kernels.

    python benchmarks/bench_decode.py ARTIFACT [--device cuda] [--prompt 38 --prompt 512] [--tokens 256] [--json FILE]

The whole of `stream` is timed, prefill and sampling (greedy) included, three times after one that captures. It exits
with 1 when a CUDA graph gives other tokens than launches one by one. Where norms are in the kernels sums have another
order, and a tie of two logits may fall the other way, which is printed. Needs torch and tvm_ffi.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch

import liftc
from liftc.runtime.module import CausalLM

VARIANTS = {
    "separate": {"LIFTC_FUSED": "0", "LIFTC_CUDA_GRAPH": "0"},
    "fused": {"LIFTC_CUDA_GRAPH": "0"},
    "separate, CUDA graph": {"LIFTC_FUSED": "0"},
    "fused, CUDA graph": {},
}
"""Environment of loading, by name."""

RUNS = 3


def load(artifact: Path, device: str, setting: dict[str, str]) -> CausalLM:
    """The model as this environment has it."""
    os.environ.update(setting)
    try:
        model = liftc.load(artifact, device, check=False)
    finally:
        for name in setting:
            del os.environ[name]
    if not isinstance(model, CausalLM):
        sys.exit(f"{artifact} is not a language model")
    return model


def timed(model: CausalLM, prompt: list[int], count: int) -> tuple[float, list[int]]:
    """Tokens per second of one stream, and the tokens."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    tokens = list(model.stream(prompt, count, stop_tokens=()))
    return len(tokens) / (time.perf_counter() - started), tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--prompt", type=int, action="append", help="tokens of the prompt; repeatable (38, 512)"
    )
    parser.add_argument("--tokens", type=int, default=256, help="tokens to decode")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    variants = VARIANTS if a.device == "cuda" else {"separate": {}}
    name = torch.cuda.get_device_name() if a.device == "cuda" else "CPU"
    answer: dict[str, object] = {"device": name, "torch": torch.__version__, "rows": []}
    found: dict[tuple[bool, int], list[int]] = {}
    same = True
    for variant, setting in variants.items():
        model = load(a.artifact, a.device, setting)
        vocab = int(model.config.get("vocab_size", 1 << 30))
        for length in a.prompt or (38, 512):
            prompt = [(100 + i) % vocab for i in range(length)]
            rates = []
            for _ in range(RUNS + 1):
                rate, tokens = timed(model, prompt, a.tokens)
                rates.append(rate)
            same = same and found.setdefault(("LIFTC_FUSED" in setting, length), tokens) == tokens
            rate = statistics.median(rates[1:])
            print(f"{variant:22s} prompt {length:5d}  {rate:8.1f} tokens/s", flush=True)
            answer["rows"] += [{"variant": variant, "prompt": length, "tokens_per_second": round(rate, 1)}]  # type: ignore[operator]
    ties = len({tuple(tokens) for tokens in found.values()}) > len({length for _, length in found})
    print(
        f"captured: {'the same' if same else 'OTHER'} tokens; fused: {'other' if ties else 'the same'} tokens"
    )
    if a.json:
        a.json.write_text(json.dumps({**answer, "captured_same": same, "fused_same": not ties}, indent=1))
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
