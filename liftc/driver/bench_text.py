"""The rows of `liftc bench kernels` as text: a line each while they are measured, tables at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from liftc.kernel_records import Record

DECODING = ("unpack_tiles", "decode_tiles")
"""Kernels whose figure is the rate of writing."""

SURROUNDED = ("separate+lift+sign_matmul", "fused+lift+sign_matmul")
"""A linear with what surrounds it, `knobs["form"]` of the record."""


def what_text(record: Record) -> str:
    """The linear, with what surrounds it where that is measured, or the chain of a record."""
    if record.chain:
        shapes, _, rounds = record.chain.partition("*")
        return f"{rounds} x ({shapes.replace('+', ', ')})"
    size = f"{record.out_features}x{record.in_features}"
    return f"{size}, {record.knobs['form']}" if record.kernel in SURROUNDED else size


def line_text(record: Record) -> str:
    """One line of progress."""
    figures = record.reason or record.status
    if record.microseconds is not None:
        share, of = record.fraction_of_ceiling or 0.0, "reading"
        if "fraction_of_write_ceiling" in record.knobs:
            share, of = record.knobs["fraction_of_write_ceiling"], "writing"
        figures = (
            f"{record.microseconds:10.1f} us {record.gigabytes_per_second or 0:8.1f} GB/s "
            f"{100 * share:6.1f} % of {of}"
        )
    return f"{record.format:10s} batch {record.batch:4d} {record.kernel:22s} {figures}  {what_text(record)}"


def table_text(answer: dict[str, Any], records: Sequence[Record]) -> str:
    """Markdown: few tokens, what surrounds a linear, many tokens, decoding; a row per linear or chain and batch."""
    lines = [
        f"{answer['device']}, {answer['kernels']}, read ceiling {answer['read_ceiling_gbs']:.0f} GB/s",
        "Microseconds, and bytes of weights over the time as % of the read ceiling.",
    ]
    if answer["not_installed"]:
        lines.append(f"Not installed: {', '.join(answer['not_installed'])}.")
    many = {r.batch for r in records if r.kernel == "lifted_linear"}
    groups: dict[str, list[Record]] = {"few": [], "surrounded": [], "many": [], "decoding": []}
    for record in records:
        name = "decoding" if record.kernel in DECODING else "many" if record.batch in many else "few"
        name = "surrounded" if record.kernel in SURROUNDED else name
        groups[name].append(record)
    if groups["few"]:
        first = {_place(r): r for r in groups["few"] if r.batch == 1}
        chains = [r for r in groups["few"] if r.chain]
        note = (
            ", x: times the time of batch 1"
            if any(r.batch > 1 and _place(r) in first for r in chains)
            else ""
        )
        lines += _section(groups["few"], lambda r: _few_cell(r, first), note)
    if groups["surrounded"]:
        lines += _section(groups["surrounded"], lambda r: _few_cell(r, {}), ", with what surrounds a linear")
    if groups["many"]:
        dense = {_place(r)[1:]: r for r in groups["many"] if r.kernel != "lifted_linear"}
        lines += _section(groups["many"], lambda r: _many_cell(r, dense), ", x: the speed of dense")
    if groups["decoding"]:
        lines += _section(
            groups["decoding"], _decoding_cell, ", GB/s written and % of the rate of filling memory"
        )
    return "\n".join(lines)


def _section(records: Sequence[Record], cell: Callable[[Record], str], note: str) -> list[str]:
    names = list(dict.fromkeys(r.kernel for r in records))
    rows: dict[tuple[str, str, int], dict[str, str]] = {}
    for r in records:
        rows.setdefault((what_text(r), r.format, r.batch), {})[r.kernel] = cell(r)
    lines = ["", *([f"Microseconds{note}.", ""] if note else [])]
    lines += ["| linears | format | batch | " + " | ".join(names) + " |", "|---" * (3 + len(names)) + "|"]
    for (what, fmt, batch), cells in rows.items():
        lines.append(f"| {what} | {fmt} | {batch} | " + " | ".join(cells.get(n, "") for n in names) + " |")
    return lines


def _place(record: Record) -> tuple[str, str, str]:
    return record.kernel, record.format, what_text(record)


def _few_cell(record: Record, first: dict[tuple[str, str, str], Record]) -> str:
    if record.microseconds is None:
        return record.status
    share = record.fraction_of_ceiling
    cell = f"{record.microseconds:.1f}" + ("" if share is None else f" ({100 * share:.1f})")
    one = first.get(_place(record))
    if record.chain and record.batch > 1 and one is not None and one.microseconds:
        cell += f" {record.microseconds / one.microseconds:.2f}x"
    return cell


def _many_cell(record: Record, dense: dict[tuple[str, str], Record]) -> str:
    if record.microseconds is None:
        return record.status
    cell = f"{record.microseconds:.1f}"
    other = dense.get(_place(record)[1:])
    if record.kernel == "lifted_linear" and other is not None and other.microseconds:
        cell += f" {other.microseconds / record.microseconds:.2f}x"
    return cell


def _decoding_cell(record: Record) -> str:
    if record.microseconds is None:
        return record.status
    share = 100 * record.knobs.get("fraction_of_write_ceiling", 0.0)
    return f"{record.microseconds:.1f}, {record.gigabytes_per_second or 0:.0f} GB/s ({share:.1f})"
