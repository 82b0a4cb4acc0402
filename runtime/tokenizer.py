"""Text to tokens and back with the `tokenizers` library alone, and chat templates in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from liftc.errors import ArtifactError, LiftcError


class Tokenizer:
    """Reads `tokenizer.json` (and the chat template) of a model folder or artifact.

    Raises ArtifactError when the folder has no usable tokenizer.json.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer as Fast

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ArtifactError(f"{folder} has no tokenizer.json; pass token ids instead of text")
        try:
            self._fast = Fast.from_file(str(path))
        except Exception as error:  # the Rust binding raises plain Exception
            raise ArtifactError(f"{path} cannot be read as a tokenizer: {error}") from error
        self._config = _read_json(folder / "tokenizer_config.json")
        template = folder / "chat_template.jinja"
        self.chat_template = (
            template.read_text(encoding="utf-8") if template.is_file() else self._config.get("chat_template")
        )

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the model's begin/end tokens when `special_tokens`."""
        return list(self._fast.encode(text, add_special_tokens=special_tokens).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(self._fast.decode(list(ids), skip_special_tokens=True))

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation ({"role", "content"} each), ready for the assistant's answer.

        Raises LiftcError when the model has no chat template or the template rejects the messages.
        """
        if not isinstance(self.chat_template, str):
            raise LiftcError("this model has no chat template; give the prompt as plain text")
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        special = {key: _token_text(self._config.get(key)) for key in ("bos_token", "eos_token", "pad_token")}
        try:
            text = environment.from_string(self.chat_template).render(
                messages=list(messages), add_generation_prompt=True, **special
            )
        except TemplateError as error:
            raise LiftcError(f"the chat template rejected the messages: {error}") from error
        return self.encode(text, special_tokens=False)


class StreamDecoder:
    """Turns a stream of token ids into printable pieces, holding back incomplete UTF-8 sequences."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = ""

    def push(self, token: int) -> str:
        """Text that became complete with this token, possibly empty."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        piece = text[len(self._shown) :]
        self._shown = text
        return piece


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _token_text(value: object) -> str:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""
