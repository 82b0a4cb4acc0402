"""Program text: print a Program for people to read, and parse what was printed.

    program "llama" {
      attr vocab_size = 49152
      tensor @model.norm.weight : bf16[576]
      lift @model.layers.0.mlp.down_proj : LQ-77/32 in=1536 left=16 right=96
      linear @model.layers.0.mlp.down_proj weight=@model.layers.0.mlp.down_proj.weight out=576 in=1536 ...
      folded @whitening.right.96.mapping.77x32 = decode_right(@whitening.right.96, @mapping.77x32)

      graph decode(%x : bf16[1,1,576]) {
        %add = aten.add.Tensor(%x, 1.0, alpha=2) : bf16[1,1,576]  # block 0 model.layers.0
        return %add
      }
    }

`@name` is a tensor of the program and stands for the get_attr node that reads it. `# block N source` after a
node is its metadata and is read back; every other comment is ignored. parse_program(print_program(p)) equals
p in the sense of liftc.compare.programs_equal.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from torch.fx import Graph, Node

from liftc.compare import node_facts
from liftc.opnames import op_name
from liftc.program import Program
from liftc.scanner import Scanner
from liftc.spec import LinearSpec
from liftc.text_parser import ProgramParser
from liftc.values import constant_text

_INLINE_INPUTS = 3


def print_program(program: Program) -> str:
    """The program as text, ending in a newline. Never fails, so that an invalid program can be looked at."""
    sections = [
        [f"  attr {key} = {value_text(value)}" for key, value in program.attrs.items()],
        [f"  tensor @{name} : {spec}" for name, spec in program.tensors.items()],
        [
            f"  lift @{name} : {s.format} in={s.in_features} left={s.left} right={s.right}"
            for name, s in program.lifts.items()
        ],
        [_linear_text(linear) for linear in program.linears.values()],
        [
            f"  folded @{name} = {op}({', '.join(f'@{operand}' for operand in operands)})"
            for name, (op, operands) in program.folded.items()
        ],
        *(list(_graph_lines(name, graph)) for name, graph in program.graphs.items()),
    ]
    body = "\n\n".join("\n".join(section) for section in sections if section)
    return f"program {json.dumps(program.name)} {{\n{body}\n}}\n"


def node_text(node: Node) -> str:
    """One node as a line of program text, without its location."""
    if node.op == "output":
        return f"return {value_text(node.args[0] if node.args else ())}"
    kind = f" : {node.meta['type']}" if node.meta.get("type") else ""
    if node.op == "placeholder":
        return f"%{node.name}{kind}"
    if node.op == "get_attr":
        return f"%{node.name} = @{node.target}{kind}"
    arguments = [value_text(value) for value in node.args]
    arguments += [f"{key}={value_text(value)}" for key, value in node.kwargs.items()]
    return f"%{node.name} = {_target_text(node)}({', '.join(arguments)}){kind}"


def value_text(value: Any) -> str:
    """An argument as text; values a program cannot hold are shown as <...>, which does not parse."""
    if isinstance(value, Node):
        return f"@{value.target}" if value.op == "get_attr" else f"%{value.name}"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(value_text, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, slice):
        return f"slice({', '.join(map(value_text, (value.start, value.stop, value.step)))})"
    if value is ...:
        return "..."
    return constant_text(value) or f"<{value!r}>"


def _target_text(node: Node) -> str:
    try:
        return op_name(node.target)
    except ValueError:
        return str(node.target)


def _linear_text(linear: LinearSpec) -> str:
    text = (
        f"  linear @{linear.name} weight=@{linear.weight} out={linear.out_features} in={linear.in_features} "
        f"block={linear.block}"
    )
    text += " transposed" if linear.transposed else ""
    text += f" lift=@{linear.lift}" if linear.lift else ""
    return text + (f" format={linear.format}" if linear.format else "")


def _graph_lines(name: str, graph: Graph) -> Iterator[str]:
    nodes = list(graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    if len(inputs) <= _INLINE_INPUTS and not any(map(_location_text, inputs)):
        yield f"  graph {name}({', '.join(map(node_text, inputs))}) {{"
    else:
        yield f"  graph {name}("
        yield from (f"    {node_text(node)},{_location_text(node)}" for node in inputs)
        yield "  ) {"
    for node in nodes:
        if node.op == "output":
            yield f"    {node_text(node)}"
        elif node.op not in ("placeholder", "get_attr"):
            yield f"    {node_text(node)}{_location_text(node)}"
    yield "  }"


def _location_text(node: Node) -> str:
    _, block, source = node_facts(node)
    if block == -1 and not source:
        return ""
    return f"  # block {block}{' ' if source else ''}{source}"


def parse_program(text: str) -> Program:
    """Inverse of print_program. Raises ParseError: the line number, what was expected and what was found."""
    return ProgramParser(Scanner(text)).program()
