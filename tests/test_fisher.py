"""Fisher factors: gradients taken block by block, weighted grams, feedback between rows, resuming."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_correction import quantize
from torch.fx import Node

from liftc.driver.compile import CompileOptions, Job, prepare_job
from liftc.driver.quantize import all_positions, make_stream
from liftc.errors import QuantizeError
from liftc.format import LiftFormat
from liftc.quant import fisher as fisher_module
from liftc.quant.activations import Budget, default_limit
from liftc.quant.blocks import BlockRunner
from liftc.quant.fisher import Fisher, measure
from liftc.quant.ldlq import quantize_group
from liftc.quant.mapping import lam_of, load_mapping
from liftc.quant.result import QuantizeOptions
from liftc.quant.stream import StreamQuantizer
from liftc.quant.tune import run_whole
from liftc.quant.whitening import orthogonal_whitening
from liftc.spec import LiftSpec, transform_shape


@pytest.fixture(scope="module")
def job(model_folder: Path, options: CompileOptions) -> Job:
    return prepare_job(model_folder, replace(options, calibration_windows=16))


def stream_of(job: Job, work: Path, limit: int | None = None) -> StreamQuantizer:
    return make_stream(
        job.captured, job.program, job.inputs, QuantizeOptions(fisher=True), work, "cpu", Budget(limit)
    )


def most_likely(self: Any, value: torch.Tensor) -> torch.Tensor:
    """The gradient of -log p of the most likely token, without drawing."""
    p = torch.softmax(value.detach().float(), -1)
    return p - torch.nn.functional.one_hot(p.argmax(-1), p.shape[-1])


def gradients(job: Job, stream: StreamQuantizer) -> tuple[BlockRunner, dict[str, list[torch.Tensor]]]:
    """Gradient of every linear's output by one backward pass through the whole graph, by linear and batch."""
    runner = stream.new_runner(stream.stores())
    runner.share(all_positions(job.inputs))
    originals = {
        name: job.captured.checkpoint.tensor(name)
        for name in {str(n.target) for n in stream.graph.find_nodes(op="get_attr")}
    }
    weights = {
        name: value.requires_grad_(name == "model.embed_tokens.weight") for name, value in originals.items()
    }
    found: dict[str, list[torch.Tensor]] = {name: [] for name in stream.nodes}
    call = runner._call
    for number in range(len(runner)):
        kept: dict[Node, torch.Tensor] = {}

        def keep(node: Node, *rest: Any, kept: dict[Node, torch.Tensor] = kept) -> Any:
            kept[node] = call(node, *rest)
            return kept[node]

        runner._call = keep  # type: ignore[assignment,method-assign]
        logits = next(iter(run_whole(runner, number, weights).values()))
        loss = -torch.log_softmax(logits.float(), -1).amax(-1).sum()
        outputs = [kept[node] for node in stream.nodes.values()]
        for name, gradient in zip(stream.nodes, torch.autograd.grad(loss, outputs)):
            found[name].append(gradient.float().flatten(0, -2))
    return runner, found


