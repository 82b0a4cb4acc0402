"""From a `torch.export` program to a plain graph of the Program form.

Weights become `get_attr` nodes named after checkpoint tensors, devices disappear (a factory op such as arange
keeps `device=cpu`, which a loader replaces), guards and no-ops are dropped, and every node gets its type with
readable symbols, its decoder block and its source module.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from liftc.errors import CaptureError
from liftc.opnames import op_name
from liftc.program import type_text
from liftc.safetensors_file import spec_of
from liftc.spec import DTYPE_NAMES, TensorSpec

_aten = torch.ops.aten
_CPU = torch.device("cpu")
_INT64_MAX = 2**63 - 1
_GUARDS = {
    "aten::_assert_tensor_metadata", "aten::_assert_scalar", "aten::_assert_async",
    "aten::sym_constrain_range", "aten::sym_constrain_range_for_size",
}  # fmt: skip
_IDENTITIES = {"aten::detach", "aten::detach_", "aten::alias", "aten::lift_fresh", "aten::lift_fresh_copy"}
_DROPOUTS = {"aten::dropout", "aten::feature_dropout", "aten::alpha_dropout"}
_CONVERSIONS = {_aten.to.dtype, _aten.to.device, _aten.to.dtype_layout, _aten.to.other}
_TENSOR_KINDS = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}


@dataclass
class LoweredGraph:
    """One graph, the tensors it reads, and those among them that are no weights (name -> value)."""

    graph: Graph
    tensors: dict[str, TensorSpec] = field(default_factory=dict)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Naming:
    """How names are made: `root` is the wrapper's prefix to strip, `blocks` the path of the block list.

    weights: module path of a parameter or persistent buffer -> checkpoint name (itself when absent).
    symbols: size symbol of the export -> readable name.
    constants: prefix of the names of unnamed constants.
    """

    root: str = ""
    blocks: str = ""
    weights: Mapping[str, str] = field(default_factory=dict)
    symbols: Mapping[sympy.Symbol, str] = field(default_factory=dict)
    constants: str = "constant"

    def module_path(self, path: str) -> str:
        """Path of a module or tensor in the captured model, without the wrapper's prefix."""
        return path.removeprefix(self.root).removeprefix(".")

    def place(self, node: Node) -> tuple[int, str]:
        """(decoder block or -1, path of the innermost module) of an exported node."""
        stack = [str(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values()]
        paths = [self.module_path(re.sub(r"@\d+$", "", path)) for path in stack if not path.startswith("_")]
        return max((self.block_of(path) for path in paths), default=-1), paths[-1] if paths else ""

    def block_of(self, path: str) -> int:
        """Decoder block that a module or tensor path lies in, -1 outside."""
        match = re.match(re.escape(self.blocks) + r"\.(\d+)(?:\.|$)", path) if self.blocks else None
        return int(match[1]) if match else -1


def lower_exported(exported: ExportedProgram, naming: Naming) -> LoweredGraph:
    """Rewrite an exported program as a Program graph; raises CaptureError for what the form cannot hold."""
    lowering = _Lowering(exported, naming)
    live = _live_nodes(exported.graph)
    for node in exported.graph.nodes:
        if node in live:
            lowering.visit(node)
    lowering.result.graph.lint()
    return lowering.result


def is_mutating(node: Node) -> bool:
    """Whether the node writes into one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _live_nodes(graph: Graph) -> set[Node]:
    """Inputs, outputs, nodes that write into their arguments, and everything those read."""
    live: set[Node] = set()
    for node in reversed(list(graph.nodes)):
        if node.op in ("output", "placeholder") or is_mutating(node) or node in live:
            live.add(node)
            live.update(node.all_input_nodes)
    return live


def _is_identity(node: Node) -> bool:
    """Whether the node returns its first argument unchanged (possibly as a copy)."""
    op, args = _schema_name(node), node.args
    if op in _DROPOUTS:
        return not args[2]
    if node.target is _aten.slice.Tensor:
        return tuple(args[2:4]) == (0, _INT64_MAX) and args[4:] in ((), (1,))
    if node.target in (_aten.mul.Tensor, _aten.add.Tensor) and not node.kwargs:
        neutral = 1 if node.target is _aten.mul.Tensor else 0
        first = args[0]
        same = isinstance(first, Node) and first.meta["val"].dtype == node.meta["val"].dtype
        exact = neutral == 1 or not node.meta["val"].dtype.is_floating_point  # -0.0 + 0 is +0.0
        return same and exact and isinstance(args[1], (int, float)) and args[1] == neutral
    return op in _IDENTITIES


def _schema_name(node: Node) -> str:
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""


@dataclass
class _Lowering:
    exported: ExportedProgram
    naming: Naming
    result: LoweredGraph = field(default_factory=lambda: LoweredGraph(Graph()))
    values: dict[Node, Any] = field(default_factory=dict)
    specs: dict[str, InputSpec] = field(default_factory=dict)
    sizes: dict[sympy.Expr, tuple[Node, int]] = field(default_factory=dict)
    pending: dict[Node, InputSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.specs = {spec.arg.name: spec for spec in self.exported.graph_signature.input_specs}

    def visit(self, node: Node) -> None:
        if node.op == "placeholder":
            self.visit_input(node)
        elif node.op == "call_function":
            self.visit_call(node)
        elif node.op == "output":
            outputs = [self.lookup(value) for value in node.args[0]]  # type: ignore[union-attr]
            self.result.graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
        elif node.op != "get_attr":
            raise CaptureError(f"the export holds a {node.op} node ({node.name}), which no graph may contain")

    def visit_input(self, node: Node) -> None:
        spec = self.specs[node.name]
        if spec.kind == InputKind.USER_INPUT:
            new = self.result.graph.placeholder(node.name)
            new.target = new.name  # torch.fx renames inputs such as `input` or `max`
            self.emit(node, new)
            for dim, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
                if isinstance(size, torch.SymInt):
                    self.sizes.setdefault(size.node.expr, (new, dim))
        elif spec.kind in _TENSOR_KINDS and spec.target is not None:
            self.pending[node] = spec
        else:
            raise CaptureError(f"the model takes an input of kind {spec.kind.name}, which is not supported")

    def read_tensor(self, node: Node, spec: InputSpec) -> None:
        """Create the get_attr node of a tensor, at its first use."""
        target = str(spec.target)
        path = self.naming.module_path(target)
        name = self.naming.weights.get(path, path)
        if target in self.exported.constants:
            constant = self.exported.constants[target]
            if not isinstance(constant, torch.Tensor) or isinstance(constant, FakeTensor) or constant.is_meta:
                raise CaptureError(f"the value of the constant {path} is not known at capture time")
            if spec.kind == InputKind.CONSTANT_TENSOR and path.startswith("lifted_tensor_"):
                name = f"{self.naming.constants}.{len(self.result.constants)}"
            self.result.constants[name] = constant.detach().clone()
        self.result.tensors[name] = spec_of(name, node.meta["val"])
        self.emit(node, self.result.graph.create_node("get_attr", name, name=re.sub(r"\W", "_", name)))
        owner = path.rpartition(".")[0]
        self.values[node].meta |= {"block": self.naming.block_of(owner), "source": owner}

    def visit_call(self, node: Node) -> None:
        target = node.target
        if _schema_name(node) in _GUARDS:
            return
        if isinstance(target, torch._ops.HigherOrderOperator):
            self.visit_region(node)
        elif _is_identity(node) and not any(is_mutating(user) for user in node.users):
            self.values[node] = self.lookup(node.args[0])
        elif target in _CONVERSIONS:
            self.visit_conversion(node)
        elif target is _aten.sym_size.int:
            self.visit_size(node)
        elif target is operator.getitem and isinstance(picked := self.lookup(node.args[0]), (tuple, list)):
            self.values[node] = picked[node.args[1]]  # type: ignore[index]
        else:
            try:
                op_name(target)
            except ValueError as error:
                raise CaptureError(f"the model cannot become a program: {error}") from error
            self.create(node, target, self.lookup(node.args), self.lookup(node.kwargs))

    def visit_size(self, node: Node) -> None:
        """Read a size from the first input that has it, so that no block depends on another block's cache."""
        size = node.meta["val"]
        first = self.sizes.get(size.node.expr) if isinstance(size, torch.SymInt) else None
        self.create(node, node.target, first or self.lookup(node.args), {})

    def visit_conversion(self, node: Node) -> None:
        """`x.to(...)` keeps its dtype change and loses its device."""
        source, wanted = node.args[0], node.meta["val"].dtype
        assert isinstance(source, Node)
        copies = node.kwargs.get("copy", False) or any(arg is True for arg in node.args[2:])
        if source.meta["val"].dtype != wanted:
            self.create(node, _aten.to.dtype, (self.lookup(source), wanted), {})
        elif copies:
            self.create(node, _aten.clone.default, (self.lookup(source),), {})
        else:
            self.values[node] = self.lookup(source)

    def visit_region(self, node: Node) -> None:
        """Inline a region that only switches gradients or autocast off."""
        name = _target_name(node.target)
        if name == "wrap_with_set_grad_enabled":
            body, inputs = node.args[1], node.args[2:]
        elif name == "wrap_with_autocast" and node.args[2] is False:
            body, inputs = node.args[4], node.args[5:]
        else:
            raise CaptureError(f"the model uses the higher-order op {name}, which no graph may contain")
        assert isinstance(body, Node)
        graph = self.exported.graph_module.get_submodule(str(body.target)).graph
        assert isinstance(graph, Graph)
        arguments = iter(inputs)
        for inner in graph.nodes:
            if inner.op == "placeholder":
                outer = next(arguments)
                self.values[inner] = self.lookup(outer)
            elif inner.op == "output":
                results = inner.args[0]
                self.values[node] = self.lookup(results)
            else:
                self.visit(inner)

    def lookup(self, value: Any) -> Any:
        """The new form of an argument: nodes mapped, devices made CPU, stray symbols refused."""
        return map_aggregate(value, self.lookup_one)

    def lookup_one(self, value: Any) -> Any:
        if isinstance(value, Node):
            if value in self.pending and value not in self.values:
                self.read_tensor(value, self.pending[value])
            if value not in self.values:
                raise CaptureError(f"the model uses {value.name}, which has no value in a graph")
            return self.values[value]
        if isinstance(value, torch.device):
            return _CPU
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise CaptureError(f"the export leaves the symbolic size {value} inside an argument")
        return value

    def create(self, old: Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.emit(old, self.result.graph.create_node("call_function", target, args, kwargs, old.name))

    def emit(self, old: Node, new: Node) -> None:
        block, source = self.naming.place(old) if old.op == "call_function" else (-1, "")
        new.meta = {"type": self.type_of(old.meta.get("val")), "block": block, "source": source}
        self.values[old] = new

    def type_of(self, value: object) -> str:
        if isinstance(value, torch.Tensor):
            if value.dtype not in DTYPE_NAMES:
                raise CaptureError(f"the model computes in {value.dtype}, which is not supported")
            sizes = ",".join(self.size_text(size) for size in value.shape)
            return f"{DTYPE_NAMES[value.dtype]}[{sizes}]"
        if isinstance(value, (tuple, list)) and value and all(isinstance(v, torch.Tensor) for v in value):
            return f"({', '.join(self.type_of(v) for v in value)})"
        return type_text(value)

    def size_text(self, size: int | torch.SymInt) -> str:
        if isinstance(size, int):
            return str(size)
        names = {symbol: sympy.Symbol(name, integer=True) for symbol, name in self.naming.symbols.items()}
        expression = size.node.expr.xreplace(names)
        if unknown := [symbol for symbol in expression.free_symbols if str(symbol).startswith("u")]:
            raise CaptureError(f"the model has a shape that depends on its data ({unknown[0]})")
        return str(expression).replace(" ", "")


def _target_name(target: object) -> str:
    return str(getattr(target, "__name__", target))
