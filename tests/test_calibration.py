"""Calibration windows: budgets, documents and chats to tokens, held-out split, and the options of `compile`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from liftc.artifact import read_manifest
from liftc.capture import Captured, capture
from liftc.cli import main
from liftc.driver.calibrate import CalibrationInputs, encoder_inputs, language_model_inputs
from liftc.driver.compile import CompileOptions, compile_model
from liftc.errors import QuantizeError
from liftc.quant.calibration import (
    CalibrationRequest,
    budget_windows,
    collect_tokens,
    parse_tokens,
    split_held_out,
    spread_windows,
)
from liftc.quant.sources import Document
from liftc.runtime.tokenizer import Tokenizer as Fast

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(
    ("text", "count"), [("5000", 5000), ("32k", 32768), ("1M", 1 << 20), ("1.5K", 1536), (" 2m ", 2 << 20)]
)
def test_token_budgets(text: str, count: int) -> None:
    assert parse_tokens(text) == count


@pytest.mark.parametrize("text", ["", "k", "0", "-5", "1e6", "32kk", "1G", "9" * 40])
def test_refused_budgets(text: str) -> None:
    with pytest.raises(QuantizeError, match="no number of tokens"):
        parse_tokens(text)


def test_budget_in_windows() -> None:
    assert budget_windows(32768, 512) == 64 and budget_windows(1000, 512) == 1
    with pytest.raises(QuantizeError, match="a budget of 511 tokens holds no window of 512"):
        budget_windows(511, 512)


@given(count=st.integers(0, 40), share=st.floats(0.01, 0.99), seed=st.integers(0, 5))
def test_held_out_split(count: int, share: float, seed: int) -> None:
    windows = [f"w{i:02d}" for i in range(count)]
    train, held = split_held_out(windows, share, seed)
    assert sorted(train + held) == windows and train == sorted(train) and held == sorted(held)
    assert (train, held) == split_held_out(windows, share, seed)
    if count >= 2:
        assert train and held and abs(len(held) - share * count) <= 1
    else:
        assert not held


def test_held_out_split_depends_on_the_seed() -> None:
    assert len({tuple(split_held_out(range(50), 0.2, seed)[1]) for seed in range(5)}) == 5
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(QuantizeError, match="held-out share"):
            split_held_out([1, 2], share, 0)


def test_collecting_stops_at_the_budget() -> None:
    read: list[str] = []

    def stream() -> Any:
        for i in range(100):
            read.append(str(i))
            yield Document(str(i))

    assert len(collect_tokens(stream(), lambda d: [int(d.text)] * 10, 35)) == 40 and len(read) == 4
    with pytest.raises(QuantizeError, match="holds no text"):
        collect_tokens([], lambda d: [], 10)


def test_windows_are_spread_over_the_text() -> None:
    starts = [int(w[0, 0]) for w in spread_windows(list(range(10_000)), 10, 50, 0)]
    assert starts == sorted(starts) and starts[0] < 1500 and starts[-1] > 8500 and len(set(starts)) == 50


@pytest.fixture(scope="module")
def chat_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a begin token "~", an end-of-text token DEL and a chat template."""
    folder = Path(shutil.copytree(model_folder, tmp_path_factory.mktemp("chat") / "model"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer.post_processor = TemplateProcessing(single="~ $A", special_tokens=[("~", 94)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "]", "chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def captured(chat_folder: Path) -> Captured:
    return capture(chat_folder)


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "set.jsonl"
    rows = [{"text": f"document {i}, of some length", "messages": CHAT} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def decoded(inputs: CalibrationInputs, folder: Path) -> str:
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = torch.cat([s["input_ids"] for s in inputs.sequences], 1)[0].tolist()
    return str(fast.decode(ids, skip_special_tokens=False))


def cut(text: str, length: int) -> list[str]:
    return [text[i : i + length] for i in range(0, len(text), length)]


def test_marks_around_documents(chat_folder: Path) -> None:
    assert Fast(chat_folder).document_marks() == ([94], [96])
    assert Fast(chat_folder).frame() == ([94], [])


def test_rows_are_marked_as_documents(captured: Captured, chat_folder: Path, jsonl: Path) -> None:
    request = CalibrationRequest(jsonl, windows=40, length=16)
    inputs = language_model_inputs(captured.program, chat_folder, request)
    text = decoded(inputs, chat_folder)
    assert text.startswith("~document 0, of some length</s>~document 1, of")
    assert inputs.description == f"{len(inputs.sequences)} windows (40 asked) of 16 tokens of set.jsonl"
    assert inputs.digest == language_model_inputs(captured.program, chat_folder, request).digest


def test_plain_text_is_not_marked(captured: Captured, chat_folder: Path, text_file: Path) -> None:
    inputs = language_model_inputs(
        captured.program, chat_folder, CalibrationRequest(text_file, windows=3, length=16, seed=7)
    )
    text = decoded(inputs, chat_folder)
    assert len(inputs.sequences) == 3 and "~" not in text and "</s>" not in text
    assert inputs.description == "3 windows of 16 tokens of text.txt"
    other = replace(CalibrationRequest(text_file, windows=3, length=16), seed=8)
    assert language_model_inputs(captured.program, chat_folder, other).digest != inputs.digest


def test_chat_template_on_request(
    captured: Captured, chat_folder: Path, jsonl: Path, text_file: Path
) -> None:
    request = CalibrationRequest(jsonl, chat_template=True, windows=4, length=16)
    inputs = language_model_inputs(captured.program, chat_folder, request)
    text = decoded(inputs, chat_folder)
    assert all(decoded_window in "[user]hi[assistant]yes" * 20 for decoded_window in cut(text, 16))
    assert inputs.description == "4 windows of 16 tokens of set.jsonl, in the chat template"
    plain = CalibrationRequest(text_file, chat_template=True, windows=1, length=16)
    assert "[" not in decoded(language_model_inputs(captured.program, chat_folder, plain), chat_folder)
    wrapped = CalibrationRequest(jsonl, "text", chat_template=True, chat_wrap=True, windows=99, length=16)
    assert decoded(language_model_inputs(captured.program, chat_folder, wrapped), chat_folder).startswith(
        "[user]document 0, of some length[user]document 1"
    )


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (CalibrationRequest(windows=1, length=257), "--calibration-length 257 is longer than the 256 tokens"),
        (CalibrationRequest(field="messages"), "holds messages; render them with --chat-template"),
        (CalibrationRequest(windows=2, length=900), "too few for one window of 900"),
        (CalibrationRequest(field="nothing"), "has no field 'nothing'"),
    ],
)
def test_refused_sets(
    captured: Captured, chat_folder: Path, jsonl: Path, request_: CalibrationRequest, said: str
) -> None:
    with pytest.raises(QuantizeError, match=said) as stop:
        language_model_inputs(captured.program, chat_folder, replace(request_, path=jsonl))
    assert str(jsonl) in str(stop.value) or request_.length == 257


def test_refused_templates(captured: Captured, chat_folder: Path, jsonl: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(chat_folder, tmp_path / "model"))
    request = CalibrationRequest(jsonl, chat_template=True, windows=1, length=16)
    for template in (
        "{{ messages[0].__class__.__base__ }}",
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{% if %}",
    ):
        (folder / "chat_template.jinja").write_text(template)
        with pytest.raises(QuantizeError, match="the chat template rejected the messages") as stop:
            language_model_inputs(captured.program, folder, request)
        assert "\n" not in str(stop.value)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(QuantizeError, match="has no chat template; drop --chat-template"):
        language_model_inputs(captured.program, folder, request)
    with pytest.raises(QuantizeError, match="give --chat-template with it"):
        CalibrationRequest(chat_wrap=True)
    with pytest.raises(QuantizeError, match="at least 1 window"):
        CalibrationRequest(windows=0)


def test_encoder_windows(tiny_folder: Any, chat_folder: Path, jsonl: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder("bert"), tmp_path / "bert"))
    shutil.copyfile(chat_folder / "tokenizer.json", folder / "tokenizer.json")
    program = capture(folder).program
    inputs = encoder_inputs(program, folder, CalibrationRequest(jsonl, windows=5, length=12))
    assert len(inputs.sequences) == 5
    for sequence in inputs.sequences:
        ids = sequence["input_ids"]
        assert ids.shape == (1, 12) and int(ids[0, 0]) == 94 and 94 not in ids[0, 1:] and 96 not in ids
        assert sequence["attention_mask"].all()
    framed = Tokenizer.from_file(str(folder / "tokenizer.json"))
    framed.post_processor = TemplateProcessing(single="~ $A ~", special_tokens=[("~", 94)])
    framed.save(str(folder / "tokenizer.json"))
    with pytest.raises(QuantizeError, match="no room for text"):
        encoder_inputs(program, folder, CalibrationRequest(jsonl, windows=1, length=2))


def test_compile_from_the_command_line(
    chat_folder: Path, jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [
        "compile", chat_folder, "-o", out, "--format", "LQ-64/32", "--beam", "1", "-q", "--json",
        "--calibration", jsonl, "--chat-template", "--calibration-tokens", "100", "--calibration-length", "20",
    ]  # fmt: skip
    assert main([str(a) for a in arguments]) == 0
    capsys.readouterr()
    said = "5 windows of 20 tokens of set.jsonl, in the chat template"
    assert read_manifest(out)["options"]["calibration"] == said
    assert said in (out / "README.md").read_text()
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": \n')
    assert main(["compile", str(chat_folder), "-o", str(tmp_path / "o"), "--calibration", str(bad)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "bad.jsonl, line 2 is not JSON" in last


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--calibration-tokens", "many"), "no number of tokens"),
        (("--calibration-tokens", "1k", "--calibration-windows", "2"), "not allowed with"),
    ],
)
def test_refused_arguments(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compile", "model", "-o", str(tmp_path / "o"), *arguments])
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_budget_smaller_than_a_window(chat_folder: Path, tmp_path: Path, options: CompileOptions) -> None:
    with pytest.raises(QuantizeError, match="a budget of 10 tokens holds no window of 24"):
        compile_model(chat_folder, tmp_path / "o", replace(options, calibration_tokens=10))
