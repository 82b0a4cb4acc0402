"""Which kernels a candidate of a sweep stands in for; what measures it is in tests/test_tuning.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from liftc.bundle import BundleCandidate
from liftc.kernel_object import KernelFunction, KernelObject
from liftc.runtime import candidates
from liftc.runtime.candidates import Bench
from liftc.runtime.kernels import Kernels
from liftc.runtime.operands import Linear
from liftc.runtime.ops import Ops
from liftc.runtime.planes import PlaneKernels

pytest.importorskip("tvm", reason="the list of kernels names templates of TVM")
from liftc.codegen import library
from liftc.codegen.best_knobs import knobs_to_json
from liftc.codegen.default_knobs import BINARY_KNOBS, GROUP_LIFT_KNOBS, LIFT_KNOBS

HOPPER = ("hopper", ("sm_90a",))


def kernels(functions: list[KernelFunction]) -> Kernels:
    made = KernelObject(Path("k.so"), "cuda", ("sm_90a",), "", (), "", 1, (), tuple(functions), "")
    return Kernels(made, "cuda", {f.symbol: print for f in functions}, None)


def base() -> list[KernelFunction]:
    templates = [
        *library.lift_templates(*HOPPER, LIFT_KNOBS["hopper"]),
        *library.group_lift_templates(*HOPPER, GROUP_LIFT_KNOBS["hopper"]),
        *library.binary_templates(*HOPPER, BINARY_KNOBS["hopper"]),
        *library.fixed_templates(*HOPPER),
    ]
    return [template.function for template in templates]


def ops(found: Kernels) -> Ops:
    """What Ops has of tiles and planes."""
    products = tuple(found.of("sign_matmul_binary"))
    return cast(Ops, SimpleNamespace(tiles=SimpleNamespace(planes=PlaneKernels(found, products))))


def linear(tokens: int, t1: int, t2: int, tiled: bool = True) -> Linear:
    shapes: dict[str, Any] = {"x": (tokens, t1 * t2), "left": (t1, t1), "right": (t2, 40)}
    made = {
        name: torch.ones(shape, dtype=torch.bfloat16 if name == "x" else None)
        for name, shape in shapes.items()
    }
    return cast(Linear, SimpleNamespace(signs=torch.empty((1, 1, 32, 4) if tiled else (1, 9)), **made))


def test_a_lift_stands_in_for_that_of_its_tokens_and_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = next(
        k for k in GROUP_LIFT_KNOBS["hopper"] if (k.tokens, k.most_left, k.most_right) == (4, 128, 128)
    )
    knobs = replace(usual, tiles=1)
    mine = [
        t.function
        for t in library.group_lift_templates("other", ("sm_90a",), (knobs,))
        if t.function.dtype == "bf16"
    ]
    mine = [f for f in mine if f.op == "lift_planes_grouped"]
    candidate = BundleCandidate(
        "lift_planes_grouped", knobs_to_json(knobs), 1, "c0.so", tuple(f.symbol for f in mine)
    )
    monkeypatch.setattr(candidates, "load_kernels", lambda path, device: kernels(mine))
    bench = object.__new__(Bench)
    bench.folder, bench.device, bench.base = Path("."), torch.device("cpu"), kernels(base())
    found = bench._with(candidate)
    assert found is not None
    alone, among = map(ops, found)
    for tokens, t1, t2, alone_takes, among_takes in (
        (4, 100, 128, True, True), (3, 65, 64, True, True), (4, 64, 100, True, False), (4, 128, 200, False, False),
        (8, 100, 128, False, False), (1, 100, 128, True, False),
    ):  # fmt: skip
        assert bench._takes(alone, candidate, linear(tokens, t1, t2)) == alone_takes, (tokens, t1, t2)
        assert bench._takes(among, candidate, linear(tokens, t1, t2)) == among_takes, (tokens, t1, t2)
        assert not bench._takes(among, candidate, linear(tokens, t1, t2, tiled=False))
    other = replace(candidate, op="sign_matmul_binary")
    assert bench._takes(among, other, linear(1, 1, 1))


def test_a_product_stands_in_for_all_products(monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = replace(BINARY_KNOBS["hopper"][0], ring=2)
    mine = [t.function for t in library.binary_templates("other", ("sm_90a",), (knobs,))]
    candidate = BundleCandidate("sign_matmul_binary", knobs_to_json(knobs), 1, "c0.so", (mine[0].symbol,))
    monkeypatch.setattr(candidates, "load_kernels", lambda path, device: kernels(mine))
    bench = object.__new__(Bench)
    bench.folder, bench.device, bench.base = Path("."), torch.device("cpu"), kernels(base())
    found = bench._with(candidate)
    assert found is not None and found[0].object == found[1].object
    assert [f.symbol for f in found[0].of("sign_matmul_binary")] == [mine[0].symbol]
    assert found[0].of("lift_planes") == bench.base.of("lift_planes")
    assert bench._with(replace(candidate, symbols=("absent",))) is None
