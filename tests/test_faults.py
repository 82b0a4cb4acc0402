"""What a user or a machine can do wrong: one sentence each, exit code 2, nothing half-written that loads."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import liftc
from liftc import artifact as artifact_module
from liftc.artifact import MANIFEST, read_manifest
from liftc.cli import main
from liftc.driver.compile import CompileOptions, compile_model
from liftc.errors import ArtifactError, LiftcError, TargetError


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one sentence that a command prints when it ends with exit code 2."""
    capsys.readouterr()
    assert main(["compile" if a == "compile" else str(a) for a in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "quantize:" not in line]
    assert "Traceback" not in "\n".join(lines)
    return lines[-1]


@pytest.fixture()
def broken(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(model_folder, tmp_path / "broken"))


def test_missing_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "no such model folder" in refused(capsys, "compile", tmp_path / "none", "-o", tmp_path / "out")


def test_truncated_weights(capsys: pytest.CaptureFixture[str], broken: Path, tmp_path: Path) -> None:
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "model.safetensors" in refused(capsys, "compile", broken, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nan_weights(
    capsys: pytest.CaptureFixture[str], broken: Path, text_file: Path, tmp_path: Path
) -> None:
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    arguments = ("--calibration", text_file, "--calibration-windows", "2", "--calibration-length", "16")
    message = refused(
        capsys, "compile", broken, "-o", tmp_path / "out", *arguments, "--beam", "1", "--format", "LQ-64/32"
    )
    assert "model.layers.1.mlp.up_proj.weight holds NaN" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [({"model_type": "nonsense"}, "nonsense"), ({"hidden_size": 32}, "config"), (None, "config.json")],
)
def test_wrong_config(
    capsys: pytest.CaptureFixture[str], broken: Path, tmp_path: Path, change: dict[str, Any] | None, said: str
) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text("{ not json" if change is None else json.dumps({**config, **change}))
    assert said in refused(capsys, "compile", broken, "-o", tmp_path / "out")


@pytest.mark.parametrize("bits", ["0", "9", "nan"])
def test_bits_out_of_range(
    capsys: pytest.CaptureFixture[str], model_folder: Path, tmp_path: Path, bits: str
) -> None:
    assert "between 1 and 8" in refused(capsys, "compile", model_folder, "-o", tmp_path / "o", "--bits", bits)


def test_bits_that_are_no_number(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compile", str(model_folder), "-o", "out", "--bits", "abc"])
    assert stop.value.code == 2 and "'abc' is not a number" in capsys.readouterr().err


def test_unknown_arch(capsys: pytest.CaptureFixture[str], model_folder: Path, tmp_path: Path) -> None:
    message = refused(
        capsys, "compile", model_folder, "-o", tmp_path / "o", "--target", "cuda", "-arch=sm_999"
    )
    assert "sm_999" in message or "nvcc" in message


def test_existing_output_is_kept(
    capsys: pytest.CaptureFixture[str], artifact: Path, model_folder: Path
) -> None:
    before = read_manifest(artifact)
    assert "--overwrite" in refused(capsys, "compile", model_folder, "-o", artifact)
    assert read_manifest(artifact) == before


def test_foreign_folders_are_never_replaced(
    capsys: pytest.CaptureFixture[str], model_folder: Path, options: CompileOptions, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    said = refused(capsys, "compile", model_folder, "-o", mine, "--overwrite")
    assert "not a liftc artifact" in said
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="not a liftc work folder"):
        compile_model(model_folder, tmp_path / "out", options)
    assert (mine / "thesis.txt").is_file() and (tmp_path / "out.partial" / "thesis.txt").is_file()


def test_overwrite_never_loses_the_old_artifact(
    damaged: Path,
    model_folder: Path,
    options: CompileOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second of the two renames fails, or the process dies between them: the old artifact comes back."""
    before, rename = read_manifest(damaged), os.replace

    def fail(source: Path, target: Path) -> None:
        if Path(source).name == "artifact":
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(ArtifactError, match="nothing was changed"):
            compile_model(model_folder, damaged, replace(options, overwrite=True))
    assert read_manifest(damaged) == before
    partial = tmp_path / "damaged.partial"
    os.replace(damaged, partial / "replaced")  # where a kill -9 would have left it
    with pytest.raises(ArtifactError, match="--overwrite"):
        compile_model(model_folder, damaged, replace(options, beam=2))
    assert read_manifest(damaged) == before


def test_unknown_effort(model_folder: Path, options: CompileOptions, tmp_path: Path) -> None:
    with pytest.raises(LiftcError, match="no effort 'heroic'"):
        compile_model(model_folder, tmp_path / "out", options, effort="heroic")


def test_too_little_calibration_text(
    capsys: pytest.CaptureFixture[str], model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("hello")
    message = refused(
        capsys, "compile", model_folder, "-o", tmp_path / "o", "--calibration", tmp_path / "short.txt"
    )
    assert "too few" in message


@pytest.mark.parametrize("where", ["weights", "block"])
def test_disk_full(
    model_folder: Path, options: CompileOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Writing fails with ENOSPC while saving the artifact, or a finished block; afterwards it can go on."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    owner = artifact_module if where == "weights" else sys.modules["liftc.quant.result"]
    with monkeypatch.context() as patch:
        patch.setattr(owner, "save_file", full)
        with pytest.raises(LiftcError, match="No space left"):
            compile_model(model_folder, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
    done = compile_model(model_folder, tmp_path / "out", options)
    assert read_manifest(done) and not (tmp_path / "out.partial").exists()


COMPILE = """
import sys, pathlib
from dataclasses import replace
from liftc.driver.compile import CompileOptions, compile_model
compile_model({model!r}, {out!r}, CompileOptions(formats=("LQ-64/32",), calibration=pathlib.Path({text!r}),
    calibration_windows=6, calibration_length=24, beam=4, progress=False))
"""


def test_kill_and_run_again(
    artifact: Path, model_folder: Path, options: CompileOptions, text_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """kill -9 after the first finished block: nothing loads, the next run continues, same bytes at the end."""
    out = tmp_path / "out"
    code = COMPILE.format(model=str(model_folder), out=str(out), text=str(text_file))
    process = subprocess.Popen([sys.executable, "-c", code])
    block = tmp_path / "out.partial" / "quantized" / "block-00001.safetensors"
    deadline = time.monotonic() + 120
    while not block.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not out.exists():  # killed in time, as it should be; a very fast machine may have finished
        with pytest.raises(ArtifactError):
            liftc.load(tmp_path / "out.partial")
        with pytest.raises(ArtifactError):
            liftc.load(tmp_path / "out.partial" / "artifact")
        capsys.readouterr()
        compile_model(model_folder, out, replace(options, progress=True))
        assert "continuing the interrupted run" in capsys.readouterr().err
    weights = "model-00001-of-00001.safetensors"
    assert read_manifest(out)["files"][weights] == read_manifest(artifact)["files"][weights]


def test_interrupted_run_with_other_options_starts_over(
    model_folder: Path, options: CompileOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def stop(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(artifact_module, "save_file", stop)
        with pytest.raises(LiftcError):
            compile_model(model_folder, tmp_path / "out", options)
    capsys.readouterr()
    compile_model(model_folder, tmp_path / "out", replace(options, beam=2, progress=True))
    assert "starting over: options differ" in capsys.readouterr().err


@pytest.fixture()
def damaged(artifact: Path, tmp_path: Path) -> Path:
    """A copy of the artifact to damage."""
    return Path(shutil.copytree(artifact, tmp_path / "damaged"))


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "graph/decode.json", "plan.json"])
def test_altered_file_does_not_load(damaged: Path, name: str) -> None:
    flip_byte(damaged / name)
    with pytest.raises(ArtifactError, match="altered"):
        liftc.load(damaged)


def test_truncated_and_missing_files_do_not_load(damaged: Path) -> None:
    kernel = next((damaged / "kernels").glob("*.so"))
    kernel.write_bytes(kernel.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="100 bytes"):
        liftc.load(damaged)
    kernel.unlink()
    with pytest.raises(ArtifactError, match="missing"):
        liftc.load(damaged)
    (damaged / MANIFEST).unlink()
    with pytest.raises(ArtifactError, match="not a finished liftc artifact"):
        liftc.load(damaged)


def test_manifest_may_not_leave_the_folder(damaged: Path) -> None:
    manifest = json.loads((damaged / MANIFEST).read_text())
    manifest["files"]["../outside"] = {"bytes": 0, "sha256": ""}
    (damaged / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="outside the artifact"):
        liftc.load(damaged)


def test_graph_with_a_forbidden_op_does_not_load(damaged: Path) -> None:
    path = damaged / "graph" / "decode.json"
    graph = json.loads(path.read_text())
    graph["ops"][0] = "aten.from_file.default"
    path.write_text(json.dumps(graph))
    manifest = json.loads((damaged / MANIFEST).read_text())
    facts = {k: v for k, v in manifest.items() if k not in ("files", "format_version")}
    artifact_module.write_manifest(damaged, facts)
    with pytest.raises(ArtifactError, match="from_file"):
        liftc.load(damaged)


def test_artifact_of_an_older_format_is_refused(damaged: Path) -> None:
    """Format 1 had lifted_linear with other arguments."""
    manifest = json.loads((damaged / MANIFEST).read_text())
    manifest["format_version"] = 1
    (damaged / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(
        ArtifactError, match="has artifact format 1 and this liftc reads 2: compile the model again"
    ):
        liftc.load(damaged)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_on_a_machine_without_gpu(damaged: Path) -> None:
    manifest = json.loads((damaged / MANIFEST).read_text())
    with pytest.raises(TargetError, match="cpu, not for cuda"):
        liftc.load(damaged, "cuda")
    manifest["targets"] = ["cuda", "llvm"]
    (damaged / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(TargetError, match=r"no usable NVIDIA GPU; load it with device='cpu'"):
        liftc.load(damaged)
    assert liftc.load(damaged, "cpu") is not None


def test_originals_are_untouched(model_folder: Path, artifact: Path) -> None:
    assert artifact.is_dir() and sorted(p.name for p in model_folder.iterdir()) == sorted(
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    )
    assert os.access(model_folder / "model.safetensors", os.R_OK)
