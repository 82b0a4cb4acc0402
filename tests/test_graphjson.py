"""Graph JSON: an exact round trip for any graph, and nothing but whitelisted data gets in."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from program_strategies import graphs
from torch.fx import Graph, GraphModule

from liftc.compare import graph_difference
from liftc.errors import ArtifactError
from liftc.graphjson import graph_from_json, graph_to_json
from liftc.opnames import ALLOWED_ATEN, op_name, op_target
from liftc.program import copy_graph


def without_metadata(graph: Graph) -> Graph:
    result = copy_graph(graph)
    for node in result.nodes:
        keep = {"type": node.meta.get("type", "")} if node.op == "placeholder" else {}
        node.meta = keep
    return result


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(graphs(["w", "model.layers.0.q+k.packed_weight"]))
def test_round_trip(graph: Graph) -> None:
    text = json.dumps(graph_to_json(graph), allow_nan=False)
    loaded = graph_from_json(json.loads(text))
    assert graph_difference(without_metadata(graph), loaded) is None
    assert json.dumps(graph_to_json(loaded)) == text


def small() -> Graph:
    graph = Graph()
    x = graph.placeholder("x")
    x.meta = {"type": "f32[2,t]", "block": 3, "source": "here"}
    w = graph.create_node("get_attr", "a.weight", name="w")
    y = graph.call_function(torch.ops.aten.linear.default, (x, w))
    z = graph.call_function(torch.ops.aten.arange.default, (3,), {"device": torch.device("cpu")})
    s = graph.call_function(torch.ops.aten.gelu.default, (y,), {"approximate": "tanh"})
    graph.output((s, [z, None, float("-inf"), 1.0, 1, slice(None, 2, None)]))
    return graph


def test_form_is_as_documented() -> None:
    assert graph_to_json(small()) == {
        "version": 1,
        "inputs": [["x", "f32[2,t]"]],
        "ops": ["aten.linear.default", "aten.arange.default", "aten.gelu.default"],
        "nodes": [
            ["linear_default", 0, ["%x", "@a.weight"]],
            ["arange_default", 1, [3], {"device": "!device(cpu)"}],
            ["gelu_default", 2, ["%linear_default"], {"approximate": "'tanh"}],
        ],
        "output": [
            "(",
            "%gelu_default",
            ["%arange_default", None, "!-inf", 1.0, 1, ["slice", None, 2, None]],
        ],
    }


def test_loaded_graph_runs() -> None:
    graph = small()
    graph.output_node().args = (graph.output_node().args[0][0],)  # type: ignore[index]
    graph.eliminate_dead_code()
    loaded = graph_from_json(graph_to_json(graph))
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    for node in loaded.nodes:
        if node.op == "get_attr":
            node.target = "weight"
    x = torch.ones(2, 3)
    expected = torch.nn.functional.gelu(x @ weight.T, approximate="tanh")
    assert torch.allclose(GraphModule({"weight": weight}, loaded)(x), expected)


def _set(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    result = copy.deepcopy(data)
    at = result
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return result


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 2, "version 2 is not 1"),
        (("version",), True, "version True is not 1"),
        (("extra",), 1, "exactly the keys"),
        (("inputs",), {}, "inputs must be an array"),
        (("inputs", 0), ["x"], r"inputs\[0\] must be \[name, type\]"),
        (("inputs", 0), ["x = 1; evil", ""], r"inputs\[0\]: 'x = 1; evil' cannot be the name of a node"),
        (("inputs", 0), ["__import__", ""], "cannot be the name of a node"),
        (("ops", 0), 7, r"ops\[0\] must be a string"),
        (
            ("ops", 0),
            "aten.from_file.default",
            r"nodes\[0\] \('linear_default'\): aten.from_file.default is not on",
        ),
        (("ops", 0), "aten.save.default", "is not on the list"),
        (("ops", 0), "aten.add.str", "is not on the list"),
        (("ops", 0), "aten.add.__class__", "is not on the list"),
        (("ops", 0), "os.system", "is not the name of an op"),
        (("ops", 0), "builtins.eval", "is not the name of an op"),
        (("ops", 0), "operator.attrgetter", "is not the name of an op"),
        (("nodes", 0), "text", r"nodes\[0\]: must be \[name, op"),
        (("nodes", 0, 0), "x\n", "cannot be the name of a node"),
        (("nodes", 0, 0), "x", "%x is defined twice"),
        (("nodes", 0, 0), 5, "name must be a string"),
        (("nodes", 0, 1), 3, "op 3 is not an index into the 3 ops"),
        (("nodes", 0, 1), -1, "op -1 is not an index"),
        (("nodes", 0, 1), True, "op True is not an index"),
        (("nodes", 0, 2), {}, "arguments an array"),
        (("nodes", 0, 2, 0), "%later", "%later is not defined before it is used"),
        (("nodes", 0, 2, 0), "%gelu_default", "%gelu_default is not defined before it is used"),
        (("nodes", 0, 2, 1), '@a"); import os; ("', "cannot be the name of a tensor"),
        (("nodes", 0, 2, 1), "plain", "cannot read the value 'plain'"),
        (("nodes", 0, 2, 1), "", "cannot read the value ''"),
        (("nodes", 0, 2, 1), "!dtype(object)", r"dtype\(object\) is not a constant"),
        (("nodes", 0, 2, 1), "!device(a:b)", "cannot be|is not a constant"),
        (("nodes", 0, 2, 1), {"a": 1}, "an object cannot be an argument"),
        (("nodes", 0, 2, 1), float("nan"), "nan must be written as a string"),
        (("nodes", 0, 2, 1), ["slice", 1], "a slice takes"),
        (("nodes", 2, 3), ["approximate"], "keyword arguments an object"),
        (("nodes", 2, 3), {"a=b, c": 1}, "impossible name 'a=b, c'"),
        (("nodes", 2, 3), {"lambda": 1}, "impossible name 'lambda'"),
        (("output",), "%nothing", "output: %nothing is not defined"),
    ],
)
def test_refuses(path: tuple[Any, ...], value: Any, message: str) -> None:
    data = _set(graph_to_json(small()), path, value)
    with pytest.raises(ArtifactError, match=f"^graph JSON: .*{message}"):
        graph_from_json(data)


@pytest.mark.parametrize("data", [None, 1, "x", [], {}, {"version": 1}])
def test_refuses_other_data(data: object) -> None:
    with pytest.raises(ArtifactError, match="expected an object with exactly the keys"):
        graph_from_json(data)


def test_refuses_deep_nesting() -> None:
    deep: list[Any] = []
    for _ in range(40):
        deep = [deep]
    with pytest.raises(ArtifactError, match="output: values are nested deeper than 32"):
        graph_from_json(_set(graph_to_json(small()), ("output",), deep))


@pytest.mark.parametrize("value", [object(), {"a": 1}, 1j, torch.ones(1), b"x"])
def test_writer_refuses_values_a_program_cannot_hold(value: Any) -> None:
    graph = Graph()
    node = graph.call_function(torch.ops.aten.relu.default, (1,))
    graph.output(node)
    node._args = (value,)
    with pytest.raises(ArtifactError, match=r"node %relu_default: .* is not a value that a program may hold"):
        graph_to_json(graph)


def test_writer_refuses_unknown_functions() -> None:
    graph = Graph()
    graph.output(graph.call_function(print, ()))
    with pytest.raises(ArtifactError, match="print is not an op that a program may call"):
        graph_to_json(graph)


def test_every_allowed_op_exists_and_has_a_name() -> None:
    for base in sorted(ALLOWED_ATEN):
        packet = getattr(torch.ops.aten, base)
        allowed = 0
        for overload in packet.overloads():
            try:
                target = op_target(f"aten.{base}.{overload}")
            except ValueError:
                continue
            assert op_name(target) == f"aten.{base}.{overload}"
            allowed += 1
        assert allowed, base


def test_allowed_ops_take_no_storage_stream_or_free_text() -> None:
    harmless = (
        "approximate assert_msg equation indexing mode norm ord pad_mode padding reduce rounding_mode side"
    ).split()
    for base in sorted(ALLOWED_ATEN):
        packet = getattr(torch.ops.aten, base)
        for overload in packet.overloads():
            try:
                target: Any = op_target(f"aten.{base}.{overload}")
            except ValueError:
                continue
            for argument in target._schema.arguments:
                kind = str(argument.type)
                assert not any(word in kind for word in ("Storage", "Stream", "Any", "Dict", "__torch__")), (
                    target
                )
                assert "str" not in kind or argument.name in harmless, (str(target), argument.name)


@pytest.mark.parametrize("base", ["copy_", "index_copy_", "add_", "masked_fill_", "zero_"])
def test_in_place_forms_come_with_their_op(base: str) -> None:
    packet = getattr(torch.ops.aten, base)
    assert op_target(f"aten.{base}.{packet.overloads()[0]}")


@pytest.mark.parametrize("base", ["set_", "resize_", "set_data", "_index_put_impl_", "from_file", "_print"])
def test_ops_off_the_list_are_refused(base: str) -> None:
    with pytest.raises(ValueError, match="is not on the list"):
        op_target(f"aten.{base}.default")


def test_size_of_a_large_graph() -> None:
    graph = Graph()
    x = graph.placeholder("input_ids")
    for block in range(100):
        name = f"model.layers.{block}.self_attn.q_proj.weight"
        w = graph.create_node("get_attr", name, name=f"attr_{block}")
        y = graph.call_function(torch.ops.aten.linear.default, (x, w))
        for shape in ([1, -1, 9, 64], [1, -1, 576]):
            y = graph.call_function(torch.ops.aten.view.default, (y, shape))
        for _ in range(8):
            y = graph.call_function(torch.ops.aten.mul.Tensor, (y, x))
        x = y
    graph.output(x)
    data = json.dumps(graph_to_json(graph), separators=(",", ":"))
    assert len(data) < 100_000, "1100 nodes"
    assert graph_difference(graph_from_json(json.loads(data)), graph) is None
