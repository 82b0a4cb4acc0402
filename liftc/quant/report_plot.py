"""The rate-distortion plot."""

from __future__ import annotations

from pathlib import Path

from liftc.errors import QuantizeError
from liftc.format import LiftFormat
from liftc.quant.figures import BEAMS, PAPER, TRELLIS, Measured, excess_db, trellis_mix


def plot(rows: list[Measured], path: Path) -> None:
    """Draw MSE (log axis) and excess over the bound (dB) against bits to a PNG; QuantizeError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise QuantizeError(
            "lattice report: the plot needs matplotlib; install it with pip install 'liftc[report]'"
        ) from error
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    colours = dict(zip(BEAMS, ("#9ecae1", "#4292c6", "#2171b5", "#08306b")))
    grid = [1 + step / 100 for step in range(301)]
    mix = [(bits, value) for bits in grid if (value := trellis_mix(bits)) is not None and bits <= 3]
    paper = [(float(LiftFormat.parse(name).bit_width), mse) for name, mse in PAPER]
    base = [row for row in rows if row.fmt.subspace_dim == 32]
    wide = [row for row in rows if row.fmt.subspace_dim == 64]
    left.plot(grid, [2.0 ** (-2 * bits) for bits in grid], color="black", lw=1, label="bound $2^{-2R}$")
    for axis, of in ((left, lambda bits, mse: mse), (right, lambda bits, mse: excess_db(mse, bits))):
        for beam in BEAMS if axis is right else BEAMS[-1:]:
            for some, style, name in ((base, "-", "d = 32"), (wide, "D", "d = 64")):
                line = [of(row.bits, row.mse[beam]) for row in some]
                axis.plot(
                    [row.bits for row in some], line, style, color=colours[beam], ms=4, lw=1.6,
                    label=f"{name}, beam {beam}",
                )  # fmt: skip
        axis.plot([b for b, _ in mix], [of(b, mse) for b, mse in mix], "--", color="#d95f02", lw=1.2,
                  label="TCQ, half-bit mixes")  # fmt: skip
        axis.plot(list(TRELLIS), [of(b, mse) for b, mse in TRELLIS.items()], "*", color="#d95f02", ms=11,
                  label="TCQ (Q-Palette)")  # fmt: skip
        axis.plot([b for b, _ in paper], [of(b, mse) for b, mse in paper], "x", color="#555555", ms=7, mew=1.8,
                  label="LiftQuant, paper")  # fmt: skip
        axis.set_xlabel("bits per weight")
        axis.grid(True, which="major", color="#dddddd", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    for name, mse in PAPER:
        bits = float(LiftFormat.parse(name).bit_width)
        right.annotate(name[3:], (bits, excess_db(mse, bits)), (6, 3), textcoords="offset points", fontsize=8,
                       color="#555555")  # fmt: skip
    left.set_yscale("log")
    left.set_ylabel("mean squared error per weight")
    left.set_title("MSE, unit Gaussian weights", fontsize=11)
    left.legend(frameon=False, fontsize=8)
    right.axhline(0, color="black", lw=1)
    right.set_ylim(-0.05, None)
    right.set_ylabel("excess over the bound $2^{-2R}$, dB (0: no code is better)")
    right.set_title("Distance from the bound", fontsize=11)
    right.legend(frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 0.02))
    figure.savefig(path, dpi=150, metadata={"Software": None})
