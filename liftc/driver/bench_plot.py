"""Roofline plot of measured kernels: useful operations per second against operations per byte of weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from liftc.errors import LiftcError
from liftc.kernel_records import Record, chain_shapes

SUFFIXES = (".png", ".svg", ".pdf")
_KERNELS = {"lift+sign_matmul": "o", "sign_matmul": "x", "sign_matmul_tiled": "x", "sign_matmul_binary": "+",
            "lifted_linear": "D", "cublas.bfloat16": "s", "cublas.float16": "s", "torch.linear.float32": "s",
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
    colours = pyplot.get_cmap("tab10")
    for number, (kernel, marker) in enumerate(_KERNELS.items()):
        mine = [(x, y) for r, x, y in points if r.kernel == kernel]
        if mine:
            axes.scatter(*zip(*mine), color=colours(number), marker=marker, s=34, alpha=0.8, label=kernel)
    left, right = min(x for _, x, _ in points) / 1.5, max(x for _, x, _ in points) * 1.5
    dense = max((y for r, _, y in points if r.kernel.startswith("cublas")), default=0.0)
    knee = min(right, dense * 1e3 / ceiling) if dense else right
    axes.plot([left, knee], [left * ceiling / 1e3, knee * ceiling / 1e3], "k-", lw=1,
              label=f"read ceiling {ceiling:.0f} GB/s")  # fmt: skip
    if dense:
        axes.plot([knee, right], [dense, dense], "k--", lw=1, label=f"best dense product {dense:.0f} TOP/s")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations of the dense product per byte of weights read (2 tokens / bytes per weight)")
    axes.set_ylabel("TOP/s of the dense product")
    batches = ", ".join(map(str, sorted({r.batch for r, *_ in points})))
    axes.set_title(f"{points[0][0].device}: linears and chains, {batches} tokens (left to right)")
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