@pytest.mark.parametrize("limit", [None, 1000])
def test_block_by_block_equals_one_backward_pass(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    monkeypatch.setattr(fisher_module._Backward, "_first", most_likely)
    stream = stream_of(job, tmp_path, limit)
    fisher = measure(stream, language_model=True, shared=all_positions(job.inputs))
    runner, wanted = gradients(job, stream)
    seen = 0
    for index, segment in enumerate(runner.segments):
        for lift, names in stream.groups(segment).items():
            stacked = torch.cat([torch.cat(wanted[name]) for name in names], -1)
            energy = stacked.square().sum(-1)
            weights = (energy / energy.mean()).sqrt()
            factors = fisher.segment(index, stream.device)
            torch.testing.assert_close(factors.tokens[lift], weights / weights.mean(), rtol=2e-2, atol=2e-2)
            outer = stacked.T @ stacked
            outer = outer / outer.diagonal().mean()
            torch.testing.assert_close(factors.outputs[lift], outer, rtol=2e-2, atol=2e-2)
            assert sum(factors.counts) == len(factors.block) == len(stacked)
            assert torch.equal(torch.cat([factors.of_batch(n) for n in range(len(runner))]), factors.block)
            seen += 1
    assert seen == len(job.program.lifts)
    runner.close()
    assert not list((tmp_path / "activations").rglob("*.safetensors"))


def test_drawn_tokens_are_seeded_and_files_are_kept(job: Job, tmp_path: Path) -> None:
    def files(folder: str) -> tuple[list[bytes], list[int]]:
        fisher = measure(
            stream_of(job, tmp_path / folder), language_model=True, shared=all_positions(job.inputs)
        )
        paths = sorted(fisher.folder.iterdir())
        return [p.read_bytes() for p in paths], [p.stat().st_mtime_ns for p in paths]

    first, again, other = files("a"), files("a"), files("b")
    assert first[0] == other[0] and first == again and len(first[0]) > 1


def test_damaged_file_is_refused(job: Job, tmp_path: Path) -> None:
    fisher = Fisher(tmp_path)
    fisher.path(1).write_bytes(b"nothing")
    with pytest.raises(QuantizeError, match=r"segment-00001\.safetensors is damaged"):
        fisher.segment(1, torch.device("cpu"))


def test_gradients_that_are_not_finite_are_refused(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fisher_module._Backward, "_first", lambda self, value: value * torch.nan)
    with pytest.raises(QuantizeError, match="gradients are not finite"):
        measure(stream_of(job, tmp_path), language_model=True, shared=all_positions(job.inputs))
    assert not list(tmp_path.rglob("segment-*"))


def test_quantizing_with_fisher_resumes_to_the_same_bytes(
    job: Job, options: CompileOptions, tmp_path: Path
) -> None:
    whole = quantize(job, options, tmp_path / "whole", fisher=True, epochs=1)
    parts = quantize(job, options, tmp_path / "parts", fisher=True, epochs=1)
    last = parts.files[-1]
    wanted = last.read_bytes()
    last.unlink()
    resumed = quantize(job, options, tmp_path / "parts", fisher=True, epochs=1)
    assert last.read_bytes() == wanted
    assert [p.read_bytes() for p in resumed.files] == [p.read_bytes() for p in whole.files]
    assert "fisher" in resumed.seconds
    finished = quantize(job, options, tmp_path / "parts", fisher=True, epochs=1)
    assert "fisher" not in finished.seconds and not set(finished.seconds) & {p.stem for p in finished.files}
    plain = quantize(job, options, tmp_path / "plain", fisher=False, epochs=1)
    assert plain.files[-1].read_bytes() != wanted and "fisher" not in plain.seconds


def correlated(count: int, seed: int) -> torch.Tensor:
    """A gram (count, count) with a few strong directions."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(count, count, generator=generator) * torch.logspace(0.5, -1.5, count)
    return mix @ mix.T / count


def test_rows_compensate_rows_under_an_output_metric() -> None:
    fmt = LiftFormat.parse("LQ-64/32")
    generator = torch.Generator().manual_seed(0)
    weight, gram, metric = torch.randn(256, 64, generator=generator), correlated(64, 1), correlated(256, 2)
    left, right = transform_shape(64, fmt)
    spec, white = LiftSpec(fmt, 64, left, right), orthogonal_whitening(left, right, 0)

    def error(output_metric: torch.Tensor | None) -> tuple[float, torch.Tensor]:
        result = quantize_group(
            weight, gram, spec, white, load_mapping(fmt), beam=8, damp=0.01, lam=lam_of(fmt),
            output_metric=output_metric,
        )  # fmt: skip
        difference = (weight - result.weight).double()
        return float((metric.double() @ difference @ gram.double() * difference).sum()), result.packed

    plain, packed = error(None)
    compensated, _ = error(metric)
    assert compensated < 0.8 * plain
    assert torch.equal(error(torch.eye(256))[1], packed)


def test_default_limit_of_activations_fits_the_machine() -> None:
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < default_limit() <= physical // 2


def test_logits_that_are_not_finite_are_refused(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = stream_of(job, tmp_path)
    broken = {"model.norm.weight": stream.checkpoint.tensor("model.norm.weight") * torch.nan}
    kind = type(stream.checkpoint)
    whole = kind.tensor
    monkeypatch.setattr(
        kind, "tensor", lambda self, name: broken[name] if name in broken else whole(self, name)
    )
    with pytest.raises(QuantizeError, match="logits are not finite"):
        measure(stream, language_model=True, shared=all_positions(job.inputs))
