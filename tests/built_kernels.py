"""CPU kernel objects shared by the tests: built once per test run, into a folder that goes with the process."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from liftc.codegen.build import build, native_cpu_level

OTHER_LEVEL = (
    "x86-64-v3" if native_cpu_level() == "x86-64-v4" else "x86-64-v2"
)  # its kernels are of another form


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="liftc-kernels-")


@cache
def cpu_object(level: str) -> Path:
    """The .so of this level, beside those of other levels."""
    return build("llvm", (level,), Path(_folder().name)).path
