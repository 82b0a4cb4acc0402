"""What may stand in a node besides nodes and numbers: constants of torch types, and the names allowed.

torch.fx turns graphs into Python source, so names read from files are checked against strict patterns.
"""

from __future__ import annotations

import builtins
import keyword
import re

import torch

from liftc.spec import DTYPE_NAMES, DTYPES

_TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+/-]*")
_NODE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DEVICE = re.compile(r"[a-z]{1,16}(:[0-9]{1,4})?")
# Names the code generator of torch.fx uses itself.
_RESERVED = frozenset((*keyword.kwlist, *dir(builtins), "self", "inf", "nan", "NoneType", "torch", "device",
                       "fx_pytree", "pytree"))  # fmt: skip

ALL_DTYPES: dict[str, torch.dtype] = {
    **{str(value)[6:]: value for value in vars(torch).values() if isinstance(value, torch.dtype)},
    **DTYPES,
}
_LAYOUTS: dict[str, torch.layout] = {"strided": torch.strided}
_MEMORY_FORMATS: dict[str, torch.memory_format] = {
    str(value)[6:]: value
    for value in (
        torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d
    )
}  # fmt: skip


def is_tensor_name(name: object) -> bool:
    """True for a name a tensor, linear or lift may have: letters, digits and `_ . + / -`."""
    return isinstance(name, str) and len(name) <= 1000 and _TENSOR_NAME.fullmatch(name) is not None


def is_node_name(name: object) -> bool:
    """True for a name a node may have: an ASCII identifier that means nothing in Python."""
    return (
        isinstance(name, str)
        and len(name) <= 1000
        and _NODE_NAME.fullmatch(name) is not None
        and name not in _RESERVED
    )


def is_argument_name(name: object) -> bool:
    """True for a keyword argument's name: any ASCII identifier but a Python keyword."""
    return (
        isinstance(name, str)
        and len(name) <= 100
        and _NODE_NAME.fullmatch(name) is not None
        and not keyword.iskeyword(name)
    )


def constant_text(value: object) -> str | None:
    """Text of a constant: dtype(bf16), device(cpu), layout(strided), memory_format(contiguous_format).

    None when the value is no such constant.
    """
    if isinstance(value, torch.dtype):
        return f"dtype({DTYPE_NAMES.get(value, str(value)[6:])})"
    if isinstance(value, torch.device):
        return f"device({value})"
    if isinstance(value, torch.layout):
        return f"layout({str(value)[6:]})"
    if isinstance(value, torch.memory_format):
        return f"memory_format({str(value)[6:]})"
    return None


def constant_value(kind: str, name: str) -> torch.dtype | torch.device | torch.layout | torch.memory_format:
    """Inverse of constant_text, given the word before and inside the parentheses; raises ValueError."""
    if kind == "dtype" and name in ALL_DTYPES:
        return ALL_DTYPES[name]
    if kind == "layout" and name in _LAYOUTS:
        return _LAYOUTS[name]
    if kind == "memory_format" and name in _MEMORY_FORMATS:
        return _MEMORY_FORMATS[name]
    if kind == "device" and _DEVICE.fullmatch(name):
        try:
            return torch.device(name)
        except RuntimeError:
            pass
    raise ValueError(f"{kind}({name}) is not a constant that a program may hold")
