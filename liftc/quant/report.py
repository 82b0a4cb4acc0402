"""Rate-distortion report of the shipped mapping matrices: a table, a plot and what was aimed for.

The figures are read from the provenance of the mapping file, where they were written when the matrices were
measured; nothing is encoded here.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from liftc.errors import QuantizeError
from liftc.format import LiftFormat
from liftc.quant import mapping, report_plot
from liftc.quant.figures import BEAMS, PAPER, Measured, excess_db, measured, trellis_mix
from liftc.quant.lattice import bound

COMMAND = "liftc lattice report -o docs"


@dataclass(frozen=True)
class Target:
    """An mse to reach by some format with low <= D/d <= high and d within `dims`, at one of `beams`."""

    low: Fraction
    high: Fraction
    dims: tuple[int, int]
    beams: tuple[int, ...]
    must: float
    aim: float

    def admits(self, fmt: LiftFormat) -> bool:
        return self.low <= fmt.bit_width <= self.high and self.dims[0] <= fmt.subspace_dim <= self.dims[1]


_TWO_FOUR = (Fraction(240, 100), Fraction(241, 100))
TARGETS = (
    Target(Fraction(2), Fraction(2), (1, 64), BEAMS, 0.0750, 0.0710),
    Target(*_TWO_FOUR, (1, 64), BEAMS, 0.0430, 0.0415),
    Target(Fraction(3), Fraction(3), (1, 64), BEAMS, 0.0196, 0.0189),
    Target(Fraction(2), Fraction(2), (32, 32), (64,), 0.0792, 0.0770),
    Target(*_TWO_FOUR, (32, 32), (64,), 0.0456, 0.0445),
    Target(Fraction(3), Fraction(3), (32, 32), (64,), 0.0213, 0.0205),
)


def lattice_report(output: Path | None = None, source: Path = mapping.SHIPPED) -> dict[str, Any]:
    """Build the report of mapping file `source`; with a folder, write rate_distortion.md and .png into it.

    Keys: formats (how many), samples, targets (one record each), files (paths written), markdown. Raises
    QuantizeError when the file lacks figures, matplotlib is missing or the folder cannot be written.
    """
    rows = measured(source)
    targets = [reached(target, rows) for target in TARGETS]
    text = markdown(rows, targets)
    files: list[str] = []
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
            report_plot.plot(rows, output / "rate_distortion.png")
            (output / "rate_distortion.md").write_text(text, encoding="utf-8")
        except OSError as error:
            raise QuantizeError(f"{output}: cannot write the report there: {error.strerror}") from error
        files = [str(output / "rate_distortion.md"), str(output / "rate_distortion.png")]
    samples = min(row.samples for row in rows)
    return {"formats": len(rows), "samples": samples, "targets": targets, "files": files, "markdown": text}


def reached(target: Target, rows: list[Measured]) -> dict[str, Any]:
    """The lowest mse that fits a target, and for `must` and `aim`: "met", "missed", or "met within the error".

    "met within the error" means above the figure by at most one standard error.
    """
    fitting = [(row.mse[beam], beam, row) for row in rows if target.admits(row.fmt) for beam in target.beams]
    record: dict[str, Any] = {
        "bits": _span(target), "where": _where(target), "must": target.must, "aim": target.aim, "format": None,
        "beam": None, "mse": None, "standard_error": None, "must_is": "not measured", "aim_is": "not measured",
    }  # fmt: skip
    if not fitting:
        return record
    mse, beam, row = min(fitting, key=lambda item: item[:2])
    error = row.standard_error[beam]

    def verdict(limit: float) -> str:
        if mse <= limit:
            return "met"
        return "met within the error" if mse <= limit + error else "missed"

    return {
        **record, "format": str(row.fmt), "beam": beam, "mse": mse, "standard_error": error,
        "must_is": verdict(target.must), "aim_is": verdict(target.aim),
    }  # fmt: skip


def markdown(rows: list[Measured], targets: list[dict[str, Any]]) -> str:
    """The report as Markdown: targets, misses, comparisons at equal bits, and every format."""
    devices = ", ".join(sorted({row.device for row in rows}))
    least, most = min(row.samples for row in rows), max(row.samples for row in rows)
    samples = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    parts = [
        "# Rate and distortion of the mapping matrices",
        f"Made by `{COMMAND}` from the records in `liftc/data/mapping.safetensors`. Mean squared error (MSE) per "
        f'weight on unit Gaussian weights, {samples} vectors of d weights per figure, encoded on {devices}; "se" '
        "is the standard error of the mean. No code of D/d bits per weight has an MSE below the bound 2^(-2 D/d).",
        "![MSE against bits](rate_distortion.png)",
        "## Targets",
        targets_table(targets),
        *_misses(targets),
        "## Against trellis codes at equal bits",
        "TCQ: Q-Palette's published TCQ figures (2.0, 2.5, 3.0 and 4.0 bits), half-bit mixes by time sharing in "
        "between. A ratio below 1 is in our favour. Beam 1024.",
        _trellis_table(rows),
        "## Against the figures of the paper",
        "The same formats, with the figures of Table 1 of the LiftQuant paper (LQ-24/8: approximate).",
        _paper_table(rows),
        "## Every shipped format",
        f"{samples} vectors per figure; se is the largest of the four beams; excess over the bound at beam 1024.",
        _format_table(rows),
    ]
    return "\n\n".join(parts) + "\n"


def targets_table(targets: list[dict[str, Any]]) -> str:
    """Markdown table of the records of `reached`."""
    lines = [["bits", "search", "must", "aim", "reached", "by", "must is", "aim is"]]
    for t in targets:
        got = "-" if t["mse"] is None else f"{t['mse']:.5f} (se {t['standard_error']:.5f})"
        by = "-" if t["mse"] is None else f"{t['format']}, beam {t['beam']}"
        must, aim = f"{t['must']:.4f}", f"{t['aim']:.4f}"
        lines.append([t["bits"], t["where"], must, aim, got, by, t["must_is"], t["aim_is"]])
    return _table(lines)


def _span(target: Target) -> str:
    low, high = float(target.low), float(target.high)
    return f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"


def _where(target: Target) -> str:
    low, high = target.dims
    dims = f"d = {low}" if low == high else f"d up to {high}"
    beams = f"beam {target.beams[0]}" if len(target.beams) == 1 else f"beam up to {max(target.beams)}"
    return f"{dims}, {beams}"


def _misses(targets: list[dict[str, Any]]) -> list[str]:
    lines = []
    for kind in ("must", "aim"):
        for t in targets:
            if t[f"{kind}_is"] == "missed":
                over = 100 * (t["mse"] / t[kind] - 1)
                lines.append(
                    f"* Missed {kind}: {t['bits']} bits with {t['where']} is at {t['mse']:.5f}, {over:.1f}% above "
                    f"{t[kind]:.4f}."
                )
    return ["\n".join(lines)] if lines else []


def _trellis_table(rows: list[Measured]) -> str:
    lines = [["format", "bits", "bound", "MSE", "se", "TCQ", "MSE / TCQ", "excess dB", "TCQ excess dB"]]
    for row in rows:
        other = trellis_mix(row.bits)
        if row.fmt.subspace_dim < 32 or other is None:
            continue
        mse = row.mse[1024]
        lines.append([
            str(row.fmt), f"{row.bits:.4f}", f"{bound(row.fmt):.5f}", f"{mse:.5f}", f"{row.standard_error[1024]:.5f}",
            f"{other:.4f}", f"{mse / other:.3f}", f"{excess_db(mse, row.bits):.2f}",
            f"{excess_db(other, row.bits):.2f}",
        ])  # fmt: skip
    return _table(lines)


def _paper_table(rows: list[Measured]) -> str:
    of = {str(row.fmt): row for row in rows}
    lines = [["format", "bits", "paper", *(f"beam {beam}" for beam in BEAMS), "se"]]
    for name, mse in PAPER:
        if name in of:
            row = of[name]
            lines.append([name, f"{row.bits:.4f}", f"{mse:.3f}", *_figures(row)])
    return _table(lines)


def _format_table(rows: list[Measured]) -> str:
    lines = [["format", "bits", "bound", *(f"beam {beam}" for beam in BEAMS), "se", "excess dB"]]
    for row in rows:
        excess = f"{excess_db(row.mse[BEAMS[-1]], row.bits):.2f}"
        lines.append([str(row.fmt), f"{row.bits:.4f}", f"{bound(row.fmt):.5f}", *_figures(row), excess])
    return _table(lines)


def _figures(row: Measured) -> list[str]:
    return [*(f"{row.mse[beam]:.5f}" for beam in BEAMS), f"{max(row.standard_error.values()):.5f}"]


def _table(lines: list[list[str]]) -> str:
    head, *body = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([head, "|---" * len(lines[0]) + "|", *body])
