"""Text to tokens and back with the `tokenizers` library alone, and chat templates in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from liftc.errors import ArtifactError, LiftcError
from liftc.runtime.chat_template import pick_template, render_chat

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "</s>", "<eos>")
"""Names of the token that ends a text in pretraining. The eos_token of a chat model ends a turn instead."""


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
        self._fast.no_truncation()  # files of sentence encoders cut and pad to a training length
        self._fast.no_padding()
        self._config = _read_json(folder / "tokenizer_config.json")
        template = folder / "chat_template.jinja"
        self.chat_template = (
            template.read_text(encoding="utf-8")
            if template.is_file()
            else pick_template(self._config.get("chat_template"))
        )

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the model's begin/end tokens when `special_tokens`."""
        return list(self._fast.encode(text, add_special_tokens=special_tokens).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(self._fast.decode(list(ids), skip_special_tokens=True))

    def token_id(self, text: str) -> int | None:
        """Id of the token that is written `text`, or None."""
        found: int | None = self._fast.token_to_id(text)
        return found

    def special_token(self, name: str) -> int | None:
        """Id of "bos_token", "eos_token" or another special token that tokenizer_config.json names, or None."""
        text = _token_text(self._config.get(name))
        return self.token_id(text) if text else None

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation ({"role", "content"} each), ready for the assistant's answer.

        Raises LiftcError when the model has no chat template or the template rejects the messages.
        """
        return self.encode(self.render(messages, add_generation_prompt=True), special_tokens=False)

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """Text of a conversation, its special tokens written out; raises LiftcError as `chat` does."""
        if self.chat_template is None:
            raise LiftcError("this model has no chat template; give the prompt as plain text")
        special = {key: _token_text(self._config.get(key)) for key in ("bos_token", "eos_token", "pad_token")}
        return render_chat(self.chat_template, messages, special, add_generation_prompt=add_generation_prompt)

    def frame(self) -> tuple[list[int], list[int]]:
        """(begin ids, end ids) that the tokenizer itself puts around a text."""
        ids = self.encode("")
        half = (len(ids) + 1) // 2
        return ids[:half], ids[half:]

    def document_marks(self) -> tuple[list[int], list[int]]:
        """(ids before, ids after) a whole document: the tokenizer's own begin and end tokens; where it adds
        no end token, the end-of-text token of the vocabulary, if there is one."""
        begin, end = self.frame()
        if not end:
            special = {t.content: i for i, t in self._fast.get_added_tokens_decoder().items() if t.special}
            eos = _token_text(self._config.get("eos_token"))
            known = [name for name in (eos, *END_OF_TEXT) if name in END_OF_TEXT and name in special]
            found = special.get(known[0]) if known else self.special_token("eos_token")
            end = [] if found is None else [found]
        return begin, end


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
