"""The process that runs candidates, started by liftc/driver/tune_run.py; a crash here ends nothing else.

    python -m liftc.runtime.tune_worker BUNDLE

Reads the number of a candidate per line and answers with one JSON line: {"records": [...], "broken": false}. The
first line it writes is {"device": ..., "read_ceiling_gbs": ...}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from liftc.bundle import read_bundle
from liftc.errors import LiftcError
from liftc.runtime.candidates import Bench


def main() -> int:
    """Serve until the input ends; returns the exit code."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints does not mix with the answers
    folder = Path(sys.argv[1])
    try:
        bundle = read_bundle(folder)
        bench = Bench(folder, bundle)
    except LiftcError as error:
        _answer(answers, {"error": str(error)})
        return 2
    _answer(answers, {"facts": bench.facts, "read_ceiling_gbs": bench.ceiling})
    for line in sys.stdin:
        result = bench.measure(bundle.candidates[int(line)])
        _answer(answers, {"records": [r.to_json() for r in result.records], "broken": result.broken})
        if result.broken:
            return 1
    return 0


def _answer(stream: TextIO, data: dict[str, Any]) -> None:
    stream.write(json.dumps(data) + "\n")
    stream.flush()


if __name__ == "__main__":
    sys.exit(main())
