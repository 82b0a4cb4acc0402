"""CPU schedules: which loops become threads, registers and vector lanes."""

from __future__ import annotations

from typing import Any

from tvm import s_tir

from liftc.codegen import tir_lift, tir_sign, tir_sign_pairs
from liftc.codegen.knobs import CpuKnobs


def sign_matmul(symbol: str, dtype: str, tile: int, knobs: CpuKnobs) -> Any:
    """One thread takes whole word rows for all tokens (one parallel loop, words stay in the first cache).

    Lanes are the rows of a word, so a word is the mask of masked additions: with AVX-512 it is loaded as two
    16-bit masks, and each token of the tile costs one broadcast and two masked additions per word. Without
    mask registers the column-pair template is the better one.
    """
    if knobs.pair_lanes:
        passes = min(tile, 32 // knobs.pair_lanes)
        return tir_sign_pairs.sign_matmul_pairs(symbol, dtype, tile, knobs.pair_lanes, passes)
    sch = s_tir.Schedule(tir_sign.sign_matmul(symbol, dtype, tile))
    g, i, _, _ = sch.get_loops(sch.get_sblock("write"))
    count = sch.get_sblock("count")
    sch.compute_at(count, i)
    sch.parallel(g)
    loops = sch.get_loops(count)[2:]  # [t,] r, k; a tile of one token has no loop
    rows, k = loops[-2:]
    row_pass, lanes = sch.split(rows, [None, knobs.row_lanes])
    tokens = loops[:-2]
    sch.reorder(row_pass, k, *tokens, lanes)
    sch.vectorize(lanes)
    for loop in tokens:
        sch.unroll(loop)
    sch.decompose_reduction(count, k)
    return sch.mod[sch.mod.get_global_vars()[0]]


def unpack_signs(symbol: str, dtype: str) -> Any:
    """One thread per range of output rows; the compiler vectorises along the columns."""
    sch = s_tir.Schedule(tir_sign.unpack_signs(symbol, dtype))
    rows, _ = sch.get_loops(sch.get_sblock("unpack"))
    sch.parallel(rows)
    return sch.mod[sch.mod.get_global_vars()[0]]


def lift(symbol: str, dtype: str, threaded: bool, knobs: CpuKnobs) -> Any:
    """Everything of one token inside its iteration; tokens in parallel when `threaded`.

    A single token is not threaded: its few microseconds of work do not pay for waking another core.
    """
    sch = s_tir.Schedule(tir_lift.lift_cpu(symbol, dtype, knobs.lift_rows, knobs.lift_lanes))
    if threaded:
        sch.parallel(sch.get_loops(sch.get_sblock("token"))[0])
    for name in ("mix", "project"):
        block = sch.get_sblock(name)
        row, lane, k = sch.get_loops(block)[-3:]
        sch.reorder(k, row, lane)
        sch.vectorize(lane)
        sch.unroll(row)
        sch.vectorize(sch.get_loops(sch.get_sblock(name + "_store"))[-1])
        sch.decompose_reduction(block, k)
    squares = sch.get_sblock("squares_lanes")
    lane, *others = sch.get_loops(squares)[-3:]
    sch.reorder(*others, lane)
    sch.vectorize(lane)
    sch.decompose_reduction(squares, others[0])
    return sch.mod[sch.mod.get_global_vars()[0]]
