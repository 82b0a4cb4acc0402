"""Records of measurements: what is accepted, what is refused and how, merging, and the knobs derived from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liftc import kernel_records
from liftc.codegen import library, search
from liftc.codegen.best_knobs import (
    ShapeRequest,
    batches_of,
    best_knobs,
    cpu_choice,
    cuda_choices,
    knobs_from_json,
    knobs_to_json,
)
from liftc.codegen.default_knobs import CPU_KNOBS, SHARED_BYTES, chip_family
from liftc.codegen.knobs import CpuKnobs, LiftKnobs, TensorCoreKnobs
from liftc.errors import RecordError
from liftc.format import LiftFormat
from liftc.kernel_records import (
    Record,
    append_records,
    merge_records,
    parse_record,
    read_records,
    records_file,
)

FMT = LiftFormat(77, 32)
ROOT = Path(__file__).resolve().parents[1]


def record(**changes: Any) -> Record:
    values: dict[str, Any] = {
        "kernel": "sign_matmul_tiled", "kernel_version": library.KERNEL_VERSION, "arch": "sm_90a", "device": "GPU 1",
        "format": "LQ-77/32", "out_features": 4096, "in_features": 4096, "batch": 1,
        "knobs": knobs_to_json(TensorCoreKnobs(1)), "status": "ok", "microseconds": 10.0,
        "gigabytes_per_second": 500.0, "read_ceiling_gbs": 3000.0, "fraction_of_ceiling": 0.2, "torch": "2.11",
        "driver": "580.1", "when": "2026-01-31T12:00:00Z",
    }  # fmt: skip
    return Record(**{**values, **changes})


def timed(knobs: TensorCoreKnobs | LiftKnobs, time: float, **changes: Any) -> Record:
    return record(knobs=knobs_to_json(knobs), microseconds=time, **changes)


records = st.builds(
    record,
    out_features=st.integers(0, 1 << 20),
    in_features=st.integers(1, 1 << 20),
    batch=st.integers(1, 64),
    microseconds=st.floats(0, 1e9),
    knobs=st.dictionaries(
        st.text(max_size=8), st.one_of(st.integers(), st.booleans(), st.text(max_size=5), st.lists(st.integers()))
    ),
    status=st.just("ok"),
    reason=st.text(max_size=20),
    device=st.text(min_size=1, max_size=20),
)  # fmt: skip


@given(records)
def test_a_line_says_the_same_as_the_record(made: Record) -> None:
    assert parse_record(made.line()) == made
    assert "\n" not in made.line()


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"status": "fine"}, "status 'fine' is none of"),
        ({"batch": 0}, "batch is not at least 1"),
        ({"batch": True}, "batch is not a count"),
        ({"kernel_version": "3"}, "kernel_version is not a count"),
        ({"microseconds": -1.0}, "microseconds is not a figure"),
        ({"microseconds": None}, "microseconds is not a figure"),
        ({"microseconds": float("nan")}, "microseconds is not a figure"),
        ({"format": "LQ-0/32"}, "does not exist"),
        ({"when": "yesterday"}, "when is not written as"),
        ({"device": ""}, "must not be empty"),
        ({"in_features": 0}, "in_features is 0 and there is no chain"),
        ({"chain": "4096x4096"}, "is not written as OCxIC"),
        ({"knobs": ["ring=4"]}, "knobs is not an object"),
        ({"knobs": {"ring": None}}, "knobs is not an object"),
        ({"extra": 1}, "there is no field 'extra'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    path = tmp_path / "GPU.jsonl"
    path.write_text(record().line() + "\n\n" + json.dumps({**record().to_json(), **change}) + "\n")
    with pytest.raises(RecordError, match=rf"GPU.jsonl, line 3: .*{reason}") as caught:
        read_records(path)
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("missing", ["kernel", "knobs", "read_ceiling_gbs", "when"])
def test_every_field_is_needed(tmp_path: Path, missing: str) -> None:
    values = record().to_json()
    del values[missing]
    (tmp_path / "a.jsonl").write_text(json.dumps(values))
    with pytest.raises(RecordError, match=f"line 1: {missing} is missing"):
        read_records(tmp_path / "a.jsonl")


@given(st.one_of(st.binary(max_size=80).map(lambda b: b.decode("utf-8", "replace")), st.just("[" * 9000)))
def test_noise_is_never_a_record(text: str) -> None:
    with pytest.raises((ValueError, RecursionError)):
        parse_record(text)


def test_half_a_line_is_cut_off_and_nothing_else_is_lost(tmp_path: Path) -> None:
    path = records_file(tmp_path / "new", "NVIDIA H100 80GB HBM3")
    assert path.name == "NVIDIA-H100-80GB-HBM3.jsonl"
    append_records(path, [record()])
    with path.open("a") as stream:
        stream.write(record(batch=2).line()[:50])
    append_records(path, [record(batch=3), record(batch=4)])
    assert [r.batch for r in read_records(path)] == [1, 3, 4]


def test_merge_keeps_each_record_once_in_a_fixed_order(tmp_path: Path) -> None:
    a, b, out = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "out.jsonl"
    append_records(a, [record(batch=2), record(batch=1)])
    append_records(b, [record(batch=1), record(batch=1, microseconds=11.0), record(device="CPU")])
    assert merge_records([a, b], out) == (4, 1)
    first = out.read_bytes()
    assert merge_records([b, out, a], out) == (4, 5) and out.read_bytes() == first
    b.write_text("{}\n")
    with pytest.raises(RecordError, match=r"b\.jsonl, line 1"):
        merge_records([a, b], out)
    assert out.read_bytes() == first and not list(tmp_path.glob("tmp*"))


def test_the_records_that_come_with_liftc_are_valid() -> None:
    for path in (ROOT / "codegen" / "records").glob("*.jsonl"):
        found = read_records(path)
        assert found and {records_file(path.parent, r.device) for r in found} == {path}


# ---------------------------------------------------------------- the best knobs

SLOW, FAST, OTHER = (TensorCoreKnobs(1, ring=ring, dependent_launch=True) for ring in (4, 6, 8))
SHAPES = ((4096, 4096), (8192, 1024))
REQUESTS = tuple(ShapeRequest(FMT, *shape) for shape in SHAPES)


def sweep(times: dict[TensorCoreKnobs, tuple[float, float]]) -> list[Record]:
    return [
        timed(knobs, time, out_features=rows, in_features=columns)
        for knobs, pair in times.items()
        for time, (rows, columns) in zip(pair, SHAPES, strict=True)
    ]


def best(found: list[Record], requests: tuple[ShapeRequest, ...] = REQUESTS, **changes: Any) -> Any:
    options = {"arch": "sm_90a", "tokens": (1, 1), **changes}
    return best_knobs(
        found, "sign_matmul_tiled", TensorCoreKnobs, options["arch"], requests, options["tokens"]
    )


def test_the_least_geometric_mean_wins() -> None:
    found = sweep({SLOW: (10.0, 12.0), FAST: (11.0, 9.0), OTHER: (9.0, 13.0)})
    choice = best(found)
    assert choice.knobs == FAST and (choice.candidates, choice.measured, choice.shapes) == (3, 2, 2)
    assert choice.describe() == "best of 3 on sm_90a, these shapes"
    assert best(found, REQUESTS[:1]).knobs == OTHER


def test_the_default_stays_unless_others_are_faster_by_more_than_noise() -> None:
    for time, want in ((9.99, SLOW), (9.9, FAST)):
        found = sweep({SLOW: (10.0, 10.0), FAST: (time, time)})
        choice = best_knobs(found, "sign_matmul_tiled", TensorCoreKnobs, "sm_90a", REQUESTS, (1, 1), SLOW)
        assert choice is not None and choice.knobs == want and choice.candidates == 2
        assert best(found).knobs == FAST


def test_wrong_failed_partial_and_foreign_records_do_not_count() -> None:
    found = sweep({SLOW: (10.0, 10.0), FAST: (1.0, 1.0), OTHER: (2.0, 2.0)})
    for status in ("wrong", "failed", "refused"):
        bad = record(knobs=knobs_to_json(FAST), status=status, microseconds=None)
        assert best([*found, bad]).knobs == OTHER
    assert best([r for r in found if (r.knobs["ring"], r.in_features) != (6, 1024)]).knobs == OTHER
    assert best([replace(r, kernel_version=library.KERNEL_VERSION - 1) for r in found]) is None
    assert best([replace(r, kernel="lift_planes") for r in found]) is None
    assert best(found, arch="sm_89") is None and best(found, tokens=(1, 4)) is None
    assert best([replace(r, knobs={**r.knobs, "gone": 1}) for r in found]) is None
    assert best(found, ()) is None and best([]) is None


def test_the_nearest_shape_stands_in() -> None:
    found = sweep({SLOW: (10.0, 5.0), FAST: (9.0, 50.0)})
    near, far = ShapeRequest(FMT, 5120, 5120), ShapeRequest(LiftFormat(64, 32), 8000, 1000)
    choice = best(found, (near,))
    assert choice.knobs == FAST and choice.measured == 0
    assert choice.describe() == "best of 2 on sm_90a, 0 of 1 shapes, the nearest measured ones for the rest"
    assert best(found, (far,)).knobs == SLOW


def test_a_chain_takes_the_place_of_the_shapes_in_it() -> None:
    found = sweep({SLOW: (10.0, 10.0), FAST: (5.0, 5.0)})
    chain = {"out_features": 0, "in_features": 0, "chain": "4096x4096+8192x1024*3"}
    found += [timed(SLOW, 60.0, **chain), timed(FAST, 61.0, **chain)]
    assert best(found).knobs == SLOW
    assert best(found, (ShapeRequest(FMT, 5120, 5120),)).knobs == SLOW  # for which 4096 x 4096 stands in
    assert best(found, REQUESTS[:1]).knobs == FAST
    other = {**chain, "chain": "4096x4096+512x512*3"}
    assert best([*found[:4], timed(SLOW, 60.0, **other), timed(FAST, 90.0, **other)]).knobs == FAST


def test_a_lift_measured_on_some_shapes_is_judged_by_chains_of_all() -> None:
    one, other = LiftKnobs(ahead=2), LiftKnobs(ahead=4)
    lifts = {"kernel": "lift_planes", "out_features": 0}
    chain = {**lifts, "in_features": 0, "chain": "4096x4096+8192x1024*3"}
    found = [timed(one, 10.0, **lifts, in_features=4096), timed(other, 9.0, **lifts, in_features=4096)]
    choice = best_knobs(found, "lift_planes", LiftKnobs, "sm_90a", REQUESTS, (1, 1), one)
    assert choice is not None and choice.knobs == other
    found += [timed(one, 60.0, **chain), timed(other, 90.0, **chain)]
    choice = best_knobs(found, "lift_planes", LiftKnobs, "sm_90a", REQUESTS, (1, 1), one)
    assert choice is not None and choice.knobs == one and (choice.measured, choice.shapes) == (1, 2)


def test_choices_of_an_object_say_where_they_come_from() -> None:
    found = [replace(r, arch="sm_90") for r in sweep({SLOW: (10.0, 10.0), FAST: (9.0, 9.0)})]
    chosen, said = cuda_choices(found, ("sm_80", "sm_90"), REQUESTS)
    usual = {t.op: t.choices() for t in library.TUNED_TEMPLATES}
    tiled = chosen["server", "sign_matmul_tiled"]
    assert tiled[0] == FAST and tiled[1:] == usual["sign_matmul_tiled"]["server"][1:]
    assert chosen["ampere", "sign_matmul_tiled"] == usual["sign_matmul_tiled"]["ampere"]
    assert "server sign_matmul_tiled up to batch 1: best of 2 on sm_90, these shapes" in said
    assert any(
        text.startswith("ampere lift_planes") and text.endswith("the defaults of ampere") for text in said
    )


def test_cpu_knobs_of_the_two_kernels_come_from_their_own_records() -> None:
    level = "x86-64-v4"
    lifted = replace(CPU_KNOBS[level], lift_rows=2, row_lanes=16)
    base = {"arch": level, "device": "CPU", "knobs": knobs_to_json(lifted)}
    found = [record(kernel="lift", out_features=0, in_features=4096, **base)]
    knobs, said = cpu_choice(found, level, REQUESTS)
    assert knobs == replace(CPU_KNOBS[level], lift_rows=2) and len(said) == 2
    assert "defaults" in said[0] and "best of 1" in said[1]


@pytest.mark.parametrize("kind", [TensorCoreKnobs, CpuKnobs, *(t.knobs for t in library.TUNED_TEMPLATES)])
def test_knobs_survive_json(kind: type[Any]) -> None:
    knobs = kind()
    values = json.loads(json.dumps(knobs_to_json(knobs)))
    assert knobs_from_json(kind, values) == knobs
    name, value = next((n, v) for n, v in values.items() if type(v) is int)
    assert knobs_from_json(kind, {**values, name: str(value)}) is None
    assert knobs_from_json(kind, {k: v for k, v in values.items() if k != name}) is None


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a", "sm_120"])
@pytest.mark.parametrize("limit", [None, 99 << 10])
def test_candidates_fit_and_start_with_the_present_choice(arch: str, limit: int | None) -> None:
    family = chip_family(arch)
    found = search.cuda_candidates(arch, (1, 8), 9, shared_bytes=limit)
    most = min(limit or SHARED_BYTES[family], SHARED_BYTES[family])
    assert found and all(c.knobs.shared_bytes() <= most for c in found)
    assert len(set(found)) == len(found) == len({(c.op, c.knobs) for c in found})
    assert [c.rank for c in found] == sorted(c.rank for c in found)
    for c in found:  # a warp group gives and takes registers as a whole
        assert not getattr(c.knobs, "multiply_registers", 0) or c.knobs.threads() % 128 == 0
    for tuned in library.TUNED_TEMPLATES:
        mine = [c for c in found if c.op == tuned.op]
        if limit is None and tuned.choices().get(family):
            present = {replace(c.knobs, pad_bytes=0) if hasattr(c.knobs, "pad_bytes") else c.knobs
                       for c in mine if c.rank == 0}  # fmt: skip
            usual = tuned.choices()[family]
            assert present <= {replace(k, pad_bytes=0) if hasattr(k, "pad_bytes") else k for k in usual}
        assert {c.knobs.tokens for c in mine} <= {k.tokens for k in tuned.choices().get(family, ())}
    serve_one = [k for k in library.LIFT_KNOBS[family] if batches_of(family, "lift_planes", k.tokens)[0] == 1]
    found = search.cuda_candidates(arch, (1,), 3, ops=("lift_planes",))
    assert [c.op for c in found] == ["lift_planes"] * 3 * len(serve_one) and serve_one
    grouped = library.GROUP_LIFT_KNOBS.get(family, ())
    found = search.cuda_candidates(arch, (4, 16), 9, ops=("lift_planes_grouped",))
    assert [c.knobs for c in found if c.rank == 0] == [k for k in grouped if k.tokens in (4, 16)]
    assert len(found) > len(grouped) or not grouped


def test_chains_are_read_as_written() -> None:
    assert kernel_records.chain_shapes("1x2+30x40*5") == ((1, 2), (30, 40))
    for text in ("", "1x2", "1x2*0", "1x*2", "1x2+*3", "0x2*1", "1x2*-1"):
        with pytest.raises(ValueError, match="chain"):
            kernel_records.chain_shapes(text)
