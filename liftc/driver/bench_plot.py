"""Roofline plot of measured kernels: useful operations per second against operations per byte of weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from liftc.errors import LiftcError
from liftc.kernel_records import Record, chain_shapes

SUFFIXES = (".png", ".svg", ".pdf")
_KERNELS = {"lift+sign_matmul": "o", "sign_matmul": "x", "cublas.float16": "s", "torch.linear.float32": "s",
            "torch.int4": "^", "gemlite.int2": "v"}  # fmt: skip


def check_matplotlib(path: Path) -> None:
    """LiftcError where the plot could not be written in the end."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise LiftcError("--plot needs matplotlib: run pip install 'liftc[report]'") from None
    if path.suffix not in SUFFIXES or not path.resolve().parent.is_dir():
        raise LiftcError(f"--plot {path}: name a {', '.join(SUFFIXES)} file in a folder that exists")


def roofline(records: Sequence[Record], path: Path) -> None:
    """Write the plot of one device's records; the sloped line is the read ceiling of the run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = [(r, *point(r)) for r in records if r.gigabytes_per_second and r.kernel in _KERNELS]
    if not points:
        raise LiftcError("--plot: there is no measurement to draw")
    ceiling = max(r.read_ceiling_gbs or 0.0 for r in records)
    figure, axes = pyplot.subplots(figsize=(8, 5.5))
    batches = sorted({r.batch for r, *_ in points})
    colours = pyplot.get_cmap("viridis")
    for kernel, marker in _KERNELS.items():
        mine = [(r, x, y) for r, x, y in points if r.kernel == kernel]
        if not mine:
            continue
        shades: list[Any] = [colours(batches.index(r.batch) / max(1, len(batches) - 1)) for r, *_ in mine]
        axes.scatter(
            [x for _, x, _ in mine], [y for *_, y in mine], c=shades, marker=marker, s=34, label=kernel
        )
    left, right = min(x for _, x, _ in points) / 1.5, max(x for _, x, _ in points) * 1.5
    axes.plot([left, right], [left * ceiling / 1e3, right * ceiling / 1e3], "k-", lw=1,
              label=f"read ceiling {ceiling:.0f} GB/s")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations of the dense product per byte of weights read (2 tokens / bytes per weight)")
    axes.set_ylabel("TOP/s of the dense product")
    axes.set_title(f"{points[0][0].device}: linears of {', '.join(map(str, batches))} tokens (dark to light)")
    axes.legend(loc="lower right", fontsize=8)
    axes.grid(True, which="both", lw=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150, metadata=_metadata(path))
    pyplot.close(figure)


def point(record: Record) -> tuple[float, float]:
    """(operations per byte of weights, 10^12 operations per second) of a record; a multiply and an add are two."""
    shapes = [(record.out_features, record.in_features)]
    if record.chain:
        shapes = list(chain_shapes(record.chain)) * int(record.chain.partition("*")[2])
    operations = 2 * record.batch * sum(rows * features for rows, features in shapes)
    seconds = (record.microseconds or 0.0) * 1e-6
    moved = (record.gigabytes_per_second or 0.0) * 1e9 * seconds
    return operations / moved, operations / seconds / 1e12


def _metadata(path: Path) -> dict[str, Any]:
    """The same bytes on every run: no date."""
    return {"Software": None} if path.suffix == ".png" else {"Date": None} if path.suffix == ".svg" else {}
