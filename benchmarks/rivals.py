"""Other quantizers on the same model, calibration and evaluation: round-to-nearest, GPTQ, AWQ and HQQ.

    python benchmarks/rivals.py MODEL --calibration calib.txt --wiki wiki.txt --web web.txt --json rivals.json
    python benchmarks/rivals.py MODEL --tokens tokens.pt --device cuda --workers 4

MODEL is a Llama-like folder (config.json, model.safetensors, tokenizer.json). Every decoder linear is quantized,
nothing else. Weights are rounded to what the format stores and put back into the model, which then runs in
its own dtype: perplexity, KL divergence from the original and top-1 agreement, in nats per token.
tokens.pt: a dictionary of token tensors "calib", "wiki" and "evalweb", for machines without the texts.

Methods (asymmetric grids, b-bit zero points and float16 scales per group of g inputs):
  rtn, rtn-clip    round to nearest; clip: the range of each group shrunk to the least squared error
  gptq, gptq-clip  GPTQ with act-order and static groups (nothing to store for the order), 1 % damping, group by
                   group of linears through the already quantized prefix
  awq              activation-aware scales (folded into norms and the previous linear) and clipping, searched on the
                   output error under the input gram, original prefix
  hqq              half-quadratic splitting, p = 0.7, 16-bit zero points, no data
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rival_methods import Tensor, awq_clip, awq_scales, fit_grid, gptq, hqq, output_loss
from torch import nn

from liftc.evaluate import evaluate

METHODS = ("rtn", "rtn-clip", "hqq", "awq", "gptq", "gptq-clip")
SHARED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def stored_bits(model: Any, method: str, bits: int, group: int) -> float:
    """Bits per weight of all decoder linears with a 16-bit scale and a zero point (b bits; 16 for HQQ) per
    group; HQQ's groups run across rows, the others end with the row."""
    total = weights = 0
    for layer in model.model.layers:
        for name in (name for names in SHARED for name in names):
            rows, columns = layer.get_submodule(name).weight.shape
            groups = rows * columns / group if method == "hqq" else rows * -(-columns // group)
            total += rows * columns * bits + groups * (16 + (16 if method == "hqq" else bits))
            weights += rows * columns
    return total / weights


class Calibration:
    """Hidden states of the calibration windows in front of one layer, and what its linears read."""

    def __init__(self, model: Any, ids: Tensor, batch: int = 16) -> None:
        self.batch = batch
        self.states = model.model.embed_tokens(ids.to(model.device))
        positions = torch.arange(ids.shape[1], device=model.device)[None]
        self.extra = {
            "attention_mask": None, "position_ids": positions,
            "position_embeddings": model.model.rotary_emb(self.states[:1], positions),
        }  # fmt: skip

    def outputs(self, layer: Any) -> Iterator[Tensor]:
        for part in self.states.split(self.batch):
            result = layer(part, **self.extra)
            yield result[0] if isinstance(result, tuple) else result

    def advance(self, layer: Any) -> None:
        """Move the hidden states behind the layer, with the weights it has now."""
        self.states = torch.cat(list(self.outputs(layer)))

    def grams(self, layer: Any, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """name -> (E[x x'] float64, E|x|) of the inputs of linears."""
        sums: dict[str, list[Tensor]] = {}

        def watch(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                x = inputs[0].flatten(0, -2).float()
                new = [(x.T @ x).double(), x.abs().sum(0)]
                sums[name] = [a + b for a, b in zip(sums[name], new)] if name in sums else new

            return hook

        hooks = [layer.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
        for _ in self.outputs(layer):
            pass
        for handle in hooks:
            handle.remove()
        tokens = self.states.shape[0] * self.states.shape[1]
        return {name: (gram / tokens, size / tokens) for name, (gram, size) in sums.items()}


@torch.no_grad()
def quantize(model: Any, method: str, bits: int, group: int, calibration: Tensor) -> dict[str, Any]:
    """Quantize all decoder linears in place; facts about GPTQ's layer losses, else nothing."""
    layers = model.model.layers
    if method in ("rtn", "rtn-clip", "hqq"):
        for layer in layers:
            for linear in (layer.get_submodule(name) for names in SHARED for name in names):
                weight = linear.weight.float()
                if method == "hqq":
                    linear.weight.copy_(hqq(weight, bits, group))
                else:
                    linear.weight.copy_(
                        fit_grid(weight, bits, group, clip=method == "rtn-clip").round(weight)
                    )
        return {}
    states = Calibration(model, calibration)
    if method == "awq":
        for layer in layers:
            grams = states.grams(layer, [names[0] for names in SHARED])
            states.advance(layer)
            awq_layer(layer, grams, bits, group)
        return {}
    ratios = []
    for layer in layers:
        for names in SHARED:
            gram = states.grams(layer, [names[0]])[names[0]][0]
            linears = [layer.get_submodule(name) for name in names]
            weight = torch.cat([linear.weight for linear in linears]).float()
            grid = fit_grid(weight, bits, group, clip=method == "gptq-clip")
            found, plain = gptq(weight, gram, grid), grid.round(weight)
            sizes = [len(linear.weight) for linear in linears]
            parts = [torch.split(error - weight, sizes) for error in (found, plain)]
            for linear, rows, ours, other in zip(linears, torch.split(found, sizes), *parts, strict=True):
                ratios.append(output_loss(ours, gram) / output_loss(other, gram))
                linear.weight.copy_(rows)
        states.advance(layer)
    worse = sum(ratio >= 1 for ratio in ratios)
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return {"linears": len(ratios), "worse_than_rtn": worse, "loss_ratio": mean, "largest_ratio": max(ratios)}


def awq_layer(layer: Any, grams: dict[str, tuple[Tensor, Tensor]], bits: int, group: int) -> None:
    """Scales into the norms and up_proj, then clipping (not of q and k) and rounding, as AWQ does."""
    folded = {"self_attn.q_proj": "input_layernorm", "mlp.gate_proj": "post_attention_layernorm"}
    scales: dict[str, Tensor] = {}
    for names in SHARED:
        gram, magnitude = grams[names[0]]
        linears = [layer.get_submodule(name) for name in names]
        s = torch.ones_like(magnitude)
        if names[0] != "self_attn.o_proj":  # its input is made by fewer value heads: nothing to fold into
            stacked = torch.cat([linear.weight for linear in linears]).float()
            s = awq_scales(stacked, gram, magnitude, bits, group)
            before = layer.get_submodule(folded.get(names[0], "mlp.up_proj"))
            by = s if before.weight.ndim == 1 else s[:, None]
            before.weight.copy_(before.weight.float() / by)
        scales[names[0]] = s
        for linear in linears:
            linear.weight.copy_(linear.weight.float() * s)
    for names in SHARED:
        s, gram = scales[names[0]], grams[names[0]][0]
        gram = gram / s.double()[:, None] / s.double()[None]
        for name in names:
            linear = layer.get_submodule(name)
            weight = linear.weight.float()
            if name not in ("self_attn.q_proj", "self_attn.k_proj"):
                weight = awq_clip(weight, gram, bits, group)
            linear.weight.copy_(fit_grid(weight, bits, group, clip=False).round(weight))


def measure(model: Any, original: Any, windows: Tensor) -> dict[str, Any]:
    """Perplexity, KL divergence and top-1 agreement on windows (n, context) as liftc.evaluate defines them."""
    ids = list(windows.to(model.device)[:, None].unbind(0))
    return evaluate(ids, lambda x: model(x).logits, lambda x: original(x).logits).to_json()


def load_model(folder: Path, device: str) -> Any:
    """The folder's Llama in the dtype of its config, rotary frequencies in float32."""
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = json.loads((folder / "config.json").read_text())
    config = LlamaConfig(**settings)
    model = LlamaForCausalLM(config)
    frequencies = model.model.rotary_emb.inv_freq.float().clone()
    model = model.to(getattr(torch, str(settings.get("dtype") or settings.get("torch_dtype", "bfloat16"))))
    state = load_file(folder / "model.safetensors")
    if settings.get("tie_word_embeddings"):
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    missing, unknown = model.load_state_dict(state, strict=False)
    if missing or unknown:
        raise SystemExit(f"{folder}: the weights do not fit the config: {missing[:3]} {unknown[:3]}")
    model.model.rotary_emb.inv_freq = frequencies
    return model.eval().to(device).requires_grad_(False)


def read_tokens(a: argparse.Namespace) -> dict[str, Tensor]:
    """Token streams "calib", "wiki" and "evalweb" from --tokens or from the texts."""
    if a.tokens:
        tokens: dict[str, Tensor] = torch.load(a.tokens, weights_only=True)
        return tokens
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(a.model / "tokenizer.json"))
    texts = {"calib": a.calibration, "wiki": a.wiki, "evalweb": a.web}
    return {
        name: torch.tensor(tokenizer.encode(path.read_text(), add_special_tokens=False).ids)
        for name, path in texts.items()
    }


def windows_of(tokens: Tensor, length: int, count: int, *, spread: bool = False) -> Tensor:
    """(count, length): the first windows, or a seeded random choice of all."""
    cut = tokens[: len(tokens) // length * length].view(-1, length)
    if spread:
        cut = cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))]
    return cut[:count]


def worker(a: argparse.Namespace, todo: Any, done: Any) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_num_threads(max(1, torch.get_num_threads() // a.workers))
    tokens = read_tokens(a)
    model, original = load_model(a.model, a.device), load_model(a.model, a.device)
    clean = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    calibration = windows_of(tokens["calib"], a.length, a.windows, spread=True)
    while (task := todo.get()) is not None:
        method, bits, group = task
        began = time.monotonic()
        model.load_state_dict(clean)
        facts = quantize(model, method, bits, group, calibration) if method != "none" else {}
        row = {
            "method": method, "bits": bits, "group": group, "quantize_seconds": time.monotonic() - began, **facts,
            "stored_bits": stored_bits(model, method, bits, group) if method != "none" else 16.0,
            "calibration_tokens": calibration.numel() if method.startswith(("gptq", "awq")) else 0,
            "wiki": measure(model, original, windows_of(tokens["wiki"], a.context, a.wiki_windows)),
            "web": measure(model, original, windows_of(tokens["evalweb"], a.context, a.web_windows)),
        }  # fmt: skip
        done.put(row)
    done.put(None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--wiki", type=Path)
    parser.add_argument("--web", type=Path)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--groups", default="64,128")
    parser.add_argument("--windows", type=int, default=128, help="calibration windows")
    parser.add_argument("--length", type=int, default=1024, help="tokens per calibration window")
    parser.add_argument("--context", type=int, default=2048, help="tokens per evaluation window")
    parser.add_argument("--wiki-windows", type=int, default=24)
    parser.add_argument("--web-windows", type=int, default=12)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    if a.tokens is None and None in (a.calibration, a.wiki, a.web):
        parser.error("give --tokens, or --calibration, --wiki and --web")
    context = multiprocessing.get_context("spawn")
    todo, done = context.Queue(), context.Queue()
    chosen = [
        (method, int(bits), int(group))
        for method in sorted(a.methods.split(","), key=METHODS.index, reverse=True)
        for bits in a.bits.split(",")
        for group in a.groups.split(",")
    ]
    for task in [("none", 16, 0), *chosen, *[None] * a.workers]:
        todo.put(task)
    processes = [context.Process(target=worker, args=(a, todo, done)) for _ in range(a.workers)]
    for process in processes:
        process.start()
    name = torch.cuda.get_device_name() if a.device.startswith("cuda") else "CPU"
    print(f"{name}, torch {torch.__version__}", flush=True)
    print(f"{'method':10s} {'b':>2s} {'g':>4s} {'stored':>7s} |{'wiki ppl':>10s}{'KL':>8s}{'top-1':>7s} |"
          f"{'web ppl':>10s}{'KL':>8s}{'top-1':>7s} | s", flush=True)  # fmt: skip
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
        cells = " |".join(
            f"{r['perplexity']:10.2f}{r['kl']:8.4f}{r['top1']:7.3f}" for r in (row["wiki"], row["web"])
        )
        note = (
            f" GPTQ/RTN layer loss {row['loss_ratio']:.3f}, largest {row['largest_ratio']:.3f}"
            if "linears" in row
            else ""
        )
        print(f"{row['method']:10s} {row['bits']:2d} {row['group']:4d} {row['stored_bits']:7.4f} |{cells} |"
              f"{row['quantize_seconds']:6.1f}{note}", flush=True)  # fmt: skip
        if a.json:
            a.json.write_text(json.dumps(rows, indent=1))
    if any(process.exitcode for process in processes):
        raise SystemExit("a worker failed")


if __name__ == "__main__":
    main()
