"""Capture of any `nn.Module` through torch.export, with torch.fx.symbolic_trace as the second attempt."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from liftc.capture_export import export_quietly
from liftc.capture_graph import Naming, lower_exported
from liftc.checkpoint import Checkpoint, OverlayCheckpoint, StateDictCheckpoint
from liftc.errors import CaptureError
from liftc.program import Attribute, Program


def capture_module(
    module: nn.Module, example_inputs: Sequence[Any], dynamic_shapes: Any = None
) -> tuple[Program, Checkpoint]:
    """Graph "forward" of a module in evaluation mode, and its live weights (not copied).

    Inputs and outputs are flattened in pytree order. Raises CaptureError with both reasons when neither
    torch.export nor torch.fx can follow the module.
    """
    name = type(module).__name__
    if not isinstance(example_inputs, (tuple, list)):
        raise CaptureError(f"{name}: example_inputs must be a tuple, got {type(example_inputs).__name__}")
    inputs = tuple(example_inputs)
    with _evaluation_mode(module):
        exported = _export(module, inputs, dynamic_shapes)
    blocks = find_blocks(module)
    symbols = _symbol_names(module, exported, inputs, dynamic_shapes)
    lowered = lower_exported(exported, Naming("", blocks, {}, symbols, "constant.forward"))
    attrs: dict[str, Attribute] = {
        "architecture": name,
        "kind": "module",
        "route": "graph",
        "blocks": blocks,
        "num_layers": len(list(module.get_submodule(blocks).children())) if blocks else 0,
    }
    program = Program(
        name, {"forward": lowered.graph}, tensors=dict(sorted(lowered.tensors.items())), attrs=attrs
    )
    return program, OverlayCheckpoint(StateDictCheckpoint(module), lowered.constants)


def find_blocks(module: nn.Module) -> str:
    """Path of the repeated blocks: the outermost list of equal modules with most weights; "" without one."""
    best, most = "", 0
    for name, container in module.named_modules():
        if isinstance(container, (nn.ModuleList, nn.Sequential)):
            kinds = {type(child) for child in container.children()}
            size = sum(parameter.numel() for parameter in container.parameters())
            if len(kinds) == 1 and size > most:
                best, most = name, size
    return best


def first_line(error: BaseException) -> str:
    """First line of an exception's message, for one-sentence errors; torch's advice on logging is cut off."""
    lines = str(error).strip().splitlines()
    return lines[0].partition(" For more information")[0].rstrip(".! ") if lines else type(error).__name__


def _export(module: nn.Module, inputs: tuple[Any, ...], dynamic_shapes: Any) -> ExportedProgram:
    try:
        return export_quietly(module, inputs, dynamic_shapes)
    except Exception as error:
        reason = first_line(error)
    try:
        return export_quietly(torch.fx.symbolic_trace(module), inputs, dynamic_shapes)
    except Exception as error:
        raise CaptureError(
            f"{type(module).__name__} cannot be captured: torch.export says {reason!r}, "
            f"torch.fx says {first_line(error)!r}"
        ) from error


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _symbol_names(
    module: nn.Module, exported: ExportedProgram, inputs: tuple[Any, ...], dynamic_shapes: Any
) -> dict[Any, str]:
    """Size symbol -> the name of its Dim, for the dims that dynamic_shapes names."""
    if dynamic_shapes is None:
        return {}
    names = list(inspect.signature(module.forward).parameters)
    given = dict(zip(names, inputs))
    shapes = dynamic_shapes if isinstance(dynamic_shapes, Mapping) else dict(zip(names, dynamic_shapes))
    dims = [dim for name, value in given.items() for dim in _walk(value, shapes.get(name))]
    user = set(exported.graph_signature.user_inputs)
    values = [
        node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder" and node.name in user
    ]
    symbols: dict[Any, str] = {}
    for value, named in zip(values, dims):
        for index, dim in named.items():
            label = dim if isinstance(dim, str) else getattr(dim, "__name__", None)
            if isinstance(label, str) and isinstance(value.shape[index], torch.SymInt):
                expression = value.shape[index].node.expr
                if expression.is_Symbol:
                    symbols.setdefault(expression, label)
    return symbols


def _walk(value: Any, shapes: Any) -> Iterator[dict[int, Any]]:
    """One dict {dimension: Dim} per leaf of an input, in pytree order."""
    if isinstance(value, torch.Tensor):
        pairs = shapes.items() if isinstance(shapes, Mapping) else enumerate(shapes or ())
        yield {index: dim for index, dim in pairs if dim is not None}
    elif isinstance(value, Mapping):
        for key in value:
            yield from _walk(value[key], shapes.get(key) if isinstance(shapes, Mapping) else None)
    elif isinstance(value, (list, tuple)):
        parts = shapes if isinstance(shapes, (list, tuple)) else [None] * len(value)
        for item, part in zip(value, parts):
            yield from _walk(item, part)
    else:
        yield {}
