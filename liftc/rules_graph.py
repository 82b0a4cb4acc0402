"""Rules every graph obeys: order, names, whitelisted ops, arguments that fit, no device but the CPU."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.fx import Node

from liftc.opnames import op_name
from liftc.program import META_KEYS
from liftc.rules import Context, NodeRule, mismatch
from liftc.values import constant_text, is_node_name

_CPU = torch.device("cpu")


def _constants(node: Node) -> list[Any]:
    """Everything inside the arguments of a node, however nested, that is no node, number or None."""
    found: list[Any] = []
    waiting: list[Any] = [*node.args, *node.kwargs.values()]
    while waiting:
        value = waiting.pop()
        if value is None or isinstance(value, (Node, int, float)):
            continue
        if isinstance(value, (list, tuple)):
            waiting.extend(value)
        elif isinstance(value, slice):
            waiting.extend((value.start, value.stop, value.step))
        else:
            found.append(value)
    return found


def _known_opcode(context: Context, node: Node) -> str | None:
    known = ("placeholder", "get_attr", "call_function", "output")
    return None if node.op in known else f"expected one of {', '.join(known)}, found {node.op}"


def _name(context: Context, node: Node) -> str | None:
    if node.name in context.names:
        return f"found a second {node.name!r}"
    return None if is_node_name(node.name) or node.op == "output" else f"found {node.name!r}"


def _earlier(context: Context, node: Node) -> str | None:
    late = [other.name for other in node.all_input_nodes if other not in context.seen]
    return f"found %{late[0]}, which comes later or from another graph" if late else None


def _values(context: Context, node: Node) -> str | None:
    for value in _constants(node):
        if value is not ... and not isinstance(value, str) and constant_text(value) is None:
            return f"found {value!r} of type {type(value).__name__}"
    return None


def _metadata(context: Context, node: Node) -> str | None:
    for key, value in node.meta.items():
        kind = int if key == "block" else str
        if key not in META_KEYS or type(value) is not kind:
            return f"found {key!r}: {value!r}"
    return None


def _input(context: Context, node: Node) -> str | None:
    if node.args or node.kwargs:
        return "found a default value"
    return mismatch(node.name, node.target)


def _inputs_first(context: Context, node: Node) -> str | None:
    return f"found {context.calls} calls before it" if context.calls else None


def _declared(context: Context, node: Node) -> str | None:
    known = node.target in context.program.tensors or node.target in context.program.folded
    return None if known else f"found {node.target!r}, which is in neither table"


def _read_type(context: Context, node: Node) -> str | None:
    spec = context.tensor(str(node.target))
    return mismatch(str(spec), node.meta["type"]) if spec and node.meta.get("type") else None


def _allowed(context: Context, node: Node) -> str | None:
    try:
        op_name(node.target)
    except ValueError as error:
        return str(error)
    return None


def _schema(context: Context, node: Node) -> str | None:
    if not isinstance(node.target, torch._ops.OpOverload):
        return "found keyword arguments" if node.kwargs else None
    positional, names, required = _arguments(node.target)
    if len(node.args) > len(positional):
        return f"expected at most {len(positional)} positional arguments, found {len(node.args)}"
    given = {*positional[: len(node.args)], *node.kwargs}
    strange = [key for key in node.kwargs if key not in names or key in positional[: len(node.args)]]
    if strange:
        return f"found {strange[0]!r}, which the op does not take or has already"
    missing = [name for name in required if name not in given]
    return f"expected a value for {missing[0]!r}, found none" if missing else None


@lru_cache(maxsize=1024)
def _arguments(op: torch._ops.OpOverload) -> tuple[tuple[str, ...], frozenset[str], tuple[str, ...]]:
    arguments = op._schema.arguments
    return (
        tuple(a.name for a in arguments if not a.kwarg_only),
        frozenset(a.name for a in arguments),
        tuple(a.name for a in arguments if not a.has_default_value()),
    )


def _devices(context: Context, node: Node) -> str | None:
    for value in _constants(node):
        if isinstance(value, torch.device) and value != _CPU:
            return mismatch("cpu", value)
    return None


GRAPH_RULES = (
    NodeRule(("*",), "a node is an input, a read of a tensor, a call or the output", _known_opcode),
    NodeRule(("*",), "the name of a node is an identifier without meaning in Python, used once", _name),
    NodeRule(("*",), "arguments are nodes of the same graph that come earlier", _earlier),
    NodeRule(("*",), "arguments are nodes, numbers, strings or constants of torch types", _values),
    NodeRule(("*",), "metadata is a type (text), a block (number) and a source (text)", _metadata),
    NodeRule(("placeholder",), "an input is called by its own name and has no default", _input),
    NodeRule(("placeholder",), "inputs come before all calls", _inputs_first),
    NodeRule(("get_attr",), "a tensor that is read is declared in tensors or folded", _declared),
    NodeRule(("get_attr",), "a read has the type of its tensor", _read_type),
    NodeRule(("call_function",), "only ops of the whitelist are called", _allowed),
    NodeRule(("call_function",), "arguments fit the schema of the op", _schema),
    NodeRule(("call_function",), "no device but cpu is named", _devices),
)
