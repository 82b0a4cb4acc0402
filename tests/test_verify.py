"""The verifier: what it accepts, and for every rule a program it refuses with the rule's sentence."""

from __future__ import annotations

import broken_programs as broken
import pytest
from broken_programs import Break, change_linear, fold, set_kind, set_tensor
from sample_programs import BLOCK_TEXT, CONV1D_TEXT, block_program

from liftc.errors import VerifyError
from liftc.format import LiftFormat
from liftc.passes.base import PassPipeline
from liftc.passes.pipeline import after_quantize, before_quantize
from liftc.program import Program
from liftc.rules_tables import TABLE_RULES
from liftc.text import parse_program
from liftc.verify import NODE_RULES, verify


@pytest.fixture(scope="module")
def stages() -> dict[str, Program]:
    """The block program as captured, prepared, lowered, and at the end of the pipeline."""
    captured = block_program()
    prepared = PassPipeline(before_quantize(LiftFormat(77, 32))).apply(captured)
    passes = after_quantize(activation_scale=True)
    lowered = PassPipeline(passes[:1]).apply(prepared)
    final = PassPipeline(passes[1:]).apply(lowered)
    return {"captured": captured, "prepared": prepared, "lowered": lowered, "final": final}


def test_accepts_every_stage(stages: dict[str, Program]) -> None:
    for program in stages.values():
        verify(program)
    verify(parse_program(CONV1D_TEXT))
    verify(Program("empty"))


# rule -> (stage, what breaks it, details of the message)
CASES: dict[str, list[tuple[str, Break, str]]] = {
    "exactly one output ends a graph": [
        ("captured", broken.two_outputs, "found 2 outputs"),
        ("captured", broken.output_not_last, "found 1 outputs, the last node being act"),
    ],
    "a node is an input, a read of a tensor, a call or the output": [
        (
            "captured",
            broken.module_call,
            "expected one of placeholder, get_attr, call_function, output, found",
        ),
    ],
    "the name of a node is an identifier without meaning in Python, used once": [
        ("captured", broken.second_name, "found a second 'gate'"),
        ("captured", broken.odd_name, "found 'x; import os'"),
    ],
    "arguments are nodes of the same graph that come earlier": [
        ("captured", broken.use_before_definition, "found %scaled, which comes later"),
        ("captured", broken.use_of_another_graph, "found %gate, which comes later or from another graph"),
    ],
    "arguments are nodes, numbers, strings or constants of torch types": [
        ("captured", broken.odd_value, "found <object"),
    ],
    "metadata is a type (text), a block (number) and a source (text)": [
        ("captured", broken.odd_metadata, "found 'val': 'x'"),
        ("captured", broken.text_block, "found 'block': '0'"),
    ],
    "an input is called by its own name and has no default": [
        ("captured", broken.default_input, "found a default value"),
        ("captured", broken.renamed_input, "expected ids, found other"),
    ],
    "inputs come before all calls": [("captured", broken.late_input, "found 16 calls before it")],
    "a tensor that is read is declared in tensors or folded": [
        ("captured", broken.undeclared, "found 'lm_head.weight', which is in neither table"),
    ],
    "a read has the type of its tensor": [
        ("captured", broken.other_read_type, "expected f32[64], found f32[65]"),
    ],
    "only ops of the whitelist are called": [
        ("captured", broken.unknown_function, "builtins.print is not an op"),
        ("captured", broken.file_op, "aten.from_file.default is not on the list"),
    ],
    "arguments fit the schema of the op": [
        ("captured", broken.too_many, "expected at most 1 positional arguments, found 2"),
        ("captured", broken.too_few, "expected a value for 'weight', found none"),
        ("captured", broken.strange_keyword, "found 'approximate', which the op does not take"),
        ("lowered", broken.operator_keyword, "found keyword arguments"),
    ],
    "no device but cpu is named": [("captured", broken.cuda, "expected cpu, found cuda")],
    "x and the result must have the features of the weight": [
        ("captured", broken.narrow_weight, "expected 32, found f32[1,t,64]"),
    ],
    "left must be square, one row per left factor": [
        ("lowered", set_tensor("whitening.left.2", (2, 3)), "expected f32[t1,t1], found f32[2,3]"),
    ],
    "left times right must cover the features of x": [
        (
            "lowered",
            set_tensor("whitening.left.2", (1, 1)),
            "expected at most 1 * 32 features, found f32[1,t,64]",
        ),
    ],
    "activation_scale must have one entry per feature of x": [
        ("lowered", set_tensor("layers.0.attn.o.activation_scale", (32,)), "expected [64], found [32]"),
    ],
    "the type must be (i16[...,lifted_features], f32[...,1])": [
        (
            "lowered",
            set_kind("lift", "(i16[1,1,99], f32[1,1,1])"),
            "expected (i16[1,1,154], f32[1,1,1]), found",
        ),
    ],
    "z and z_scale must be results 0 and 1 of one lift": [
        ("lowered", broken.mixed_lifts, "found z_3 and z_scale"),
        ("lowered", broken.swapped_results, "found z_scale and z"),
    ],
    "packed shape must be [ceil(out/32), lifted_features]": [
        (
            "lowered",
            set_tensor("layers.0.attn.q.packed_weight", (2, 160), "i32"),
            "expected i32[2,154], found i32[2,160]",
        ),
        (
            "final",
            set_tensor("layers.0.attn.o.packed_weight", (2, 154), "i64"),
            "expected i32[2,154], found i64[2,154]",
        ),
    ],
    "lifted_features must keep sums inside 32 bits": [
        ("lowered", broken.wide_lift, "expected at most 131080, found 154000"),
    ],
    "the result must have one feature per entry of output_scale": [
        ("lowered", set_kind("sign_matmul", "f32[1,1,65]"), "expected 64, found 65"),
        ("final", set_tensor("layers.0.attn.o.output_scale", (63,)), "expected 63, found 64"),
    ],
    "packed must be the packed tensor of a linear or lift in the tables": [
        ("lowered", broken.foreign_packed, "found @free.packed_weight"),
    ],
    "right_inverse must be square and a multiple of d rows, mapping_matrix [d,D]": [
        ("lowered", set_tensor("mapping.77x32", (33, 77)), "found [32,32] and [33,77]"),
    ],
    "the type must be f32[t2, t2 / d D]": [
        ("lowered", set_kind("decode_right", "f32[32,78]"), "expected f32[32,77], found f32[32,78]"),
    ],
    "names of tensors, linears and lifts hold letters, digits and _ . + / - only": [
        ("captured", broken.rename_tensor, "found other characters"),
    ],
    "a tensor has a known dtype and a shape of whole numbers": [
        ("captured", broken.odd_dtype, "found f7[1]"),
        ("captured", broken.negative_shape, "found f32[-1]"),
    ],
    "attributes are text, numbers, True or False": [("captured", broken.list_attribute, "found list")],
    "a linear is listed under its own name": [("prepared", change_linear(name="other"), "found other")],
    "the weight of a linear has shape [out,in], or [in,out] when transposed": [
        ("prepared", change_linear(out_features=97), "expected [97, 64], found [96, 64]"),
        ("prepared", change_linear(transposed=True), "expected [64, 96], found [96, 64]"),
    ],
    "a linear and its lift agree in format and input features": [
        ("prepared", change_linear(lift="none"), "found no lift none"),
        ("prepared", change_linear(format=LiftFormat(3, 2)), "expected LQ-77/32 in=64, found LQ-3/2 in=64"),
    ],
    "a lift serves at least one linear": [("prepared", broken.idle_lift, "found none")],
    "a folded tensor is decode_right of two stored tensors [t2,t2] and [d,D], d dividing t2": [
        ("lowered", fold("lift", "q.bias"), "found op lift"),
        ("lowered", fold("decode_right", "whitening.right.32"), "found whitening.right.32 f32[32,32]"),
        (
            "lowered",
            fold("decode_right", "whitening.right.32", "mapping.77x32", name="q.bias"),
            "found a stored",
        ),
    ],
    "packed signs and output scales have the shape of the linears they stack": [
        ("final", broken.stack_ragged, "found layers.0.mlp.gate with rows to spare inside the stack"),
        ("final", change_linear(out_features=160), "expected i32[8,154], found i32[6,154]"),
    ],
    "a linear is computed once in every graph": [
        ("prepared", broken.uncomputed, "expected 1, found 0 in graph prefill"),
        ("prepared", broken.computed_twice, "expected 1, found 2 in graph decode"),
    ],
}


