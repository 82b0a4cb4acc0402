"""What `liftc bench` prints, draws and shows again: text, points of the roofline, records; nothing is measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from operand_layouts import tile_layout
from test_records import record

pytest.importorskip("tvm", reason="records name knobs of kernels that TVM builds")
from liftc import cli
from liftc.driver.bench import within_shared
from liftc.driver.bench_fused import surroundings
from liftc.driver.bench_many import signs_of_tiles
from liftc.driver.bench_plot import point
from liftc.driver.bench_text import line_text, table_text
from liftc.kernel_object import KernelFunction, KernelObject
from liftc.kernel_records import append_records, parse_record
from liftc.packing import unpack_signs
from liftc.runtime.kernels import Kernels


def test_records_are_shown_without_measuring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.jsonl"
    old, wrong = record(kernel_version=0, microseconds=0.5), record(status="wrong", microseconds=0.1)
    slow, fast, other = record(microseconds=9.0), record(microseconds=7.0), record(batch=4, microseconds=1.0)
    append_records(file, [slow, fast, other, old, wrong])
    assert cli.main(["bench", "records", str(file), "--batch", "1", "-q"]) == 0
    text = capsys.readouterr().out
    assert "| 4096x4096 | LQ-77/32 | 1 | 7.0 (20.0) |" in text and "0.5" not in text and "| 4 |" not in text
    assert cli.main(["bench", "records", str(file), "--batch", "2", "-q"]) == 2


def test_within_shared_leaves_out_what_does_not_fit() -> None:
    functions = tuple(
        KernelFunction(f"f{size}", "sign_matmul_tiled", "", shared_bytes=size) for size in (0, 99, 101)
    )
    made = KernelObject(Path("a.so"), "cuda", ("sm_90a",), "", (), "", 1, (), functions, "")
    kernels = Kernels(made, "cuda", {f.symbol: print for f in functions}, None)
    assert [f.symbol for f in within_shared(kernels, 99).of("sign_matmul_tiled")] == ["f0", "f99"]


def test_signs_are_read_from_tiles_by_torch() -> None:
    packed = torch.randint(
        -(2**31), 2**31, (2, 300), dtype=torch.int32, generator=torch.Generator().manual_seed(0)
    )
    signs = signs_of_tiles(tile_layout(packed), 49, 300)
    assert torch.equal(signs, unpack_signs(packed, 49))


def test_tables_compare_with_one_token_dense_and_writing() -> None:
    chain = {"out_features": 0, "in_features": 0, "chain": "8x8+8x16*2"}
    share = {"write_ceiling_gbs": 50.0, "fraction_of_write_ceiling": 0.7, "rows": 8}
    rows = [
        record(kernel="lift", microseconds=10.0, **chain), record(kernel="lift", batch=4, microseconds=11.0, **chain),
        record(kernel="lifted_linear", batch=300, microseconds=20.0),
        record(kernel="cublas.float16", batch=300, microseconds=15.0),
        record(kernel="unpack_tiles", microseconds=1.0, gigabytes_per_second=35.0, knobs=share),
    ]  # fmt: skip
    assert [parse_record(r.line()) for r in rows] == rows
    answer = {"device": "D", "kernels": "k.so", "read_ceiling_gbs": 60.0, "not_installed": []}
    text = table_text(answer, rows)
    assert "| 4 | 11.0 (20.0) 1.10x |" in text and "| 300 | 20.0 0.75x | 15.0 |" in text
    assert "| 1 | 1.0, 35 GB/s (70.0) |" in text and "70.0 % of writing" in line_text(rows[-1])


def test_every_surrounding_of_a_linear_has_a_row() -> None:
    rows = [
        record(kernel=kernel, microseconds=time, knobs={"form": form}, read_ceiling_gbs=None, fraction_of_ceiling=None)
        for form, times in (("norm", (9.0, 7.0)), ("layer norm, bias", (8.0, 6.0)))
        for kernel, time in zip(("separate+lift+sign_matmul", "fused+lift+sign_matmul"), times)
    ]  # fmt: skip
    answer = {"device": "D", "kernels": "k.so", "read_ceiling_gbs": 60.0, "not_installed": []}
    text = table_text(answer, rows)
    size = f"{rows[0].out_features}x{rows[0].in_features}"
    assert f"| {size}, norm | LQ-77/32 | 1 | 9.0 | 7.0 |" in text
    assert f"| {size}, layer norm, bias | LQ-77/32 | 1 | 8.0 | 6.0 |" in text


@pytest.mark.parametrize("shape", [(4096, 1024), (1024, 1024), (1024, 4096)])
def test_surroundings_of_a_linear(shape: tuple[int, int]) -> None:
    found = surroundings(shape)
    assert len({around.name for around in found}) == len(found) == (1 if shape[0] == shape[1] else 3)
    assert all(around.residual == (shape[0] <= shape[1]) for around in found)


def test_points_of_the_roofline() -> None:
    chain = record(out_features=0, in_features=0, chain="100x50+10x20*2", batch=3, microseconds=2.0,
                   gigabytes_per_second=1.0)  # fmt: skip
    intensity, rate = point(chain)
    operations = 2 * 3 * 2 * (100 * 50 + 10 * 20)
    assert intensity == pytest.approx(operations / 2000.0) and rate == pytest.approx(operations / 2e-6 / 1e12)
