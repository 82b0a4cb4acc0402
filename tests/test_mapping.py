"""Mapping matrices: shipped file, learning, cache, and the library behind `liftc lattice`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from liftc.errors import QuantizeError
from liftc.format import LiftFormat
from liftc.quant import lattice, mapping
from liftc.quant.encode import decode, encode
from liftc.quant.mapping import Recipe, learn_mapping, load_mapping, mapping_provenance

QUICK = Recipe(seed=3, warmup=6, steps=8, batch=512, beam=8, lam=0.08)
SMALL = LiftFormat(6, 3)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LIFTC_CACHE_DIR", str(tmp_path / "cache"))
    load_mapping.cache_clear()
    yield
    load_mapping.cache_clear()


def test_every_shipped_matrix_has_its_shape_and_provenance() -> None:
    formats = mapping.shipped_formats()
    assert {LiftFormat(64, 32), LiftFormat(77, 32), LiftFormat(96, 32)} <= set(formats)
    for fmt in formats:
        matrix, made = load_mapping(fmt), mapping_provenance(fmt)
        assert matrix.shape == (fmt.subspace_dim, fmt.lifted_dim) and matrix.dtype == torch.float32
        assert made["source"] == "shipped"
        assert {"seed", "steps", "beam", "lam", "batch", "mse", "standard_error", "samples"} <= made.keys()
        assert lattice.bound(fmt) < made["mse"] < 2.2 * lattice.bound(fmt)
        assert mapping.lam_of(fmt) == made["lam"] > 0


@pytest.mark.parametrize(("name", "most"), [("LQ-64/32", 0.0792), ("LQ-77/32", 0.0456), ("LQ-96/32", 0.0213)])
def test_the_error_of_the_main_formats_is_as_recorded(name: str, most: float) -> None:
    fmt = LiftFormat.parse(name)
    made = mapping_provenance(fmt)
    measured = lattice.lattice_eval(fmt, made["beam"], samples=2048, device="cpu")
    assert measured["mse"] < made["mse"] + 5 * measured["standard_error"]
    assert made["mse"] < most


def test_learning_is_deterministic_and_lowers_the_error() -> None:
    first, again = (learn_mapping(SMALL, QUICK) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, learn_mapping(SMALL, replace(QUICK, seed=4)))
    start = torch.linalg.qr(torch.randn(6, 3, generator=torch.Generator().manual_seed(3)))[0].T.contiguous()
    before = mapping.evaluate_mapping(start, 8, 2048, 1)[0]
    after = mapping.evaluate_mapping(first, 8, 2048, 1)[0]
    assert after < 0.9 * before
    assert after > lattice.bound(SMALL)


def test_a_windowed_start_and_a_given_start() -> None:
    windowed = learn_mapping(SMALL, replace(QUICK, band=1.0))
    assert windowed.shape == (3, 6)
    continued = learn_mapping(SMALL, replace(QUICK, steps=2), start=windowed)
    assert (continued - windowed).abs().max() < (learn_mapping(SMALL, QUICK) - windowed).abs().max()


def test_a_format_without_shipped_matrix_is_learned_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mapping, "ON_THE_SPOT", replace(QUICK, steps=4))
    assert SMALL not in mapping.shipped_formats()
    matrix = load_mapping(SMALL)
    assert "learning a mapping matrix for LQ-6/3" in capsys.readouterr().err
    assert mapping_provenance(SMALL)["source"] == "learned on the spot"
    load_mapping.cache_clear()
    assert torch.equal(load_mapping(SMALL), matrix)
    assert capsys.readouterr().err == ""
    (path,) = (Path(mapping.env.cache_dir()) / "mapping").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-9])  # a damaged cache is learned again, not trusted
    load_mapping.cache_clear()
    assert torch.equal(load_mapping(SMALL), matrix)


def test_damaged_mapping_files_are_refused(tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    matrix = torch.ones(3, 6)
    mapping.write_mappings(good, {SMALL: (matrix, {"lam": 0.1})})
    assert torch.equal(mapping.read_mapping(good, SMALL), matrix)
    with pytest.raises(QuantizeError, match="cannot read"):
        mapping.read_mapping(good, LiftFormat(7, 3))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-4])
    for read in (lambda: mapping.read_mapping(cut, SMALL), lambda: mapping.read_provenance(cut)):
        with pytest.raises(QuantizeError, match="cannot read") as caught:
            read()
        assert "\n" not in str(caught.value)
    for bad in (torch.ones(6, 3), torch.ones(3, 6) * float("nan"), torch.ones(3, 6, dtype=torch.float64)):
        odd = tmp_path / "odd.safetensors"
        from safetensors.torch import save_file

        save_file({str(SMALL): bad}, odd, {str(SMALL): json.dumps({})})
        with pytest.raises(QuantizeError, match="not a finite float32 matrix of shape"):
            mapping.read_mapping(odd, SMALL)


def test_evaluation_matches_encode_and_decode() -> None:
    matrix = learn_mapping(SMALL, QUICK)
    mse, error, seconds = mapping.evaluate_mapping(matrix, 8, 500, seed=9, lam=0.08)
    w = torch.randn(500, 3, generator=torch.Generator().manual_seed(9))
    expected = (w - decode(encode(w, matrix, beam=8, lam=0.08), matrix)).square().mean().item()
    assert mse == pytest.approx(expected, rel=1e-5)
    assert 0 < error < mse and seconds > 0
    with pytest.raises(QuantizeError, match="at least 2 samples"):
        mapping.evaluate_mapping(matrix, 8, 1, seed=9)


def test_lattice_train_adds_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    made = lattice.lattice_train(SMALL, path, QUICK, device="cpu", samples=256)
    lattice.lattice_train(LiftFormat(5, 3), path, QUICK, device="cpu", samples=256)
    matrices = lattice.read_all(path)
    assert set(matrices) == {SMALL, LiftFormat(5, 3)}
    assert matrices[SMALL][1]["mse"] == made["mse"] and made["steps"] == QUICK.steps
    with pytest.raises(QuantizeError, match="no such mapping file"):
        lattice.read_all(tmp_path / "none.safetensors")


def test_lattice_eval_and_show_report_what_the_cli_prints() -> None:
    row = lattice.lattice_eval(LiftFormat(77, 32), beam=4, samples=256, device="cpu")
    assert {"bits", "mse", "standard_error", "seconds_per_million_weights"} <= row.keys()
    assert row["bits"] == 2.40625 and row["weights"] == 256 * 32
    again = lattice.lattice_eval(LiftFormat(77, 32), beam=4, samples=256, device="cpu")
    assert again["mse"] == row["mse"]
    shown = lattice.lattice_show(LiftFormat(77, 32))
    assert shown["shape"] == [32, 77]
    assert "LQ-77/32" in [line["format"] for line in lattice.lattice_show()["formats"]]
    json.dumps([row, shown])
