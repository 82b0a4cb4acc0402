"""lm-evaluation-harness on an artifact: the harness's model "liftc", and its command line with that model known.

    python -m liftc.driver.lm_eval --model liftc --model_args path=OUT --tasks TASKS [options of lm_eval]
    liftc eval OUT --tasks TASKS [--task-dir DIR]

Needs the extra `lm-eval`. Requests run one by one, and tokens, special tokens, truncation and rolling windows are
those of the harness's own model "hf", so that figures compare.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from liftc.driver.evaluate import load_any
from liftc.errors import LiftcError
from liftc.runtime.executor import KVCache
from liftc.runtime.tokenizer import Tokenizer

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
except ImportError as _error:
    raise LiftcError("tasks need lm-evaluation-harness: pip install 'liftc[lm-eval]'") from _error

CHUNK = 256
GENERATION = {"until", "do_sample", "temperature", "top_k", "top_p", "seed"}
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
Scored = tuple[float, bool]
Request = tuple[Any, list[int], list[int]]


@register_model("liftc")
class LiftcLM(TemplateLM):  # type: ignore[misc]
    """An artifact, or a model folder with its original weights, as a model of lm-evaluation-harness.

    path: the folder. device, dtype (of model folders): as in `liftc eval`. max_length: longest sequence in tokens
    (default: the model's). max_gen_toks: tokens generated where a task states no number. The harness passes
    batch_size and max_batch_size to every model; sequences run one by one whatever they say.
    Raises LiftcError for folders that cannot be loaded and tokenizers without begin and end tokens.
    """

    def __init__(
        self,
        path: str | Path,
        device: str | None = None,
        dtype: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.path = Path(path)
        self.tokens = Tokenizer(self.path)
        self.model = load_any(self.path, dtype, device)
        self._device = self.model.device
        self.max_length = int(max_length or self.model.max_length)
        self.max_gen_toks = int(max_gen_toks)
        stops = self.model.stop_tokens
        eos = self.tokens.special_token("eos_token")
        begin = self.tokens.special_token("bos_token")
        self._end = eos if eos is not None else stops[0] if stops else None
        self._begin = begin if begin is not None else self._end
        if self._end is None:
            raise LiftcError(
                f"{path} names no end-of-sequence token, which tasks need; add it to config.json"
            )

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> LiftcLM:
        """What the harness's command line calls. It states the device "cuda:0" where its user stated none:
        without a GPU, that means the artifact's own device. A device among the model arguments comes first."""
        stated = {k: v for k, v in (additional_config or {}).items() if v is not None}
        if str(stated.get("device")).startswith("cuda") and not torch.cuda.is_available():
            del stated["device"]
        return cls(**{**stated, **arg_dict})

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> LiftcLM:
        """create_from_arg_obj for "key=value,key=value"."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        return int(self._end)  # type: ignore[arg-type]

    @property
    def prefix_token_id(self) -> int:
        """What conditions the first token of a text: the begin token, else the end-of-sequence token."""
        return int(self._begin)  # type: ignore[arg-type]

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness caches templated requests."""
        return str(self.path.resolve()).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them, but never a second begin token."""
        if add_special_tokens is None:
            plain = self.tokens.encode(string, special_tokens=False)
            return plain if plain[:1] == [self._begin] else self.tokens.encode(string)
        return self.tokens.encode(string, special_tokens=add_special_tokens)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each token predicted once from windows of at most max_length."""
        answers = []
        for instance in tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm):
            (text,) = instance.args
            windows = get_rolling_token_windows(
                self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )  # fmt: skip
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            total = sum(value for value, _ in self._loglikelihood_tokens(parts, disable_tqdm=True))
            answers.append(float(total))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), float(total))
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Scored]:
        """(log-likelihood of the continuation, whether greedy decoding gives it) per (key, context, continuation).

        Requests that differ in their last token only, such as the letters of multiple choice, share one run.
        """
        answers: list[Scored] = [(0.0, True)] * len(requests)
        inputs = [self._input(context, continuation) for _, context, continuation in requests]
        order = sorted(
            (i for i, (_, targets) in enumerate(inputs) if targets), key=lambda i: _order(inputs[i])
        )
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as bar:
            for (_, tokens, count), members in groupby(order, key=lambda i: _order(inputs[i])):
                logits = self._logits(list(tokens), count)
                for i in members:
                    answers[i] = _score(logits, inputs[i][1])
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
                    bar.update()
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of the task's stop texts, the end-of-sequence token or the token limit."""
        answers = []
        for instance in tqdm(requests, desc="generate_until", disable=disable_tqdm):
            context, arguments = instance.args
            text = self._generate(context, dict(arguments))
            answers.append(text)
            self.cache_hook.add_partial("generate_until", (context, arguments), text)
        return answers

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation in the model's own template, rendered in a sandbox."""
        return self.tokens.render(chat_history, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Text of the template, for the harness's records."""
        return self.tokens.chat_template if chat_template else None

    def _input(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """(tokens the model reads, targets): the last max_length + 1 tokens, shifted by one."""
        if len(continuation) > self.max_length:
            raise LiftcError(
                f"a continuation of {len(continuation)} tokens does not fit in {self.max_length}; raise max_length"
            )
        return [*context, *continuation][-(self.max_length + 1) :][:-1], continuation

    @torch.no_grad()
    def _logits(self, tokens: list[int], count: int) -> torch.Tensor:
        """Logits (count, vocab) of the last `count` positions."""
        ids = torch.tensor([tokens], device=self.model.device)
        if len(tokens) == 1:
            return self.model(ids)[0]  # type: ignore[no-any-return]
        graph = self.model.graphs["prefill"]
        where = torch.arange(len(tokens), device=self.model.device)
        result = graph.call(ids, where, where[-count:], *KVCache(graph, len(tokens)).tensors)
        assert isinstance(result, torch.Tensor)
        return result[0]

    def _generate(self, context: str, arguments: dict[str, Any]) -> str:
        limits = [arguments.pop(name, None) for name in LENGTHS]
        limit = int(next((value for value in limits if value is not None), self.max_gen_toks))
        unknown = set(arguments) - GENERATION
        if unknown:
            raise LiftcError(
                f"liftc cannot apply the generation argument {min(unknown)!r}; drop it from the task"
            )
        if limit >= self.max_length:
            raise LiftcError(f"{limit} generated tokens leave no room for the prompt in {self.max_length}")
        until = arguments.get("until") or []
        marks = [mark for mark in ([until] if isinstance(until, str) else until) if mark]
        stops = {self.eot_token_id, *self.model.stop_tokens}
        stops |= {
            token for mark in marks if (token := self.tokens.token_id(mark)) is not None and len(mark) > 1
        }
        sample = arguments.get("do_sample", float(arguments.get("temperature") or 0) > 0)
        temperature = float(arguments.get("temperature") or 1.0) if sample else 0.0
        ids = self.tok_encode(context)[-(self.max_length - limit) :] or [self.prefix_token_id]
        new: list[int] = []
        for token in self.model.stream(
            ids, limit, temperature=temperature, top_k=int(arguments.get("top_k") or 0),
            top_p=float(arguments.get("top_p") or 1.0), seed=int(arguments.get("seed") or 0), stop_tokens=tuple(stops),
        ):  # fmt: skip
            if token in stops:
                break
            new.append(token)
            if any(mark in self.tokens.decode(new) for mark in marks):
                break
        text = self.tokens.decode(new)
        return text[: min((text.find(mark) for mark in marks if mark in text), default=len(text))]


def evaluate_tasks(
    artifact: Path,
    tasks: Sequence[str],
    *,
    task_dir: Path | None = None,
    few_shot: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    device: str | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Task name -> {metric: value} of the harness's tasks; task_dir: folder with YAML files of more tasks.

    few_shot, limit: examples in the prompt and examples evaluated, as the harness's --num_fewshot and --limit.
    Raises LiftcError for tasks that are unknown or whose data is not at hand.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    if task_dir is not None and not task_dir.is_dir():
        raise LiftcError(f"{task_dir}: no such folder of tasks")
    model = LiftcLM(artifact, device, dtype)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            own = TaskManager(include_path=str(task_dir), include_defaults=False) if task_dir else None
            if own is None or set(tasks) - set(
                own.all_tasks
            ):  # listing the harness's own tasks takes seconds
                own = TaskManager(include_path=None if task_dir is None else str(task_dir))
            found = simple_evaluate(
                model, tasks=list(tasks), num_fewshot=few_shot, limit=limit, apply_chat_template=chat,
                task_manager=own, log_samples=False, bootstrap_iters=1000,
            )  # fmt: skip
    except (KeyError, ValueError, OSError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise LiftcError(f"lm-evaluation-harness cannot run {', '.join(tasks)}: {said[0]}") from error
    results: dict[str, dict[str, Any]] = (found or {}).get("results", {})
    return {
        name: {key: value for key, value in row.items() if isinstance(value, (int, float))}
        for name, row in results.items()
    }


def tasks_answer(
    artifact: Path, tasks: Sequence[str], *, reference: Path | None = None, **options: Any
) -> dict[str, Any]:
    """evaluate_tasks of an artifact and, where given, of the original model, as the answer of `liftc eval`."""
    started = time.perf_counter()
    answer: dict[str, Any] = {"tasks": evaluate_tasks(artifact, tasks, **options)}
    if reference is not None:
        answer["reference_tasks"] = evaluate_tasks(reference, tasks, **options)
    lines = []
    for name, row in answer["tasks"].items():
        for key, value in row.items():
            line = f"{name:24s} {key:28s} {value:.4f}"
            if reference is not None:
                line += f"   reference {answer['reference_tasks'][name][key]:.4f}"
            lines.append(line)
    return {**answer, "text": "\n".join(lines), "seconds": time.perf_counter() - started}


def _order(pair: tuple[list[int], list[int]]) -> tuple[int, tuple[int, ...], int]:
    tokens, targets = pair
    return -len(tokens), tuple(tokens), len(targets)


def _score(logits: torch.Tensor, targets: list[int]) -> Scored:
    """Sum of the log-probabilities of targets under logits (len(targets), vocab), and whether all are the argmax."""
    gold = torch.tensor(targets, device=logits.device)
    total, greedy = 0.0, True
    for start in range(0, len(targets), CHUNK):
        part, wanted = logits[start : start + CHUNK].float(), gold[start : start + CHUNK, None]
        total += float(part.log_softmax(-1).gather(1, wanted).double().sum())
        greedy = greedy and bool((part.argmax(-1, keepdim=True) == wanted).all())
    return total, greedy


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
