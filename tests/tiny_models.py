"""Tiny random Hugging Face models for tests: one per family, weights large enough that every layer matters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB, HIDDEN, INNER, LAYERS = 97, 48, 80, 2
_DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _decoder(name: str, **changes: Any) -> Callable[[], PreTrainedConfig]:
    return lambda: getattr(transformers, name)(**{**_DECODER, **changes})


def _gpt2() -> PreTrainedConfig:
    return transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=4,
        n_positions=256,
        bos_token_id=1,
        eos_token_id=2,
    )


def _bert(**changes: Any) -> Callable[[], PreTrainedConfig]:
    heads = {k: v for k, v in _DECODER.items() if k != "num_key_value_heads"}
    return lambda: transformers.BertConfig(**{**heads, "type_vocab_size": 2, **changes})


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _decoder("LlamaConfig", tie_word_embeddings=False),
    "llama-tied": _decoder("LlamaConfig", tie_word_embeddings=True),
    "llama-rope3": _decoder(
        "LlamaConfig",
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    ),
    "qwen2": _decoder("Qwen2Config", tie_word_embeddings=True),
    "qwen3": _decoder("Qwen3Config", head_dim=16, tie_word_embeddings=False),
    "mistral": _decoder("MistralConfig", sliding_window=16, head_dim=16),
    "gemma2": _decoder(
        "Gemma2Config", head_dim=16, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    ),
    "gemma3": _decoder(
        "Gemma3TextConfig", head_dim=16, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": _decoder("Phi3Config"),
    "gpt2": _gpt2,
}  # fmt: skip
ENCODERS: dict[str, Callable[[], PreTrainedConfig]] = {"bert": _bert()}


def tiny_model(
    family: str, dtype: torch.dtype = torch.float32, attention: str = "eager", seed: int = 0
) -> Any:
    """A seeded random model of a family, in evaluation mode."""
    causal = family in FAMILIES
    config = (FAMILIES if causal else ENCODERS)[family]()
    maker = AutoModelForCausalLM if causal else AutoModel
    model: PreTrainedModel = maker.from_config(config, dtype=dtype, attn_implementation=attention)
    randomise(model, seed)
    return model.eval()


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Fill parameters so that signals neither vanish nor explode: matrices 1/sqrt(fan), vectors near their mean."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                scale = (
                    1.0
                    if "embed" in name or "wte" in name or "wpe" in name
                    else 1.5 * parameter.shape[-1] ** -0.5
                )
                parameter.copy_(noise * scale)
            else:
                mean = 0.0 if name.endswith("bias") or "gemma" in type(model).__name__.lower() else 1.0
                parameter.copy_(mean + 0.2 * noise)


def save_tiny(
    folder: Path, family: str, dtype: torch.dtype = torch.float32, seed: int = 0, shards: str = "5GB"
) -> Path:
    """Save a tiny model as a Hugging Face folder and return the folder."""
    tiny_model(family, dtype, seed=seed).save_pretrained(folder, max_shard_size=shards)
    return folder
