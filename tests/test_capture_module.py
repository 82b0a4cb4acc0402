"""Encoders and arbitrary modules: one graph, "forward"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import HIDDEN, LAYERS, VOCAB, tiny_model
from torch import nn
from torch.export import Dim

from liftc.capture import capture
from liftc.errors import CaptureError


def test_bert_matches_huggingface_for_any_batch_and_padding(tiny_folder: Any, graph_runner: Any) -> None:
    captured = capture(tiny_folder("bert"))
    assert captured.kind == "module" and captured.config is not None
    assert captured.program.attrs["num_layers"] == LAYERS
    forward = graph_runner(captured.program, "forward", captured.checkpoint)
    assert forward.types == dict.fromkeys(["input_ids", "attention_mask", "token_type_ids"], "i64[b,t]")
    assert captured.program.graphs["forward"].output_node().args[0].meta["type"] == f"f32[b,t,{HIDDEN}]"
    model = tiny_model("bert", attention="sdpa")
    for batch, length in [(1, 1), (2, 9), (5, 30)]:
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
        types = torch.randint(0, 2, (batch, length), generator=generator)
        mask = (torch.arange(length) <= torch.arange(batch)[:, None] * 5).long()
        with torch.no_grad():
            want = model(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state
        torch.testing.assert_close(forward(ids, mask, types), want, rtol=1e-4, atol=1e-5)


def test_checkpoint_of_a_model_with_a_head_serves_its_encoder(tmp_path: Any, graph_runner: Any) -> None:
    from transformers import BertForMaskedLM

    torch.manual_seed(0)
    model = BertForMaskedLM(tiny_model("bert").config).eval()
    model.save_pretrained(tmp_path / "bert")
    captured = capture(tmp_path / "bert")
    assert "bert.encoder.layer.0.intermediate.dense.weight" in captured.program.tensors
    ids = torch.arange(3, 11)[None]
    forward = graph_runner(captured.program, "forward", captured.checkpoint)
    with torch.no_grad():
        want = model.bert(ids).last_hidden_state
    got = forward(ids, torch.ones_like(ids), torch.zeros_like(ids))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


class Tower(nn.Module):
    """A stack of equal blocks with a buffer that is not saved, a constant, and an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.5)) for _ in range(3)
        )
        self.unused = nn.Linear(4, 4)
        self.register_buffer("ramp", torch.arange(8.0), persistent=False)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor, extras: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        y = self.inlet(x) + self.ramp.to(x.device) + torch.tensor([0.5])
        for block in self.blocks:
            y = y + block(y)
        return {"mean": y.mean(0) + extras["bias"], "out": self.norm(y)}


def test_any_module_with_dynamic_shapes(graph_runner: Any) -> None:
    torch.manual_seed(0)
    model = Tower()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = (torch.randn(5, 6), {"bias": torch.randn(8)})
    shapes = {"x": {0: Dim("rows", min=2)}, "extras": {"bias": None}}
    captured = capture(model, inputs, dynamic_shapes=shapes)
    assert model.training and model.blocks[0].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    program = captured.program
    assert program.attrs["blocks"] == "blocks" and program.attrs["num_layers"] == 3
    assert captured.kind == "module" and captured.config is None
    linears = [n for n in program.graphs["forward"].nodes if n.target is torch.ops.aten.linear.default]
    assert [n.meta["block"] for n in linears] == [-1, 0, 1, 2]
    assert linears[0].meta["type"] == "f32[rows,8]"
    assert not any("unused" in name for name in program.tensors)
    assert {"ramp", "norm.running_mean"} < set(program.tensors)
    pointer = captured.checkpoint.tensor("blocks.1.0.weight").data_ptr()
    assert pointer == model.blocks[1][0].weight.data_ptr()
    forward = graph_runner(program, "forward", captured.checkpoint)
    x, bias = torch.randn(11, 6), torch.randn(8)
    with torch.no_grad():
        want = model.eval()(x, {"bias": bias})
    torch.testing.assert_close(forward(x, bias), (want["mean"], want["out"]))


class Choosy(nn.Module):
    """Branches on data, which torch.export refuses, but hides it from the symbolic tracer in a leaf."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return self.layer(x)
        return x


class NeedsTracer(nn.Module):
    """Works under torch.fx, whose proxies are no tensors, and not under torch.export."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(x, torch.Tensor) and float(x.sum()) == 1e9:
            return x
        return torch.relu(self.layer(x))


def test_symbolic_trace_is_the_second_attempt(graph_runner: Any) -> None:
    torch.manual_seed(0)
    model = NeedsTracer()
    captured = capture(model, [torch.randn(3, 4)])
    forward = graph_runner(captured.program, "forward", captured.checkpoint)
    x = torch.randn(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(forward(x), model(x))
    assert set(captured.program.tensors) == {"layer.weight", "layer.bias"}


def test_control_flow_on_data_is_refused_with_both_reasons() -> None:
    with pytest.raises(
        CaptureError, match=r"Choosy cannot be captured: torch.export says .* torch.fx says"
    ) as error:
        capture(Choosy(), (torch.randn(2, 4),))
    assert "\n" not in str(error.value)


def test_rejects_modules_without_example_inputs() -> None:
    with pytest.raises(CaptureError, match="Linear needs example_inputs"):
        capture(nn.Linear(2, 2))
    from transformers import BertForSequenceClassification

    head = BertForSequenceClassification(tiny_model("bert").config)
    with pytest.raises(CaptureError, match="BertForSequenceClassification has a head of its own"):
        capture(head)
    with pytest.raises(CaptureError, match="must be a tuple, got Tensor"):
        capture(nn.Linear(2, 2), torch.randn(1, 2))  # type: ignore[arg-type]
    with pytest.raises(CaptureError, match="apply to model folders"):
        capture(nn.Linear(2, 2), (torch.randn(1, 2),), dtype="bfloat16")


class Mutating(nn.Module):
    def forward(self, cache: torch.Tensor, x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(0, row, x)
        return cache.sum(0)


def test_in_place_writes_survive_without_readers(graph_runner: Any) -> None:
    captured = capture(Mutating(), (torch.zeros(4, 3), torch.ones(1, 3), torch.tensor([2])))
    forward = graph_runner(captured.program, "forward", captured.checkpoint)
    cache = torch.zeros(4, 3)
    forward(cache, torch.full((1, 3), 5.0), torch.tensor([1]))
    assert cache[1].tolist() == [5.0] * 3 and cache[[0, 2, 3]].eq(0).all()
