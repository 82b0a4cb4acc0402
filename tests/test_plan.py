"""The byte plan: categories, exact totals, and a JSON form that does not believe what it reads."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from sample_programs import BLOCK_TEXT, random_tensors

from liftc.errors import ArtifactError
from liftc.format import LiftFormat
from liftc.passes.base import PassPipeline
from liftc.passes.pipeline import after_quantize, before_quantize
from liftc.plan import CATEGORIES, Plan, plan_program
from liftc.program import Program
from liftc.text import parse_program


@pytest.fixture(scope="module")
def program() -> Program:
    passes = [*before_quantize(LiftFormat(77, 32)), *after_quantize(activation_scale=True)]
    return PassPipeline(passes).apply(parse_program(BLOCK_TEXT))


def test_every_tensor_is_planned_with_its_bytes(program: Program) -> None:
    plan = plan_program(program)
    assert [entry.name for entry in plan.entries] == list(program.tensors)
    tensors = random_tensors(program)
    for entry in plan.entries:
        value = tensors[entry.name]
        assert entry.nbytes == value.numel() * value.element_size()
    assert plan.total == sum(t.numel() * t.element_size() for t in tensors.values())
    assert program.attrs["plan.bytes"] == plan.total
    assert program.attrs["plan.bits_per_weight"] == plan.bits_per_weight


def test_categories_and_bits_per_weight(program: Program) -> None:
    plan = plan_program(program)
    weights = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 96 * 64
    assert plan.weights == weights
    signs = 4 * (4 * 154 + 2 * 154 + 6 * 154 + 2 * 231)
    output_scale = 2 * (128 + 64 + 192 + 64)
    transform = 4 * (2 * 2 + 3 * 3 + 32 * 32) + 2 * (64 + 64 + 64 + 96)
    mapping = 4 * 32 * 77
    assert plan.bytes_by_category() == {
        "signs": signs, "output_scale": output_scale, "transform": transform, "mapping": mapping,
        "embedding": 4 * 128 * 64, "head": 4 * 128 * 64, "norm": 4 * 64, "bias": 4 * 64, "other": 0,
    }  # fmt: skip
    assert plan.bits_per_weight == 8 * (signs + output_scale + transform + mapping) / weights
    assert plan.computed_at_load == 4 * 32 * 77
    order = [CATEGORIES.index(entry.category) for entry in plan.entries]
    assert order == sorted(order)


def test_programs_that_are_not_lowered_have_no_bits_per_weight() -> None:
    plan = plan_program(parse_program(BLOCK_TEXT))
    assert plan.bits_per_weight == 0.0
    assert plan.bytes_by_category()["other"] == 4 * (64 * 64 * 2 + 32 * 64 * 2 + 96 * 64 * 3)


@pytest.mark.parametrize(
    ("line", "category"),
    [
        ("%y = aten.layer_norm.default(%x, [8], @w, None)", "norm"),
        ("%y = aten.layer_norm.default(%x, [8], None, @w)", "norm"),
        ("%c = aten.to.dtype(@w, dtype(f32)) : f32[8]\n%o = aten.add.Tensor(%c, 1.0) : f32[8]\n"
         "%r = aten.rsqrt.default(%x)\n%n = aten.mul.Tensor(%x, %r)\n%y = aten.mul.Tensor(%n, %o)", "norm"),
        ("%r = aten.sqrt.default(%x)\n%n = aten.div.Tensor(%x, %r)\n%c = aten.to.dtype(%n, dtype(f32))\n"
         "%y = aten.mul.Tensor(@w, %c)", "norm"),
        ("%y = aten.add.Tensor(%x, @w)", "bias"),
        ("%y = aten.addmm.default(@w, %x, @m)", "bias"),
        ("%y = aten.linear.default(%x, @m, @w)", "bias"),
        ("%y = aten.embedding.default(@w, %x)", "embedding"),
        ("%y = aten.sub.Tensor(%x, @w)", "other"),
        ("%y = aten.mul.Tensor(%x, @w)", "other"),
        ("%y = aten.linear.default(%x, @w)", "other"),
    ],
)  # fmt: skip
def test_roles_of_tensors(line: str, category: str) -> None:
    text = f"""program "p" {{ tensor @w : f32[8]
      tensor @m : f32[8,8]
      graph forward(%x : f32[2,8]) {{ {line}
      return %y }} }}"""
    entries = {entry.name: entry.category for entry in plan_program(parse_program(text)).entries}
    assert entries["w"] == category


def test_a_tied_embedding_counts_once() -> None:
    text = BLOCK_TEXT.replace("@lm_head.weight)", "@embed.weight)").replace(
        "  tensor @lm_head.weight : f32[128,64]\n", ""
    )
    plan = plan_program(parse_program(text))
    assert plan.bytes_by_category()["embedding"] == 4 * 128 * 64
    assert plan.bytes_by_category()["head"] == 0


def test_json_round_trip(program: Program) -> None:
    plan = plan_program(program)
    text = json.dumps(plan.to_json())
    assert Plan.from_json(json.loads(text)) == plan
    assert json.dumps(Plan.from_json(json.loads(text)).to_json()) == text
    assert plan.to_json()["bytes"]["total"] == plan.total


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 2, "expected an object of version 1"),
        (("more",), 2, "expected an object of version 1"),
        (("weights",), -1, "weights must be a count, got -1"),
        (("weights",), 1.5, "weights must be a count"),
        (("weights",), 1, "the totals do not belong to the entries"),
        (("computed_at_load",), "x", "computed_at_load must be a count"),
        (("bits_per_weight",), 1.0, "the totals do not belong to the entries"),
        (("bytes", "signs"), 1, "the totals do not belong to the entries"),
        (("entries",), {}, "entries must be an array"),
        (("entries", 0), ["a"], r"entries\[0\] must be \[name"),
        (("entries", 0, 0), "bad name", r"entries\[0\] has an impossible name"),
        (("entries", 0, 1), "colour", r"entries\[0\] has an impossible name, category"),
        (("entries", 0, 2), "f7", r"entries\[0\] has an impossible name, category or dtype"),
        (("entries", 0, 3), [-1], r"entries\[0\] has an impossible shape"),
        (("entries", 0, 3), [1], r"entries\[0\] states \d+ bytes, its shape and dtype make 4"),
        (("entries", 0, 4), True, r"entries\[0\] states True bytes"),
    ],
)
def test_from_json_refuses(program: Program, path: tuple[Any, ...], value: Any, message: str) -> None:
    data = copy.deepcopy(plan_program(program).to_json())
    at: Any = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(ArtifactError, match=f"^plan: .*{message}|^plan: {message}"):
        Plan.from_json(data)


def test_from_json_refuses_doubles(program: Program) -> None:
    data = plan_program(program).to_json()
    data["entries"].append(data["entries"][0])
    with pytest.raises(ArtifactError, match="a tensor is listed twice"):
        Plan.from_json(data)
    with pytest.raises(ArtifactError, match="expected an object"):
        Plan.from_json([1])
