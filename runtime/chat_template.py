"""Chat templates of models, rendered by jinja2 in a sandbox: a template is data, never trusted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from liftc.errors import LiftcError


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, str]],
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool,
) -> str:
    """Text of a conversation ({"role", "content"} each).

    special_tokens: "bos_token", "eos_token", ... as the template names them. The clock is not offered to
    templates, so the same messages always give the same text. Raises LiftcError when the template does not
    parse, reaches outside the sandbox, or rejects the messages.
    """
    environment = _environment()
    try:
        return str(
            environment.from_string(template).render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **special_tokens,
            )
        )
    except Exception as error:  # a template can raise anything
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise LiftcError(f"the chat template rejected the messages: {said[0]}") from error


def pick_template(value: object) -> str | None:
    """The template in a tokenizer_config.json: a text, or the one called "default" in a list of named ones."""
    if isinstance(value, list):
        named = {v.get("name"): v.get("template") for v in value if isinstance(v, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _environment() -> Any:
    from jinja2 import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):  # type: ignore[misc, unused-ignore]
        """{% generation %} marks the assistant's words for training; here it only passes them on."""

        tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = to_json
    return environment
