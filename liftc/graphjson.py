"""Graphs as JSON data, so that loading an artifact needs no model code, no pickle and no TVM.

    {"version": 1,
     "inputs": [["input_ids", "i64[1,t]"], ...],             name and type, in call order
     "ops": ["aten.linear.default", ...],                    each op once
     "nodes": [["linear_3", 0, ["%mul_7", "@w"], {...}]],    name, index in ops, arguments[, keywords]
     "output": ["(", "%linear_210"]}

Numbers, booleans and null stand for themselves and an array for a list. A string starts with its kind:
`%node`, `@tensor`, `'text`, `!constant` (`!dtype(bf16)`, `!inf`). An array whose first item is "(" is a
tuple, "slice" a slice. Types of inner nodes, blocks and sources stay in program.txt: running a graph needs
none of them and they would double the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.fx import Graph, Node

from liftc.errors import ArtifactError
from liftc.graphbuild import GraphBuilder, NodeRef, TensorRef
from liftc.opnames import op_name
from liftc.values import constant_text, constant_value

VERSION = 1
_KEYS = ("version", "inputs", "ops", "nodes", "output")
_CONSTANT = re.compile(r"(dtype|device|layout|memory_format)\(([a-z0-9_:]+)\)")
_SPECIAL: dict[str, Any] = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan, "...": ...}
_MAX_DEPTH = 32


def graph_to_json(graph: Graph) -> dict[str, Any]:
    """JSON data of a graph, the same for equal graphs.

    Raises ArtifactError for a value that a program cannot hold.
    """
    ops: dict[str, int] = {}
    data: dict[str, Any] = {"version": VERSION, "inputs": [], "ops": [], "nodes": [], "output": None}
    for node in graph.nodes:
        try:
            if node.op == "placeholder":
                data["inputs"].append([node.name, node.meta.get("type", "")])
            elif node.op == "call_function":
                row = [
                    node.name,
                    ops.setdefault(op_name(node.target), len(ops)),
                    list(map(_encode, node.args)),
                ]
                if node.kwargs:
                    row.append({key: _encode(value) for key, value in node.kwargs.items()})
                data["nodes"].append(row)
            elif node.op == "output":
                data["output"] = _encode(node.args[0])
            elif node.op != "get_attr":
                raise ValueError(f"{node.op} nodes cannot be written")
        except ValueError as error:
            raise ArtifactError(f"graph JSON: node %{node.name}: {error}") from error
    data["ops"] = list(ops)
    return data


def graph_from_json(data: object) -> Graph:
    """Inverse of graph_to_json for data of unknown origin.

    Placeholders carry meta["type"]; other nodes no metadata. Only whitelisted ops, checked names and plain
    values come through. Raises ArtifactError naming the entry at fault.
    """
    if not isinstance(data, dict) or sorted(data) != sorted(_KEYS):
        raise ArtifactError(f"graph JSON: expected an object with exactly the keys {', '.join(_KEYS)}")
    if data["version"] != VERSION or isinstance(data["version"], bool):
        raise ArtifactError(
            f"graph JSON: version {data['version']!r} is not {VERSION}; use the matching liftc"
        )
    inputs, ops, nodes = (_list(data[key], key) for key in ("inputs", "ops", "nodes"))
    for i, op in enumerate(ops):
        if not isinstance(op, str):
            raise ArtifactError(f"graph JSON: ops[{i}] must be a string")
    names = {row[0] for row in (*inputs, *nodes) if isinstance(row, list) and row and isinstance(row[0], str)}
    builder = GraphBuilder(names)
    for i, row in enumerate(inputs):
        if not (isinstance(row, list) and len(row) == 2 and all(isinstance(item, str) for item in row)):
            raise ArtifactError(f"graph JSON: inputs[{i}] must be [name, type]")
        with _located(f"inputs[{i}]"):
            builder.input(row[0], {"type": row[1]})
    for i, row in enumerate(nodes):
        with _located(f"nodes[{i}] ({row[0]!r:.60})" if isinstance(row, list) and row else f"nodes[{i}]"):
            _add_call(builder, ops, row)
    with _located("output"):
        builder.output(_decode(data["output"]))
    return builder.graph


def _add_call(builder: GraphBuilder, ops: list[Any], row: object) -> None:
    if not isinstance(row, list) or len(row) not in (3, 4):
        raise ValueError("must be [name, op, arguments] or [name, op, arguments, keyword arguments]")
    name, index, args = row[:3]
    kwargs = row[3] if len(row) == 4 else {}
    if not isinstance(name, str) or not isinstance(args, list) or not isinstance(kwargs, dict):
        raise ValueError("name must be a string, arguments an array, keyword arguments an object")
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(ops):
        raise ValueError(f"op {index!r} is not an index into the {len(ops)} ops")
    values = tuple(_decode(value) for value in args)
    builder.call(name, ops[index], values, {key: _decode(value) for key, value in kwargs.items()}, {})


def _encode(value: Any) -> Any:
    if isinstance(value, Node):
        return f"@{value.target}" if value.op == "get_attr" else f"%{value.name}"
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else f"!{value!r}"
    if isinstance(value, str):
        return f"'{value}"
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, tuple):
        return ["(", *(_encode(item) for item in value)]
    if isinstance(value, slice):
        return ["slice", *(_encode(item) for item in (value.start, value.stop, value.step))]
    if value is ...:
        return "!..."
    text = constant_text(value)
    if text is None:
        raise ValueError(f"{value!r} of type {type(value).__name__} is not a value that a program may hold")
    return f"!{text}"


def _decode(value: Any, depth: int = 0) -> Any:
    if depth > _MAX_DEPTH:
        raise ValueError(f"values are nested deeper than {_MAX_DEPTH}")
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} must be written as a string")
        return value
    if isinstance(value, str):
        return _decode_text(value)
    if not isinstance(value, list):
        raise ValueError(f"an object cannot be an argument: {value!r}")
    kind = value[0] if value and value[0] in ("(", "slice") else ""
    items = [_decode(item, depth + 1) for item in (value[1:] if kind else value)]
    if kind == "slice":
        if len(items) != 3:
            raise ValueError(f"a slice takes (start, stop, step), found {len(items)} values")
        return slice(*items)
    return tuple(items) if kind else items


def _decode_text(value: str) -> Any:
    kind, rest = value[:1], value[1:]
    if kind == "%":
        return NodeRef(rest)
    if kind == "@":
        return TensorRef(rest)
    if kind == "'":
        return rest
    match = _CONSTANT.fullmatch(rest)
    if kind != "!" or not (match or rest in _SPECIAL):
        raise ValueError(f"cannot read the value {value!r}")
    return constant_value(match[1], match[2]) if match else _SPECIAL[rest]


def _list(value: object, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise ArtifactError(f"graph JSON: {key} must be an array")
    return value


@contextmanager
def _located(where: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ArtifactError(f"graph JSON: {where}: {error}") from error
