"""A compiled encoder on padded batches of sentences, its inputs by order and by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_examples import example
from tiny_models import HIDDEN, save_tiny, tiny_model
from whole_path import save_tokenizer

import liftc
from liftc.driver.compile import CompileOptions, prepare_job
from liftc.errors import LiftcError
from liftc.quant.blocks import BlockRunner
from liftc.runtime.module import GraphModel

SENTENCES = ["It was the best of times.", "It was the worst of times!", "Call me Ishmael.", "A"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("encoder") / "bert", "bert")
    save_tokenizer(folder)
    out = folder.parent / "out"
    example("05_sentence_encoder").main(folder, out, 3.0, windows=16)
    return out


@pytest.fixture(scope="module")
def model(encoder: Path) -> GraphModel:
    return liftc.load(encoder)


@pytest.mark.parametrize(("count", "wanted"), [(12, [4, 4, 4]), (10, [2] * 5), (7, [1] * 7)])
def test_windows_run_in_equal_batches(encoder: Path, count: int, wanted: list[int]) -> None:
    """The encoder is captured for any batch, so calibration windows are stacked, and give what one alone gives."""
    job = prepare_job(
        encoder.parent / "bert", CompileOptions(calibration_windows=count, calibration_length=16)
    )
    graph, inputs = job.program.graphs[job.inputs.graph], job.inputs
    single, batched = (
        BlockRunner(graph, inputs.sequences, inputs.shared, inputs.scratch, batch=size) for size in (1, 4)
    )
    assert batched.graph.symbolic_batch and len(single) == count and batched.rows == wanted
    fetch = job.captured.checkpoint.tensor
    for index in range(len(single.segments) - 1):
        single.advance(index, fetch)
        batched.advance(index, fetch)
    (node,) = (n for n in single.graph.outputs(index) if n.target is torch.ops.aten.layer_norm.default)
    alone = torch.cat([single.value(n, node) for n in range(count)])
    together = torch.cat([batched.value(n, node) for n in range(len(batched))])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_padding_does_not_change_a_sentence(encoder: Path, model: GraphModel) -> None:
    embed = example("05_sentence_encoder").embed
    tokenizer = liftc.Tokenizer(encoder)
    together = embed(model, tokenizer, SENTENCES)
    assert together.shape == (len(SENTENCES), HIDDEN)
    for row, sentence in zip(together, SENTENCES, strict=True):
        torch.testing.assert_close(embed(model, tokenizer, [sentence])[0], row, rtol=1e-4, atol=1e-5)


def test_embeddings_are_close_to_the_original(encoder: Path, model: GraphModel) -> None:
    embed, tokenizer = example("05_sentence_encoder").embed, liftc.Tokenizer(encoder)
    original = tiny_model("bert")
    with torch.no_grad():
        wanted = embed(lambda **inputs: original(**inputs).last_hidden_state, tokenizer, SENTENCES)
    assert ((wanted * embed(model, tokenizer, SENTENCES)).sum(1) > 0.95).all()


def test_inputs_by_order_and_by_name(model: GraphModel) -> None:
    ids = torch.arange(5, 15).view(2, 5)
    mask, types = torch.ones_like(ids), torch.zeros_like(ids)
    first = model(ids, mask, types)
    assert first.equal(model(ids, token_type_ids=types, attention_mask=mask))
    for inputs, named in [
        ((ids,), {}),
        ((ids, mask), {"types": types}),
        ((ids, mask, types), {"input_ids": ids}),
        ((ids, mask, types, ids), {}),
    ]:
        with pytest.raises(LiftcError, match=r"takes the inputs .'input_ids', 'attention_mask'"):
            model(*inputs, **named)


def test_tokenizer_neither_cuts_nor_pads(encoder: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    fast = Tokenizer.from_file(str(encoder / "tokenizer.json"))
    fast.enable_truncation(4)
    fast.enable_padding(length=16)
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = liftc.Tokenizer(tmp_path)
    assert [len(tokenizer.encode(text)) for text in ("abc", "abcdefgh")] == [3, 8]
