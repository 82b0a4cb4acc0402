"""Batched block runs, spilled activations, intra-block correction, end-to-end tuning, captures on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_faults import refused
from torch.fx import Graph

import liftc
from liftc.artifact import read_manifest
from liftc.capture import capture
from liftc.capture_file import FACTS as CAPTURE_FACTS
from liftc.capture_file import load_captured, save_captured
from liftc.driver import quantize as quantize_module
from liftc.driver.compile import CompileOptions, Job, compile_model, prepare_job
from liftc.driver.quantize import quantize_program, whole_model_of
from liftc.errors import CaptureError, CheckpointError, QuantizeError
from liftc.quant import activations, stream
from liftc.quant.activations import ActivationStore, Budget
from liftc.quant.blocks import BlockRunner, ScaledWeight, stack
from liftc.quant.correct import fit, token_weights
from liftc.quant.parallel import Ranks
from liftc.quant.result import FACTS, Quantized
from liftc.quant.trainable import Rates, Trainable
from liftc.quant.tune import TUNED_FILE, kl_divergence, run_whole

aten = torch.ops.aten


@pytest.fixture(scope="module")
def job(model_folder: Path, options: CompileOptions) -> Job:
    return prepare_job(model_folder, replace(options, calibration_windows=16))


def runner_of(job: Job, batch: int, store: ActivationStore | None = None) -> BlockRunner:
    inputs = job.inputs
    graph = job.program.graphs[inputs.graph]
    return BlockRunner(graph, inputs.sequences, inputs.shared, inputs.scratch, batch=batch, store=store)


def quantize(job: Job, options: CompileOptions, work: Path, **changes: Any) -> Quantized:
    picked = replace(options, **changes).quantize_options()
    return quantize_program(
        job.captured, job.program, job.inputs, picked, work, device="cpu", activation_memory=None, resume=False,
        progress=False,
    )  # fmt: skip


def test_batched_runs_equal_single_ones(job: Job) -> None:
    single, batched = runner_of(job, 1), runner_of(job, 4)
    assert batched.graph.batchable and len(single) == 16 and batched.rows == [4] * 4
    fetch = job.captured.checkpoint.tensor
    for index in range(len(single.segments) - 1):
        single.advance(index, fetch)
        batched.advance(index, fetch)
        for node in single.graph.outputs(index):
            one = torch.cat([single.value(n, node) for n in range(4)])
            torch.testing.assert_close(batched.value(0, node), one, rtol=1e-4, atol=1e-5)


def test_sequences_of_other_shapes_are_not_stacked() -> None:
    short, long = {"x": torch.ones(1, 2)}, {"x": torch.ones(1, 3)}
    assert [tuple(s["x"].shape) for s in stack([short, long, short, short], 2)] == [(2, 2), (1, 2), (1, 3)]


def test_observe_sees_values_of_an_earlier_segment() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    first = graph.call_function(aten.mul.Tensor, (x, 2))
    second = graph.call_function(aten.add.Tensor, (first, 1))
    first.meta["block"], second.meta["block"] = -1, 0
    graph.output(second)
    runner = BlockRunner(graph, [{"x": torch.ones(1, 2)}], {}, lambda name: torch.zeros(1))
    runner.advance(0, lambda name: torch.zeros(1))
    seen: list[torch.Tensor] = []
    runner.observe(1, lambda name: torch.zeros(1), {first: seen.append})
    assert [s.tolist() for s in seen] == [[[2.0, 2.0]]]


def test_scaled_weight_is_its_dense_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    unit, x = torch.randn(6, 4, generator=generator), torch.randn(3, 4, generator=generator)
    scale = torch.rand(6, generator=generator).requires_grad_(True)
    bias = torch.randn(6, generator=generator)
    ways = [ScaledWeight(unit, scale).linear(x, bias), x @ ScaledWeight(unit, scale).dense().T + bias]
    torch.testing.assert_close(*ways)
    grads = [torch.autograd.grad(y.square().sum(), scale)[0] for y in ways]
    torch.testing.assert_close(*grads)
    assert torch.equal(ScaledWeight(unit, scale, True).dense(), ScaledWeight(unit, scale).dense().T)


def test_activations_go_to_disk_past_the_limit(job: Job, tmp_path: Path) -> None:
    budget = Budget(2000)
    spilling, plain = runner_of(job, 2, ActivationStore(budget, tmp_path)), runner_of(job, 2)
    fetch = job.captured.checkpoint.tensor
    for index in range(2):
        spilling.advance(index, fetch)
        plain.advance(index, fetch)
    node = plain.graph.outputs(1)[0]
    assert all(torch.equal(spilling.value(n, node), plain.value(n, node)) for n in range(len(plain)))
    assert budget.spilled > 0 and 0 < budget.peak <= 2000 and list(tmp_path.iterdir())
    spilling.close()
    assert not list(tmp_path.iterdir()) and budget.used == 0


def test_disk_full_while_spilling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(activations, "save_file", full)
    with pytest.raises(QuantizeError, match="free some disk space"):
        ActivationStore(Budget(0), tmp_path).put(0, {"x": torch.ones(4)})
    assert not list(tmp_path.iterdir())


def test_fit_keeps_the_better_of_before_and_after() -> None:
    def trained(target: float, held_out_target: float) -> tuple[float, float]:
        trainable = Trainable(torch.device("cpu"))
        trainable.add_vector("v", torch.ones(4))

        def loss(number: int) -> torch.Tensor:
            wanted = held_out_target if number == 1 else target
            return (trainable.weights()["v"] - wanted).square().sum()  # type: ignore[union-attr,operator]

        fitted = fit(trainable, loss, [0], [1], epochs=20, rates=Rates(vector=0.02), dense=False, seed=0)
        assert fitted.after <= fitted.before
        return fitted.before - fitted.after, trainable.tensor("v").mean().item()

    gain, value = trained(1.2, 1.2)
    assert gain > 0.1 and value == pytest.approx(1.2, abs=0.05)
    assert trained(0.8, 1.2) == (0.0, 1.0)


def test_fit_refuses_what_is_not_finite() -> None:
    trainable = Trainable(torch.device("cpu"))
    trainable.add_vector("v", torch.ones(2))
    with pytest.raises(QuantizeError, match="not finite"):
        fit(
            trainable,
            lambda n: torch.tensor(float("nan")),
            [0],
            [1],
            epochs=1,
            rates=Rates(),
            dense=False,
            seed=0,
        )


def test_token_weights() -> None:
    loud = torch.ones(1, 5, 3)
    loud[0, 0] *= 30
    assert token_weights(loud)[0].tolist() == pytest.approx([0.01, 1, 1, 1, 1])
    assert token_weights(torch.zeros(1, 2, 3)).tolist() == [[1, 1]]


def test_kl_divergence() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25]])
    q = torch.tensor([[0.25, 0.5, 0.25]])
    expected = (p * (p / q).log()).sum().item()
    assert kl_divergence(p.log() + 3, q.log() - 1).item() == pytest.approx(expected, rel=1e-5)


def test_each_ingredient_lowers_the_divergence(job: Job, options: CompileOptions, tmp_path: Path) -> None:
    """On the calibration set: signs alone, with block correction, with dense training, tuned end to end."""
    steps: dict[str, dict[str, int]] = {
        "signs": {"epochs": 0, "dense_epochs": 0, "tune_epochs": 0},
        "correction": {"epochs": 6, "dense_epochs": 0, "tune_epochs": 0},
        "tuned": {"epochs": 6, "dense_epochs": 2, "tune_epochs": 6},
    }
    found: dict[str, float] = {}
    runner = runner_of(job, 2)
    runner.share({"logit_positions": job.inputs.shared["cache_position"]})
    original = {n: job.captured.checkpoint.tensor(n) for s in runner.segments for n in s.weights}
    for name, changes in steps.items():
        quantized = quantize(job, options, tmp_path / name, **changes)
        weights = whole_model_of(job.captured, job.program, job.inputs, quantized, "cpu").weights()
        with torch.no_grad():
            pairs = [
                [next(iter(run_whole(runner, n, w).values())) for w in (original, weights)]
                for n in range(len(runner))
            ]
        found[name] = sum(kl_divergence(*pair).item() for pair in pairs) / len(pairs)
        for block in quantized.blocks:
            assert block.error_after <= block.error_before
        if changes["tune_epochs"]:
            assert quantized.tuned is not None and quantized.tuned.after < quantized.tuned.before
    assert found["tuned"] < found["correction"] < found["signs"]


def test_tuned_tensors_are_the_artifact(
    model_folder: Path, options: CompileOptions, job: Job, tmp_path: Path
) -> None:
    """The artifact holds the tuned norms and scales, and computes what the trainer computed."""
    changes = {"calibration_windows": 16, "epochs": 2, "tune_epochs": 4, "dense_epochs": 0}
    out = compile_model(model_folder, tmp_path / "out", options, **changes)
    report = json.loads((out / "report.json").read_text())
    assert report["tuned"]["epochs"] > 0 and len(report["blocks"]) == 2
    assert read_manifest(out)["run"]["peak_bytes"]["process"] > 0
    stored = load_file(next(out.glob("model-*.safetensors")))
    before = load_file(model_folder / "model.safetensors")
    assert not torch.equal(stored["model.norm.weight"], before["model.norm.weight"])
    quantized = quantize(job, options, tmp_path / "work", **changes)
    weights = whole_model_of(job.captured, job.program, job.inputs, quantized, "cpu").weights()
    runner = runner_of(job, 1)
    runner.share({"logit_positions": job.inputs.shared["cache_position"]})
    ids = job.inputs.sequences[0]["input_ids"]
    expected = next(iter(run_whole(runner, 0, weights).values()))
    torch.testing.assert_close(liftc.load(out)(ids), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("where", ["block", "tune"])
def test_interrupted_quantization_resumes_to_the_same_bytes(
    job: Job, options: CompileOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    changes = {"epochs": 1, "dense_epochs": 1, "tune_epochs": 1}
    whole = quantize(job, options, tmp_path / "whole", **changes)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "tune":
            patch.setattr(quantize_module, "tune", stop)
        else:
            original = stream.StreamQuantizer._segment
            patch.setattr(
                stream.StreamQuantizer, "_segment",
                lambda self, index, *rest: stop() if index == 2 else original(self, index, *rest),
            )  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            quantize(job, options, tmp_path / "cut", **changes)
    again = quantize(job, options, tmp_path / "cut", **changes)
    assert [p.name for p in again.files] == [p.name for p in whole.files] and again.files[
        -1
    ].name == TUNED_FILE
    assert all(one.read_bytes() == two.read_bytes() for one, two in zip(whole.files, again.files))


def test_resume_refuses_what_changed(
    capsys: pytest.CaptureFixture[str], model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    base = ["compile", model_folder, "-o", tmp_path / "out", "--calibration", text_file, "--calibration-windows", "6",
            "--calibration-length", "24", "--format", "LQ-64/32", "--device", "cpu"]  # fmt: skip
    assert "nothing to resume" in refused(capsys, *base, "--beam", "2", "--resume")
    from liftc.cli import main

    assert main([str(a) for a in [*base, "--beam", "2", "--quantize-only", "-q"]]) == 0
    assert not (tmp_path / "out").exists()
    assert "options beam (2 -> 3)" in refused(capsys, *base, "--beam", "3", "--resume")
    assert "calibration" in refused(capsys, *base, "--beam", "2", "--calibration-length", "20", "--resume")
    assert main([str(a) for a in [*base, "--beam", "2", "--resume", "-q"]]) == 0
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_device_that_is_not_there(
    capsys: pytest.CaptureFixture[str], model_folder: Path, tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    said = refused(capsys, "compile", model_folder, "-o", tmp_path / "o", "--device", "cuda", "--calibration-windows",
                   "1", "--calibration-length", "16")  # fmt: skip
    assert "--device cuda needs an NVIDIA GPU" in said


def test_captured_model_survives_the_disk(model_folder: Path, tmp_path: Path) -> None:
    captured = capture(model_folder)
    again = load_captured(save_captured(captured, tmp_path / "captured"), model_folder)
    assert again.kind == captured.kind and again.config == captured.config
    assert list(again.program.graphs) == list(captured.program.graphs)
    assert again.program.tensors == captured.program.tensors
    for name in captured.program.tensors:
        assert torch.equal(again.checkpoint.tensor(name), captured.checkpoint.tensor(name))


def test_captured_model_of_other_weights_is_refused(model_folder: Path, tmp_path: Path) -> None:
    folder = save_captured(capture(model_folder), tmp_path / "captured")
    other = tmp_path / "other"
    other.mkdir()
    tensors = load_file(model_folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].contiguous()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        load_captured(folder, other)
    (folder / CAPTURE_FACTS).write_text("{}")
    with pytest.raises(CaptureError, match="another version"):
        load_captured(folder, model_folder)
    with pytest.raises(CaptureError, match="not a captured model"):
        load_captured(tmp_path / "none", model_folder)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_correction_on_the_gpu(job: Job, options: CompileOptions, tmp_path: Path) -> None:
    picked = replace(options, epochs=2, dense_epochs=1, tune_epochs=2).quantize_options()

    def run(name: str) -> Quantized:
        return quantize_program(
            job.captured, job.program, job.inputs, picked, tmp_path / name, device="cuda", activation_memory=None,
            resume=False, progress=False,
        )  # fmt: skip

    one, two = run("one"), run("two")
    for a, b in zip(one.files, two.files):
        assert a.read_bytes() == b.read_bytes()
    assert one.tuned is not None and one.tuned.after <= one.tuned.before and one.memory["gpu"] > 0


def test_two_processes_quantize_as_one(
    model_folder: Path, text_file: Path, options: CompileOptions, job: Job, tmp_path: Path
) -> None:
    """torchrun with two processes: one set of files, errors and losses like those of a single process."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "liftc",
        "compile", model_folder, "-o", tmp_path / "out", "--calibration", text_file, "--calibration-windows", "16",
        "--calibration-length", "24", "--format", "LQ-64/32", "--beam", "4", "--epochs", "2", "--dense-epochs", "1",
        "--tune-epochs", "1", "--device", "cpu", "--quantize-only", "-q",
    ]  # fmt: skip
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    changes = {"epochs": 2, "dense_epochs": 1, "tune_epochs": 1}
    one = quantize(job, options, tmp_path / "one", **changes)
    folder = tmp_path / "out.partial" / "quantized"
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in one.files)
    for path in one.files[:-1]:
        with safe_open(path, "pt") as a, safe_open(folder / path.name, "pt") as b:
            assert sorted(a.keys()) == sorted(b.keys())
            first, second = (json.loads(handle.metadata()[FACTS])["linears"] for handle in (a, b))
        for x, y in zip(first, second):
            assert x["name"] == y["name"] and y["proxy_loss"] == pytest.approx(x["proxy_loss"], rel=0.2)


def test_rows_and_windows_are_shared() -> None:
    parts = [Ranks(r, 3).rows(200) for r in range(3)]
    assert [p.start for p in parts] == [0, 64, 128] and parts[-1].stop == 200
    assert [Ranks(r, 2).share(range(5)) for r in range(2)] == [[0, 2], [1, 3]]
    with pytest.raises(QuantizeError, match="cannot share 1"):
        Ranks(0, 2).share([1])
