"""Pipeline text, options of passes, dumps and timings, and that every pass is where its name says."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path

import pytest
from sample_programs import BLOCK_TEXT, block_program

from liftc.compare import programs_equal
from liftc.errors import VerifyError
from liftc.format import LiftFormat
from liftc.passes.assign_formats import AssignFormats
from liftc.passes.base import Pass, PassError, PassPipeline
from liftc.passes.choose_order import ChooseOrder
from liftc.passes.lower_linears import LowerLinears
from liftc.passes.pipeline import after_quantize, before_quantize, parse_pipeline
from liftc.passes.registry import PASSES, get_pass
from liftc.passes.select_linears import SelectLinears
from liftc.program import Program
from liftc.text import parse_program, print_program

Golden = Callable[..., None]


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("", []),
        ("canonicalize", ["canonicalize"]),
        (" canonicalize , plan-layout ", ["canonicalize", "plan-layout"]),
        ("assign-formats{bits=2.4},lower-linears", [AssignFormats(bits=2.4), LowerLinears()]),
        ("lower-linears{activation-scale=true}", [LowerLinears(activation_scale=True)]),
        ("lower-linears{activation-scale=false}", [LowerLinears()]),
        ("lower-linears{}", [LowerLinears()]),
        ("select-linears{min-features=8, include=head}", [SelectLinears(include="head", min_features=8)]),
        ('select-linears{exclude="mlp\\\\.(up|down)$"}', [SelectLinears(exclude=r"mlp\.(up|down)$")]),
        ("choose-order{graphs=prefill,graphs=decode,order=activation-first}",
         [ChooseOrder(graphs=("prefill", "decode"), order="activation-first")]),
        ('assign-formats{format=LQ-24/8 overrides="mlp=LQ-3/2" overrides=q=2.5}',
         [AssignFormats(format="LQ-24/8", overrides=("mlp=LQ-3/2", "q=2.5"))]),
    ],
)  # fmt: skip
def test_parse_pipeline(text: str, passes: list[str | Pass]) -> None:
    assert parse_pipeline(text) == [get_pass(item)() if isinstance(item, str) else item for item in passes]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (",", "pipeline, character 1: expected the name of a pass"),
        ("a,,b", "there is no pass 'a'; the passes are canonicalize, select-linears"),
        ("canonicalize,", "pipeline, character 14: expected the name of a pass"),
        (
            "canonicalize plan-layout",
            "pipeline, character 14: expected ',' and another pass, found 'plan-layout'",
        ),
        ("canonicalize{x=1}", "pass canonicalize has no option 'x'; it takes no options"),
        ("lower-linears{bits=1}", "pass lower-linears has no option 'bits'; it takes activation-scale"),
        ("lower-linears{activation-scale=1}", "option activation-scale must be true or false, got '1'"),
        ("assign-formats{bits=x}", "pass assign-formats: option bits must be a number, got 'x'"),
        ("select-linears{min-features=1.5}", "option min-features must be a whole number, got '1.5'"),
        ("select-linears{include=a,include=b}", "option include is given twice"),
        ("select-linears{include=}", "pipeline, character 24: expected a value"),
        ("select-linears{include}", "pipeline, character 16: expected option=value or '}'"),
        ("select-linears{include=a", "pipeline, character 25: expected ',' or '}'"),
        ('select-linears{include="a}', "pipeline, character 24: the string does not end"),
    ],
)
def test_parse_pipeline_refuses(text: str, message: str) -> None:
    with pytest.raises(PassError) as error:
        parse_pipeline(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "passes",
    [
        before_quantize(
            LiftFormat(77, 32), {r"mlp\.down": LiftFormat(96, 32)}, include="lm_head", exclude='"q"'
        ),
        after_quantize(activation_scale=True),
        [ChooseOrder(("prefill", "x y"), "activation-first"), AssignFormats(bits=1e-05, subspace_dim=8)],
    ],
)
def test_a_pipeline_prints_as_what_parses_to_it(passes: list[Pass]) -> None:
    assert parse_pipeline(",".join(map(str, passes))) == passes


def test_file_class_and_name_agree() -> None:
    folder = Path(sys.modules["liftc.passes"].__path__[0])
    for name in PASSES:
        cls = get_pass(name)
        assert cls.name == name
        assert cls.__name__ == "".join(word.capitalize() for word in name.split("-"))
        assert cls.__module__ == f"liftc.passes.{name.replace('-', '_')}"
        assert is_dataclass(cls) and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
        assert cls.__doc__ and not cls.__doc__.startswith(cls.__name__ + "("), "written by hand"
    modules = {path.stem for path in folder.glob("*.py")}
    assert modules - {name.replace("-", "_") for name in PASSES} == {
        "__init__", "base", "nodes", "pipeline", "registry"
    }  # fmt: skip


def test_the_pipeline_uses_every_pass_once() -> None:
    passes = [*before_quantize(LiftFormat(77, 32)), *after_quantize()]
    assert [item.name for item in passes] == list(PASSES)


def test_dumps_are_numbered_and_parse(tmp_path: Path) -> None:
    before = before_quantize(LiftFormat(77, 32))
    prepared = PassPipeline(before, dump_dir=tmp_path / "ir").apply(block_program())
    final = PassPipeline(after_quantize(), dump_dir=tmp_path / "ir", first=len(before) + 1).apply(prepared)
    assert sorted(path.name for path in (tmp_path / "ir").iterdir()) == [
        "00-input.txt", "01-canonicalize.txt", "02-select-linears.txt", "03-assign-formats.txt",
        "04-share-transforms.txt", "05-lower-linears.txt", "06-fuse-row-groups.txt",
        "07-fold-decode-transform.txt", "08-choose-order.txt", "09-plan-layout.txt",
    ]  # fmt: skip
    dumped = parse_program((tmp_path / "ir" / "09-plan-layout.txt").read_text())
    assert programs_equal(dumped, final)


def test_passes_resume_from_a_dump(tmp_path: Path) -> None:
    passes = [*before_quantize(LiftFormat(77, 32)), *after_quantize()]
    final = PassPipeline(passes, dump_dir=tmp_path).apply(block_program())
    for number, item in enumerate(passes[:-1], 1):
        dump = parse_program((tmp_path / f"{number:02d}-{item.name}.txt").read_text())
        assert programs_equal(PassPipeline(passes[number:]).apply(dump), final), item.name


def test_whole_pipeline(golden: Golden) -> None:
    passes = [*before_quantize(LiftFormat(77, 32), {"down": LiftFormat(24, 8)}), *after_quantize()]
    golden(print_program(PassPipeline(passes).apply(block_program())))


def test_debug_levels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = PassPipeline([SelectLinears()])
    pipeline.apply(block_program())
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LIFTC_DEBUG", "1")
    pipeline.apply(block_program())
    assert re.fullmatch(r"pass select-linears: \d+\.\d+ s, verify \d+\.\d+ s\n", capsys.readouterr().err)
    monkeypatch.setenv("LIFTC_DEBUG", "3")
    result = pipeline.apply(block_program())
    error = capsys.readouterr().err
    assert error.startswith("pass 01 select-linears\n") and print_program(result) in error


def test_the_verifier_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    class Break(Pass):
        name = "break"

        def apply(self, program: Program) -> Program:
            result = program.copy()
            del result.tensors["embed.weight"]
            return result

    with pytest.raises(VerifyError, match=r"^the result of pass break is invalid: verify: graph prefill"):
        PassPipeline([Break()]).apply(parse_program(BLOCK_TEXT))
    monkeypatch.setenv("LIFTC_VERIFY", "0")
    assert "embed.weight" not in PassPipeline([Break()]).apply(parse_program(BLOCK_TEXT)).tensors
