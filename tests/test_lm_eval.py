"""The lm-evaluation-harness adapter against the logits, against the harness's own model, and on a local task."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from liftc.cli import main
from liftc.errors import LiftcError

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
TEXTS = ["It was the best of times, it was the worst of times.", "Whatever, never mind!", "A"]
PAIRS = [
    ("The cat", " sat"),
    ("The cat", " ate"),
    ("", "A start"),
    ("Q: two?  ", "A"),
    ("Q: two?  ", "B"),
    ("a" * 300, "bc"),
]


def test_missing_harness(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "liftc.driver.lm_eval", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", str(artifact), "--tasks", "any", "-q"]) == 2
    assert "pip install 'liftc[lm-eval]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny original model with special tokens and a chat template."""
    copy = Path(shutil.copytree(model_folder, tmp_path_factory.mktemp("lm") / "model"))
    facts = {"bos_token": "~", "eos_token": "|", "chat_template": TEMPLATE}
    (copy / "tokenizer_config.json").write_text(json.dumps(facts))
    return copy


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    pytest.importorskip("lm_eval")
    from liftc.driver.lm_eval import LiftcLM

    return LiftcLM(folder)


def requests(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=args if isinstance(args, tuple) else (args,)) for args in arguments]


def ids(text: str) -> list[int]:
    return [ord(c) - 32 for c in text]


