"""What capture refuses, each time in one sentence that names the place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from liftc.capture import capture, capture_config
from liftc.errors import CaptureError, CheckpointError, LiftcError


@pytest.fixture
def folder(tiny_folder: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder("llama"), tmp_path / "model"))


def change(folder: Path, **values: Any) -> Path:
    """Change keys of config.json; None removes a key."""
    path = folder / "config.json"
    config = {k: v for k, v in {**json.loads(path.read_text()), **values}.items() if v is not None}
    path.write_text(json.dumps(config))
    return folder


def refusal(kind: type[LiftcError], *args: Any, **options: Any) -> str:
    with pytest.raises(kind) as error:
        capture(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_folder_and_missing_config(folder: Path) -> None:
    assert "no such model folder" in refusal(CheckpointError, folder / "nowhere")
    (folder / "config.json").unlink()
    assert "config.json: no such file" in refusal(CheckpointError, folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00\xff", '{"a": ' * 5000])
def test_config_that_is_no_json_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    message = refusal(CheckpointError, folder)
    assert "config.json" in message and "JSON" in message


def test_config_without_or_with_unknown_model_type(folder: Path) -> None:
    assert "no model_type" in refusal(CaptureError, change(folder, model_type=None))
    assert "'llamx' is unknown" in refusal(CaptureError, change(folder, model_type="llamx"))


def test_remote_code_is_never_run(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    change(folder, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    assert "brings its own code, which liftc never runs" in refusal(CaptureError, folder)


def test_quantized_and_encoder_decoder_models(folder: Path) -> None:
    change(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "already quantized (gptq)" in refusal(CaptureError, folder)
    with pytest.raises(CaptureError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        capture_config({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]})
    with pytest.raises(CaptureError, match="ViTModel is neither"):
        capture_config({"model_type": "vit", "architectures": ["ViTModel"]})


@pytest.mark.parametrize("values", [{"hidden_size": 64}, {"intermediate_size": 96}, {"vocab_size": 100}])
def test_sizes_that_disagree_with_the_weights(folder: Path, values: dict[str, int]) -> None:
    message = refusal(CheckpointError, change(folder, **values))
    assert "has shape" in message and "config.json implies" in message


def test_more_layers_than_weights(folder: Path) -> None:
    assert "lacks model.layers.2" in refusal(CheckpointError, change(folder, num_hidden_layers=3))
    assert "states 1000000000 layers" in refusal(CheckpointError, change(folder, num_hidden_layers=10**9))


@pytest.mark.parametrize(
    "values", [{"num_attention_heads": 0}, {"hidden_size": "big"}, {"hidden_act": "warp"}]
)
def test_nonsense_in_the_config(folder: Path, values: dict[str, Any]) -> None:
    message = refusal(CaptureError, change(folder, **values))
    assert str(folder) in message and "llama" in message.lower()


def test_architecture_that_cannot_be_exported() -> None:
    config = {
        "model_type": "mamba", "architectures": ["MambaForCausalLM"], "vocab_size": 32, "hidden_size": 16,
        "num_hidden_layers": 1, "state_size": 4,
    }  # fmt: skip
    with pytest.raises(CaptureError, match="Mamba"):
        capture_config(config)


def test_computations_that_depend_on_the_text() -> None:
    from tiny_models import FAMILIES

    config = FAMILIES["llama"]().to_dict()
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(
        CaptureError, match="dynamic rotary embeddings, which change with the length of the text"
    ):
        capture_config({**config, "rope_parameters": rope})
    with pytest.raises(CaptureError, match="MixtralForCausalLM routes tokens to 8 experts"):
        capture_config({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]})


def test_unknown_options(folder: Path) -> None:
    assert "unknown dtype 'int8'" in refusal(CaptureError, folder, dtype="int8")
    assert "unknown attention 'flash'" in refusal(CaptureError, folder, attention="flash")
    assert "belong to modules" in refusal(CaptureError, folder, (torch.zeros(1),))


def test_softcapped_attention_refuses_sdpa_only_when_asked_for_it() -> None:
    from tiny_models import FAMILIES

    with pytest.raises(CaptureError, match=r"Gemma2ForCausalLM .* sdpa attention .*; try eager"):
        capture_config(FAMILIES["gemma2"](), attention="sdpa")


def test_tie_that_the_checkpoint_contradicts(tiny_folder: Any, tmp_path: Path, language_runner: Any) -> None:
    """config.json says tied, the file holds two different tensors: both are used, as transformers does."""
    from tiny_models import tiny_model

    folder = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "model"))
    captured = capture(change(folder, tie_word_embeddings=True))
    assert {"lm_head.weight", "model.embed_tokens.weight"} < set(captured.program.tensors)
    ids = torch.arange(3, 9)[None]
    runner = language_runner(captured.program, captured.checkpoint, 8)
    with torch.no_grad():
        torch.testing.assert_close(runner.prefill(ids), tiny_model("llama")(ids).logits, rtol=1e-4, atol=1e-4)


def test_published_spellings_of_names() -> None:
    """GPT-NeoX stores its head as embed_out, old BERT files say gamma and beta."""
    from tiny_models import ENCODERS
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import GPTNeoXConfig

    from liftc.capture_hf import build_model
    from liftc.capture_weights import WeightNames
    from liftc.checkpoint import StateDictCheckpoint

    neox = GPTNeoXConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9
    )
    for config, kind, changes in [
        (neox, "causal-lm", {"lm_head.weight": "embed_out.weight"}),
        (
            ENCODERS["bert"](),
            "encoder",
            {
                "embeddings.LayerNorm.weight": "bert.embeddings.LayerNorm.gamma",
                "encoder.layer.1.output.LayerNorm.bias": "bert.encoder.layer.1.output.LayerNorm.beta",
            },
        ),
    ]:
        model = build_model(config, torch.float32, "eager", kind, FakeTensorMode(allow_non_fake_inputs=True))
        prefix = "bert." if kind == "encoder" else ""
        names = {path: changes.get(path, prefix + path) for path, _ in model.named_parameters()}
        disk = {names[path]: torch.zeros(weight.shape) for path, weight in model.named_parameters()}
        assert WeightNames.bind(model, StateDictCheckpoint(disk), "test").stored == names


def test_gpt2_without_the_usual_prefix(tmp_path: Path, language_runner: Any) -> None:
    """The published GPT-2 stores h.0.attn..., its class says transformer.h.0.attn..."""
    from tiny_models import tiny_model

    model = tiny_model("gpt2")
    model.transformer.save_pretrained(tmp_path / "gpt2")
    captured = capture(change(tmp_path / "gpt2", architectures=["GPT2LMHeadModel"]))
    assert "h.0.attn.c_attn.weight" in captured.program.tensors
    assert captured.checkpoint.spec("lm_head.weight") == captured.checkpoint.spec("wte.weight")
    ids = torch.arange(3, 9)[None]
    runner = language_runner(captured.program, captured.checkpoint, 8)
    with torch.no_grad():
        torch.testing.assert_close(runner.prefill(ids), model(ids).logits, rtol=1e-4, atol=1e-4)
