"""How GGUF spells a model: tensor names, row order and hyperparameters of llama, qwen2 and qwen3.

A GGUF file has no config.json; llama.cpp keeps the same facts as metadata under "<architecture>.<key>".
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from liftc.errors import CheckpointError
from liftc.gguf_reader import GgufFile

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_PATTERN = re.compile(r"(?:blk\.(\d+)\.)?([a-z_]+)\.(weight|bias)")
ROPE_FREQS = "rope_freqs.weight"


def hf_name(name: str) -> str | None:
    """Hugging Face name of a GGUF tensor; None for one that these architectures do not have."""
    match = _PATTERN.fullmatch(name)
    if not match:
        return None
    block, stem, suffix = match.groups()
    if block is None:
        return f"{_TOP[stem]}.{suffix}" if stem in _TOP else None
    return f"model.layers.{block}.{_BLOCK[stem]}.{suffix}" if stem in _BLOCK else None


def unpermute_rows(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's row order of a llama q or k projection.

    llama.cpp rotates neighbouring pairs of a head (2i, 2i+1), Hugging Face rotates (i, i + head_dim/2), so
    llama.cpp's converter interleaves the halves of each head. tensor: (heads * head_dim, ...), the same out.
    """
    head_dim = tensor.shape[0] // heads
    pairs = tensor.reshape(heads, head_dim // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape).contiguous()


def permuted_heads(config: Mapping[str, Any], name: str) -> int:
    """Number of heads to un-permute for this GGUF tensor; 0 when its rows are in Hugging Face order."""
    if config["model_type"] == "llama" and ".attn_q." in name:
        return int(config["num_attention_heads"])
    if config["model_type"] == "llama" and ".attn_k." in name:
        return int(config["num_key_value_heads"])
    return 0


def build_config(file: GgufFile, dtype: str) -> dict[str, Any]:
    """config.json of the model; `dtype` in words of torch ("bfloat16").

    Raises CheckpointError for another architecture, experts, an unknown rope scaling, or missing keys.
    """
    path, meta = file.path, file.metadata
    arch = meta.get("general.architecture")
    if arch not in _CLASSES:
        known = ", ".join(_CLASSES)
        raise CheckpointError(f"{path}: GGUF architecture {arch!r} is not supported (supported: {known})")
    if meta.get(f"{arch}.expert_count", 0):
        raise CheckpointError(f"{path}: {arch} with experts is not supported in GGUF form; use the HF folder")
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(
            f"{path}: the file holds no token_embd.weight; it is not a whole language model"
        )

    def number(key: str, default: float | None = None) -> Any:
        value = meta.get(f"{arch}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise CheckpointError(f"{path}: metadata {arch}.{key} must be a positive number, got {value!r}")
        return value

    heads, hidden = number("attention.head_count"), number("embedding_length")
    context = number("context_length")
    attention_bias = "blk.0.attn_q.bias" in file.tensors
    config: dict[str, Any] = {
        "architectures": [_CLASSES[arch]],
        "model_type": arch,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": number("attention.key_length", meta.get(f"{arch}.rope.dimension_count", hidden // heads)),
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": _shortest(number("attention.layer_norm_rms_epsilon", 1e-6)),
        "rope_theta": number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, arch, context),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": dtype,
    }
    if arch == "llama":
        config |= {"attention_bias": attention_bias, "mlp_bias": "blk.0.ffn_up.bias" in file.tensors}
    if arch == "qwen3":
        config["attention_bias"] = attention_bias
    if arch in ("qwen2", "qwen3"):
        config["use_sliding_window"] = False
    return config | token_ids(meta)


def token_ids(meta: Mapping[str, Any]) -> dict[str, int]:
    """bos/eos/pad token ids that the metadata states."""
    keys = {
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "padding_token_id",
    }
    found = {ours: meta.get(f"tokenizer.ggml.{theirs}") for ours, theirs in keys.items()}
    return {key: value for key, value in found.items() if isinstance(value, int)}


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 9.999999747378752e-06 was written as 1e-05."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if torch.tensor(short, dtype=torch.float32) == torch.tensor(value, dtype=torch.float32):
            return short
    return value


def _rope_scaling(file: GgufFile, arch: str, context: int) -> dict[str, Any] | None:
    """rope_scaling of the config; Llama 3's is recovered from the frequency factors the file stores."""
    meta, key = file.metadata, f"{arch}.rope.scaling"
    if ROPE_FREQS in file.tensors:
        return _llama3_scaling(file, arch)
    kind = meta.get(f"{key}.type", "none")
    if kind == "none":
        return None
    factor = meta.get(f"{key}.factor")
    original = meta.get(f"{key}.original_context_length", context)
    if kind == "linear" and isinstance(factor, float):
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and isinstance(factor, float) and isinstance(original, int):
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise CheckpointError(
        f"{file.path}: rope scaling {kind!r} is not supported in GGUF form; use the HF folder"
    )


def _llama3_scaling(file: GgufFile, arch: str) -> dict[str, Any]:
    """Llama 3's scaling whose factors equal the stored ones; raises CheckpointError when none does.

    A wavelength below original / high keeps its frequency, one above original / low is divided by `factor`,
    and between them the inverse frequency is interpolated. All published models use low 1, high 4 and 8192.
    """
    stored = file.tensor(ROPE_FREQS, torch.float64)
    theta = float(file.metadata.get(f"{arch}.rope.freq_base", 10000.0))
    low, high, original = 1.0, 4.0, 8192
    factor = round(float(stored.max()), 3)
    exponent = torch.arange(stored.numel(), dtype=torch.float64) / stored.numel()
    wavelength = 2 * math.pi * theta**exponent
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if stored.shape != expected.shape or not torch.allclose(stored, expected, rtol=1e-3):
        raise CheckpointError(f"{file.path}: its rope_freqs are not those of Llama 3; use the HF folder")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
