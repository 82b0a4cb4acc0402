"""lower-linears to plan-layout: the lowered program computes what the dense one does, and stays tidy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sample_programs import BLOCK_TEXT, CONV1D_TEXT, random_tensors, run_graph, stacked_tensors

from liftc import reference
from liftc.compare import programs_equal
from liftc.passes.assign_formats import AssignFormats
from liftc.passes.base import Pass, PassError, PassPipeline
from liftc.passes.canonicalize import Canonicalize
from liftc.passes.choose_order import ChooseOrder
from liftc.passes.fold_decode_transform import FoldDecodeTransform
from liftc.passes.fuse_row_groups import FuseRowGroups
from liftc.passes.lower_linears import LowerLinears
from liftc.passes.plan_layout import PlanLayout
from liftc.passes.select_linears import SelectLinears
from liftc.passes.share_transforms import ShareTransforms
from liftc.program import Program
from liftc.tensor_names import packed_parts, transform_names
from liftc.text import parse_program, print_program

Golden = Callable[..., None]
IDS = torch.tensor([[3, 1, 4, 1, 5]])


def lowered(*more: Pass, text: str = BLOCK_TEXT, scale: bool = False) -> Program:
    passes = (
        Canonicalize(), SelectLinears(), AssignFormats(bits=2.4), ShareTransforms(),
        LowerLinears(activation_scale=scale), *more,
    )  # fmt: skip
    return PassPipeline(passes, check=True).apply(parse_program(text))


def graph_only(program: Program, graph: str) -> str:
    """Text of the tables and one graph."""
    return print_program(
        Program(program.name, {graph: program.graphs[graph]}, program.tensors, folded=program.folded)
    )


def ops(program: Program, graph: str) -> list[str]:
    return [str(node.target) for node in program.graphs[graph].nodes if node.op == "call_function"]


def dense_tensors(program: Program, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the program before lowering: each linear's weight decoded from its signs."""
    dense = dict(tensors)
    for name, linear in program.linears.items():
        spec = program.lifts[linear.lift]
        names = transform_names(linear.lift, spec)
        right = reference.decode_right(tensors[names.right], tensors[names.mapping])
        scale = tensors.get(f"{linear.lift}.activation_scale")
        weight = reference.decode_weight(
            tensors[f"{name}.packed_weight"], tensors[f"{name}.output_scale"], scale,
            tensors[names.left], right, spec.in_features,
        )  # fmt: skip
        dense[linear.weight] = weight.T.contiguous() if linear.transposed else weight
    return dense


def small_tensors(program: Program) -> dict[str, torch.Tensor]:
    """Random tensors whose output scales bring the activations back to ordinary size."""
    tensors = random_tensors(program, seed=5)
    return {n: t / 16 if n.endswith(".output_scale") else t for n, t in tensors.items()}


# lower-linears


def test_lower_linears(golden: Golden) -> None:
    golden(graph_only(lowered(), "decode"))


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("graph", ["prefill", "decode"])
def test_lower_linears_computes_what_the_decoded_weights_do(graph: str, scale: bool) -> None:
    program = lowered(scale=scale)
    tensors = small_tensors(program)
    ids = IDS if graph == "prefill" else IDS[:, :1]
    expected = run_graph(parse_program(BLOCK_TEXT), graph, dense_tensors(program, tensors), ids)
    result = run_graph(program, graph, tensors, ids)
    assert result.dtype == torch.float32
    assert torch.allclose(result, expected, atol=2e-3 * float(expected.abs().max()))


def test_lower_linears_handles_transposed_weights() -> None:
    program = lowered(text=CONV1D_TEXT)
    tensors = small_tensors(program)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    expected = run_graph(parse_program(CONV1D_TEXT), "forward", dense_tensors(program, tensors), x)
    assert torch.allclose(run_graph(program, "forward", tensors, x), expected, atol=2e-3)
    assert "aten.t.default" not in ops(program, "forward")


def test_lower_linears_replaces_the_tensors() -> None:
    program = lowered(scale=True)
    assert not set(program.tensors) & {linear.weight for linear in program.linears.values()}
    assert str(program.tensors["layers.0.mlp.up.packed_weight"]) == "i32[3,154]"
    assert str(program.tensors["layers.0.mlp.up.output_scale"]) == "bf16[96]"
    assert str(program.tensors["layers.0.mlp.gate+up.activation_scale"]) == "bf16[64]"
    assert {"whitening.left.2", "whitening.left.3", "whitening.right.32", "mapping.77x32"} <= set(
        program.tensors
    )
    assert packed_parts(program)["layers.0.mlp.up.packed_weight"] == ["layers.0.mlp.up"]
    assert ops(program, "decode").count("liftc.lift.default") == 4
    assert ops(program, "decode").count("liftc.sign_matmul.default") == 7
    assert ops(program, "decode").count("liftc.decode_right.default") == 1


