"""GGUF conversion: tensors, row order, config and tokenizer, against models written in llama.cpp's form."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, randomise
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from liftc.errors import CheckpointError
from liftc.gguf import convert_gguf
from liftc.gguf_names import unpermute_rows
from liftc.gguf_reader import read_gguf

BYTES = sorted(ByteLevel.alphabet())
SPECIAL = ["<|end|>", "<|start|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "1 2", "\u0120 \u0120"]
TOKENS = SPECIAL + BYTES + [merge.replace(" ", "") for merge in MERGES]
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def interleave_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Row i of each half of a head becomes row 2i or 2i+1, written as a loop over rows."""
    size = weight.shape[0] // heads
    result = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        head, inner = divmod(row, size)
        half, index = divmod(inner, size // 2)
        result[head * size + 2 * index + half] = weight[row]
    return result


def gguf_name(name: str) -> str:
    stem, suffix = name.rsplit(".", 1)
    parts = stem.split(".")
    if parts[1:2] == ["layers"]:
        return f"blk.{parts[2]}.{NAMES['.'.join(parts[3:])]}.{suffix}"
    return f"{NAMES[stem]}.{suffix}"


def write_gguf(path: Path, family: str, kind: gguf.GGMLQuantizationType, **extra: Any) -> Any:
    """Write a tiny model of a family as GGUF; returns the Hugging Face model with the stored weights."""
    config = FAMILIES[family]()
    config.update({"vocab_size": len(TOKENS), "hidden_size": 64, "intermediate_size": 96, "head_dim": 16})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomise(model, 3)
    arch = config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(256)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(16)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    for key, value in extra.items():
        getattr(writer, f"add_{key}")(*value)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            permuted = [count for part, count in heads.items() if arch == "llama" and part in name]
            stored = interleave_rows(weight, permuted[0]) if permuted else weight
            used = kind if weight.ndim > 1 else gguf.GGMLQuantizationType.F32
            data = gguf.quantize(stored.numpy(), used)
            writer.add_tensor(gguf_name(name), data, raw_dtype=used)
            exact = torch.from_numpy(np.array(gguf.dequantize(data, used)))
            weight.copy_(unpermute_rows(exact, permuted[0]) if permuted else exact)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_row_order_is_undone_exactly() -> None:
    for heads, size in [(1, 2), (3, 8), (4, 16)]:
        weight = torch.randn(heads * size, 5, generator=torch.Generator().manual_seed(size))
        assert torch.equal(unpermute_rows(interleave_rows(weight, heads), heads), weight)
        bias = weight[:, 0]
        assert torch.equal(unpermute_rows(interleave_rows(bias, heads), heads), bias)


@pytest.mark.parametrize(
    ("family", "kind", "dtype"),
    [("llama", "Q8_0", "float32"), ("qwen2", "Q4_1", "bfloat16"), ("qwen3", "F16", "float16")],
)
def test_converted_folder_is_the_same_model(tmp_path: Path, family: str, kind: str, dtype: str) -> None:
    source, folder = tmp_path / "m.gguf", tmp_path / "out"
    want = write_gguf(source, family, gguf.GGMLQuantizationType[kind])
    convert_gguf(source, folder, dtype)
    assert sorted(p.name for p in folder.iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert not list(tmp_path.glob("*.partial"))
    got = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert str(got.dtype) == f"torch.{dtype}" and type(got) is type(want)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        for name, parameter in want.named_parameters():
            parameter.copy_(parameter.to(got.dtype))
            assert torch.equal(got.get_parameter(name).float(), parameter), name
        want.set_attn_implementation("eager")
        assert torch.equal(got.float()(ids).logits, want(ids).logits)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "m.gguf", "llama-tied", gguf.GGMLQuantizationType.F32)
    convert_gguf(folder / "m.gguf", folder / "out")
    return folder


def test_config_states_what_the_file_states(converted: Path) -> None:
    config = json.loads((converted / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"] is True
    assert config["rms_norm_eps"] == 1e-6 and config["dtype"] == "bfloat16"
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 0)
    assert json.loads((converted / "out" / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 0,
    }


def test_tokenizer_splits_digits_as_the_model_was_trained(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted / "out")
    text = "hello  12<|end|>"
    pieces = tokenizer.tokenize(text)
    assert pieces == ["hello", "\u0120\u0120", "1", "2", "<|end|>"]
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.model_max_length == 256 and tokenizer.eos_token == "<|end|>"
    message = [{"role": "user", "content": "he"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "he"
    settings = json.loads((converted / "out" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == (converted / "out" / "chat_template.jinja").read_text()


def test_capture_takes_a_gguf_file(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from liftc import capture as module

    monkeypatch.setenv("LIFTC_CACHE_DIR", str(converted / "cache"))
    first = module._converted(converted / "m.gguf")
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert module._converted(converted / "m.gguf") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(CheckpointError, match="no such GGUF file"):
        module.capture(converted / "other.gguf")


def refuses(path: Path, message: str) -> None:
    out = path.parent / "refused"
    with pytest.raises(CheckpointError, match=message) as error:
        convert_gguf(path, out)
    assert "\n" not in str(error.value)
    assert not out.exists() and not list(path.parent.glob("*.partial"))


def test_damaged_files(converted: Path, tmp_path: Path) -> None:
    data = (converted / "m.gguf").read_bytes()
    bad = tmp_path / "bad.gguf"
    refuses(bad, "no such GGUF file")
    for content, message in [
        (b"", "cannot be read as a GGUF file"),
        (b"GGML" + data[4:], "is not a GGUF file"),
        (data[:4] + struct.pack("<I", 1) + data[8:], "GGUF version 1 is not supported"),
        (data[:4] + struct.pack(">I", 3) + data[8:], "GGUF version 50331648"),
        (data[:8] + struct.pack("<Q", 2**60) + data[16:], "bad.gguf"),
        (data[:16] + struct.pack("<Q", 2**60) + data[24:], "bad.gguf"),
        (data[:20], "truncated inside its header"),
        (data[:3000], "truncated"),
        (data[:-100], "is truncated"),
    ]:
        bad.write_bytes(content)
        refuses(bad, message)


def test_every_truncation_of_the_header_is_refused(converted: Path, tmp_path: Path) -> None:
    data = (converted / "m.gguf").read_bytes()
    bad = tmp_path / "bad.gguf"
    for size in range(4, 6000, 97):
        bad.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            read_gguf(bad)


def test_flipped_bytes_never_escape_as_other_errors(converted: Path, tmp_path: Path) -> None:
    data = bytearray((converted / "m.gguf").read_bytes())
    bad = tmp_path / "bad.gguf"
    generator = np.random.default_rng(0)
    for position in generator.integers(4, 9000, 150):
        changed = data.copy()
        changed[position] ^= 1 << int(generator.integers(8))
        bad.write_bytes(changed)
        try:
            read_gguf(bad)
        except CheckpointError as error:
            assert "\n" not in str(error)


def test_unsupported_models(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refuses(path, r"architecture 'mamba' is not supported \(supported: llama, qwen2, qwen3\)")
    write_gguf(path, "llama", gguf.GGMLQuantizationType.F32, expert_count=(8,))
    refuses(path, "with experts is not supported")
    write_gguf(
        path, "llama", gguf.GGMLQuantizationType.F32, rope_scaling_type=(gguf.RopeScalingType.LONGROPE,)
    )
    refuses(path, "rope scaling 'longrope' is not supported")
    write_gguf(
        path, "llama", gguf.GGMLQuantizationType.F32, tensor=("blk.0.odd.weight", np.zeros(2, np.float32))
    )
    refuses(path, r"tensor blk\.0\.odd\.weight has no counterpart in LlamaForCausalLM")
    write_gguf(path, "llama", gguf.GGMLQuantizationType.F32, uint16=("split.count", 3))
    refuses(path, "one of 3 parts of a split GGUF file")


def test_llama3_rope_factors_become_a_config(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(head_dim=64, rope_parameters=scaling)
    plain = 1 / 10000.0 ** (torch.arange(0, 64, 2) / 64)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    path = tmp_path / "m.gguf"
    kind = gguf.GGMLQuantizationType.F32
    write_gguf(path, "llama", kind, tensor=("rope_freqs.weight", (plain / scaled).numpy()))
    convert_gguf(path, tmp_path / "out")
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"]
    assert stated == {key: value for key, value in scaling.items() if key != "rope_theta"}
    write_gguf(path, "llama", kind, tensor=("rope_freqs.weight", np.linspace(1, 3, 32, dtype=np.float32)))
    refuses(path, "rope_freqs are not those of Llama 3")


def test_never_overwrites_and_cleans_up(
    converted: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="exists already"):
        convert_gguf(converted / "m.gguf", converted / "out")
    with pytest.raises(CheckpointError, match="cannot convert to 'int8'"):
        convert_gguf(converted / "m.gguf", tmp_path / "x", "int8")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("liftc.gguf._write_tokenizer", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        convert_gguf(converted / "m.gguf", tmp_path / "x")
    assert not list(tmp_path.iterdir())
