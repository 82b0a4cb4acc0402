"""Generation, sampling, tokenizer, KV cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import liftc
from liftc.cli import main
from liftc.errors import ArtifactError, LiftcError
from liftc.runtime.module import CausalLM
from liftc.runtime.sampling import Sampling
from liftc.runtime.tokenizer import StreamDecoder, Tokenizer


@pytest.fixture(scope="module")
def model(artifact: Path) -> CausalLM:
    loaded = liftc.load(artifact)
    assert isinstance(loaded, CausalLM)
    return loaded


def test_seeded_sampling_repeats(model: CausalLM) -> None:
    draw = [
        model.generate([1, 2, 3], 8, temperature=1.0, top_k=20, top_p=0.9, seed=seed).tolist()
        for seed in (4, 4, 5)
    ]
    assert draw[0] == draw[1] != draw[2]


def test_stop_tokens_end_the_stream(model: CausalLM) -> None:
    free = list(model.stream([1, 2, 3], 8, stop_tokens=()))
    stopped = list(model.stream([1, 2, 3], 8, stop_tokens=(free[2],)))
    assert stopped == free[: free.index(free[2]) + 1]


def test_context_bounds_the_stream(model: CausalLM) -> None:
    assert len(list(model.stream([1, 2, 3], 8, stop_tokens=(), context_length=6))) == 3
    with pytest.raises(LiftcError, match="leaves no room"):
        list(model.stream([1, 2, 3], 8, context_length=3))
    assert list(model.stream([1, 2, 3], 0)) == []


def test_one_token_prompt_equals_prefill(model: CausalLM) -> None:
    first = list(model.stream([5], 4, stop_tokens=()))
    again = [int(model(torch.tensor([[5, *first[:i]]]))[0, -1].argmax()) for i in range(4)]
    assert first == again


@pytest.mark.parametrize("ids", [[], [[1, 2], [3, 4]], [97], [-1]])
def test_rejects_bad_prompts(model: CausalLM, ids: list[int]) -> None:
    with pytest.raises(LiftcError, match="input_ids"):
        list(model.stream(torch.tensor(ids, dtype=torch.int64), 4))


@pytest.mark.parametrize(
    "values",
    [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"temperature": float("nan")}],
)
def test_rejects_sampling_out_of_range(values: dict[str, float]) -> None:
    with pytest.raises(LiftcError):
        Sampling(**values)  # type: ignore[arg-type]


def test_top_k_and_top_p_keep_the_likely_tokens() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    generator = torch.Generator().manual_seed(0)
    k = {int(Sampling(1.0, top_k=2).next_token(logits, generator)) for _ in range(200)}
    p = {int(Sampling(1.0, top_p=0.7).next_token(logits, generator)) for _ in range(200)}
    assert k == {1, 3} and p == {1, 3}
    assert int(Sampling().next_token(logits, None)) == 1


def test_tokenizer_round_trip_and_stream(model_folder: Path) -> None:
    tokenizer = Tokenizer(model_folder)
    ids = tokenizer.encode("hello, world")
    decoder = StreamDecoder(tokenizer)
    assert tokenizer.decode(ids) == "hello, world" == "".join(decoder.push(i) for i in ids)


def test_chat_template_runs_in_a_sandbox(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model_folder / "tokenizer.json").read_bytes())
    with pytest.raises(LiftcError, match="no chat template"):
        Tokenizer(tmp_path).chat([{"role": "user", "content": "hi"}])
    template = tmp_path / "chat_template.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}:{{ m.content }} {% endfor %}assistant:")
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.chat([{"role": "user", "content": "hi"}])) == "user:hi assistant:"
    template.write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(LiftcError, match="chat template"):
        Tokenizer(tmp_path).chat([{"role": "user", "content": "hi"}])


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


def test_cli_generate_eval_inspect_opt(
    artifact: Path, model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str | Path) -> dict[str, object]:
        assert main([*map(str, arguments), "--json", "-q"]) == 0
        answer: dict[str, object] = json.loads(capsys.readouterr().out)
        return answer

    made = run("generate", artifact, "-p", "It was", "-n", "5")
    assert made["prompt_tokens"] == 6 and 1 <= int(str(made["tokens"])) <= 5
    quality = run(
        "eval", artifact, "--reference", model_folder, "--text", text_file, "--ctx", "32", "--windows", "3"
    )
    assert quality["tokens"] == 93 and float(str(quality["kl"])) > 0
    same = run("eval", model_folder, "--reference", model_folder, "--text", text_file, "--ctx", "32")
    assert same["kl"] == 0 and same["top1"] == 1 and same["perplexity"] == same["reference_perplexity"]
    facts = run("inspect", artifact, "--tensors")
    assert {"bits_per_weight", "bytes", "targets", "formats", "tensors"} <= set(facts)
    program = artifact / "program.txt"
    assert run("opt", program)["program"] == program.read_text()
    listed = run("opt", "--list")["passes"]
    assert isinstance(listed, list) and "lower-linears" in listed
    assert main(["opt", str(tmp_path / "none.txt")]) == 2
