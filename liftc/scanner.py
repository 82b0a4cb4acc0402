"""Character level of the program text: names, numbers, strings, values, and errors with line numbers."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from liftc.errors import ParseError
from liftc.graphbuild import NodeRef, TensorRef
from liftc.values import constant_value

_SPACE = re.compile(r"(?:\s+|#[^\n]*)*")
_BLANK = re.compile(r"[ \t]*")
_NODE = re.compile(r"%([A-Za-z0-9_]+)")
_TENSOR = re.compile(r"@([A-Za-z0-9_.+/-]+)")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_NUMBER = re.compile(r"-?(?:inf\b|[0-9]{1,400}(\.[0-9]+)?([eE][+-]?[0-9]+)?)")
_LOCATION = re.compile(r"# block (-?[0-9]{1,9})(?: (\S+))?[ \t]*(?=\n|$)")
_KEYWORD = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=")
_CONSTANT = re.compile(r"(dtype|device|layout|memory_format)\(([a-z0-9_:]+)\)")
_WORDS: dict[str, Any] = {
    "True": True,
    "False": False,
    "None": None,
    "inf": float("inf"),
    "nan": float("nan"),
}
_MAX_DEPTH = 32


class Scanner:
    """Reads program text from left to right; every method raises ParseError naming the line."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def fail(self, expected: str) -> NoReturn:
        """Raise ParseError: what was expected at the current position and what stands there."""
        found = self.text[self.at : self.at + 24].split("\n")[0]
        raise self.error(f"expected {expected}, found {repr(found) if found else self._nothing()}")

    def error(self, message: str) -> ParseError:
        """A ParseError for the current line."""
        return ParseError(f"line {self.text.count(chr(10), 0, self.at) + 1}: {message}")

    def _nothing(self) -> str:
        return "the end of the line" if self.at < len(self.text) else "the end of the text"

    def skip(self) -> None:
        """Skip white space, newlines and comments."""
        match = _SPACE.match(self.text, self.at)
        assert match is not None
        self.at = match.end()

    def peek(self, literal: str) -> bool:
        """True when `literal` comes next, after white space."""
        self.skip()
        return self.text.startswith(literal, self.at)

    def accept(self, literal: str) -> bool:
        """Step over `literal` if it comes next."""
        if not self.peek(literal):
            return False
        self.at += len(literal)
        return True

    def accept_on_line(self, literal: str) -> bool:
        """Step over `literal` if it comes next on this line; unlike accept, leaves comments alone."""
        blank = _BLANK.match(self.text, self.at)
        assert blank is not None
        found = self.text.startswith(literal, blank.end())
        self.at = blank.end() + len(literal) if found else self.at
        return found

    def expect(self, literal: str) -> None:
        """Step over `literal`, which must come next."""
        if not self.accept(literal):
            self.fail(repr(literal))

    def match(self, pattern: re.Pattern[str], expected: str) -> re.Match[str]:
        """Step over what `pattern` matches after white space."""
        self.skip()
        found = pattern.match(self.text, self.at)
        if not found:
            self.fail(expected)
        self.at = found.end()
        return found

    def word(self, expected: str = "a word") -> str:
        """A word such as "tensor" or "aten.add.Tensor"."""
        return self.match(_WORD, expected)[0]

    def node_name(self) -> str:
        """Name after `%`."""
        return self.match(_NODE, "a node such as %add_1")[1]

    def tensor_name(self) -> str:
        """Name after `@`."""
        return self.match(_TENSOR, "a tensor such as @model.norm.weight")[1]

    def keyword(self) -> str:
        """The name in `name=` if that comes next, else ""."""
        self.skip()
        match = _KEYWORD.match(self.text, self.at)
        if match:
            self.at = match.end()
        return match[1] if match else ""

    def integer(self) -> int:
        """A whole number."""
        value = self.number()
        if not isinstance(value, int):
            raise self.error(f"expected a whole number, found {value}")
        return value

    def number(self) -> int | float:
        """An integer or a float; 1 and 1.0 are different values."""
        text = self.match(_NUMBER, "a number")[0]
        return int(text) if text.lstrip("-").isdigit() else float(text)

    def string(self) -> str:
        """A string in double quotes with the escapes of JSON."""
        self.skip()
        try:
            value, self.at = json.JSONDecoder().raw_decode(self.text, self.at)
        except json.JSONDecodeError:
            self.fail("a string in double quotes")
        if not isinstance(value, str):
            self.fail("a string in double quotes")
        return value

    def type(self, stop: str) -> str:
        """Type text up to one of the characters of `stop` outside brackets, or the end of the line."""
        depth, start = 0, self.at
        while self.at < len(self.text):
            char = self.text[self.at]
            if char in "\n#" or (depth == 0 and char in stop):
                break
            depth += (char in "[(") - (char in ")]")
            self.at += 1
        if depth:
            self.fail("a closing bracket of the type")
        text = self.text[start : self.at].strip()
        if not text:
            self.fail("a type such as bf16[1,t,576]")
        return text

    def location(self) -> tuple[int, str]:
        """(block, source) of a `# block 0 model.layers.0` comment later on the line; (-1, "") if none."""
        blank = _BLANK.match(self.text, self.at)
        match = _LOCATION.match(self.text, blank.end() if blank else self.at)
        if not match:
            return -1, ""
        self.at = match.end()
        return int(match[1]), match[2] or ""

    def value(self, depth: int = 0) -> Any:
        """An argument: node, tensor, number, string, constant, slice, list or tuple."""
        self.skip()
        if depth > _MAX_DEPTH:
            raise self.error(f"values are nested deeper than {_MAX_DEPTH}")
        char = self.text[self.at : self.at + 1]
        if char == "%":
            return NodeRef(self.node_name())
        if char == "@":
            return TensorRef(self.tensor_name())
        if char == '"':
            return self.string()
        if char == "[":
            return self._sequence("[", "]", depth)[0]
        if char == "(":
            items, comma = self._sequence("(", ")", depth)
            if len(items) == 1 and not comma:
                raise self.error("a tuple of one value is written (value,)")
            return tuple(items)
        if self.accept("..."):
            return ...
        if char.isdigit() or char == "-":
            return self.number()
        return self._constant(depth)

    def _sequence(self, opening: str, closing: str, depth: int) -> tuple[list[Any], bool]:
        self.expect(opening)
        items: list[Any] = []
        comma = True
        while not self.accept(closing):
            if not comma:
                self.fail(f"',' or {closing!r}")
            items.append(self.value(depth + 1))
            comma = self.accept(",")
        return items, comma

    def _constant(self, depth: int) -> Any:
        match = _CONSTANT.match(self.text, self.at)
        if match:
            self.at = match.end()
            try:
                return constant_value(match[1], match[2])
            except ValueError as error:
                raise self.error(str(error)) from error
        start = self.at
        word = self.word("a value")
        if word in _WORDS:
            return _WORDS[word]
        if word == "slice":
            parts = self._sequence("(", ")", depth)[0]
            if len(parts) != 3:
                raise self.error(f"slice takes (start, stop, step), found {len(parts)} values")
            return slice(*parts)
        self.at = start
        self.fail("a value")
