"""Captured language models against Hugging Face's own forward pass, family by family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, HIDDEN, LAYERS, VOCAB, tiny_model
from transformers import AutoModelForCausalLM

from liftc.capture import Captured, capture, capture_config
from liftc.opnames import op_name
from liftc.program import split_type

PROMPT, STEPS = 30, 20
CAPTURED: dict[str, Captured] = {}


@pytest.fixture(scope="module")
def captured(tiny_folder: Callable[..., Path]) -> Callable[[str], Captured]:
    def get(family: str) -> Captured:
        if family not in CAPTURED:
            CAPTURED[family] = capture(tiny_folder(family))
        return CAPTURED[family]

    return get


def token_ids(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode_match_huggingface(family: str, captured: Any, language_runner: Any) -> None:
    model, got = captured(family), []
    ids = token_ids(PROMPT + STEPS)
    with torch.no_grad():
        want = tiny_model(family)(ids).logits
    runner = language_runner(model.program, model.checkpoint, 64)
    got.append(runner.prefill(ids[:, :PROMPT]))
    for position in range(PROMPT, PROMPT + STEPS):
        got.append(runner.decode(int(ids[0, position]), position))
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=2e-5 * float(want.abs().max()))
    assert model.kind == "causal-lm"
    assert model.program.attrs["num_layers"] == LAYERS


def test_prefill_serves_any_length_and_any_choice_of_logits(captured: Any, language_runner: Any) -> None:
    model = captured("llama")
    ids = token_ids(12)
    with torch.no_grad():
        want = tiny_model("llama")(ids).logits
    for cache, cut in [(12, 1), (200, 5), (37, 11)]:
        runner = language_runner(model.program, model.checkpoint, cache)
        first = runner.prefill(ids[:, :cut], torch.tensor([cut - 1]))
        second = runner.prefill(ids[:, cut:], torch.arange(12 - cut).flip(0), start=cut)  # a later chunk
        torch.testing.assert_close(first, want[:, cut - 1 : cut], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(second, want[:, cut:].flip(1), rtol=1e-4, atol=1e-4)


def test_graphs_run_on_a_narrowed_view_of_a_longer_cache(captured: Any, language_runner: Any) -> None:
    model = captured("llama")
    ids = token_ids(9)
    runner = language_runner(model.program, model.checkpoint, 64)
    want = [runner.prefill(ids), runner.decode(5, 9)]
    whole = [torch.full_like(cache, 7.0) for cache in runner.caches]
    runner.caches = [cache.narrow(2, 0, 16) for cache in whole]
    got = [runner.prefill(ids), runner.decode(5, 9)]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert all((cache[:, :, 16:] == 7).all() and not (cache[:, :, :10] == 7).any() for cache in whole)


def test_graph_form(captured: Any) -> None:
    program = captured("llama").program
    graph = program.graphs["prefill"]
    inputs = {n.name: n.meta["type"] for n in graph.nodes if n.op == "placeholder"}
    assert list(inputs)[:4] == ["input_ids", "cache_position", "logit_positions", "k_cache_0"]
    assert list(inputs)[-1] == f"v_cache_{LAYERS - 1}"
    assert inputs["input_ids"] == "i64[1,t]" and inputs["logit_positions"] == "i64[n]"
    assert inputs["k_cache_1"] == inputs["v_cache_0"] == "f32[1,2,s,12]"
    linears = [n for n in graph.nodes if n.target is torch.ops.aten.linear.default]
    assert [n.meta["block"] for n in linears] == [0] * 7 + [1] * 7 + [-1]
    assert linears[6].meta["source"] == "model.layers.0.mlp.down_proj"
    assert linears[6].args[1].target == "model.layers.0.mlp.down_proj.weight"
    assert linears[6].args[1].meta["block"] == 0
    assert linears[6].meta["type"] == f"f32[1,t,{HIDDEN}]"
    assert linears[-1].meta["type"] == f"f32[1,n,{VOCAB}]"
    assert program.graphs["decode"].output_node().args[0].meta["type"] == f"f32[1,1,{VOCAB}]"
    sizes = [n for n in graph.nodes if n.target is torch.ops.aten.sym_size.int]
    assert {(n.args[0].name, n.args[1]) for n in sizes} == {("input_ids", 1), ("k_cache_0", 2)}
    queries = [linears[i].args[0] for i in (0, 1, 2)]
    assert queries[0] is queries[1] is queries[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_hold_only_plain_tensor_ops(family: str, captured: Any) -> None:
    model = captured(family)
    used = set()
    for graph in model.program.graphs.values():
        for node in graph.nodes:
            assert set(node.meta) == {"type", "block", "source"} or node.op == "output"
            if node.op == "call_function":
                assert not op_name(node.target).startswith("aten._assert")
                devices = [a for a in [*node.args, *node.kwargs.values()] if isinstance(a, torch.device)]
                assert all(device == torch.device("cpu") for device in devices)
                assert node.users or node.target._schema.is_mutable
            if node.op == "get_attr":
                used.add(node.target)
                spec = model.program.tensors[node.target]
                assert split_type(node.meta["type"]) == (spec.dtype, tuple(map(str, spec.shape)))
                assert model.checkpoint.spec(node.target) == spec
    assert used == set(model.program.tensors)


def test_in_place_cache_updates_feed_attention(captured: Any) -> None:
    for graph in captured("qwen3").program.graphs.values():
        attention = [
            n for n in graph.nodes if n.target is torch.ops.aten.scaled_dot_product_attention.default
        ]
        copies = [n for n in graph.nodes if n.target is torch.ops.aten.index_copy_.default]
        assert len(attention) == LAYERS and len(copies) == 2 * LAYERS
        assert all(copy.users for copy in copies)
        assert [copy.args[0].name for copy in copies[:2]] == ["k_cache_0", "v_cache_0"]


def test_decode_does_not_copy_the_cache(captured: Any) -> None:
    expanded = [
        n for n in captured("llama").program.graphs["decode"].nodes if ",s,12]" in n.meta.get("type", "")
    ]
    assert {n.op if n.op != "call_function" else str(n.target) for n in expanded} == {
        "placeholder",
        "aten.index_copy_.default",
    }


def test_sliding_layers_differ_from_full_ones(captured: Any) -> None:
    """Gemma 3 has two masks; softcapping sends Gemma 2 to eager attention without being told."""
    gemma = captured("gemma3").program
    masks = [
        n.args[3] for n in gemma.graphs["decode"].nodes
        if n.target is torch.ops.aten.scaled_dot_product_attention.default
    ]  # fmt: skip
    assert masks[0] is not masks[1]
    assert gemma.attrs["attention"] == "sdpa"
    assert captured("gemma2").program.attrs["attention"] == "eager"


def test_gpt2_keeps_transposed_weights_and_biases(captured: Any) -> None:
    program = captured("gpt2").program
    products = [n for n in program.graphs["decode"].nodes if n.target is torch.ops.aten.addmm.default]
    assert len(products) == 4 * LAYERS
    weight = products[0].args[2]
    assert program.tensors[weight.target].shape == (HIDDEN, 3 * HIDDEN)
    assert products[-1].meta["block"] == LAYERS - 1


def test_tied_head_is_one_tensor_with_an_alias(captured: Any) -> None:
    model = captured("llama-tied")
    assert "lm_head.weight" not in model.program.tensors
    assert model.checkpoint.spec("lm_head.weight") == model.checkpoint.spec("model.embed_tokens.weight")
    head = model.checkpoint.tensor("lm_head.weight")
    assert torch.equal(head, model.checkpoint.tensor("model.embed_tokens.weight"))
    linear = [n for n in model.program.graphs["decode"].nodes if n.target is torch.ops.aten.linear.default][
        -1
    ]
    assert linear.args[1].target == "model.embed_tokens.weight"


def test_rotary_frequencies_are_part_of_the_checkpoint(captured: Any) -> None:
    model = captured("llama-rope3")
    want = tiny_model("llama-rope3").model.rotary_emb.inv_freq
    assert torch.equal(model.checkpoint.tensor("model.rotary_emb.inv_freq"), want)
    assert model.program.tensors["model.rotary_emb.inv_freq"].dtype == "f32"


@pytest.mark.parametrize("family", ["llama-tied", "gemma3"])
def test_bf16_eager_generates_the_very_tokens(family: str, tiny_folder: Any, language_runner: Any) -> None:
    """Weights are float32 on disk; the override converts them on reading, as from_pretrained does."""
    folder, half = tiny_folder(family), torch.bfloat16
    model = capture(folder, attention="eager", dtype="bfloat16")
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=half, attn_implementation="eager")
    ids = token_ids(10)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    want = hf.generate(ids, **options)[0, 10:].tolist()
    runner = language_runner(model.program, model.checkpoint, 40)
    assert runner.greedy(ids, 12) == want
    with torch.no_grad():
        assert torch.equal(runner.prefill(ids), hf(ids).logits)
    name = "model.layers.0.mlp.up_proj.weight"
    assert model.program.tensors[name].dtype == model.checkpoint.spec(name).dtype == "bf16"
    weight = tiny_model(family).model.layers[0].mlp.up_proj.weight
    assert torch.equal(model.checkpoint.tensor(name), weight.to(half))
    assert all(spec.dtype == "f32" for name, spec in model.program.tensors.items() if "inv_freq" in name)


def test_config_alone_gives_the_same_program(captured: Any) -> None:
    model = captured("qwen2")
    bare = capture_config(model.config)
    for name, graph in model.program.graphs.items():
        assert str(bare.program.graphs[name]) == str(graph)
    assert bare.program.tensors == model.program.tensors
    assert list(bare.checkpoint.names()) == ["model.rotary_emb.inv_freq"]


def test_live_model_shares_its_weights(captured: Any) -> None:
    model = tiny_model("llama")
    live = capture(model)
    weight = live.checkpoint.tensor("model.layers.1.self_attn.o_proj.weight")
    assert weight.data_ptr() == model.model.layers[1].self_attn.o_proj.weight.data_ptr()
    assert live.kind == "causal-lm" and live.program.attrs["dtype"] == "f32"
    assert str(live.program.graphs["decode"]) == str(captured("llama").program.graphs["decode"])
