"""The examples run, and stay short."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_examples_are_short() -> None:
    files = sorted(EXAMPLES.glob("*.py"))
    assert len(files) >= 4
    assert not [path.name for path in files if len(path.read_text().splitlines()) > 80]


def test_compile_and_generate(model_folder: Path, tmp_path: Path) -> None:
    text = example("01_compile_and_generate").main(model_folder, tmp_path / "out", 2.0)
    assert text.startswith("It was the best of")


def test_any_module(tmp_path: Path) -> None:
    assert example("02_any_module").main(tmp_path / "out") < 0.06


def test_mixed_formats(model_folder: Path, tmp_path: Path) -> None:
    facts = example("03_mixed_formats").main(model_folder, tmp_path / "out")
    assert facts["formats"] == {"LQ-64/32": 8, "LQ-96/32": 2}


def test_passes_by_hand(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "liftc.sign_matmul" in example("04_passes_by_hand").main(model_folder)
    assert "planned:" in capsys.readouterr().out
