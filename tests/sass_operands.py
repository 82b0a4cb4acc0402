"""Machine code of warp-group products: whether a register operand is written while a product may still read it.

`wgmma` reads its register operand after it was issued, and the assembler does not keep other instructions from that
register: a copy that it removes can make a load for the next product overwrite the operand of the last one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_PRODUCT = re.compile(r"[A-Z]GMMA\S* R\d+, R(\d+), gdesc")
_WRITES = re.compile(r"^(?:@!?U?P\w+ )?([A-Z][\w.]*) (?:U?P\w+, )?R(\d+)\b")
_BRANCH = re.compile(r"^(@!?\S+ )?BRA\b.*`\((\.L_x_\d+)\)")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)")
_READS_ONLY = ("ST", "RED", "SYNCS", "ATOMS", "BRA", "R2UR", "UBLKCP", "LDGSTS", "ISETP", "DEPBAR", "MEMBAR")


def find_disassembler(nvcc: Path) -> Path | None:
    """nvdisasm on the path or beside nvcc."""
    found = shutil.which("nvdisasm")
    beside = nvcc.resolve().parent / "nvdisasm"
    return Path(found) if found else beside if beside.exists() else None


def overwritten_operands(disassembler: Path, cubin: Path) -> list[str]:
    """Instructions that write a register operand of a product before a wait for it, in any function."""
    command = [str(disassembler), "-c", str(cubin)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    found: list[str] = []
    for section in listing.split(".section\t.text.")[1:]:
        found += overwrites(section)
    return found


def overwrites(section: str) -> list[str]:
    """The same, of the listing of one function."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in section.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif instruction := _INSTRUCTION.match(line):
            code.append(instruction[1])
    found = []
    for at, text in enumerate(code):
        if product := _PRODUCT.search(text):
            operand = range(int(product[1]), int(product[1]) + 4)
            found += [
                f"{text} <- {code[i]}" for i in _in_flight(code, labels, at) if _writes(code[i], operand)
            ]
    return found


def _in_flight(code: list[str], labels: dict[str, int], product: int) -> set[int]:
    """Instructions that may run between a product and a wait that covers it.

    Products form groups, whose last one is marked gsb0; a wait leaves the given number of latest groups in flight.
    """
    seen: set[tuple[int, int]] = set()
    ahead = [
        (product + 1, int("gsb0" in code[product]))
    ]  # where, groups complete since: its own and those after it
    while ahead:
        at, groups = ahead.pop()
        while at < len(code) and (at, groups) not in seen:
            text = code[at]
            wait = _WAIT.search(text)
            if text.startswith("EXIT") or (wait and groups > int(wait[1], 16)):
                break
            seen.add((at, groups))
            if "GMMA" in text and "gsb0" in text:
                groups = min(groups + 1, 8)
            if branch := _BRANCH.match(text):
                ahead.append((labels[branch[2]], groups))
                if not branch[1]:
                    break
            at += 1
    return {at for at, _ in seen}


def _writes(text: str, operand: range) -> bool:
    written = _WRITES.match(text)
    if not written or written[1].startswith(_READS_ONLY) or "GMMA" in written[1]:
        return False
    first = int(written[2])
    many = 4 if ".128" in written[1] else 2 if ".64" in written[1] or ".WIDE" in written[1] else 1
    return first < operand.stop and first + many > operand.start
