"""What the builds of all targets share: a scratch folder, files that appear complete or not at all, TVM itself."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from liftc.errors import BuildError
from liftc.kernel_object import KernelObject

EXPORTS = "{ global: __tvm_ffi_*; liftc_*; local: *; };\n"
"""Linker script: what an object exports."""

LINK_FLAGS = ("-Wl,--version-script=exports.map", "-Wl,--build-id=none", "-Wl,-z,nodelete", "-Wl,-s")
"""No build id and no symbol table, so that the same input gives the same bytes; the object stays loaded."""


@contextmanager
def build_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder inside `folder` (created where missing), removed at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as scratch:
        yield Path(scratch)


def finish(scratch: Path, record: KernelObject) -> KernelObject:
    """Move SCRATCH/kernels.so to its place and write its descriptor."""
    descriptor = scratch / "descriptor.json"
    descriptor.write_text(record.to_json())
    record.descriptor.unlink(missing_ok=True)  # never an old descriptor beside a new object
    os.replace(scratch / "kernels.so", record.path)
    os.replace(descriptor, record.descriptor)
    return record


def import_tvm() -> Any:
    """The tvm package; BuildError where it is not installed."""
    try:
        import tvm
    except ImportError:
        raise BuildError("building kernels needs TVM: run pip install 'liftc[quantize]'") from None
    return tvm
