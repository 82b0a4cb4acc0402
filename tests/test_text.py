"""Program text: what is printed parses back to the same program, and errors name the line."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from program_strategies import programs
from torch.fx import Graph

from liftc.compare import program_difference
from liftc.errors import ParseError
from liftc.program import Program
from liftc.spec import TensorSpec
from liftc.text import parse_program, print_program

EXAMPLE = """\
program "toy" {
  attr vocab_size = 64
  attr tied = True

  tensor @model.layers.0.q.weight : f32[8,8]

  lift @model.layers.0.q : LQ-3/2 in=8 left=4 right=2

  linear @l.q weight=@model.layers.0.q.weight out=8 in=8 block=0 lift=@model.layers.0.q format=LQ-3/2

  folded @folded = decode_right(@model.layers.0.q.weight, @model.layers.0.q.weight)

  graph forward(%x : f32[1,t,8]) {
    %linear = aten.linear.default(%x, @model.layers.0.q.weight, None) : f32[1,t,8]  # block 0 model.layers.0.q
    %sizes = aten.sym_size.int(%x, 1)
    %view = aten.view.default(%linear, [1, %sizes, 2, 4]) : f32[1,t,2,4]
    %clone = aten.clone.default(%view, memory_format=memory_format(contiguous_format)) : f32[1,t,2,4]
    %index = aten.index.Tensor(%clone, [None, %x])
    return (%clone, %index)
  }
}
"""


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(programs())
def test_parse_inverts_print(program: Program) -> None:
    text = print_program(program)
    parsed = parse_program(text)
    assert program_difference(program, parsed) is None
    assert print_program(parsed) == text


def test_example_survives_unchanged() -> None:
    assert print_program(parse_program(EXAMPLE)) == EXAMPLE


def test_comments_and_layout_do_not_matter() -> None:
    text = EXAMPLE.replace("\n\n", "\n# a remark\n").replace("%x : f32[1,t,8])", "\n %x : f32[1,t,8], \n)")
    text = text.replace("None]", "None ]  ")
    assert program_difference(parse_program(text), parse_program(EXAMPLE)) is None


def test_parsed_graph_runs() -> None:
    graph = parse_program(EXAMPLE).graphs["forward"]
    graph.output_node().args = (next(n for n in graph.nodes if n.name == "clone"),)
    graph.eliminate_dead_code()
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    for node in graph.nodes:
        if node.op == "get_attr":
            node.target = "weight"
    module = torch.fx.GraphModule({"weight": weight}, graph)
    x = torch.ones(1, 3, 8)
    assert torch.equal(module(x), (x @ weight.T).view(1, 3, 2, 4))


def test_get_attr_is_a_reference_wherever_it_stands() -> None:
    def build(early: bool) -> Program:
        graph = Graph()
        x = graph.placeholder("x")
        first = graph.create_node("get_attr", "w", name="early") if early else None
        y = graph.call_function(torch.ops.aten.mul.Tensor, (x, x))
        second = first or graph.create_node("get_attr", "w", name="late")
        graph.output(graph.call_function(torch.ops.aten.add.Tensor, (y, second)))
        return Program("p", {"forward": graph}, {"w": TensorSpec((2,), "f32")})

    assert program_difference(build(True), build(False)) is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('program "toy" {', 'module "toy" {', "line 1: expected 'program', found 'module"),
        ("attr tied = True", "attr tied = true", "line 3: expected a value, found 'true'"),
        ("attr tied = True", "attr tied = [1]", "line 3: attribute tied must be"),
        ("attr tied", "attr vocab_size", "line 3: attribute vocab_size is declared twice"),
        ("f32[8,8]", "f33[8,8]", "line 5: expected a type such as bf16[576,1536]"),
        ("f32[8,8]", "f32[8,t]", "line 5: expected a type such as bf16[576,1536]"),
        ("LQ-3/2 in", "LQ-1/2 in", "line 7: format LQ-1/2 does not exist"),
        ("left=4 right=2", "left=1 right=2", "line 7: lift: 1 x 2 does not cover 8 features"),
        ("left=4 right=2", "right=2", "line 7: expected 'left=', found 'right=2'"),
        ("out=8 in=8", "out=x in=8", "line 9: expected a number"),
        (
            "(%x, @model.layers.0.q.weight, None)",
            "(%y, @model.layers.0.q.weight)",
            "line 14: %y is not defined",
        ),
        (
            "%sizes = aten.sym_size.int(%x, 1)",
            "%linear = aten.sym_size.int(%x, 1)",
            "line 15: %linear is defined twice",
        ),
        ("aten.sym_size.int", "aten.from_file.default", "line 15: aten.from_file.default is not on the list"),
        ("aten.sym_size.int", "os.system", "line 15: 'os.system' is not the name of an op"),
        ("%sizes = aten", "%import = aten", "line 15: 'import' cannot be the name of a node"),
        ("[1, %sizes, 2, 4]", "[1, %sizes 2, 4]", "line 16: expected ',' or ']'"),
        ("[1, %sizes, 2, 4]", "(%sizes)", "line 16: a tuple of one value is written (value,)"),
        (
            "memory_format(contiguous_format)",
            "memory_format(weird)",
            "line 17: memory_format(weird) is not a constant",
        ),
        ("memory_format=memory", "x=1, memory", "line 17: expected a keyword argument"),
        ("return (%clone, %index)", "", "line 20: expected 'return'"),
        (
            "    return (%clone, %index)\n  }\n}\n",
            "    return (%clone,",
            "line 19: expected a value, found the end",
        ),
        ("  }\n}\n", "  }\n}\nmore", "line 22: expected the end of the text, found 'more'"),
    ],
)
def test_errors_name_the_line(old: str, new: str, message: str) -> None:
    assert old in EXAMPLE
    with pytest.raises(ParseError) as error:
        parse_program(EXAMPLE.replace(old, new, 1))
    assert str(error.value).startswith(message)


def test_deep_nesting_is_refused() -> None:
    text = EXAMPLE.replace("return (%clone, %index)", "return " + "[" * 5000)
    with pytest.raises(ParseError, match="line 19: values are nested deeper than 32"):
        parse_program(text)


def test_invalid_programs_can_be_printed_but_not_parsed() -> None:
    graph = Graph()
    graph.output(graph.call_function(print, (object,)))
    text = print_program(Program("p", {"forward": graph}))
    assert "= <built-in function print>(<<class 'object'>>)" in text
    with pytest.raises(ParseError, match="expected the name of an op"):
        parse_program(text)
