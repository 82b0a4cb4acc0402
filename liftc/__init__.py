"""liftc: lowers language models to lift-project-sign form at fractional bit-widths, and runs the result.

    liftc.compile("model-folder", bits=2.4, output="out")     # returns the artifact's path
    model = liftc.load("out"); model.generate(ids)

Importing liftc is light: torch and everything heavier is imported at first use of a name below.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "compile": ("liftc.driver.compile", "compile_model"),
    "CompileOptions": ("liftc.driver.compile", "CompileOptions"),
    "load": ("liftc.runtime.loader", "load"),
    "Tokenizer": ("liftc.runtime.tokenizer", "Tokenizer"),
    "LiftFormat": ("liftc.format", "LiftFormat"),
    "LiftcError": ("liftc.errors", "LiftcError"),
}

if TYPE_CHECKING:
    from liftc.driver.compile import CompileOptions
    from liftc.driver.compile import compile_model as compile
    from liftc.errors import LiftcError
    from liftc.format import LiftFormat
    from liftc.runtime.loader import load
    from liftc.runtime.tokenizer import Tokenizer

__all__ = ["CompileOptions", "LiftFormat", "LiftcError", "Tokenizer", "__version__", "compile", "load"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'liftc' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute)
