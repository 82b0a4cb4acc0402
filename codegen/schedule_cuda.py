"""CUDA schedules: plain and correct for every shape. Lanes of a warp are the rows of a word.

A tensor-core implementation of sign_matmul can be listed before this one in codegen/library.py; the limits
of its KernelFunction say which calls it takes, and these kernels keep the rest.
"""

from __future__ import annotations

from typing import Any

from tvm import s_tir

from liftc.codegen import tir_lift, tir_sign
from liftc.codegen.knobs import CudaKnobs


def sign_matmul(symbol: str, dtype: str, knobs: CudaKnobs) -> Any:
    """One block per token and word row: warps split the columns, lane r sums row r, then the warps add up."""
    sch = s_tir.Schedule(tir_sign.sign_matmul_direct(symbol, dtype))
    count, write = sch.get_sblock("count"), sch.get_sblock("write")
    token, g, r, k = sch.get_loops(count)
    sch.bind(token, "blockIdx.y")
    sch.bind(g, "blockIdx.x")
    outer, part = sch.split(k, [None, knobs.column_slices])
    sch.bind(r, "threadIdx.x")
    sch.bind(part, "threadIdx.y")
    sch.reorder(r, outer, part)
    sch.set_scope(count, 0, "local")
    sch.reverse_compute_at(write, g)
    sch.bind(sch.get_loops(write)[-1], "threadIdx.x")
    return sch.mod[sch.mod.get_global_vars()[0]]


def unpack_signs(symbol: str, dtype: str, knobs: CudaKnobs) -> Any:
    """One thread per sign; neighbours are columns, so words and results are read and written in order."""
    sch = s_tir.Schedule(tir_sign.unpack_signs(symbol, dtype))
    row, column = sch.get_loops(sch.get_sblock("unpack"))
    outer, lane = sch.split(column, [None, knobs.threads])
    for loop, axis in ((row, "blockIdx.y"), (outer, "blockIdx.x"), (lane, "threadIdx.x")):
        sch.bind(loop, axis)
    return sch.mod[sch.mod.get_global_vars()[0]]


def lift(symbol: str, dtype: str, knobs: CudaKnobs) -> Any:
    """Two thread-per-element products, then one block per token for its norm and the rounding."""
    sch = s_tir.Schedule(tir_lift.lift_cuda(symbol, dtype))
    for name in ("mix_element", "project_element"):
        token, row, column = sch.get_loops(sch.get_sblock(name))
        outer, lane = sch.split(column, [None, knobs.lift_threads])
        for loop, axis in (
            (token, "blockIdx.z"),
            (row, "blockIdx.y"),
            (outer, "blockIdx.x"),
            (lane, "threadIdx.x"),
        ):
            sch.bind(loop, axis)
        total = sch.get_sblock(name.removesuffix("_element"))
        sch.decompose_reduction(total, sch.get_loops(total)[-1])
    sch.bind(sch.get_loops(sch.get_sblock("token"))[0], "blockIdx.x")
    for name in ("squares", "round", "scale"):
        _, lane = sch.split(sch.get_loops(sch.get_sblock(name))[-1], [None, knobs.threads])
        sch.bind(lane, "threadIdx.x")
    return sch.mod[sch.mod.get_global_vars()[0]]
