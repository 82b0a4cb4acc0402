"""Quantize a few decoder blocks of a model's shape with random weights: seconds per block, memory, total.

    python scripts/dry_run.py --shape 70b --tokenizer FOLDER --effort balanced

Writes a Llama folder of --layers blocks into a temporary directory, quantizes it exactly as `liftc compile`
does, and extrapolates from the last block and the mean of the Fisher pass. Random weights do not change the work,
only the perplexity.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from liftc.capture import capture_config
from liftc.capture_file import save_captured
from liftc.driver.compile import CompileOptions, prepare_job
from liftc.driver.quantize import quantize_program

SHAPES = {
    "tiny": (256, 512, 4, 2, 4),
    "7b": (4096, 11008, 32, 32, 32),
    "8b": (4096, 14336, 32, 8, 32),
    "70b": (8192, 28672, 64, 8, 80),
}
"""hidden, intermediate, heads, key/value heads, blocks."""


def config_of(shape: str, layers: int, tokenizer: Path) -> dict[str, Any]:
    """config.json of a Llama of that shape with the tokenizer's vocabulary."""
    hidden, inner, heads, kv_heads, _ = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": inner, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers, "vocab_size": json.loads((tokenizer / "config.json").read_text())["vocab_size"],
        "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "rope_theta": 10000.0,
        "tie_word_embeddings": True, "hidden_act": "silu", "torch_dtype": "bfloat16",
    }  # fmt: skip


def capture_shape(shape: str, layers: int, tokenizer: Path, out: Path) -> None:
    """Write the captured graphs of a shape; no weights are needed."""
    captured = capture_config(config_of(shape, layers, tokenizer))
    save_captured(replace(captured, folder=tokenizer), out)


def write_model(folder: Path, shape: str, layers: int, tokenizer: Path) -> None:
    """A Llama folder of `layers` blocks with random bfloat16 weights, one file per block."""
    hidden, inner, heads, kv_heads, _ = SHAPES[shape]
    config = config_of(shape, layers, tokenizer)
    vocabulary = config["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config))
    for path in tokenizer.glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}

    def random(*size: int) -> torch.Tensor:
        base = torch.randn(1 << 20, generator=generator).mul_(0.02).to(torch.bfloat16)
        count = size[0] * size[1]
        return base.repeat(-(-count // base.numel()))[:count].view(size)

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name)
        index.update(dict.fromkeys(tensors, name))

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    save("model-embed.safetensors",
         {"model.embed_tokens.weight": random(vocabulary, hidden), "model.norm.weight": ones})  # fmt: skip
    key = hidden // heads * kv_heads
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (key, hidden), "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    for layer in range(layers):
        start = f"model.layers.{layer}."
        tensors = {f"{start}{name}.weight": random(*size) for name, size in shapes.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        save(f"model-{layer}.safetensors", {**tensors, **{f"{start}{n}.weight": ones.clone() for n in norms}})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="70b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokenizer", type=Path, required=True, help="Hugging Face folder with a tokenizer")
    parser.add_argument("--effort", default="balanced")
    parser.add_argument("--bits", type=float, default=2.4)
    parser.add_argument(
        "--capture-to", type=Path, help="only write the captured graphs there, for --captured"
    )
    parser.add_argument("--captured", type=Path, help="graphs written before")
    a = parser.parse_args()
    if a.capture_to:
        capture_shape(a.shape, a.layers, a.tokenizer, a.capture_to)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        folder.mkdir()
        write_model(folder, a.shape, a.layers, a.tokenizer)
        options = CompileOptions(bits=a.bits, effort=a.effort, tune_epochs=0, captured=a.captured)
        started = time.perf_counter()
        job = prepare_job(folder, options)
        captured = time.perf_counter()
        quantized = quantize_program(
            job.captured, job.program, job.inputs, options.quantize_options(), Path(name) / "work",
            device=None, activation_memory=None, resume=False, progress=False,
        )  # fmt: skip
        whole = time.perf_counter() - captured
    blocks = [quantized.seconds[path.stem] for path in quantized.files]
    fisher = quantized.seconds.get("fisher", 0.0)
    weights = sum(spec.out_features * spec.in_features for spec in job.program.linears.values()) // len(
        blocks
    )
    total = (blocks[-1] + fisher / len(blocks)) * SHAPES[a.shape][4]
    print(f"{a.shape} {a.effort}, {job.inputs.description}: capture {captured - started:.1f} s, fisher {fisher:.1f} s, "
          f"blocks {[round(b, 2) for b in blocks]} s of {weights / 1e6:.0f} M weights, all {whole:.1f} s; "
          f"{SHAPES[a.shape][4]} blocks about {total / 60:.1f} min")  # fmt: skip
    print(f"peak bytes: {quantized.memory}; a block is {2 * weights / 1e9:.2f} GB in bfloat16")


if __name__ == "__main__":
    main()
