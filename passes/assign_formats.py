"""assign-formats: how many bits each selected linear gets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from liftc.errors import FormatError
from liftc.format import DEFAULT_SUBSPACE_DIM, LiftFormat
from liftc.passes.base import Pass, PassError, compile_pattern
from liftc.program import Program
from liftc.spec import LinearSpec
from liftc.tensor_names import packed_parts


@dataclass(frozen=True)
class AssignFormats(Pass):
    """Give every selected linear its format LQ-D/d.

    Either bits, taken to the nearest D / subspace_dim, or format. overrides: "REGEX=LQ-D/d" or "REGEX=BITS"
    for the linears whose name the expression finds; later ones win over earlier ones.
    """

    name: ClassVar[str] = "assign-formats"
    bits: float | None = None
    format: str = ""
    subspace_dim: int = DEFAULT_SUBSPACE_DIM
    overrides: tuple[str, ...] = ()

    def apply(self, program: Program) -> Program:
        if packed_parts(program):
            raise PassError("assign-formats: the linears of this program are lowered already")
        default = self._default()
        linears = {name: replace(linear, format=default, lift="") for name, linear in program.linears.items()}
        for text in self.overrides:
            self._override(text, linears)
        return replace(program, linears=linears, lifts={})

    def _default(self) -> LiftFormat:
        if (self.bits is None) == (not self.format):
            raise PassError("assign-formats: give exactly one of bits and format")
        return self._format(str(self.bits) if self.bits is not None else self.format)

    def _format(self, text: str) -> LiftFormat:
        """A format from "LQ-D/d", "D/d" or a number of bits."""
        if "/" in text:
            return LiftFormat.parse(text)
        try:
            bits = float(text)
        except ValueError:
            raise FormatError(
                f"cannot read {text!r}: write a format such as LQ-77/32 or a number of bits"
            ) from None
        return LiftFormat.from_bits(bits, self.subspace_dim)

    def _override(self, text: str, linears: dict[str, LinearSpec]) -> None:
        pattern, equals, value = text.rpartition("=")
        if not equals or not pattern:
            raise PassError(f"assign-formats: write the override {text!r} as REGEX=LQ-D/d")
        expression = compile_pattern(pattern, "assign-formats, option overrides")
        fmt = self._format(value)
        found = [name for name in linears if expression.search(name)]
        if not found:
            raise PassError(
                f"assign-formats: override {pattern!r} matches none of the {len(linears)} linears"
            )
        for name in found:
            linears[name] = replace(linears[name], format=fmt)