def test_lower_linears_refuses() -> None:
    selected = PassPipeline((SelectLinears(),), check=True).apply(parse_program(BLOCK_TEXT))
    with pytest.raises(PassError, match=r"linear layers.0.attn.q has no lift; run share-transforms first"):
        LowerLinears().apply(selected)
    with pytest.raises(PassError, match=r"lower-linears: the linears of this program are lowered already"):
        LowerLinears().apply(lowered())
    untyped = BLOCK_TEXT.replace("@layers.0.mlp.up.weight) : f32[1,t,96]", "@layers.0.mlp.up.weight)")
    with pytest.raises(PassError, match=r"layers.0.mlp.up: the type of node %up is not known"):
        lowered(text=untyped)


@pytest.mark.parametrize("earlier", [SelectLinears(), AssignFormats(bits=2.0), ShareTransforms()])
def test_earlier_passes_refuse_a_lowered_program(earlier: Pass) -> None:
    with pytest.raises(PassError, match="the linears of this program are lowered already"):
        earlier.apply(lowered())


# fuse-row-groups


def test_fuse_row_groups(golden: Golden) -> None:
    golden(graph_only(lowered(FuseRowGroups()), "prefill"))


@pytest.mark.parametrize("graph", ["prefill", "decode"])
def test_fuse_row_groups_changes_no_bit(graph: str) -> None:
    before, after = lowered(), lowered(FuseRowGroups())
    tensors = small_tensors(before)
    ids = IDS if graph == "prefill" else IDS[:, :1]
    fused = stacked_tensors(after, tensors)
    assert set(fused) == set(after.tensors)
    assert all(list(value.shape) == list(after.tensors[name].shape) for name, value in fused.items())
    assert torch.equal(run_graph(after, graph, fused, ids), run_graph(before, graph, tensors, ids))


def test_fuse_row_groups_keeps_the_order_of_rows() -> None:
    program = lowered(FuseRowGroups())
    assert packed_parts(program) == {
        "layers.0.attn.q+k+v.packed_weight": [f"layers.0.attn.{x}" for x in "qkv"],
        "layers.0.attn.o.packed_weight": ["layers.0.attn.o"],
        "layers.0.mlp.gate+up.packed_weight": ["layers.0.mlp.gate", "layers.0.mlp.up"],
        "layers.0.mlp.down.packed_weight": ["layers.0.mlp.down"],
    }
    assert str(program.tensors["layers.0.attn.q+k+v.packed_weight"]) == "i32[4,154]"
    assert ops(program, "decode").count("liftc.sign_matmul.default") == 4


def pair(first: int, second: int) -> str:
    """Two linears on one input."""
    return f"""program "pair" {{
      tensor @a.weight : f32[{first},64]
      tensor @b.weight : f32[{second},64]
      graph forward(%x : f32[3,64]) {{
        %a = aten.linear.default(%x, @a.weight) : f32[3,{first}]
        %b = aten.linear.default(%x, @b.weight) : f32[3,{second}]
        return (%a, %b)
      }}
    }}"""


@pytest.mark.parametrize(("first", "second", "fused"), [(64, 40, True), (40, 64, False), (33, 33, False)])
def test_fuse_row_groups_needs_whole_words_before_the_last(first: int, second: int, fused: bool) -> None:
    before, after = lowered(text=pair(first, second)), lowered(FuseRowGroups(), text=pair(first, second))
    assert ("a+b.packed_weight" in after.tensors) == fused
    assert programs_equal(before, after) != fused
    tensors, x = small_tensors(before), torch.ones(3, 64)
    result = run_graph(after, "forward", stacked_tensors(after, tensors), x)
    assert all(map(torch.equal, result, run_graph(before, "forward", tensors, x)))


def test_fuse_row_groups_is_idempotent() -> None:
    once = lowered(FuseRowGroups())
    assert programs_equal(FuseRowGroups().apply(once), once)


