"""GGUF file -> ordinary Hugging Face folder (safetensors, config, tokenizer), tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from liftc.errors import CheckpointError
from liftc.gguf_names import ROPE_FREQS, build_config, hf_name, permuted_heads, token_ids, unpermute_rows
from liftc.gguf_reader import GgufFile, GgufTensor, read_gguf
from liftc.safetensors_file import write_safetensors
from liftc.spec import DTYPE_NAMES, TensorSpec

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def convert_gguf(path: str | Path, out_folder: str | Path, dtype: str = "bfloat16") -> None:
    """Convert a GGUF file of a llama, qwen2 or qwen3 model into a folder that any HF loader reads.

    The folder gets config.json, model.safetensors in `dtype` ("bfloat16", "float16" or "float32"),
    tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json. It is written
    under a temporary name and renamed at the end, so a killed run leaves nothing that loads.
    Raises CheckpointError for an unreadable file, an unsupported architecture, an existing folder or a
    full disk.
    """
    out = Path(out_folder)
    if dtype not in _DTYPES:
        raise CheckpointError(f"cannot convert to {dtype!r}: choose {', '.join(_DTYPES)}")
    if out.exists():
        raise CheckpointError(f"{out} exists already; delete it or choose another folder")
    file = read_gguf(path)
    config = build_config(file, dtype)
    layout = _plan_layout(file, config)
    partial = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_weights(file, config, layout, _DTYPES[dtype], partial / "model.safetensors")
        _write_json(partial / "config.json", config)
        _write_json(partial / "generation_config.json", token_ids(file.metadata))
        _write_tokenizer(file, config, partial)
        partial.rename(out)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {out}: {error.strerror}; free some disk space and retry"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _plan_layout(file: GgufFile, config: dict[str, Any]) -> dict[str, GgufTensor]:
    """HF name -> GGUF tensor in writing order; raises CheckpointError for tensors without a meaning here."""
    layout: dict[str, GgufTensor] = {}
    for name, info in file.tensors.items():
        if name == ROPE_FREQS:  # already expressed by rope_scaling in the config
            continue
        target = hf_name(name)
        if target is None:
            raise CheckpointError(
                f"{file.path}: tensor {name} has no counterpart in {config['architectures'][0]}"
            )
        heads = permuted_heads(config, name)
        if heads and info.shape[0] % (2 * heads):
            raise CheckpointError(
                f"{file.path}: {info.shape[0]} rows of {name} do not split into {heads} heads"
            )
        layout[target] = info
    return layout


def _write_weights(
    file: GgufFile, config: dict[str, Any], layout: dict[str, GgufTensor], dtype: torch.dtype, path: Path
) -> None:
    def decoded() -> Iterator[tuple[str, torch.Tensor]]:
        for name, info in layout.items():
            tensor = file.tensor(info.name, dtype)
            heads = permuted_heads(config, info.name)
            yield name, unpermute_rows(tensor, heads) if heads else tensor

    specs = {name: TensorSpec(info.shape, DTYPE_NAMES[dtype]) for name, info in layout.items()}
    write_safetensors(path, specs, decoded(), {"format": "pt"})


def _write_tokenizer(file: GgufFile, config: dict[str, Any], folder: Path) -> None:
    """tokenizer.json and its companions, built by transformers from the vocabulary in the file."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.path.parent), gguf_file=file.path.name)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{file.path}: its tokenizer cannot be converted ({reason})") from error
    if file.metadata.get("tokenizer.ggml.pre") == "smollm":  # digits never join each other or a space
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    tokenizer.save_pretrained(str(folder))
    settings_path = folder / "tokenizer_config.json"
    settings: dict[str, Any] = json.loads(settings_path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "backend"):
        settings.pop(key, None)
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "add_bos_token": bool(file.metadata.get("tokenizer.ggml.add_bos_token", False)),
    }
    if isinstance(template := file.metadata.get("tokenizer.chat_template"), str):
        settings["chat_template"] = template
    _write_json(settings_path, settings)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
