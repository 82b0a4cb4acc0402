"""Measure a bundle: candidates one after the other in a process of their own, every record on disk at once.

Imports neither TVM nor transformers. A candidate that crashes, hangs or leaves the GPU in an error costs its process,
which is started again; what was measured before is in the records file.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liftc.bundle import Bundle, BundleCandidate, read_bundle
from liftc.errors import LiftcError, TargetError
from liftc.kernel_records import Record, append_records, parse_record, read_records, records_file
from liftc.runtime.candidates import unmeasured

START_SECONDS = 180.0
CANDIDATE_SECONDS = 60.0
"""The most that a candidate may take; when others have been timed, LONGER times the slowest, and SHORTEST at least."""

LONGER, SHORTEST = 10.0, 30.0
_MOST_CRASHES = 8

Say = Callable[[str], None]


@dataclass(frozen=True)
class Sweep:
    """What a run did. skipped: measured before. left: not reached within the budget. records: of this run."""

    file: Path
    device: str
    ceiling: float
    measured: int
    skipped: int
    left: int
    seconds: float
    records: tuple[Record, ...]


class Worker:
    """A process of liftc.runtime.tune_worker; answers arrive with a time limit."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "liftc.runtime.tune_worker", str(folder)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._errors: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=(stream, take), daemon=True)
            for stream, take in ((self.process.stdout, self._lines.put), (self.process.stderr, self._keep))
        ]
        for reader in self._readers:
            reader.start()
        try:
            self.hello = self.answer(START_SECONDS)
        except BaseException:
            self.close()
            raise

    def _read(self, stream: Any, take: Callable[[str], None]) -> None:
        with stream:
            for line in stream:
                take(line)
        take("")

    def _keep(self, line: str) -> None:
        if line.strip():
            self._errors = [*self._errors[-20:], line.strip()]

    def ask(self, number: int, seconds: float) -> dict[str, Any]:
        """Measure a candidate; RuntimeError with a reason when the process dies or takes longer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{number}\n")
            self.process.stdin.flush()
        except OSError:
            raise RuntimeError(self._death()) from None
        return self.answer(seconds)

    def answer(self, seconds: float) -> dict[str, Any]:
        """The next line the process writes."""
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise RuntimeError(f"no answer within {seconds:.0f} s") from None
        if not line:
            raise RuntimeError(self._death())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _death(self) -> str:
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            return "the process closed its output"
        ended = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"the process ended with {ended}" + (f": {self._errors[-1]}" if self._errors else "")

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            try:
                self.process.stdin.close()
            except OSError:
                pass
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for reader in self._readers:
            reader.join(2)


def run_bundle(
    folder: Path, records: Path, *, budget: float, again: bool = False, say: Say = lambda text: None
) -> Sweep:
    """Measure candidates, best guesses first, until all are done or `budget` seconds are over.

    records: folder whose <device>.jsonl gets the records. again: also those it has already. Raises LiftcError when
    the machine cannot run the bundle at all. Interrupting it loses nothing that was measured.
    """
    started = time.monotonic()
    bundle = read_bundle(folder)
    worker: Worker | None = _start(folder)
    assert worker is not None
    facts, ceiling = worker.hello["facts"], float(worker.hello["read_ceiling_gbs"])
    file = records_file(records, facts["device"])
    known = set() if again or not file.exists() else {_known(r) for r in read_records(file)}
    say(
        f"{facts['device']}: read ceiling {ceiling:.0f} GB/s, {len(bundle.candidates)} candidates, records in {file}"
    )
    found: list[Record] = []
    measured = skipped = crashes = 0
    slowest = 0.0
    left = len(bundle.candidates)
    try:
        for number, candidate in enumerate(bundle.candidates):
            elapsed = time.monotonic() - started
            if elapsed + slowest > budget and measured:
                break
            left -= 1
            if _wanted(bundle, candidate) <= known:
                skipped += 1
                continue
            begin = time.monotonic()
            try:
                if worker is None:
                    worker = _start(folder)
                answer = worker.ask(number, _patience(slowest))
                made = [parse_record(json.dumps(r)) for r in answer["records"]]
                broken = bool(answer["broken"])
            except (RuntimeError, ValueError, KeyError) as error:
                made, broken = [_failed(bundle, candidate, facts, str(error), ceiling)], True
            append_records(file, made)
            found += made
            measured += 1
            if any(r.status == "ok" for r in made):  # one that hangs or is refused says nothing about others
                slowest = max(slowest, time.monotonic() - begin)
            say(_line(number, candidate, made))
            if broken and worker is not None:
                worker.close()
                worker, crashes = None, crashes + 1
                if crashes > _MOST_CRASHES:
                    raise TargetError(
                        f"tune: {crashes} candidates crashed on {facts['device']} ({made[-1].reason}); see {file}"
                    )
    finally:
        if worker is not None:
            worker.close()
    seconds = time.monotonic() - started
    return Sweep(file, facts["device"], ceiling, measured, skipped, left, seconds, tuple(found))


def _patience(slowest: float) -> float:
    """Seconds to wait for a candidate where others took `slowest` at most, 0 for none yet."""
    return min(CANDIDATE_SECONDS, max(SHORTEST, LONGER * slowest)) if slowest else CANDIDATE_SECONDS


def _start(folder: Path) -> Worker:
    try:
        worker = Worker(folder)
    except RuntimeError as error:
        raise TargetError(f"tune: the measuring process does not start ({error})") from None
    if "error" in worker.hello:
        worker.close()
        raise LiftcError(worker.hello["error"])
    return worker


def _known(record: Record) -> tuple[Any, ...]:
    knobs = json.dumps(record.knobs, sort_keys=True)
    return (record.kernel, record.kernel_version, record.arch, record.dtype, knobs, record.format,
            record.out_features, record.in_features)  # fmt: skip


def _wanted(bundle: Bundle, candidate: BundleCandidate) -> set[tuple[Any, ...]]:
    """What `known` must hold for the candidate to be skipped; a bad candidate has one record only and runs again."""
    knobs = json.dumps(candidate.knobs, sort_keys=True)
    start = (candidate.op, bundle.kernel_version, bundle.arch, bundle.dtype, knobs)
    if not candidate.op.startswith("lift"):
        return {(*start, w.format, w.out_features, w.in_features) for w in bundle.work}
    chains = Counter(w.format for w in bundle.work)  # a lift does some of the shapes only, and every chain
    return {(*start, w.format, 0, 0 if chains[w.format] > 1 else w.in_features) for w in bundle.work}


def _failed(
    bundle: Bundle, candidate: BundleCandidate, facts: dict[str, str], reason: str, ceiling: float
) -> Record:
    return unmeasured(bundle, candidate, facts, "failed", reason, ceiling)


def _line(number: int, candidate: BundleCandidate, made: list[Record]) -> str:
    """One line of progress: what was measured, how fast the whole chain (or the only shape) was."""
    if not made:
        return f"{number:4d} {candidate.op:18s} is not for factors of these sizes"
    first = next((r for r in made if r.chain), made[0])
    knobs = " ".join(f"{k}={v}" for k, v in candidate.knobs.items())
    what = f"{first.microseconds:9.1f} us {100 * (first.fraction_of_ceiling or 0):5.1f} %" if first.microseconds else (
        f"{first.status}: {first.reason}"
    )  # fmt: skip
    return f"{number:4d} {candidate.op:18s} batch {first.batch:2d} {what}  {knobs}"