def directly(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    tokens = torch.tensor([[*context, *continuation]])[:, -(model.max_length + 1) :]
    logits = model.model(tokens)[0, :-1].double()
    part, gold = logits[-len(continuation) :], torch.tensor(continuation)
    return float(part.log_softmax(-1).gather(1, gold[:, None]).sum()), bool((part.argmax(-1) == gold).all())


def test_loglikelihood_is_that_of_the_logits(model: Any) -> None:
    found = model.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        trimmed = context.rstrip(" ")
        continuation = context[len(trimmed) :] + continuation
        expected = directly(model, ids(trimmed) or ids("~"), ids(continuation))
        assert value == pytest.approx(expected[0], abs=1e-4) and greedy == expected[1]
    best = int(model.model(torch.tensor([ids("The cat")]))[0, -1].argmax())
    ((_, greedy),) = model.loglikelihood(requests(("The cat", chr(best + 32))), disable_tqdm=True)
    assert greedy and not all(g for _, g in found)


def test_last_token_variants_share_a_run(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    logits = model._logits

    def counted(tokens: list[int], count: int) -> torch.Tensor:
        runs.append(len(tokens))
        result: torch.Tensor = logits(tokens, count)
        return result

    monkeypatch.setattr(model, "_logits", counted)
    choices = [("Question: which one?", letter) for letter in "ABCD"]
    together = model.loglikelihood(requests(*choices), disable_tqdm=True)
    assert len(runs) == 1 and len(set(together)) == 4
    assert together == [model.loglikelihood(requests(c), disable_tqdm=True)[0] for c in choices]


def test_rolling_predicts_every_token_once(model: Any) -> None:
    found = model.loglikelihood_rolling(requests(*TEXTS), disable_tqdm=True)
    for text, value in zip(TEXTS, found, strict=True):
        assert value == pytest.approx(directly(model, ids("~"), ids(text))[0], abs=1e-3)


def test_rolling_windows_of_long_texts(folder: Path) -> None:
    pytest.importorskip("lm_eval")
    from liftc.driver.lm_eval import LiftcLM

    short = LiftcLM(folder, max_length=16)
    tokens = ids(TEXTS[0])
    (value,) = short.loglikelihood_rolling(requests(TEXTS[0]), disable_tqdm=True)
    expected, done = directly(short, ids("~"), tokens[:16])[0], 16
    while done < len(tokens):
        end = min(done + 16, len(tokens))
        context = tokens[end - 17 : done]
        expected += directly(short, context, tokens[done:end])[0]
        done = end
    assert value == pytest.approx(expected, abs=1e-3)
    with pytest.raises(LiftcError, match="a continuation of 52 tokens does not fit in 16"):
        short.loglikelihood(requests(("a", TEXTS[0])), disable_tqdm=True)


def test_generation_stops_where_the_task_says(model: Any) -> None:
    prompt = "It was the"
    free = model.model.generate(torch.tensor([ids(prompt)]), 20, stop_tokens=())[0, len(prompt) :].tolist()
    text = "".join(chr(t + 32) for t in free)
    end = next((i for i, t in enumerate(free) if t in {2, model.eot_token_id}), len(free))
    (whole,) = model.generate_until(requests((prompt, {"until": [], "max_gen_toks": 20})), disable_tqdm=True)
    assert whole == text[:end] and len(whole) > 4
    mark = whole[3:5]
    (cut,) = model.generate_until(
        requests((prompt, {"until": mark, "max_new_tokens": 20})), disable_tqdm=True
    )
    assert cut == whole[: whole.find(mark)]
    sampled = [
        model.generate_until(
            requests((prompt, {"do_sample": True, "temperature": 2.0, "seed": s, "max_gen_toks": 8})),
            disable_tqdm=True,
        )
        for s in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    with pytest.raises(LiftcError, match="cannot apply the generation argument 'num_beams'"):
        model.generate_until(requests((prompt, {"num_beams": 4})), disable_tqdm=True)
    with pytest.raises(LiftcError, match="leave no room"):
        model.generate_until(requests((prompt, {"max_gen_toks": 10_000})), disable_tqdm=True)


def test_chat_template(model: Any) -> None:
    chat = [{"role": "user", "content": "hi"}]
    assert model.apply_chat_template(chat) == "[user]hi?"
    assert model.apply_chat_template(chat, add_generation_prompt=False) == "[user]hi"
    assert model.chat_template(True) == TEMPLATE and model.chat_template(False) is None


def test_agrees_with_the_model_of_the_harness(model: Any, folder: Path) -> None:
    """Same numbers as lm_eval --model hf on the same weights, generation included."""
    pytest.importorskip("accelerate")
    pytest.importorskip("peft")
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="~", eos_token="|", pad_token="|"
    )
    theirs = HFLM(
        AutoModelForCausalLM.from_pretrained(folder), tokenizer=tokenizer, batch_size=1, device="cpu"
    )
    for a, b in zip(
        model.loglikelihood(requests(*PAIRS)), theirs.loglikelihood(requests(*PAIRS)), strict=True
    ):
        assert a == pytest.approx(b, abs=1e-3)
    rolling = model.loglikelihood_rolling(requests(*TEXTS)), theirs.loglikelihood_rolling(requests(*TEXTS))
    assert rolling[0] == pytest.approx(rolling[1], abs=1e-3)
    asked = requests(("It was the", {"until": ["zz"], "max_gen_toks": 12}))
    assert model.generate_until(asked) == theirs.generate_until(asked)


TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def test_a_task_on_disk(
    model: Any, artifact: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """`liftc eval --tasks` gives the accuracies that follow from the logits of artifact and original."""
    import datasets

    from liftc.driver.lm_eval import LiftcLM

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows: list[dict[str, Any]] = [
        {"question": f"Number {i}?", "choices": ["one", "two", "six"], "label": i % 3} for i in range(12)
    ]
    data, tasks = tmp_path / "rows.jsonl", tmp_path / "tasks"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks.mkdir()
    (tasks / "tiny.yaml").write_text(TASK.format(data=data))

    def accuracy(judge: Any) -> float:
        right = 0
        for row in rows:
            scores = [directly(judge, ids(row["question"]), ids(f" {c}"))[0] for c in row["choices"]]
            right += scores.index(max(scores)) == row["label"]
        return right / len(rows)

    common = ["--tasks", "tiny_choice", "--task-dir", str(tasks), "--reference", str(folder), "--json", "-q"]
    assert main(["eval", str(artifact), *common]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["tasks"]["tiny_choice"]["acc,none"] == pytest.approx(accuracy(LiftcLM(artifact)))
    assert answer["reference_tasks"]["tiny_choice"]["acc,none"] == pytest.approx(accuracy(model))
    assert main(["eval", str(folder), "--tasks", "no_such_task", "-q"]) == 2
    assert "cannot run no_such_task" in capsys.readouterr().err
    assert main(["eval", str(folder), "--tasks", "x", "--task-dir", str(tmp_path / "none"), "-q"]) == 2


def test_known_to_the_harness(folder: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.registry import get_model

    from liftc.driver.lm_eval import LiftcLM

    assert get_model("liftc") is LiftcLM
    made = LiftcLM.create_from_arg_string(f"path={folder},max_length=32", {"batch_size": 1, "device": "cpu"})
    assert made.max_length == 32 and made.prefix_token_id == 94 and made.eot_token_id == 92


def test_default_device_of_the_harness(folder: Path) -> None:
    pytest.importorskip("lm_eval")
    from liftc.driver.lm_eval import LiftcLM

    if torch.cuda.is_available():
        pytest.skip("this machine has the device the harness asks for")
    made = LiftcLM.create_from_arg_obj({"path": folder}, {"device": "cuda:0", "max_batch_size": None})
    assert made.device == torch.device("cpu")
    assert (
        LiftcLM.create_from_arg_obj({"path": folder, "device": "cpu"}, {"device": "cuda:7"}).device.type
        == "cpu"
    )


def test_models_without_an_end_token(model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from liftc.driver.lm_eval import LiftcLM

    copy = Path(shutil.copytree(model_folder, tmp_path / "model"))
    config = json.loads((copy / "config.json").read_text())
    assert LiftcLM(copy).eot_token_id == 2
    (copy / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    with pytest.raises(LiftcError, match="names no end-of-sequence token"):
        LiftcLM(copy)