@pytest.mark.parametrize(
    ("sentence", "stage", "change", "details"),
    [(sentence, *case) for sentence, cases in CASES.items() for case in cases],
)
def test_refuses(stages: dict[str, Program], sentence: str, stage: str, change: Break, details: str) -> None:
    program = stages[stage].copy()
    change(program)
    with pytest.raises(VerifyError) as error:
        verify(program)
    assert str(error.value).startswith("verify: ")
    assert f": {sentence}: {details}" in str(error.value)
    verify(stages[stage])


def test_every_rule_has_a_case() -> None:
    rules = {rule.sentence for rule in NODE_RULES} | {rule.sentence for rule in TABLE_RULES}
    assert rules | {"exactly one output ends a graph"} == set(CASES)


def test_message_names_graph_op_and_node_and_stays_short(stages: dict[str, Program]) -> None:
    program = stages["captured"].copy()
    item = broken.node(program, "kv")
    item.args = ([broken.node(program, "k")] * 500, "x", 3)
    with pytest.raises(VerifyError) as error:
        verify(program)
    assert str(error.value).startswith("verify: graph decode: cat %kv: arguments fit the schema of the op: ")
    assert "; the node is %kv = aten.cat.default([%k, %k" in str(error.value)
    assert len(str(error.value)) < 700


def test_pipeline_names_the_pass(stages: dict[str, Program]) -> None:
    program = parse_program(BLOCK_TEXT.replace("tensor @layers.0.mlp.up.weight : f32[96,64]\n", ""))
    with pytest.raises(
        VerifyError, match=r"^the input of the passes is invalid: verify: graph prefill: get_attr"
    ):
        PassPipeline(before_quantize(LiftFormat(77, 32))).apply(program)
