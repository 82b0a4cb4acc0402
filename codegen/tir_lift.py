# mypy: disable-error-code="misc, untyped-decorator"
"""The lift x -> (z, z_scale): algorithms for CPU (tiles padded in scratch) and CUDA (scratch passed in).

Shapes as in liftc/reference.py: n tokens, IC = in_features, t1 = left, t2 = right, C = lifted_right,
K = t1 C. The step of z comes from the norm of x and `bound`, the largest norm of a row of T*.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from liftc.reference import MOST_NOTHING
from liftc.spec import Z_MAX

NAN_BITS = 0x7FC00000
LARGEST = 3.4028234663852886e38


def z_step(squares: Any, bound: Any) -> Any:
    """z_scale from the sum of squares of a token, as liftc/reference.py: NaN if not finite, 0 for next to nothing."""
    step = T.sqrt(squares) * (bound / T.float32(Z_MAX))
    nothing = T.Or(squares < T.float32(MOST_NOTHING), step < T.float32(MOST_NOTHING))
    finite = T.And(squares <= T.float32(LARGEST), step <= T.float32(LARGEST))  # false for NaN
    bits = T.reinterpret("int32", T.Select(nothing, T.float32(0), step))
    return T.reinterpret("float32", T.Select(finite, bits, NAN_BITS))


def inverse_step(step: Any) -> Any:
    """1 / step, or 0 where z is 0."""
    return T.Select(step > T.float32(0), T.float32(1) / step, T.float32(0))


def rounded(real: Any, inverse: Any) -> Any:
    """z int16 of a value of T* x; 0 where the inverse of the step is, whatever the value."""
    most = T.float32(Z_MAX)
    near = T.nearbyint(real * inverse)
    inside = T.Select(near < most, T.Select(near > -most, near, -most), most)
    return T.Cast("int16", T.Select(inverse > T.float32(0), inside, T.float32(0)))


def lift_cpu(symbol: str, dtype: str, rows: int, lanes: int) -> Any:
    """PrimFunc whose two products work on register tiles of `rows` x `lanes`.

    x `dtype` (1, n, IC), activation_scale f32 (IC,), left f32 (t1, t1), right f32 (t2, C), bound f32 (1,)
    -> z int16 (1, n, K), z_scale f32 (1, n, 1). All operands of the inner products are copied into tiles
    padded to whole registers, so no inner loop of them has a remainder. Blocks: right; token, with pad,
    squares, step, mix, project and round inside.
    """

    @T.prim_func(s_tir=True)
    def function(
        x_arg: T.handle, in_scale_arg: T.handle, left_arg: T.handle, right_arg: T.handle, bound_arg: T.handle,
        z_arg: T.handle, z_scale_arg: T.handle,
    ) -> None:  # fmt: skip
        T.func_attr({"tirx.noalias": True, "global_symbol": symbol})
        n = T.int32()
        IC = T.int32()
        t1 = T.int32()
        t2 = T.int32()
        C = T.int32()
        K = T.int32()
        x = T.match_buffer(x_arg, (1, n, IC), dtype, align=2)
        in_scale = T.match_buffer(in_scale_arg, (IC,), "float32", align=4)
        left = T.match_buffer(left_arg, (t1, t1), "float32", align=4)
        right = T.match_buffer(right_arg, (t2, C), "float32", align=4)
        bound = T.match_buffer(bound_arg, (1,), "float32", align=4)
        z = T.match_buffer(z_arg, (1, n, K), "int16", align=2)
        z_scale = T.match_buffer(z_scale_arg, (1, n, 1), "float32", align=4)
        I = T.meta_var((t1 + rows - 1) // rows)  # noqa: E741
        J = T.meta_var((t2 + lanes - 1) // lanes)
        L = T.meta_var((C + lanes - 1) // lanes)
        right_pad = T.sblock_alloc_buffer((t2, L, lanes), "float32")
        for j, c0, c1 in T.grid(t2, L, lanes):
            with T.sblock("right_zero"):
                vj, v0, v1 = T.axis.remap("SSS", [j, c0, c1])
                right_pad[vj, v0, v1] = T.float32(0)
        for j, c in T.grid(t2, C):
            with T.sblock("right"):
                vj, vc = T.axis.remap("SS", [j, c])
                right_pad[vj, vc // lanes, vc % lanes] = right[vj, vc]
        for t in range(n):
            with T.sblock("token"):
                vt = T.axis.spatial(n, t)
                T.reads(
                    x[0, vt, 0:IC], in_scale[0:IC], left[0:t1, 0:t1], right_pad[0:t2, 0:L, 0:lanes], bound[0]
                )
                T.writes(z[0, vt, 0:K], z_scale[0, vt, 0])
                x_pad = T.sblock_alloc_buffer((t1, J, lanes), "float32")
                mixed = T.sblock_alloc_buffer((I, rows, J, lanes), "float32")
                real = T.sblock_alloc_buffer((I, rows, L, lanes), "float32")
                lane_squares = T.sblock_alloc_buffer((lanes,), "float32")
                squares = T.sblock_alloc_buffer((1,), "float32")
                step = T.sblock_alloc_buffer((2,), "float32")  # and its inverse
                for a, j0, j1 in T.grid(t1, J, lanes):
                    with T.sblock("pad_zero"):
                        va, v0, v1 = T.axis.remap("SSS", [a, j0, j1])
                        x_pad[va, v0, v1] = T.float32(0)
                for a, j in T.grid(IC // t2, t2):  # whole rows of x, then the last part of one
                    with T.sblock("pad"):
                        va, vj = T.axis.remap("SS", [a, j])
                        x_pad[va, vj // lanes, vj % lanes] = (
                            T.Cast("float32", x[0, vt, va * t2 + vj]) * in_scale[va * t2 + vj]
                        )
                for j in range(IC % t2):
                    with T.sblock("pad_rest"):
                        vj = T.axis.spatial(IC % t2, j)
                        x_pad[IC // t2, vj // lanes, vj % lanes] = (
                            T.Cast("float32", x[0, vt, IC // t2 * t2 + vj]) * in_scale[IC // t2 * t2 + vj]
                        )
                for j1, a, j0 in T.grid(lanes, t1, J):
                    with T.sblock("squares_lanes"):
                        v1, va, v0 = T.axis.remap("SRR", [j1, a, j0])
                        with T.init():
                            lane_squares[v1] = T.float32(0)
                        lane_squares[v1] = lane_squares[v1] + x_pad[va, v0, v1] * x_pad[va, v0, v1]
                for j1 in range(lanes):
                    with T.sblock("squares"):
                        v1 = T.axis.reduce(lanes, j1)
                        with T.init():
                            squares[0] = T.float32(0)
                        squares[0] = squares[0] + lane_squares[v1]
                with T.sblock("step"):
                    step[0] = z_step(squares[0], bound[0])
                with T.sblock("inverse"):
                    step[1] = inverse_step(step[0])
                with T.sblock("scale"):
                    z_scale[0, vt, 0] = step[0]
                for i0, j0 in T.grid(I, J):
                    with T.sblock("mix_tile"):
                        vi0, vj0 = T.axis.remap("SS", [i0, j0])
                        tile = T.sblock_alloc_buffer((rows, lanes), "float32", scope="local")
                        for i1, j1, a in T.grid(rows, lanes, t1):
                            with T.sblock("mix"):
                                vi1, vj1, va = T.axis.remap("SSR", [i1, j1, a])
                                with T.init():
                                    tile[vi1, vj1] = T.float32(0)
                                tile[vi1, vj1] = (
                                    tile[vi1, vj1]
                                    + left[T.min(vi0 * rows + vi1, t1 - 1), va] * x_pad[va, vj0, vj1]
                                )
                        for i1, j1 in T.grid(rows, lanes):
                            with T.sblock("mix_store"):
                                vi1, vj1 = T.axis.remap("SS", [i1, j1])
                                mixed[vi0, vi1, vj0, vj1] = tile[vi1, vj1]
                for i0, c0 in T.grid(I, L):
                    with T.sblock("project_tile"):
                        vi0, vc0 = T.axis.remap("SS", [i0, c0])
                        tile = T.sblock_alloc_buffer((rows, lanes), "float32", scope="local")
                        for i1, c1, j in T.grid(rows, lanes, t2):
                            with T.sblock("project"):
                                vi1, vc1, vj = T.axis.remap("SSR", [i1, c1, j])
                                with T.init():
                                    tile[vi1, vc1] = T.float32(0)
                                tile[vi1, vc1] = (
                                    tile[vi1, vc1]
                                    + mixed[vi0, vi1, vj // lanes, vj % lanes] * right_pad[vj, vc0, vc1]
                                )
                        for i1, c1 in T.grid(rows, lanes):
                            with T.sblock("project_store"):
                                vi1, vc1 = T.axis.remap("SS", [i1, c1])
                                real[vi0, vi1, vc0, vc1] = tile[vi1, vc1]
                for i, c in T.grid(t1, C):
                    with T.sblock("round"):
                        vi, vc = T.axis.remap("SS", [i, c])
                        z[0, vt, vi * C + vc] = rounded(
                            real[vi // rows, vi % rows, vc // lanes, vc % lanes], step[1]
                        )

    return function


def lift_cuda(symbol: str, dtype: str) -> Any:
    """PrimFunc of three CUDA kernels; `mixed` f32 (n, t1, t2) and `real` f32 (n, K) are the caller's scratch.

    Other arguments as in lift_cpu. Blocks: mix_element and project_element, each
    with its sum inside; token, with squares, round and scale inside.
    """

    @T.prim_func(s_tir=True)
    def function(
        x_arg: T.handle, in_scale_arg: T.handle, left_arg: T.handle, right_arg: T.handle, bound_arg: T.handle,
        mixed_arg: T.handle, real_arg: T.handle, z_arg: T.handle, z_scale_arg: T.handle,
    ) -> None:  # fmt: skip
        T.func_attr({"tirx.noalias": True, "global_symbol": symbol})
        n = T.int32()
        IC = T.int32()
        t1 = T.int32()
        t2 = T.int32()
        C = T.int32()
        K = T.int32()
        x = T.match_buffer(x_arg, (1, n, IC), dtype, align=2)
        in_scale = T.match_buffer(in_scale_arg, (IC,), "float32", align=4)
        left = T.match_buffer(left_arg, (t1, t1), "float32", align=4)
        right = T.match_buffer(right_arg, (t2, C), "float32", align=4)
        bound = T.match_buffer(bound_arg, (1,), "float32", align=4)
        mixed = T.match_buffer(mixed_arg, (n, t1, t2), "float32", align=4)
        real = T.match_buffer(real_arg, (n, K), "float32", align=4)
        z = T.match_buffer(z_arg, (1, n, K), "int16", align=2)
        z_scale = T.match_buffer(z_scale_arg, (1, n, 1), "float32", align=4)
        for t, i, j in T.grid(n, t1, t2):
            with T.sblock("mix_element"):
                vt, vi, vj = T.axis.remap("SSS", [t, i, j])
                part = T.sblock_alloc_buffer((1,), "float32", scope="local")
                for a in range(t1):
                    with T.sblock("mix"):
                        va = T.axis.reduce(t1, a)
                        with T.init():
                            part[0] = T.float32(0)
                        part[0] = part[0] + left[vi, va] * T.if_then_else(
                            va * t2 + vj < IC,
                            T.Cast("float32", x[0, vt, va * t2 + vj]) * in_scale[va * t2 + vj],
                            T.float32(0),
                        )
                with T.sblock("mix_store"):
                    mixed[vt, vi, vj] = part[0]
        for t, i, c in T.grid(n, t1, C):
            with T.sblock("project_element"):
                vt, vi, vc = T.axis.remap("SSS", [t, i, c])
                part = T.sblock_alloc_buffer((1,), "float32", scope="local")
                for j in range(t2):
                    with T.sblock("project"):
                        vj = T.axis.reduce(t2, j)
                        with T.init():
                            part[0] = T.float32(0)
                        part[0] = part[0] + mixed[vt, vi, vj] * right[vj, vc]
                with T.sblock("project_store"):
                    real[vt, vi * C + vc] = part[0]
        for t in range(n):
            with T.sblock("token"):
                vt = T.axis.spatial(n, t)
                T.reads(real[vt, 0:K], x[0, vt, 0:IC], in_scale[0:IC], bound[0])
                T.writes(z[0, vt, 0:K], z_scale[0, vt, 0])
                squares = T.sblock_alloc_buffer((1,), "float32", scope="shared")
                for k in range(IC):
                    with T.sblock("squares"):
                        vk = T.axis.reduce(IC, k)
                        with T.init():
                            squares[0] = T.float32(0)
                        squares[0] = squares[0] + (T.Cast("float32", x[0, vt, vk]) * in_scale[vk]) * (
                            T.Cast("float32", x[0, vt, vk]) * in_scale[vk]
                        )
                for k in range(K):
                    with T.sblock("round"):
                        vk = T.axis.spatial(K, k)
                        z[0, vt, vk] = rounded(real[vt, vk], inverse_step(z_step(squares[0], bound[0])))
                for one in range(1):
                    with T.sblock("scale"):
                        vo = T.axis.spatial(1, one)
                        z_scale[0, vt, vo] = z_step(squares[0], bound[0])

    return function
