"""The whole pipeline on an exported model of two blocks: prefill, decode and decoded weights agree."""

from __future__ import annotations

import json

import pytest
import torch
from sample_programs import random_tensors, run_graph, stacked_tensors
from tiny_llama import VOCAB, TinyLlama, new_caches, tiny_llama

from liftc import reference
from liftc.compare import graph_difference, program_difference
from liftc.format import LiftFormat
from liftc.graphjson import graph_from_json, graph_to_json
from liftc.passes.base import PassPipeline
from liftc.passes.pipeline import after_quantize, before_quantize
from liftc.program import Program, copy_graph
from liftc.tensor_names import transform_names
from liftc.text import parse_program, print_program

Model = tuple[Program, dict[str, torch.Tensor]]
Pair = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
TOKENS = torch.tensor([[5, 17, 3, 88, 41, 2, 60]])


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_llama()


@pytest.fixture(scope="module")
def prepared(model: Model) -> Program:
    return PassPipeline(before_quantize(LiftFormat(77, 32))).apply(model[0])


@pytest.fixture(scope="module")
def lowered(prepared: Program) -> Program:
    return PassPipeline(after_quantize()).apply(prepared)


@pytest.fixture(scope="module")
def packed(model: Model, prepared: Program, lowered: Program) -> Pair:
    """(dense weights decoded from random signs, the same as tensors of the lowered program)."""
    one_by_one = PassPipeline(after_quantize()[:1]).apply(prepared)
    tensors = random_tensors(one_by_one, seed=11)
    dense = dict(model[1])
    tensors = {**tensors, **{name: dense[name] for name in one_by_one.tensors if name in dense}}
    for name, linear in lowered.linears.items():
        spec = lowered.lifts[linear.lift]
        names = transform_names(linear.lift, spec)
        scale = tensors[f"{name}.output_scale"] / 16
        tensors[f"{name}.output_scale"] = scale
        right = reference.decode_right(tensors[names.right], tensors[names.mapping])
        signs = tensors[f"{name}.packed_weight"]
        dense[linear.weight] = reference.decode_weight(
            signs, scale, None, tensors[names.left], right, spec.in_features
        )
    return dense, stacked_tensors(lowered, tensors)


def prefill(program: Program, tensors: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = run_graph(
        program, "prefill", tensors, tokens, torch.arange(tokens.shape[1]), *new_caches()
    )
    return result


def decode(program: Program, tensors: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    caches = new_caches()
    steps = [
        run_graph(program, "decode", tensors, tokens[:, i : i + 1], torch.tensor([i]), *caches)
        for i in range(tokens.shape[1])
    ]
    return torch.cat(steps, 1)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 2e-3 * b.abs().max())


def test_export_is_faithful(model: Model) -> None:
    module = TinyLlama().eval()
    with torch.no_grad():
        expected = module(TOKENS, torch.arange(TOKENS.shape[1]), *new_caches())
    assert torch.allclose(prefill(*model, TOKENS), expected, atol=1e-5)


def test_preparing_changes_no_result(model: Model, prepared: Program) -> None:
    assert torch.equal(prefill(prepared, model[1], TOKENS), prefill(*model, TOKENS))
    ops = {str(node.target) for node in prepared.graphs["prefill"].nodes}
    assert "aten.dropout.default" not in ops


def test_tables(lowered: Program) -> None:
    assert len(lowered.linears) == 14
    assert list(lowered.lifts)[:4] == [
        "layers.0.q_proj+k_proj+v_proj", "layers.0.o_proj", "layers.0.gate_proj+up_proj", "layers.0.down_proj",
    ]  # fmt: skip
    assert [linear.block for linear in lowered.linears.values()] == [0] * 7 + [1] * 7


def test_lowered_graphs_compute_what_the_decoded_weights_do(
    model: Model, lowered: Program, packed: Pair
) -> None:
    dense, tensors = packed
    expected = prefill(model[0], dense, TOKENS)
    assert expected.shape == (1, TOKENS.shape[1], VOCAB)
    assert close(prefill(lowered, tensors, TOKENS), expected)
    assert close(decode(lowered, tensors, TOKENS), expected)


def test_prefill_then_decode_share_the_cache(lowered: Program, packed: Pair) -> None:
    tensors = packed[1]
    caches = new_caches()
    run_graph(lowered, "prefill", tensors, TOKENS[:, :4], torch.arange(4), *caches)
    step = run_graph(lowered, "decode", tensors, TOKENS[:, 4:5], torch.tensor([4]), *caches)
    assert close(step, prefill(lowered, tensors, TOKENS[:, :5])[:, 4:])


def test_text_and_json_keep_the_programs(model: Model, lowered: Program) -> None:
    for program in (model[0], lowered):
        assert program_difference(parse_program(print_program(program)), program) is None
        for graph in program.graphs.values():
            loaded = graph_from_json(json.loads(json.dumps(graph_to_json(graph))))
            bare = copy_graph(graph)
            for node in bare.nodes:
                node.meta = {"type": node.meta.get("type", "")} if node.op == "placeholder" else {}
            assert graph_difference(loaded, bare) is None


def test_bfloat16(model: Model) -> None:
    program, tensors = tiny_llama(torch.bfloat16)
    lowered = PassPipeline([*before_quantize(LiftFormat(64, 32)), *after_quantize()]).apply(program)
    random = random_tensors(lowered)
    values = {n: tensors.get(n, t / 16 if n.endswith("output_scale") else t) for n, t in random.items()}
    caches = new_caches(torch.bfloat16)
    logits = run_graph(lowered, "prefill", values, TOKENS, torch.arange(TOKENS.shape[1]), *caches)
    assert logits.dtype == torch.bfloat16 and bool(torch.isfinite(logits).all())
