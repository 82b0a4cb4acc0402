"""Fixtures of the whole path: a tiny language model with a tokenizer, and its artifact, each made once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import save_tiny
from tokenizers import Tokenizer, decoders, models

from liftc.driver.compile import CompileOptions, compile_model

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 40
OPTIONS = CompileOptions(
    formats=("LQ-64/32",), cpu="native", calibration_windows=6, calibration_length=24, beam=4, progress=False
)


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of printable ASCII, one token per character, that fits the tiny vocabulary."""
    vocab = {chr(code): code - 32 for code in range(32, 128)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama in a Hugging Face folder, with a character tokenizer."""
    folder = save_tiny(tmp_path_factory.mktemp("whole") / "llama", "llama")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text for calibration and evaluation."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def options(text_file: Path) -> CompileOptions:
    """Options that compile the tiny model in seconds."""
    return replace(OPTIONS, calibration=text_file)


@pytest.fixture(scope="session")
def artifact(model_folder: Path, options: CompileOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model compiled for this CPU."""
    return compile_model(model_folder, tmp_path_factory.mktemp("artifact") / "out", options)
