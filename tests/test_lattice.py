"""`liftc lattice`: the rate-distortion report, and the command line around it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from liftc.cli import main
from liftc.errors import QuantizeError
from liftc.format import LiftFormat
from liftc.quant import figures, lattice, mapping, report

DOCS = Path(__file__).parent.parent / "docs"
SMALL = LiftFormat(6, 3)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["lattice", "-q", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def mapping_file(path: Path, **changes: object) -> Path:
    row = {"mse": 0.09, "standard_error": 0.001}
    made = {"samples": 10, "device": "cpu", "figures": {str(b): row for b in figures.BEAMS}, **changes}
    mapping.write_mappings(path, {SMALL: (torch.ones(3, 6), made)})
    return path


def test_the_committed_report_is_what_the_command_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    code, out, _ = call(capsys, "report", "-o", str(tmp_path))
    assert code == 0 and "rate_distortion.md" in out
    made = (tmp_path / "rate_distortion.md").read_text(encoding="utf-8")
    assert made == (DOCS / "rate_distortion.md").read_text(encoding="utf-8")
    assert (tmp_path / "rate_distortion.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (DOCS / "rate_distortion.png").stat().st_size > 10_000


def test_the_report_covers_every_format_with_enough_samples() -> None:
    answer = report.lattice_report()
    rows = figures.measured()
    assert answer["formats"] == len(rows) == len(mapping.shipped_formats()) and answer["files"] == []
    assert answer["samples"] >= 100_000
    for row in rows:
        low = lattice.bound(row.fmt)
        errors = [row.mse[beam] for beam in figures.BEAMS]
        assert all(low < mse < 2.7 * low for mse in errors), row.fmt
        assert all(wide <= narrow * 1.001 for narrow, wide in pairwise(errors)), row.fmt
        assert f"| {row.fmt} | {row.bits:.4f} |" in answer["markdown"]


def test_recorded_figures_are_those_of_the_shipped_matrix() -> None:
    fmt = LiftFormat(77, 32)
    (row,) = (row for row in figures.measured() if row.fmt == fmt)
    found = lattice.lattice_eval(fmt, 16, samples=2048, seed=5, device="cpu")
    assert abs(found["mse"] - row.mse[16]) < 5 * found["standard_error"]


def test_targets_say_met_and_missed() -> None:
    errors = dict.fromkeys(figures.BEAMS, 0.001)
    row = figures.Measured(
        LiftFormat(64, 32), 10, "cpu", dict(zip(figures.BEAMS, (0.9, 0.8, 0.7, 0.6))), errors
    )
    target = replace(report.TARGETS[0], must=0.6, aim=0.5)
    found = report.reached(target, [row])
    assert (found["beam"], found["mse"], found["must_is"], found["aim_is"]) == (1024, 0.6, "met", "missed")
    narrow = report.reached(replace(target, beams=(64,), must=0.7995, aim=0.9), [row])
    assert (narrow["beam"], narrow["must_is"], narrow["aim_is"]) == (64, "met within the error", "met")
    other = report.reached(target, [replace(row, fmt=LiftFormat(96, 32))])
    assert other["mse"] is None and other["aim_is"] == "not measured"
    text = report.markdown([row], [found, other])
    assert "Missed aim: 2.00 bits with d up to 64, beam up to 1024 is at 0.60000, 20.0% above 0.5000." in text


def test_trellis_mixes_and_the_bound() -> None:
    assert figures.trellis_mix(2.0) == 0.0710 and figures.trellis_mix(4.0) == 0.0059
    assert figures.trellis_mix(2.25) == pytest.approx((0.0710 + 0.0363) / 2)
    assert figures.trellis_mix(2.4) == pytest.approx(0.0433, abs=1e-4)
    assert figures.trellis_mix(1.9) is None and figures.trellis_mix(3.5) is None
    assert figures.excess_db(2**-4.8, 2.4) == pytest.approx(0, abs=1e-12)
    assert figures.excess_db(2 * 2**-4.8, 2.4) == pytest.approx(3.0103, abs=1e-4)


@pytest.mark.parametrize(
    "changes",
    [{"figures": {}}, {"figures": None}, {"samples": "many"}, {"samples": 1},
     {"figures": {str(b): {"mse": float("nan"), "standard_error": 1.0} for b in figures.BEAMS}}],
)  # fmt: skip
def test_files_without_usable_figures_are_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    good = mapping_file(tmp_path / "good.safetensors")
    assert report.lattice_report(source=good)["formats"] == 1
    bad = mapping_file(tmp_path / "bad.safetensors", **changes)
    with pytest.raises(QuantizeError, match="figures") as caught:
        report.lattice_report(source=bad)
    assert "\n" not in str(caught.value)


def test_the_plot_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(QuantizeError, match=r"pip install 'liftc\[report\]'"):
        report.lattice_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_eval_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(
        capsys,
        "eval",
        "--format",
        "LQ-77/32",
        "--beam",
        "4",
        "--samples",
        "8001",
        "--device",
        "cpu",
        "--json",
    )
    row = json.loads(out)
    assert code == 0 and row["samples"] == 251 and row["weights"] == 251 * 32 and row["bits"] == 2.40625
    assert lattice.bound(LiftFormat(77, 32)) < row["mse"] < 0.08
    assert row["standard_error"] > 0 and row["seconds_per_million_weights"] > 0
    code, out, _ = call(
        capsys, "eval", "--format", "LQ-8/4", "--beam", "2", "--beam", "8", "--samples", "400", "--device", "cpu",
        "--json",
    )  # fmt: skip
    assert [row["beam"] for row in json.loads(out)["rows"]] == [2, 8]


def test_show_one_format_and_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "show", "--format", "LQ-77/32", "--json")
    shown = json.loads(out)
    assert code == 0 and shown["shape"] == [32, 77] and shown["source"] == "shipped"
    code, out, _ = call(capsys, "show")
    assert code == 0 and len(out.splitlines()) == len(mapping.shipped_formats())


def test_train_writes_a_matrix_that_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.safetensors"
    code, out, _ = call(
        capsys, "train", "--format", "LQ-6/3", "--steps", "2", "--beam", "4", "--samples", "900", "--seed", "7",
        "--device", "cpu", "-o", str(path), "--json",
    )  # fmt: skip
    made = json.loads(out)
    assert code == 0 and (made["steps"], made["beam"], made["seed"], made["samples"]) == (2, 4, 7, 300)
    assert made["lam"] == mapping.suggested_lam(SMALL)
    matrix = mapping.read_mapping(path, SMALL)
    mse = mapping.evaluate_mapping(matrix, 4, 300, 8, made["lam"])[0]
    assert mse == pytest.approx(made["mse"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "--format", "77-32"], "cannot read format"),
        (["eval", "--samples", "0"], "--samples must be at least 1"),
        (["eval", "--samples", "64", "--beam", "0"], "beam must lie between 1 and 4096"),
        (["eval", "--device", "abacus"], "there is no such device"),
        (["eval", "--device", "meta"], "runs on cpu or cuda"),
        (["eval", "--device", "cuda:99"], "CUDA devices"),
        (["eval", "--seed", "-1"], "--seed must lie between"),
        (["eval", "-o", "x"], "writes no file"),
        (["train", "--format", "LQ-6/3"], "name the file to write"),
        (["train", "-o", "x"], "name a format"),
        (["train", "--format", "LQ-6/3", "-o", "x", "--steps", "0"], "--steps must be at least 1"),
        (["train", "--format", "LQ-6/3", "-o", "x", "--beam", "4", "--beam", "8"], "give --beam once"),
        (["report", "--beam", "4"], "leave --format and --beam out"),
    ],
)
def test_mistakes_end_in_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, *arguments)
    assert code == 2 and out == ""
    assert message in err and err.count("\n") == 1


def test_files_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = tmp_path / "taken"
    taken.write_text("not a mapping file")
    code, _, err = call(capsys, "report", "-o", str(taken))
    assert code == 2 and "cannot write the report" in err
    code, _, err = call(capsys, "train", "--format", "LQ-6/3", "--steps", "1", "-o", str(taken))
    assert code == 2 and "cannot read the mapping matrices" in err
    assert taken.read_text() == "not a mapping file"
