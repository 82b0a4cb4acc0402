"""canonicalize, select-linears, assign-formats, share-transforms: what they do and what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sample_programs import BLOCK_TEXT, CONV1D_TEXT, block_program, random_tensors, run_graph

from liftc.compare import programs_equal
from liftc.errors import FormatError, LiftcError
from liftc.format import LiftFormat
from liftc.passes.assign_formats import AssignFormats
from liftc.passes.base import Pass, PassError, PassPipeline
from liftc.passes.canonicalize import Canonicalize
from liftc.passes.select_linears import SelectLinears
from liftc.passes.share_transforms import ShareTransforms, lift_name
from liftc.program import Program
from liftc.spec import LiftSpec
from liftc.text import parse_program, print_program

Golden = Callable[..., None]


def prepared(*passes: Pass, text: str = BLOCK_TEXT) -> Program:
    return PassPipeline(passes, check=True).apply(parse_program(text))


def graph_text(program: Program) -> str:
    return print_program(program)


def forward(body: str, tensors: str = "", inputs: str = "%x : f32[2,8]") -> Program:
    return parse_program(f'program "p" {{\n{tensors}\ngraph forward({inputs}) {{\n{body}\n}} }}')


# canonicalize


def test_canonicalize_conv1d(golden: Golden) -> None:
    golden(graph_text(prepared(Canonicalize(), text=CONV1D_TEXT)))


def test_canonicalize_conv1d_computes_the_same() -> None:
    before = parse_program(CONV1D_TEXT)
    after = prepared(Canonicalize(), text=CONV1D_TEXT)
    tensors = random_tensors(before)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))
    expected = run_graph(before, "forward", tensors, x)
    assert torch.allclose(run_graph(after, "forward", tensors, x), expected, atol=1e-6)
    ops = [str(node.target) for node in after.graphs["forward"].nodes if node.op == "call_function"]
    assert ops.count("aten.linear.default") == 2
    assert not {"aten.addmm.default", "aten.view.default", "aten.to.dtype", "aten.dropout.default"} & set(ops)


def test_canonicalize_is_idempotent_and_leaves_its_input_alone() -> None:
    program = parse_program(CONV1D_TEXT)
    once = Canonicalize().apply(program)
    assert programs_equal(program, parse_program(CONV1D_TEXT))
    assert programs_equal(Canonicalize().apply(once), once)


@pytest.mark.parametrize(
    ("call", "kept"),
    [
        ("aten.alias.default(%y) : f32[2,8]", False),
        ("aten.detach.default(%y) : f32[2,8]", False),
        ("aten.clone.default(%y) : f32[2,8]", False),
        ("aten.clone.default(%y, memory_format=memory_format(contiguous_format)) : f32[2,8]", True),
        ("aten.clone.default(%x) : f32[2,8]", True),
        ("aten.to.dtype(%y, dtype(f32)) : f32[2,8]", False),
        ("aten.to.dtype(%y, dtype(f32), False, True) : f32[2,8]", True),
        ("aten.to.dtype(%y, dtype(bf16)) : bf16[2,8]", True),
        ("aten._to_copy.default(%y, dtype=dtype(f32)) : f32[2,8]", False),
        ("aten.view.default(%y, [2, 8]) : f32[2,8]", False),
        ("aten.view.default(%y, [8, 2]) : f32[8,2]", True),
        ("aten.slice.Tensor(%y, 0, 0, 9223372036854775807) : f32[2,8]", False),
        ("aten.slice.Tensor(%y, 0, 0, 1) : f32[1,8]", True),
        ("aten.expand.default(%y, [-1, -1]) : f32[2,8]", False),
        ("aten.dropout.default(%y, 0.5, False) : f32[2,8]", False),
        ("aten.dropout.default(%y, 0.5, True) : f32[2,8]", True),
        ("aten.contiguous.default(%y) : f32[2,8]", True),
    ],
)
def test_canonicalize_drops_only_what_does_nothing(call: str, kept: bool) -> None:
    body = f"%y = aten.mul.Tensor(%x, 2.0) : f32[2,8]\n%z = {call}\n%w = aten.neg.default(%z)\nreturn %w"
    result = Canonicalize().apply(forward(body))
    assert any(node.name == "z" for node in result.graphs["forward"].nodes) == kept


def test_canonicalize_keeps_copies_where_something_is_written() -> None:
    body = """%y = aten.mul.Tensor(%x, 2.0) : f32[2,8]
        %z = aten.clone.default(%y) : f32[2,8]
        %w = aten.add_.Tensor(%z, 1.0) : f32[2,8]
        return (%y, %z)"""
    assert "aten.clone" in print_program(Canonicalize().apply(forward(body)))


def test_canonicalize_drops_guards_and_dead_code_but_not_writes() -> None:
    body = """%y = aten.mul.Tensor(%x, 2.0) : f32[2,8]
        %g = aten._assert_tensor_metadata.default(%y)
        %dead = aten.neg.default(%y) : f32[2,8]
        %written = aten.add_.Tensor(%x, 1.0) : f32[2,8]
        return %y"""
    names = [node.name for node in Canonicalize().apply(forward(body)).graphs["forward"].nodes]
    assert names == ["x", "y", "written", "output"]


@pytest.mark.parametrize(
    ("product", "expected"),
    [
        ("aten.matmul.default(%x, @w) : f32[2,4]", "(%x, %t)"),
        ("aten.mm.default(%x, @w) : f32[2,4]", "(%x, %t)"),
        ("aten.addmm.default(@b, %x, @w) : f32[2,4]", "(%x, %t, @b)"),
    ],
)
def test_canonicalize_writes_products_as_linear(product: str, expected: str) -> None:
    tensors = "tensor @w : f32[8,4]\ntensor @b : f32[4]"
    text = print_program(Canonicalize().apply(forward(f"%y = {product}\nreturn %y", tensors)))
    assert "%t = aten.t.default(@w) : f32[4,8]" in text
    assert f"%linear = aten.linear.default{expected} : f32[2,4]" in text


@pytest.mark.parametrize(
    "swap", ["aten.t.default(@w)", "aten.permute.default(@w, [1, 0])", "aten.transpose.int(@w, -2, -1)",
             "aten.numpy_T.default(@w)"],
)  # fmt: skip
def test_canonicalize_looks_through_transposes(swap: str) -> None:
    body = f"%s = {swap}\n%y = aten.matmul.default(%x, %s) : f32[2,4]\nreturn %y"
    text = print_program(Canonicalize().apply(forward(body, "tensor @w : f32[4,8]")))
    assert "%linear = aten.linear.default(%x, @w) : f32[2,4]" in text


@pytest.mark.parametrize(
    "product",
    [
        "aten.addmm.default(@b, %x, @w, beta=2) : f32[2,4]",
        "aten.addmm.default(%x, %x, @w) : f32[2,4]",
        "aten.matmul.default(%x, %x) : f32[2,8]",
        "aten.bmm.default(%x, @w) : f32[2,4]",
    ],
)
def test_canonicalize_leaves_other_products_alone(product: str) -> None:
    program = forward(f"%y = {product}\nreturn %y", "tensor @w : f32[8,4]\ntensor @b : f32[4]")
    assert programs_equal(Canonicalize().apply(program), program)


def test_canonicalize_keeps_the_flattening_when_somebody_reads_the_flat_result() -> None:
    text = CONV1D_TEXT.replace("return %view_3", "return (%view_3, %addmm_1)")
    result = print_program(prepared(Canonicalize(), text=text))
    assert "aten.linear.default(%view_2, %t_1, @h.0.proj.bias) : f32[2*t,64]" in result


# select-linears


def test_select_linears(golden: Golden) -> None:
    golden(graph_text(prepared(SelectLinears())).split("\n  graph ")[0])


def test_select_linears_marks_transposed_weights() -> None:
    program = prepared(Canonicalize(), SelectLinears(), text=CONV1D_TEXT)
    linear = program.linears["h.0.attn"]
    assert linear.transposed
    assert (linear.out_features, linear.in_features) == (96, 64)


def test_select_linears_include_exclude_and_size() -> None:
    assert "lm_head" in prepared(SelectLinears(include="lm_head")).linears
    assert "layers.0.mlp.up" not in prepared(SelectLinears(exclude=r"mlp\.up$")).linears
    assert list(prepared(SelectLinears(min_features=64)).linears) == [
        "layers.0.attn.q", "layers.0.attn.o", "layers.0.mlp.gate", "layers.0.mlp.up", "layers.0.mlp.down",
    ]  # fmt: skip


def test_select_linears_takes_everything_in_a_program_without_blocks() -> None:
    program = prepared(SelectLinears(), text=BLOCK_TEXT.replace("# block 0", "# block -1"))
    assert "lm_head" in program.linears


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": "nothing"}, "include 'nothing' matches none of the 8 linears"),
        ({"exclude": "nothing"}, "exclude 'nothing' matches none of the 8 linears"),
        ({"include": "("}, "option include: '\\(' is not a regular expression"),
        ({"include": "attn.k", "min_features": 64}, "cannot include layers.0.attn.k: it has fewer than 64"),
    ],
)
def test_select_linears_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(PassError, match=f"^select-linears.*{message}"):
        SelectLinears(**options).apply(block_program())  # type: ignore[arg-type]


def test_select_linears_never_takes_tied_or_shared_weights() -> None:
    tied = BLOCK_TEXT.replace("@lm_head.weight)", "@embed.weight)")
    with pytest.raises(
        PassError, match=r"cannot include embed: its weight embed.weight is also read by aten.embed"
    ):
        prepared(SelectLinears(include="lm_head"), text=tied)
    twice = BLOCK_TEXT.replace("@layers.0.mlp.up.weight)", "@layers.0.mlp.gate.weight)")
    assert "layers.0.mlp.gate" not in prepared(SelectLinears(), text=twice).linears


def test_select_linears_refuses_graphs_that_disagree() -> None:
    head, decode = BLOCK_TEXT.split("  graph decode")
    decode = decode.replace(
        "aten.linear.default(%scaled, @layers.0.attn.k.weight)", "aten.neg.default(%scaled)"
    )
    with pytest.raises(PassError, match=r"linear layers.0.attn.k is in graph prefill but not in decode"):
        SelectLinears().apply(parse_program(f"{head}  graph decode{decode}"))
    decode = BLOCK_TEXT.split("  graph decode")[1].replace(
        "# block 0 layers.0.attn.k", "# block 1 layers.0.attn.k"
    )
    with pytest.raises(PassError, match=r"linear layers.0.attn.k is in block 0 and in block 1"):
        SelectLinears().apply(parse_program(f"{head}  graph decode{decode}"))


# assign-formats


def test_assign_formats() -> None:
    program = prepared(SelectLinears(), AssignFormats(bits=2.4))
    assert {linear.format for linear in program.linears.values()} == {LiftFormat(77, 32)}
    program = prepared(
        SelectLinears(),
        AssignFormats(format="LQ-24/8", overrides=("mlp=LQ-96/32", "mlp.down=2", r"\.q$=3/2")),
    )
    formats = {name: str(linear.format) for name, linear in program.linears.items()}
    assert formats["layers.0.attn.k"] == "LQ-24/8"
    assert formats["layers.0.mlp.up"] == "LQ-96/32"
    assert formats["layers.0.mlp.down"] == "LQ-64/32"
    assert formats["layers.0.attn.q"] == "LQ-3/2"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, PassError, "give exactly one of bits and format"),
        ({"bits": 2.0, "format": "LQ-3/2"}, PassError, "give exactly one of bits and format"),
        ({"bits": 9.0}, FormatError, "bits must lie between 1 and 8, got 9"),
        ({"bits": float("nan")}, FormatError, "bits must lie between 1 and 8"),
        ({"format": "abc"}, FormatError, "cannot read 'abc'"),
        ({"format": "LQ-1/2"}, FormatError, "does not exist"),
        (
            {"bits": 2.0, "overrides": ("nothing=LQ-3/2",)},
            PassError,
            "'nothing' matches none of the 7 linears",
        ),
        ({"bits": 2.0, "overrides": ("mlp",)}, PassError, "write the override 'mlp' as REGEX="),
        ({"bits": 2.0, "overrides": ("(=3/2",)}, PassError, "'\\(' is not a regular expression"),
        ({"bits": 2.0, "overrides": ("mlp=x",)}, FormatError, "cannot read 'x'"),
    ],
)
def test_assign_formats_refuses(options: dict[str, object], error: type[LiftcError], message: str) -> None:
    program = prepared(SelectLinears())
    with pytest.raises(error, match=message):
        AssignFormats(**options).apply(program)  # type: ignore[arg-type]


# share-transforms


def test_share_transforms(golden: Golden) -> None:
    program = prepared(SelectLinears(), AssignFormats(bits=2.4), ShareTransforms())
    golden(graph_text(program).split("\n  graph ")[0])
    assert program.lifts["layers.0.attn.q+k+v"] == LiftSpec(LiftFormat(77, 32), 64, left=2, right=32)


def test_share_transforms_needs_equal_formats() -> None:
    program = prepared(
        SelectLinears(), AssignFormats(bits=2.4, overrides=(r"attn\.v=3.0",)), ShareTransforms()
    )
    assert list(program.lifts)[:2] == ["layers.0.attn.q+k", "layers.0.attn.v"]


def test_share_transforms_needs_one_input_in_every_graph() -> None:
    head, decode = BLOCK_TEXT.split("  graph decode")
    decode = decode.replace("(%scaled, @layers.0.attn.v.weight)", "(%x, @layers.0.attn.v.weight)")
    text = f"{head}  graph decode{decode}"
    program = prepared(SelectLinears(), AssignFormats(bits=2.4), ShareTransforms(), text=text)
    assert list(program.lifts)[:2] == ["layers.0.attn.q+k", "layers.0.attn.v"]


def test_share_transforms_refuses() -> None:
    with pytest.raises(PassError, match=r"linear layers.0.attn.q has no format; run assign-formats first"):
        prepared(SelectLinears(), ShareTransforms())
    wide = """program "wide" { tensor @w.weight : f32[32,60000]
        graph forward(%x : f32[1,60000]) { %y = aten.linear.default(%x, @w.weight) : f32[1,32]
        return %y } }"""
    with pytest.raises(PassError, match=r"^share-transforms: w: lift: 180000 lifted features would overflow"):
        prepared(SelectLinears(), AssignFormats(format="LQ-96/32"), ShareTransforms(), text=wide)


@pytest.mark.parametrize(
    ("members", "name"),
    [
        (["a.b.q"], "a.b.q"),
        (["a.b.q", "a.b.k"], "a.b.q+k"),
        (["a.b.q", "a.c.k"], "a.b.q+c.k"),
        (["q", "k"], "q+k"),
        (["a.b", "a.b.c"], "a.b+b.c"),
        ([f"e.{i}.gate" for i in range(64)], "e.0.gate+63_more"),
    ],
)
def test_lift_names(members: list[str], name: str) -> None:
    assert lift_name(members) == name