def test_fuse_row_groups_turns_merging_views_into_reshapes() -> None:
    view = "%kv = aten.cat.default([%k, %v], -1) : f32[1,t,64]"
    merged = """%size = aten.sym_size.int(%ids, 1)
    %flat = aten.view.default(%k, [-1]) : f32[32*t]
    %heads = aten.view.default(%k, [1, %size, 2, 16]) : f32[1,t,2,16]
    %unflat = aten.view.default(%flat, [1, %size, 32]) : f32[1,t,32]
    %unhead = aten.reshape.default(%heads, [1, %size, 32]) : f32[1,t,32]
    %kk = aten.add.Tensor(%unflat, %unhead) : f32[1,t,32]
    %kv = aten.cat.default([%kk, %v], -1) : f32[1,t,64]"""
    text = BLOCK_TEXT.replace(view, merged)
    assert text != BLOCK_TEXT
    before, after = lowered(text=text), lowered(FuseRowGroups(), text=text)
    tensors = small_tensors(before)
    result = run_graph(after, "prefill", stacked_tensors(after, tensors), IDS)
    assert torch.equal(result, run_graph(before, "prefill", tensors, IDS))
    printed = print_program(after)
    assert "%flat = aten.reshape.default" in printed
    assert "%heads = aten.view.default" in printed


# fold-decode-transform


def test_fold_decode_transform(golden: Golden) -> None:
    golden(graph_only(lowered(FoldDecodeTransform()), "decode"))


def test_fold_decode_transform_changes_no_bit() -> None:
    before, after = lowered(), lowered(FoldDecodeTransform())
    tensors = small_tensors(before)
    assert torch.equal(run_graph(after, "prefill", tensors, IDS), run_graph(before, "prefill", tensors, IDS))
    assert after.folded == {
        "whitening.right.32.mapping.77x32": ("decode_right", ("whitening.right.32", "mapping.77x32"))
    }
    assert "liftc.decode_right.default" not in ops(after, "prefill")


def test_fold_decode_transform_leaves_computed_operands_alone() -> None:
    text = """program "p" {
      tensor @m : f32[2,3]
      graph forward(%right : f32[4,4]) {
        %y = liftc.decode_right.default(%right, @m) : f32[4,6]
        return %y
      }
    }"""
    program = parse_program(text)
    assert programs_equal(FoldDecodeTransform().apply(program), program)


# choose-order


def test_choose_order(golden: Golden) -> None:
    golden(graph_only(lowered(FuseRowGroups(), FoldDecodeTransform(), ChooseOrder()), "prefill"))


def test_choose_order_changes_the_named_graphs_only() -> None:
    before, after = lowered(), lowered(ChooseOrder())
    assert ops(after, "decode") == ops(before, "decode")
    assert "liftc.lift.default" not in ops(after, "prefill")
    assert ops(after, "prefill").count("liftc.lifted_linear.default") == 7
    both = lowered(ChooseOrder(graphs=("decode", "prefill")))
    assert "liftc.lift.default" not in ops(both, "decode")


@pytest.mark.parametrize("scale", [False, True])
def test_both_orders_agree_and_invert_each_other(scale: bool) -> None:
    before, after = lowered(scale=scale), lowered(ChooseOrder(), scale=scale)
    tensors = small_tensors(before)
    expected = run_graph(before, "prefill", tensors, IDS)
    result = run_graph(after, "prefill", tensors, IDS)
    assert torch.allclose(result, expected, atol=2e-3 * float(expected.abs().max()))
    back = ChooseOrder(order="activation-first").apply(after)
    assert sorted(ops(back, "prefill")) == sorted(ops(before, "prefill"))
    assert torch.equal(run_graph(back, "prefill", tensors, IDS), expected)


def test_choose_order_reads_the_factors_of_a_folded_transform() -> None:
    """The many-token graph reads what was folded from; nothing folded is kept that no graph reads."""
    before = lowered(FoldDecodeTransform())
    after = ChooseOrder(graphs=("prefill", "decode")).apply(before)
    tensors = small_tensors(before)
    expected = run_graph(before, "prefill", tensors, IDS)
    assert torch.allclose(
        run_graph(after, "prefill", tensors, IDS), expected, atol=2e-3 * float(expected.abs().max())
    )
    reads = [str(n.target) for n in after.graphs["prefill"].nodes if n.op == "get_attr"]
    assert reads.count("whitening.right.32") == reads.count("mapping.77x32") == 1
    assert "whitening.right.32.mapping.77x32" not in reads
    assert PlanLayout().apply(after).folded == {} != after.folded
    back = ChooseOrder(order="activation-first", graphs=("prefill",)).apply(after)
    assert torch.equal(run_graph(back, "prefill", tensors, IDS), expected)


