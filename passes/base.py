"""What a pass is, and the pipeline that runs passes with the verifier in between.

A pass is a frozen dataclass: its fields are its options, on the command line too. It takes a valid Program
and returns a valid one without changing the first; in between, inside `apply`, anything may happen. A pass
that rewrites nodes works on `program.copy()`; one that only fills in tables shares the graphs.
"""

from __future__ import annotations

import json
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

from liftc import env
from liftc.errors import LiftcError, VerifyError
from liftc.program import Program
from liftc.text import print_program
from liftc.verify import verify

PassType = TypeVar("PassType", bound="Pass")


class PassError(LiftcError):
    """An option of a pass that cannot be followed, or a program a pass cannot work on."""


@dataclass(frozen=True)
class Pass(ABC):
    """Base of all passes; `name` is the command line's, as in `choose-order{order=weight-first}`."""

    name: ClassVar[str]

    @abstractmethod
    def apply(self, program: Program) -> Program:
        """The transformed program; `program` is left as it was. Raises PassError."""

    def __str__(self) -> str:
        """The pass with the options that differ from their defaults, as the command line takes it."""
        options = []
        for option in fields(self):
            value = getattr(self, option.name)
            if value != _default(option):
                key = option.name.replace("_", "-")
                options += [f"{key}={_quoted(v)}" for v in (value if isinstance(value, tuple) else (value,))]
        return f"{self.name}{{{','.join(options)}}}" if options else self.name

    @classmethod
    def from_options(cls: type[PassType], options: Sequence[tuple[str, str]]) -> PassType:
        """Build the pass from (key, text) pairs; a key of a tuple field may come several times.

        Raises PassError for unknown or repeated keys and for text that does not fit the field.
        """
        hints = get_type_hints(cls)
        known = {option.name.replace("_", "-"): option.name for option in fields(cls)}
        values: dict[str, Any] = {}
        for key, text in options:
            if key not in known:
                offer = f"it takes {', '.join(known)}" if known else "it takes no options"
                raise PassError(f"pass {cls.name} has no option {key!r}; {offer}")
            name = known[key]
            if hints[name] == tuple[str, ...]:
                values[name] = (*values.get(name, ()), text)
            elif name in values:
                raise PassError(f"pass {cls.name}: option {key} is given twice")
            else:
                values[name] = _converted(cls.name, key, text, hints[name])
        return cls(**values)


def compile_pattern(pattern: str, owner: str) -> re.Pattern[str]:
    """A regular expression given by the user; raises PassError naming `owner`, the option it came from."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise PassError(f"{owner}: {pattern!r} is not a regular expression ({error})") from error


@dataclass(frozen=True)
class PassPipeline:
    """Passes run one after the other.

    dump_dir: folder that receives the program text after each pass, named 03-share-transforms.txt; `first` is
    the number of the first pass. check: run the verifier on the input and after each pass (on unless
    LIFTC_VERIFY=0). LIFTC_DEBUG=1 prints the time of each pass, 2 also what it is about to run, 3 the text.
    """

    passes: Sequence[Pass]
    dump_dir: Path | None = None
    first: int = 1
    check: bool = field(default_factory=env.verify_enabled)

    def apply(self, program: Program) -> Program:
        """Run all passes. Raises PassError, or VerifyError naming the pass that broke a rule."""
        self._verify(program, "the input of the passes")
        if self.dump_dir and self.first == 1:
            self._dump(program, "00-input")
        for number, item in enumerate(self.passes, self.first):
            if env.debug_level() >= 2:
                print(f"pass {number:02d} {item}", file=sys.stderr)
            started = time.perf_counter()
            program = item.apply(program)
            ran = time.perf_counter()
            self._verify(program, f"the result of pass {item.name}")
            if env.debug_level() >= 1:
                checked = time.perf_counter() - ran
                print(f"pass {item.name}: {ran - started:.3f} s, verify {checked:.3f} s", file=sys.stderr)
            if env.debug_level() >= 3:
                print(print_program(program), file=sys.stderr)
            self._dump(program, f"{number:02d}-{item.name}")
        return program

    def _verify(self, program: Program, what: str) -> None:
        if self.check:
            try:
                verify(program)
            except VerifyError as error:
                raise VerifyError(f"{what} is invalid: {error}") from error

    def _dump(self, program: Program, name: str) -> None:
        if self.dump_dir:
            self.dump_dir.mkdir(parents=True, exist_ok=True)
            (self.dump_dir / f"{name}.txt").write_text(print_program(program), encoding="utf-8")


_CONVERSIONS: dict[Any, Callable[[str], Any]] = {int: int, float: float, str: str, float | None: float}


def _converted(owner: str, key: str, text: str, kind: Any) -> Any:
    if kind is bool:
        if text not in ("true", "false"):
            raise PassError(f"pass {owner}: option {key} must be true or false, got {text!r}")
        return text == "true"
    try:
        return _CONVERSIONS[kind](text)
    except ValueError as error:
        what = "a whole number" if kind is int else "a number"
        raise PassError(f"pass {owner}: option {key} must be {what}, got {text!r}") from error


def _default(option: Any) -> object:
    return option.default_factory() if option.default_factory is not MISSING else option.default


def _quoted(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    return text if re.fullmatch(r"[A-Za-z0-9_.+/-]+", text) else json.dumps(text)
