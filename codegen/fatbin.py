"""Read which device code a host object carries, without cuobjdump (the pip packages lack it).

A CUDA host object holds containers (magic 0xBA55ED50) of entries; an entry is PTX text (kind 1) or machine
code, an ELF file (kind 2), with its sm number and flags. Observed with nvcc 13.0 and 13.x; the check in
codegen/build_cuda.py fails, never passes, when a later nvcc changes the form.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_MAGIC = struct.pack("<I", 0xBA55ED50)
_CONTAINER = struct.Struct("<IHHQ")  # magic, version, header size, bytes of entries
_ENTRY = struct.Struct("<HHIQ")  # kind, version, header size, bytes of payload
_KINDS = {1: "ptx", 2: "machine code"}
_SM_OFFSET, _FLAGS_OFFSET, _MIN_HEADER = 28, 40, 64
_FLAG_ARCH_SPECIFIC = 0x100000


@dataclass(frozen=True)
class DeviceCode:
    """One entry: kind "ptx" or "machine code", arch "sm_90a" (for PTX: the compute_XX it was made for)."""

    kind: str
    arch: str
    payload: bytes


def device_code(data: bytes) -> Iterator[DeviceCode]:
    """Entries of every container in the bytes of an object file; malformed containers end their own list."""
    start = data.find(_MAGIC)
    while start >= 0:
        yield from _entries(data, start)
        start = data.find(_MAGIC, start + 4)


def _entries(data: bytes, start: int) -> Iterator[DeviceCode]:
    if start + _CONTAINER.size > len(data):
        return
    _, _, header, size = _CONTAINER.unpack_from(data, start)
    position, end = start + header, start + header + size
    if end > len(data):
        return
    while position + _MIN_HEADER <= end:
        kind, _, entry_header, payload = _ENTRY.unpack_from(data, position)
        body = position + entry_header
        if kind not in _KINDS or entry_header < _MIN_HEADER or body + payload > end:
            return
        (sm,) = struct.unpack_from("<I", data, position + _SM_OFFSET)
        (flags,) = struct.unpack_from("<I", data, position + _FLAGS_OFFSET)
        letter = "a" if flags & _FLAG_ARCH_SPECIFIC else ""
        yield DeviceCode(_KINDS[kind], f"sm_{sm}{letter}", data[body : body + payload])
        position = body + payload
