# mypy: disable-error-code="misc, untyped-decorator, valid-type"
"""sign_matmul for SSE and AVX2, which lack mask registers: two columns at a time through pmaddwd.

The 16-bit halves of a lane hold the bits of one row in two neighbouring columns. Comparing them with the
row's bit gives -1 or 0 in each half, and multiply-add with the pair (z[k], z[k + 1]) gives minus the sum of the
z whose bit is set: four instructions for `lanes` rows of two columns, where test, mask and add need eight.
This template is written with its vector instructions in place, so it takes no schedule.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm.script import tirx as T

from liftc.codegen.tir_sign import round_to_dtype

MULTIPLY_ADD = {4: "llvm.x86.sse2.pmadd.wd", 8: "llvm.x86.avx2.pmadd.wd"}


def sign_matmul_pairs(symbol: str, dtype: str, tile: int, lanes: int, passes: int) -> Any:
    """PrimFunc with the arguments and result of tir_sign.sign_matmul.

    lanes: int32 lanes of a register, 4 or 8. passes: times a thread reads the words of a row group, each time
    for 32 / passes of its rows, so that tile * 32 / passes / lanes sums stay in registers.
    """
    round_to = partial(round_to_dtype, dtype)
    rows, chunks = 32 // passes, 32 // passes // lanes

    @T.prim_func(s_tir=True)
    def function(
        z_arg: T.handle, z_scale_arg: T.handle, packed_arg: T.handle, scale_arg: T.handle, y_arg: T.handle
    ) -> None:
        T.func_attr({"tirx.noalias": True, "global_symbol": symbol})
        m = T.int32()
        K = T.int32()
        G = T.int32()
        OC = T.int32()
        z = T.match_buffer(z_arg, (m, tile, K), "int16", align=2)
        z_scale = T.match_buffer(z_scale_arg, (m, tile, 1), "float32", align=4)
        packed = T.match_buffer(packed_arg, (G, K), "int32", align=4)
        scale = T.match_buffer(scale_arg, (OC,), "float32", align=4)
        y = T.match_buffer(y_arg, (m, tile, OC), dtype, align=2)
        total = T.sblock_alloc_buffer((m, tile), "int32")
        for i, t, k in T.grid(m, tile, K):
            with T.sblock("sum"):
                vi, vt, vk = T.axis.remap("SSR", [i, t, k])
                with T.init():
                    total[vi, vt] = 0
                total[vi, vt] = total[vi, vt] + T.Cast("int32", z[vi, vt, vk])
        for g in T.parallel(G):
            for i in range(m):
                with T.sblock("rows"):
                    vg, vi = T.axis.remap("SS", [g, i])
                    T.reads(
                        z[vi, 0:tile, 0:K],
                        packed[vg, 0:K],
                        z_scale[vi, 0:tile, 0],
                        scale[0:OC],
                        total[vi, 0:tile],
                    )
                    T.writes(y[vi, 0:tile, 0:OC])
                    count = T.sblock_alloc_buffer((tile * rows,), "int32", scope="local")
                    for part in T.unroll(passes):
                        for j in T.unroll(tile * chunks):
                            count[T.ramp(j * lanes, 1, lanes)] = T.broadcast(0, lanes)
                        for k in range(K // 2):
                            for c in T.unroll(chunks):
                                for t in T.unroll(tile):
                                    count[T.ramp(t * rows + c * lanes, 1, lanes)] = count[
                                        T.ramp(t * rows + c * lanes, 1, lanes)
                                    ] - _multiply_add(
                                        _hits(
                                            packed[vg, 2 * k],
                                            packed[vg, 2 * k + 1],
                                            part * rows + c * lanes,
                                            lanes,
                                        ),
                                        _pair(z[vi, t, 2 * k], z[vi, t, 2 * k + 1], lanes),
                                        lanes,
                                    )
                        if K % 2 == 1:
                            for c in T.unroll(chunks):
                                for t in T.unroll(tile):
                                    count[T.ramp(t * rows + c * lanes, 1, lanes)] = count[
                                        T.ramp(t * rows + c * lanes, 1, lanes)
                                    ] - _multiply_add(
                                        _hits(packed[vg, K - 1], 0, part * rows + c * lanes, lanes),
                                        _pair(z[vi, t, K - 1], 0, lanes),
                                        lanes,
                                    )
                        for t, r in T.grid(tile, rows):
                            if vg * 32 + part * rows + r < OC:
                                y[vi, t, vg * 32 + part * rows + r] = round_to(
                                    T.Cast(
                                        "float32", count[t * rows + r] - (total[vi, t] - count[t * rows + r])
                                    )
                                    * z_scale[vi, t, 0]
                                    * scale[vg * 32 + part * rows + r]
                                )

    return function


def _hits(first: Any, second: Any, row: Any, lanes: int) -> Any:
    """16-bit halves of -1 where rows row..row + lanes - 1 have their bit set in the words of two columns.

    `row` is a loop variable or a number; all rows of a call lie in one half of the word.
    """
    low = (first & 0xFFFF) | T.shift_left(second, 16)
    high = (T.shift_right(first, 16) & 0xFFFF) | (second & -0x10000)
    word = T.Select(row < 16, low, high)
    bits = T.shift_left(
        T.broadcast(T.int32(0x10001), lanes), T.broadcast(row % 16, lanes) + T.ramp(0, 1, lanes)
    )
    halves = f"int16x{2 * lanes}"
    return T.Select(
        T.reinterpret(halves, T.broadcast(word, lanes) & bits) == T.reinterpret(halves, bits),
        T.broadcast(T.int16(-1), 2 * lanes),
        T.broadcast(T.int16(0), 2 * lanes),
    )


def _pair(first: Any, second: Any, lanes: int) -> Any:
    """Two int16 side by side in every 32-bit lane."""
    both = (T.Cast("int32", first) & 0xFFFF) | T.shift_left(T.Cast("int32", second), 16)
    return T.reinterpret(f"int16x{2 * lanes}", T.broadcast(both, lanes))


def _multiply_add(hits: Any, pairs: Any, lanes: int) -> Any:
    return T.call_llvm_pure_intrin(f"int32x{lanes}", MULTIPLY_ADD[lanes], hits, pairs)
