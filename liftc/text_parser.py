"""Parser of the program text; the grammar is described in liftc/text.py."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from liftc.errors import LiftcError, ParseError
from liftc.format import LiftFormat
from liftc.graphbuild import GraphBuilder
from liftc.program import Attribute, Program
from liftc.scanner import Scanner
from liftc.spec import DTYPES, LiftSpec, LinearSpec, TensorSpec

_DIM = re.compile(r"[0-9]{1,15}(,[0-9]{1,15})*")
_FORMAT = re.compile(r"LQ-[0-9]{1,4}/[0-9]{1,4}")


@dataclass
class _Statement:
    """A node as written, before its references are resolved; line is where it starts."""

    at: int
    name: str
    op: str = ""
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


class ProgramParser:
    """Builds one Program from one Scanner; `program()` is the only entry."""

    def __init__(self, scanner: Scanner) -> None:
        self.scan = scanner
        self.result = Program("")

    def program(self) -> Program:
        """The whole text as a Program; raises ParseError."""
        scan = self.scan
        scan.expect("program")
        self.result.name = scan.string()
        scan.expect("{")
        sections = {
            "attr": self._attr, "tensor": self._tensor, "lift": self._lift, "linear": self._linear,
            "folded": self._folded, "graph": self._graph,
        }  # fmt: skip
        while not scan.accept("}"):
            start = scan.at
            word = scan.word(f"{', '.join(sections)} or '}}'")
            if word not in sections:
                scan.at = start
                scan.skip()
                scan.fail(f"{', '.join(sections)} or '}}'")
            try:
                sections[word]()
            except ParseError:
                raise
            except (LiftcError, ValueError) as error:
                raise scan.error(str(error)) from error
        scan.skip()
        if scan.at < len(scan.text):
            scan.fail("the end of the text")
        return self.result

    def _new(self, name: str, table: Iterable[str], what: str) -> str:
        if name in table:
            raise self.scan.error(f"{what} {name} is declared twice")
        return name

    def _attr(self) -> None:
        key = self._new(self.scan.word("the name of an attribute"), self.result.attrs, "attribute")
        self.scan.expect("=")
        value: Attribute = self.scan.value()
        if not isinstance(value, (str, int, float, bool)):
            raise self.scan.error(f"attribute {key} must be a string, a number, True or False")
        self.result.attrs[key] = value

    def _tensor(self) -> None:
        name = self._new(self.scan.tensor_name(), self.result.tensors, "tensor")
        self.scan.expect(":")
        text = self.scan.type("")
        dtype, bracket, rest = text.partition("[")
        dims = rest[:-1]
        if dtype not in DTYPES or not bracket or rest[-1:] != "]" or not (dims == "" or _DIM.fullmatch(dims)):
            raise self.scan.error(f"expected a type such as bf16[576,1536] for tensor {name}, found {text!r}")
        self.result.tensors[name] = TensorSpec(tuple(map(int, filter(None, dims.split(",")))), dtype)

    def _lift(self) -> None:
        name = self._new(self.scan.tensor_name(), self.result.lifts, "lift")
        self.scan.expect(":")
        fmt = self._format()
        sizes = [self._field(key) for key in ("in", "left", "right")]
        if sizes[2] < 1:
            raise self.scan.error(f"lift {name} must have positive sizes")
        self.result.lifts[name] = LiftSpec(fmt, *sizes)

    def _linear(self) -> None:
        scan = self.scan
        name = self._new(scan.tensor_name(), self.result.linears, "linear")
        scan.expect("weight=")
        weight = scan.tensor_name()
        out, width, block = (self._field(key) for key in ("out", "in", "block"))
        transposed = scan.accept("transposed")
        lift = scan.tensor_name() if scan.accept("lift=") else ""
        fmt = self._format() if scan.accept("format=") else None
        self.result.linears[name] = LinearSpec(name, weight, out, width, block, transposed, lift, fmt)

    def _field(self, key: str) -> int:
        self.scan.expect(f"{key}=")
        return self.scan.integer()

    def _format(self) -> LiftFormat:
        match = self.scan.match(_FORMAT, "a format such as LQ-77/32")
        return LiftFormat.parse(match[0])

    def _folded(self) -> None:
        scan = self.scan
        name = self._new(scan.tensor_name(), self.result.folded, "folded tensor")
        scan.expect("=")
        op = scan.word("the name of an op")
        scan.expect("(")
        operands: list[str] = []
        while not scan.accept(")"):
            operands.append(scan.tensor_name())
            if not scan.peek(")"):
                scan.expect(",")
        self.result.folded[name] = (op, tuple(operands))

    def _graph(self) -> None:
        scan = self.scan
        name = self._new(scan.word("the name of a graph"), self.result.graphs, "graph")
        inputs, calls = list(self._inputs()), []
        scan.expect("{")
        while scan.peek("%"):
            calls.append(self._call())
        scan.expect("return")
        returned = scan.value()
        builder = GraphBuilder({s.name for s in (*inputs, *calls)}, self._tensor_type)
        end = scan.at
        for statement in inputs:
            scan.at = statement.at
            builder.input(statement.name, statement.meta)
        for s in calls:
            scan.at = s.at
            builder.call(s.name, s.op, tuple(s.args), s.kwargs, s.meta)
        scan.at = end
        self.result.graphs[name] = builder.output(returned)
        scan.expect("}")

    def _inputs(self) -> Iterator[_Statement]:
        scan = self.scan
        scan.expect("(")
        while not scan.accept(")"):
            statement = _Statement(scan.at, scan.node_name())
            kind = scan.type(",)") if scan.accept_on_line(":") else ""
            if not scan.peek(")"):
                scan.expect(",")
            statement.meta = self._meta(kind)
            yield statement

    def _call(self) -> _Statement:
        scan = self.scan
        statement = _Statement(scan.at, scan.node_name())
        scan.expect("=")
        statement.op = scan.word("the name of an op")
        scan.expect("(")
        while not scan.accept(")"):
            key = scan.keyword()
            if key:
                statement.kwargs[self._new(key, statement.kwargs, "argument")] = scan.value()
            elif statement.kwargs:
                scan.fail("a keyword argument")
            else:
                statement.args.append(scan.value())
            if not scan.peek(")"):
                scan.expect(",")
        statement.meta = self._meta(scan.type("") if scan.accept_on_line(":") else "")
        return statement

    def _meta(self, kind: str) -> dict[str, Any]:
        block, source = self.scan.location()
        return {"type": kind, "block": block, "source": source}

    def _tensor_type(self, name: str) -> str:
        return str(self.result.tensors[name]) if name in self.result.tensors else ""
