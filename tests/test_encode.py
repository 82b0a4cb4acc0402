"""The beam encoder: every back end against the plain torch search, the search against exact search."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liftc.errors import QuantizeError
from liftc.quant import beam_llvm, beam_llvm_kernel
from liftc.quant.encode import (
    Prepared,
    decode,
    encode,
    prepare,
    project,
    search,
    search_reference,
)
from liftc.quant.exact import encode_exact, measure_gap


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def frame(d: int, big: int, seed: int = 0) -> torch.Tensor:
    """A mapping matrix with orthonormal rows."""
    return torch.linalg.qr(gaussian(big, d, seed=seed))[0].T.contiguous()


def assert_same(targets: torch.Tensor, prepared: Prepared, beam: int) -> None:
    signs, cost = search(targets, prepared, beam)
    expected, least = search_reference(targets, prepared, beam)
    assert signs.dtype == torch.int8 and signs.shape == targets.shape
    assert torch.equal(signs, expected)
    assert torch.equal(cost, least)


@pytest.mark.parametrize(
    ("big", "d", "beam"),
    [(1, 1, 1), (2, 1, 4), (5, 3, 1), (16, 8, 16), (17, 8, 3), (33, 16, 33), (64, 32, 16), (77, 32, 1),
     (77, 32, 17), (77, 32, 64), (77, 32, 128), (96, 32, 40), (128, 64, 16), (154, 64, 16), (256, 100, 5)],
)  # fmt: skip
def test_compiled_search_equals_reference(big: int, d: int, beam: int) -> None:
    prepared = prepare(frame(d, big))
    w = gaussian(9, d, seed=1)
    w[3] = 0  # ties at every level
    w[4] *= 1000
    w[5] *= 1e-6
    assert_same(project(w, prepared, beam), prepared, beam)


def test_full_beam_4096() -> None:
    prepared = prepare(frame(8, 20))
    assert_same(project(gaussian(2, 8), prepared, 4096), prepared, 4096)


@settings(max_examples=20, deadline=None)
@given(
    d=st.integers(1, 20), extra=st.integers(0, 40), beam=st.integers(1, 80), rows=st.integers(1, 6),
    lam=st.sampled_from([0.01, 0.05, 0.3]), with_metric=st.booleans(), seed=st.integers(0, 10_000),
)  # fmt: skip
def test_property_compiled_equals_reference(
    d: int, extra: int, beam: int, rows: int, lam: float, with_metric: bool, seed: int
) -> None:
    metric = torch.eye(d) + 0.3 * gaussian(d, d, seed=seed + 1) if with_metric else None
    if metric is not None and torch.linalg.cond(metric) > 1e5:
        metric = None
    prepared = prepare(gaussian(d, d + extra, seed=seed), metric, lam)
    targets = project(gaussian(rows, d, seed=seed + 2), prepared, beam)
    assert_same(targets, prepared, beam)
    # duplicated columns make equal costs between different prefixes
    twice = prepare(gaussian(d, d + extra, seed=seed).repeat(1, 2)[:, : min(2 * (d + extra), 256)], None, lam)
    assert_same(project(gaussian(rows, d, seed=seed + 2), twice, beam), twice, beam)


@pytest.mark.parametrize(("cpu", "static"), [("x86-64", 0), ("x86-64-v3", 0), ("x86-64-v3", 20)])
def test_kernels_of_lesser_processors_give_the_same_signs(
    cpu: str, static: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = beam_llvm_kernel.build(static, cpu)
    monkeypatch.setattr(beam_llvm, "_kernel", lambda beam: kernel)
    for big, d, beam in ((77, 32, static or 64), (40, 16, static or 10), (9, 4, static or 1)):
        prepared = prepare(frame(d, big))
        w = gaussian(5, d, seed=3)
        w[0] = 0
        assert_same(project(w, prepared, beam), prepared, beam)


def test_rows_are_independent_of_batch_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(frame(16, 40))
    targets = project(gaussian(700, 16), prepared, 8)
    monkeypatch.setenv("LIFTC_NUM_THREADS", "1")
    alone = search(targets, prepared, 8)[0]
    monkeypatch.setenv("LIFTC_NUM_THREADS", "3")
    together = search(targets, prepared, 8)[0]
    assert torch.equal(alone, together)
    assert torch.equal(search(targets[333:334], prepared, 8)[0], together[333:334])


def test_cost_is_the_metric_error_plus_a_constant() -> None:
    matrix, metric, lam = frame(8, 20), torch.eye(8) + 0.2 * gaussian(8, 8, seed=5), 0.07
    prepared = prepare(matrix, metric, lam)
    w = gaussian(6, 8, seed=6)
    targets = project(w, prepared, 16)
    signs, cost = search(targets, prepared, 16)
    unit = (metric / (metric.square().sum() / 8).sqrt()).double()
    error = ((w.double() - signs.double() @ matrix.double().T) @ unit.T).square().sum(1)
    constant = lam * 20 + targets.double().square().sum(1) - (w.double() @ unit.T).square().sum(1)
    assert torch.allclose(cost.double(), error + constant, rtol=1e-5, atol=1e-5)


def test_metric_steers_the_search_and_its_scale_does_not_matter() -> None:
    matrix, w = frame(8, 20), gaussian(200, 8, seed=2)
    metric = torch.diag(torch.tensor([10.0, 5, 2, 1, 1, 0.5, 0.2, 0.1]))

    def error(signs: torch.Tensor) -> float:
        return float(((w - decode(signs, matrix)) @ metric.T).square().sum())

    steered = encode(w, matrix, metric=metric)
    assert error(steered) < 0.5 * error(encode(w, matrix))
    assert torch.equal(steered, encode(w, matrix, metric=64.0 * metric))


def test_wider_beams_are_better_and_reach_the_exact_search() -> None:
    matrix = frame(8, 16)
    gaps = [measure_gap(matrix, beam, samples=128) for beam in (1, 4, 16, 64, 256)]
    assert all(a.beam > b.beam for a, b in itertools.pairwise(gaps[:4]))
    assert gaps[-1].share_exact == 1.0 and gaps[-1].beam == pytest.approx(gaps[-1].exact, rel=1e-6)
    assert gaps[2].beam < 1.25 * gaps[2].exact


@pytest.mark.parametrize("d", [1, 3])
def test_exact_search_is_exhaustive(d: int) -> None:
    matrix, w, metric = gaussian(d, 7), gaussian(20, d, seed=1), torch.eye(d) + 0.1 * gaussian(d, d, seed=2)
    points = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=7)))
    errors = ((w[:, None] - (points @ matrix.T)[None]) @ metric.T).square().sum(2)
    found = ((w - decode(encode_exact(w, matrix, metric=metric), matrix)) @ metric.T).square().sum(1)
    assert torch.allclose(found, errors.min(1).values, rtol=1e-5, atol=1e-9)


def test_exact_search_refuses_large_formats() -> None:
    with pytest.raises(QuantizeError, match="limit is 24"):
        encode_exact(gaussian(1, 8), frame(8, 25))
    with pytest.raises(QuantizeError, match="do not fit"):
        encode_exact(gaussian(1, 7), frame(8, 16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_strides(dtype: torch.dtype) -> None:
    matrix, w = frame(4, 9), gaussian(6, 8, seed=4).to(dtype)
    strided = w[:, ::2]
    assert not strided.is_contiguous()
    assert torch.equal(encode(strided, matrix), encode(strided.float().contiguous(), matrix))


def test_empty_batch() -> None:
    signs = encode(torch.empty(0, 4), frame(4, 9))
    assert signs.shape == (0, 9) and signs.dtype == torch.int8
    assert decode(signs, frame(4, 9)).shape == (0, 4)


def test_decode() -> None:
    matrix = frame(4, 9)
    signs = encode(gaussian(5, 4), matrix)
    assert set(signs.unique().tolist()) <= {-1, 1}
    assert torch.allclose(decode(signs, matrix), signs.float() @ matrix.T)
    with pytest.raises(QuantizeError, match="do not fit"):
        decode(signs[:, :8], matrix)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.full((2, 4), float("nan"))}, "NaN or infinity"),
        ({"w": torch.full((2, 4), float("inf"))}, "NaN or infinity"),
        ({"w": torch.full((2, 4), 1e30)}, "too large"),
        ({"w": torch.zeros(2, 5)}, "do not split into rows of d = 4"),
        ({"w": torch.zeros(4)}, "do not split into rows of d = 4"),
        ({"mapping_matrix": torch.zeros(4)}, r"is \(d, D\)"),
        ({"mapping_matrix": frame(4, 4)[:, :3]}, "needs 1 <= d <= D <= 256"),
        ({"mapping_matrix": torch.zeros(4, 257)}, "needs 1 <= d <= D <= 256"),
        ({"mapping_matrix": torch.full((4, 9), float("nan"))}, "mapping matrix contains NaN"),
        ({"beam": 0}, "beam must lie between 1 and 4096"),
        ({"beam": 4097}, "beam must lie between 1 and 4096"),
        ({"lam": 0.0}, "lam must be a positive number"),
        ({"lam": float("nan")}, "lam must be a positive number"),
        ({"metric": torch.eye(5)}, "metric must be"),
        ({"metric": torch.diag(torch.tensor([1.0, 1, 1, 0]))}, "not positive definite"),
        ({"metric": torch.full((4, 4), float("inf"))}, "metric contains NaN"),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"w": torch.zeros(2, 4), "mapping_matrix": frame(4, 9), **change}
    w, matrix = arguments.pop("w"), arguments.pop("mapping_matrix")
    with pytest.raises(QuantizeError, match=message) as caught:
        encode(w, matrix, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_device_without_encoder_is_refused() -> None:
    prepared = prepare(frame(4, 9))
    with pytest.raises(QuantizeError, match="no encoder for device meta"):
        search(
            torch.zeros(2, 9, device="meta"),
            replace(prepared, mapping_matrix=torch.zeros(4, 9, device="meta")),
            4,
        )
