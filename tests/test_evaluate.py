"""Perplexity, KL divergence and agreement against closed forms; the per-layer report; `liftc eval`."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import liftc
from liftc.cli import main
from liftc.driver.evaluate import evaluate_artifact, load_any, load_dense
from liftc.driver.layers import BlockProbe, block_outputs, layer_errors, outputs_of
from liftc.errors import LiftcError
from liftc.evaluate import divergence, evaluate
from liftc.runtime.module import CausalLM

VOCAB = 11


def logits_of(seed: int, dtype: torch.dtype = torch.float64) -> Callable[[torch.Tensor], torch.Tensor]:
    """A model whose logits depend on the last token only."""
    table = 3 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lambda ids: table[ids].to(dtype)


def windows(count: int, length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randint(0, VOCAB, (1, length), generator=generator) for _ in range(count)]


def test_figures_equal_their_definitions() -> None:
    model, reference, texts = logits_of(1), logits_of(2), windows(3, 300)
    result = evaluate(texts, model, reference)
    nll, kl, agree, n = 0.0, 0.0, 0, 0
    for ids in texts:
        p, q = (m(ids)[0, :-1].softmax(-1) for m in (model, reference))
        for i, gold in enumerate(ids[0, 1:].tolist()):
            nll -= math.log(p[i, gold])
            kl += sum(float(a) * math.log(a / b) for a, b in zip(q[i], p[i]))
            agree += int(p[i].argmax() == q[i].argmax())
            n += 1
    assert (result.tokens, result.windows, result.context) == (n, 3, 300) == (3 * 299, 3, 300)
    assert result.perplexity == pytest.approx(math.exp(nll / n), rel=1e-12)
    assert result.kl == pytest.approx(kl / n, rel=1e-12) and result.top1 == agree / n
    assert result.reference_perplexity == pytest.approx(evaluate(texts, reference).perplexity, rel=1e-12)
    assert evaluate(texts, model).kl is None


def test_half_precision_logits_lose_no_more_than_their_rounding() -> None:
    texts = windows(2, 50)
    exact = evaluate(texts, logits_of(1), logits_of(2))
    rounded = evaluate(texts, logits_of(1, torch.bfloat16), logits_of(2, torch.bfloat16))
    assert rounded.kl == pytest.approx(exact.kl, rel=0.02)
    same = evaluate(texts, logits_of(1, torch.bfloat16), logits_of(1, torch.bfloat16))
    assert same.kl == 0 and same.top1 == 1 and same.perplexity == same.reference_perplexity


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-200, 200, width=32), min_size=2, max_size=8), st.integers(0, 100))
def test_divergence_is_finite_and_never_negative(values: list[float], seed: int) -> None:
    q = torch.tensor(values)
    p = q + 1e-3 * torch.randn(len(values), generator=torch.Generator().manual_seed(seed))
    found = divergence(q.log_softmax(-1), p.log_softmax(-1))
    assert 0 <= float(found) < 1 and float(divergence(q.log_softmax(-1), q.log_softmax(-1))) == 0


def test_divergence_of_ruled_out_tokens() -> None:
    out = -math.inf
    q, p = torch.tensor([0.0, 0.0, out]).log_softmax(-1), torch.tensor([0.0, 0.0, out]).log_softmax(-1)
    assert float(divergence(q, p)) == 0
    assert float(divergence(q, torch.tensor([0.0, 0.0, 0.0]).log_softmax(-1))) == pytest.approx(math.log(1.5))
    assert float(divergence(torch.tensor([0.0, 0.0, 0.0]).log_softmax(-1), p)) == math.inf


def test_refused_logits() -> None:
    texts = windows(1, 10)
    with pytest.raises(LiftcError, match="logits of the model in window 0 are NaN"):
        evaluate(texts, lambda ids: torch.full((1, 10, VOCAB), math.nan))
    with pytest.raises(LiftcError, match="the model has 11 tokens and the reference 12"):
        evaluate(texts, logits_of(1), lambda ids: torch.zeros(1, 10, 12))
    hopeless = evaluate(
        texts, lambda ids: torch.full((1, 10, VOCAB), -1e5).index_fill(2, torch.tensor([0]), 0.0)
    )
    assert hopeless.perplexity > 1e300


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_probe_gives_the_hidden_states_of_transformers(
    tiny_folder: Callable[..., Path], family: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_folder(family)
    model = load_dense(folder)
    probe = BlockProbe(model, outputs_of(folder, model))
    ids = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79, 32, 38]])
    original = AutoModelForCausalLM.from_pretrained(folder).eval()
    caught: list[torch.Tensor] = []
    layers = original.transformer.h if family == "gpt2" else original.model.layers
    for layer in layers:
        layer.register_forward_hook(
            lambda m, i, out: caught.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        original(ids)
    assert probe.blocks == [0, 1]
    for ours, theirs in zip(probe(ids), caught, strict=True):
        torch.testing.assert_close(ours, theirs.view_as(ours), atol=1e-4, rtol=1e-4)


def test_layer_errors_equal_their_definitions(artifact: Path, model_folder: Path) -> None:
    model, original = load_any(artifact), load_dense(model_folder)
    assert isinstance(liftc.load(artifact), CausalLM)
    probes = (
        BlockProbe(model, outputs_of(artifact, model)),
        BlockProbe(original, outputs_of(model_folder, original)),
    )
    texts = [torch.arange(2, 30)[None], torch.arange(40, 52)[None]]
    errors = layer_errors(texts, *probes)
    for row, error in enumerate(errors):
        ours, theirs = (torch.cat([p(ids)[row][0] for ids in texts]).double() for p in probes)
        assert error.block == row
        assert error.relative_error == pytest.approx(
            float((ours - theirs).square().sum() / theirs.square().sum()), rel=1e-6
        )
        ratio = (ours - theirs).square().sum(1) / theirs.square().sum(1)
        assert error.token_error == pytest.approx(float(ratio.mean()), rel=1e-6)
        cosine = (ours * theirs).sum(1) / (ours.norm(dim=1) * theirs.norm(dim=1))
        assert error.cosine == pytest.approx(float(cosine.mean()), rel=1e-6)
    assert 0.001 < errors[0].relative_error < errors[1].relative_error < 1
    same = layer_errors(texts, probes[1], probes[1])
    assert all(e.relative_error == 0 and e.cosine == pytest.approx(1) for e in same)


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert main(["eval", *map(str, arguments), "--json", "-q"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_eval_of_several_texts_and_layers(
    artifact: Path, model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("A quick brown fox jumps over the lazy dog, again and again. " * 10)
    common = (artifact, "--reference", model_folder, "--ctx", "32", "--windows", "3")
    both = run(capsys, *common, "--text", text_file, "--text", other, "--layers")
    assert [t["file"] for t in both["texts"]] == [str(text_file), str(other)] and "perplexity" not in both
    alone = run(capsys, *common, "--text", other)
    assert both["texts"][1] == {"file": str(other), **{k: alone[k] for k in both["texts"][1] if k != "file"}}
    assert [entry["block"] for entry in both["layers"]] == [0, 1]
    report = json.loads((artifact / "report.json").read_text())["linears"]
    assert [row for entry in both["layers"] for row in entry["linears"]] == report != []
    assert main(["eval", *map(str, common), "--text", str(other), "--layers", "-q"]) == 0
    printed = capsys.readouterr().out
    assert "worst linear" in printed and "perplexity" in printed and "mlp.down_proj" in printed


def test_eval_refuses(artifact: Path, model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(LiftcError, match="name its folder with --reference"):
        evaluate_artifact(artifact, [text_file], layers=True, context=16)
    short = tmp_path / "short.txt"
    short.write_text("tiny")
    with pytest.raises(LiftcError, match=r"short\.txt: the text holds 4 tokens, too few"):
        evaluate_artifact(artifact, [text_file, short], context=16)
    with pytest.raises(LiftcError, match="--ctx must be at least 2"):
        evaluate_artifact(artifact, [text_file], context=1)
    with pytest.raises(LiftcError, match="--ctx 300 is longer than the 256 tokens"):
        evaluate_artifact(artifact, [text_file], context=300)
    with pytest.raises(LiftcError, match="at least one text file"):
        evaluate_artifact(artifact, [])


def test_layers_of_a_folder_without_program_text(artifact: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    model = load_any(copy)
    (copy / "program.txt").unlink()
    with pytest.raises(LiftcError, match=r"program\.txt cannot be read"):
        outputs_of(copy, model)
    with pytest.raises(LiftcError, match="no decoder blocks"):
        block_outputs(model.graphs["prefill"].module.graph)
