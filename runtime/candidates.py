"""Check and time one candidate of a bundle on this machine; needs torch and tvm_ffi, neither TVM nor a compiler."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from liftc.bundle import Bundle, BundleCandidate
from liftc.errors import ArtifactError, LiftcError
from liftc.format import LiftFormat
from liftc.kernel_object import TARGETS, KernelFunction
from liftc.kernel_records import Record, digits
from liftc.runtime import operands
from liftc.runtime.kernels import Kernels, load_kernels
from liftc.runtime.operands import Linear, Operands
from liftc.runtime.ops import Ops
from liftc.runtime.planes import LIFTS
from liftc.runtime.tiles import PRODUCTS
from liftc.runtime.timing import Clock, machine_facts
from liftc.spec import DTYPES

CHECKS = ((33, 700), (1990, 576), (545, 1536), (1, 64))
"""(out_features, in_features) every candidate is checked on beside the shapes to measure."""

_MOST_LAUNCHES = 512


@dataclass(frozen=True)
class Result:
    """Records of one candidate; `broken` when the process should not be used again (a CUDA error)."""

    records: tuple[Record, ...]
    broken: bool = False


class Bench:
    """The base object of a bundle on this machine's device, random operands, and the read ceiling."""

    def __init__(self, folder: Path, bundle: Bundle) -> None:
        self.folder, self.bundle = folder, bundle
        kind = TARGETS[bundle.target]
        self.device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
        self.base = load_kernels(folder / bundle.base, self.device)
        self.operands = Operands(self.device, bundle.pool_bytes)
        self.clock = Clock(self.device)
        self.ceiling = self.clock.read_ceiling(self.base, self.operands.pool)
        self.facts = machine_facts(self.device)
        self.dtype = DTYPES[bundle.dtype]

    def measure(self, candidate: BundleCandidate) -> Result:
        """Right on every shape first, then one record per shape, batch and chain; never raises for a candidate.

        A lift does the shapes whose factors it is chosen for; where there are none, there is no record.
        """
        if candidate.refused:
            return self._no(candidate, "refused", candidate.refused)
        try:
            found = self._with(candidate)
            if found is None:
                return self._no(candidate, "refused", "it does not fit this device")
            alone, among = (Ops(kernels) for kernels in found)
            if reason := self._wrong(alone, among, candidate):
                return self._no(candidate, *reason)
            return Result(tuple(self._times(among, candidate)))
        except (ArtifactError, LiftcError) as error:
            return self._no(candidate, "failed", str(error))
        except (RuntimeError, ValueError, TypeError) as error:  # of CUDA, tvm_ffi and torch
            line = next((part for part in str(error).splitlines() if part.strip()), type(error).__name__)
            return replace(self._no(candidate, "failed", line), broken=self.device.type == "cuda")

    def _with(self, candidate: BundleCandidate) -> tuple[Kernels, Kernels] | None:
        """The base with the candidate's functions in place of all of its own for that op and dtype, to check them, and
        in place of those that are chosen in the same cases, to time them: a lift is for factors of some size.
        """
        loaded = load_kernels(self.folder / candidate.file, self.device)
        if not all(symbol in loaded.functions for symbol in candidate.symbols):
            return None
        mine = [f for f in loaded.object.functions if f.symbol in candidate.symbols]
        dtypes, cases = {f.dtype for f in mine}, {_case(f) for f in mine}
        ops = next((forms for forms in (PRODUCTS, LIFTS) if candidate.op in forms), (candidate.op,))
        rivals = [f for f in self.base.object.functions if f.op in ops and f.dtype in dtypes]
        same = [f for f in rivals if candidate.op not in LIFTS or _case(f) in cases]
        functions = {**self.base.functions, **{f.symbol: loaded.functions[f.symbol] for f in mine}}

        def without(dropped: list[KernelFunction]) -> Kernels:
            kept = [f for f in self.base.object.functions if f not in dropped]
            made = replace(self.base.object, functions=(*mine, *kept))
            return replace(self.base, object=made, functions=functions)

        return without(rivals), without(same)

    def _batches(self, candidate: BundleCandidate) -> list[int]:
        """Those of the bundle that this candidate is made for: all, or the largest up to its tokens."""
        most = candidate.knobs.get("tokens")
        if not isinstance(most, int):
            return list(self.bundle.batches)
        kind = candidate.op.partition("_")[0]  # products of all forms share the batches
        sizes = [c.knobs["tokens"] for c in self.bundle.candidates if c.op.partition("_")[0] == kind]
        smaller = [size for size in sizes if size < most]
        return [b for b in self.bundle.batches if max(smaller, default=0) < b <= most]

    def _groups(self) -> list[tuple[LiftFormat, list[tuple[int, int]]]]:
        groups: dict[str, list[tuple[int, int]]] = {}
        for work in self.bundle.work:
            groups.setdefault(work.format, []).append((work.out_features, work.in_features))
        return [(LiftFormat.parse(fmt), shapes) for fmt, shapes in groups.items()]

    def _wrong(self, alone: Ops, among: Ops, candidate: BundleCandidate) -> tuple[str, str] | None:
        """(status, reason) when the candidate is wrong somewhere."""
        lifts = candidate.op.startswith("lift")
        for fmt, shapes in self._groups():
            for batch in self._batches(candidate):
                wanted = list(dict.fromkeys(shapes))
                for linear in self.operands.linears(alone, [*CHECKS, *wanted], fmt, batch, self.dtype):
                    shape = (linear.rows, linear.features)
                    if shape in wanted and not self._takes(among, candidate, linear):
                        continue
                    good = operands.lift_is_right(alone, linear) if lifts else all(
                        operands.product_is_exact(alone, linear, dtype) for dtype in {self.dtype, torch.float32}
                        if dtype == self.dtype or linear.signs.dim() == 4
                    )  # fmt: skip
                    if not good:
                        return "wrong", f"{shape[0]}x{shape[1]} {fmt} batch {batch}"
        return None

    def _takes(self, ops: Ops, candidate: BundleCandidate, linear: Linear) -> bool:
        """Whether the candidate is what does this linear: a lift is for tiles, and factors of some size."""
        if candidate.op not in LIFTS:
            return True
        factors = (linear.left.shape[0], linear.right.shape[0])
        chosen = ops.tiles.planes.lift_for(linear.x.shape[0], linear.x.dtype, *factors)
        return linear.signs.dim() == 4 and chosen is not None and chosen.symbol in candidate.symbols

    def _times(self, ops: Ops, candidate: BundleCandidate) -> list[Record]:
        made: list[Record] = []
        lifts = candidate.op.startswith("lift")
        for fmt, shapes in self._groups():
            for batch in self._batches(candidate):
                before = len(made)
                unique = dict.fromkeys((0, s[1]) if lifts else s for s in shapes)
                for rows, features in unique:
                    shape = (rows or features, features)
                    (one,) = self.operands.linears(ops, [shape], fmt, batch, self.dtype)
                    if not self._takes(ops, candidate, one):
                        continue
                    copies = self._copies(ops, [shape], fmt, batch)
                    size = sum(c.lift_bytes if lifts else c.sign_bytes for c in copies) / len(copies)
                    time = self._chain(ops, copies, "lift" if lifts else "product") / len(copies)
                    made.append(self._record(candidate, fmt, (rows, features), batch, time, size))
                if len(shapes) > 1 and len(made) > before:
                    copies = self._copies(ops, shapes, fmt, batch)
                    time = self._chain(ops, copies, "whole")  # as they run: what is fastest alone need not be
                    size = sum(c.sign_bytes for c in copies)
                    names = "+".join(f"{a}x{b}" for a, b in shapes)
                    chain = f"{names}*{len(copies) // len(shapes)}"
                    record = self._record(candidate, fmt, (0, 0), batch, time, size)
                    made.append(replace(record, chain=chain))
        return made

    def _copies(self, ops: Ops, shapes: list[tuple[int, int]], fmt: LiftFormat, batch: int) -> list[Linear]:
        """The shapes in turn until their signs fill the pool."""
        once = self.operands.linears(ops, shapes, fmt, batch, self.dtype)
        size = sum(linear.signs.nbytes for linear in once)
        rounds = max(1, min(self.operands.pool.nbytes // size, _MOST_LAUNCHES // len(shapes)))
        return self.operands.linears(ops, shapes * rounds, fmt, batch, self.dtype)

    def _chain(self, ops: Ops, copies: list[Linear], what: str) -> float:
        """Microseconds of all of them in order."""

        def run() -> None:
            for linear in copies:
                if what == "lift":
                    operands.lift(ops, linear)
                elif what == "whole":
                    operands.whole(ops, linear, self.dtype)
                else:
                    operands.product(ops, linear, self.dtype)

        return self.clock.microseconds(run)

    def _record(
        self, candidate: BundleCandidate, fmt: LiftFormat, shape: tuple[int, int], batch: int, time: float, size: float
    ) -> Record:  # fmt: skip
        rate = size / time / 1e3
        return Record(
            kernel=candidate.op, kernel_version=self.bundle.kernel_version, arch=self.bundle.arch, format=str(fmt),
            out_features=shape[0], in_features=shape[1], batch=batch, knobs=candidate.knobs, status="ok",
            microseconds=digits(time), gigabytes_per_second=digits(rate), read_ceiling_gbs=round(self.ceiling, 1),
            fraction_of_ceiling=digits(rate / self.ceiling), dtype=self.bundle.dtype, **self.facts,
        )  # fmt: skip

    def _no(self, candidate: BundleCandidate, status: str, reason: str) -> Result:
        return Result((unmeasured(self.bundle, candidate, self.facts, status, reason, self.ceiling),))


def _case(function: KernelFunction) -> tuple[int, int, int]:
    """What decides which calls a lift gets."""
    return function.max_tokens, function.most_left, function.most_right


def unmeasured(
    bundle: Bundle, candidate: BundleCandidate, facts: dict[str, Any], status: str, reason: str, ceiling: float | None
) -> Record:  # fmt: skip
    """The one record of a candidate that was not timed, for the first work of the bundle."""
    work = bundle.work[0]
    most = candidate.knobs.get("tokens")
    return Record(
        kernel=candidate.op, kernel_version=bundle.kernel_version, arch=bundle.arch, format=work.format,
        out_features=0 if candidate.op.startswith("lift") else work.out_features, in_features=work.in_features,
        batch=most if isinstance(most, int) else bundle.batches[0], knobs=candidate.knobs, status=status,
        microseconds=None, gigabytes_per_second=None, read_ceiling_gbs=None if ceiling is None else round(ceiling, 1),
        fraction_of_ceiling=None, dtype=bundle.dtype, reason=reason[:300], **facts,
    )  # fmt: skip
