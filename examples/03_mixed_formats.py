"""Different formats for different layers, and the byte ledger of the result.

python examples/03_mixed_formats.py MODEL OUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import liftc
from liftc.driver.inspect import inspect_artifact


def main(model: Path, out: Path) -> dict[str, Any]:
    """2 bits everywhere but 3 bits in the down projections; returns what `liftc inspect` says."""
    formats = ("LQ-64/32", r"mlp\.down_proj=LQ-96/32")
    liftc.compile(model, out, formats=formats, calibration_windows=16, calibration_length=32, beam=8)
    return inspect_artifact(out)


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), Path(sys.argv[2]))["text"])
