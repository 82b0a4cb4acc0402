"""The whole path in seconds: compile a tiny model, load it without TVM, check it against the oracle."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import liftc
from liftc import reference
from liftc.artifact import read_json, read_manifest
from liftc.checkpoint import SafetensorsCheckpoint
from liftc.driver.compile import CompileOptions, compile_model
from liftc.driver.evaluate import load_dense
from liftc.driver.inspect import inspect_artifact
from liftc.errors import LiftcError
from liftc.plan import Plan
from liftc.runtime.module import CausalLM


@pytest.fixture(scope="module")
def model(artifact: Path) -> CausalLM:
    loaded = liftc.load(artifact)
    assert isinstance(loaded, CausalLM)
    return loaded


def test_fresh_process_without_tvm_or_transformers(artifact: Path, model: CausalLM) -> None:
    code = (
        "import sys\n"
        "sys.modules['tvm'] = sys.modules['transformers'] = None\n"
        f"import liftc; model = liftc.load({str(artifact)!r})\n"
        "print(model.generate([5, 6, 7, 8], 12)[0].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == model.generate([5, 6, 7, 8], 12)[0].tolist()


def test_decode_agrees_with_prefill(model: CausalLM) -> None:
    """Activation-first decode and weight-first prefill give the same logits up to fixed point."""
    ids = torch.tensor([[3, 9, 27, 81, 14, 42, 60, 7, 33, 2]])
    tokens = model.generate(ids, 6, stop_tokens=())
    full = model(tokens)
    greedy = full[0, ids.shape[1] - 1 : -1].argmax(-1)
    assert torch.equal(greedy, tokens[0, ids.shape[1] :])


def test_weights_are_those_of_the_plan(artifact: Path, model_folder: Path) -> None:
    """Dense weights rebuilt from the files approximate the originals as well as the report says."""
    stored, original = SafetensorsCheckpoint(artifact), SafetensorsCheckpoint(model_folder)
    folded = read_json(artifact / "graph/folded.json")
    name = "model.layers.0.mlp.down_proj"
    program = (artifact / "program.txt").read_text()
    assert f"@{name}.packed_weight" in program
    packed, scale = stored.tensor(f"{name}.packed_weight"), stored.tensor(f"{name}.output_scale")
    weight = original.tensor(f"{name}.weight")
    shapes = {n: stored.spec(n).shape for n in stored.names() if n.startswith("whitening.left")}
    for op, (right_name, mapping_name) in folded.values():
        right = reference.decode_right(stored.tensor(right_name), stored.tensor(mapping_name))
        for left_name, (t1, _) in shapes.items():
            if op == "decode_right" and t1 * right.shape[1] == packed.shape[1]:
                left = stored.tensor(left_name)
                dense = reference.decode_weight(packed, scale, None, left, right, weight.shape[1])
                error = float((dense - weight).pow(2).sum() / weight.pow(2).sum())
                report = read_json(artifact / "report.json")["linears"]
                stated = next(row["relative_error"] for row in report if row["name"] == name)
                assert error == pytest.approx(stated, rel=0.05) and error < 0.5
                return
    pytest.fail("no stored transform fits the layer")


def test_planned_bytes_are_on_disk(artifact: Path) -> None:
    plan = Plan.from_json(read_json(artifact / "plan.json"))
    stored = SafetensorsCheckpoint(artifact)
    assert {e.name: e.nbytes for e in plan.entries} == {n: stored.spec(n).nbytes for n in stored.names()}
    facts = inspect_artifact(artifact)
    assert facts["bytes"]["total"] == plan.total and facts["bits_per_weight"] == plan.bits_per_weight
    readable = {p.stat().st_mode & 0o777 for p in artifact.glob("*.*") if p.is_file()}
    assert len(readable) == 1, "all files carry the same permissions"
    assert facts["formats"] == {"LQ-64/32": 10} and facts["targets"][0]["target"] == "llvm"


def test_same_seed_same_hashes(
    artifact: Path, model_folder: Path, options: CompileOptions, tmp_path: Path
) -> None:
    again = compile_model(model_folder, tmp_path / "again", options)
    first, second = read_manifest(artifact)["files"], read_manifest(again)["files"]
    assert first == second
    other = compile_model(model_folder, tmp_path / "other", replace(options, seed=1))
    weights = "model-00001-of-00001.safetensors"
    assert read_manifest(other)["files"][weights] != first[weights]


def test_overrides_and_exclusions(model_folder: Path, options: CompileOptions, tmp_path: Path) -> None:
    mixed = replace(options, formats=("LQ-64/32", "mlp.down_proj=LQ-96/32"), exclude=r"self_attn\.q_proj")
    out = compile_model(model_folder, tmp_path / "mixed", mixed)
    assert inspect_artifact(out)["formats"] == {"LQ-64/32": 6, "LQ-96/32": 2}
    assert "model.layers.0.self_attn.q_proj.weight" in SafetensorsCheckpoint(out).names()
    loaded = liftc.load(out)
    assert isinstance(loaded, CausalLM) and loaded.generate([1, 2, 3], 4).shape[1] == 7
    with pytest.raises(LiftcError, match="nothing_here"):
        compile_model(model_folder, tmp_path / "none", replace(options, formats=("nothing_here=LQ-96/32",)))


def test_three_bits_are_closer_than_two(
    model: CausalLM, model_folder: Path, options: CompileOptions, tmp_path: Path
) -> None:
    original = load_dense(model_folder)
    ids = torch.tensor([[11, 22, 33, 44, 55, 66, 77, 88, 9, 10, 11, 12]])
    wanted = original(ids).float()
    better = liftc.load(
        compile_model(model_folder, tmp_path / "three", replace(options, formats=("LQ-96/32",)))
    )
    error_two = (model(ids).float() - wanted).pow(2).mean()
    error_three = (better(ids).float() - wanted).pow(2).mean()
    assert error_three < 0.6 * error_two


def test_module_with_example_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(48, 80), torch.nn.GELU(), torch.nn.Linear(80, 20)).eval()
    x = torch.randn(64, 48)
    out = compile_model(
        module, tmp_path / "module", formats=("LQ-96/32",), beam=8, example_inputs=(x,), progress=False
    )
    wanted = module(x)
    error = (liftc.load(out)(x) - wanted).pow(2).mean() / wanted.pow(2).mean()
    assert error < 0.1
    with pytest.raises(LiftcError, match="got 2 in order"):
        liftc.load(out)(x, x)