def test_choose_order_leaves_other_right_factors_alone() -> None:
    """A right factor that is no decode_right has no d and D to decode the weight with."""
    text = """program "p" {
      tensor @left : f32[2,2]
      tensor @right : f32[4,6]
      tensor @l.packed_weight : i32[1,12]
      tensor @l.output_scale : f32[8]
      linear @l weight=@w out=8 in=8 block=-1 lift=@l format=LQ-3/2
      lift @l : LQ-3/2 in=8 left=2 right=4
      graph forward(%x : f32[1,8]) {
        %lift = liftc.lift.default(%x, None, @left, @right) : (i16[1,12], f32[1,1])
        %z = operator.getitem(%lift, 0) : i16[1,12]
        %s = operator.getitem(%lift, 1) : f32[1,1]
        %y = liftc.sign_matmul.default(%z, %s, @l.packed_weight, @l.output_scale, dtype(f32)) : f32[1,8]
        return %y
      }
    }"""
    program = parse_program(text)
    assert programs_equal(ChooseOrder().apply(program), program)


def test_choose_order_casts_when_dtypes_differ() -> None:
    text = print_program(lowered()).replace("dtype(f32)) : f32[1,t,64]", "dtype(f16)) : f16[1,t,64]", 1)
    program = ChooseOrder(graphs=("prefill",)).apply(parse_program(text))
    printed = print_program(program)
    assert "aten.to.dtype(%lifted_linear, dtype(f16)) : f16[1,t,64]" in printed
    assert ": f32[1,t,64]" in next(line for line in printed.splitlines() if "%lifted_linear =" in line)


def test_choose_order_refuses() -> None:
    with pytest.raises(PassError, match="order must be weight-first or activation-first, got 'sideways'"):
        ChooseOrder(order="sideways").apply(lowered())
    with pytest.raises(PassError, match="there is no graph 'nowhere', only prefill, decode"):
        ChooseOrder(graphs=("nowhere",)).apply(lowered())


# plan-layout


def test_plan_layout(golden: Golden) -> None:
    program = lowered(FuseRowGroups(), FoldDecodeTransform(), ChooseOrder(), PlanLayout())
    golden(print_program(program).split("\n  graph ")[0])


def test_plan_layout_drops_tensors_nobody_reads() -> None:
    text = BLOCK_TEXT.replace("tensor @embed", "tensor @unused : f32[5]\n  tensor @embed")
    assert "unused" not in lowered(PlanLayout(), text=text).tensors
    assert "mapping.77x32" in lowered(FoldDecodeTransform(), PlanLayout()).tensors


def test_plan_layout_refuses_a_program_that_is_not_lowered() -> None:
    program = PassPipeline((SelectLinears(),), check=True).apply(parse_program(BLOCK_TEXT))
    with pytest.raises(
        PassError, match=r"linear layers.0.attn.q is not lowered yet; run lower-linears first"
    ):
        PlanLayout().apply(program)


@pytest.mark.parametrize(
    "item",
    [Canonicalize(), FuseRowGroups(), FoldDecodeTransform(), ChooseOrder(), PlanLayout(),
     ChooseOrder(order="activation-first")],
    ids=lambda item: str(item),
)  # fmt: skip
def test_passes_leave_their_input_alone(item: Pass) -> None:
    program = lowered()
    text = print_program(program)
    result = item.apply(program)
    assert print_program(program) == text
    assert parse_program(print_program(result)) is not None


@pytest.mark.parametrize(
    "item",
    [SelectLinears(), AssignFormats(bits=2.0), ShareTransforms(), LowerLinears()],
    ids=lambda item: item.name,
)
def test_early_passes_leave_their_input_alone(item: Pass) -> None:
    before = (Canonicalize(), SelectLinears(), AssignFormats(bits=2.4), ShareTransforms())
    count = {"select-linears": 1, "assign-formats": 2, "share-transforms": 3, "lower-linears": 4}[item.name]
    program = PassPipeline(before[:count], check=True).apply(parse_program(BLOCK_TEXT))
    text = print_program(program)
    item.apply(program)
    assert print_program(program) == text
