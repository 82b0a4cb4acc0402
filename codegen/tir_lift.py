# mypy: disable-error-code="misc, untyped-decorator"
"""The lift x -> (z, z_scale): algorithms for CPU (tiles padded in scratch) and CUDA (scratch passed in).

Shapes as in liftc/reference.py: n tokens, IC = in_features, t1 = left, t2 = right, C = lifted_right,
K = t1 C. The peak is the maximum of the bits of |T* x|, which order like the numbers themselves with
infinity and NaN on top: exact, independent of the order, and NaN cannot get lost in a comparison.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from liftc.spec import Z_MAX

INFINITY_BITS = 0x7F800000
NAN_BITS = 0x7FC00000


def lift_cpu(symbol: str, dtype: str, rows: int, lanes: int) -> Any:
    """PrimFunc whose two products work on register tiles of `rows` x `lanes`.

    x `dtype` (1, n, IC), activation_scale f32 (IC,), left f32 (t1, t1), right f32 (t2, C)
    -> z int16 (1, n, K), z_scale f32 (1, n, 1). All operands of the inner products are copied into tiles
    padded to whole registers, so no inner loop of them has a remainder. Blocks: right; token, with pad,
    mix, project, peak, factor, scale and round inside.
    """

    @T.prim_func(s_tir=True)
    def function(
        x_arg: T.handle, in_scale_arg: T.handle, left_arg: T.handle, right_arg: T.handle,
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
                T.reads(x[0, vt, 0:IC], in_scale[0:IC], left[0:t1, 0:t1], right_pad[0:t2, 0:L, 0:lanes])
                T.writes(z[0, vt, 0:K], z_scale[0, vt, 0])
                x_pad = T.sblock_alloc_buffer((t1, J, lanes), "float32")
                mixed = T.sblock_alloc_buffer((I, rows, J, lanes), "float32")
                real = T.sblock_alloc_buffer((I, rows, L, lanes), "float32")
                peak_lanes = T.sblock_alloc_buffer((lanes,), "int32")
                peak = T.sblock_alloc_buffer((1,), "int32")
                factor = T.sblock_alloc_buffer((1,), "float32")
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
                for c1, i0, i1, c0 in T.grid(lanes, I, rows, L):  # padding repeats row t1 - 1 or is zero
                    with T.sblock("peak_lanes"):
                        vc1, vi0, vi1, vc0 = T.axis.remap("SRRR", [c1, i0, i1, c0])
                        with T.init():
                            peak_lanes[vc1] = 0
                        peak_lanes[vc1] = T.max(
                            peak_lanes[vc1], T.reinterpret("int32", real[vi0, vi1, vc0, vc1]) & 0x7FFFFFFF
                        )
                for c1 in range(lanes):
                    with T.sblock("peak"):
                        vc1 = T.axis.reduce(lanes, c1)
                        with T.init():
                            peak[0] = 0
                        peak[0] = T.max(peak[0], peak_lanes[vc1])
                with T.sblock("factor"):
                    factor[0] = T.float32(Z_MAX) / T.reinterpret("float32", peak[0])
                with T.sblock("scale"):
                    z_scale[0, vt, 0] = T.reinterpret(
                        "float32", T.Select(peak[0] < INFINITY_BITS, peak[0], NAN_BITS)
                    ) / T.float32(Z_MAX)
                for i, c in T.grid(t1, C):
                    with T.sblock("round"):
                        vi, vc = T.axis.remap("SS", [i, c])
                        z[0, vt, vi * C + vc] = T.Cast(
                            "int16",
                            T.Select(
                                T.abs(real[vi // rows, vi % rows, vc // lanes, vc % lanes] * factor[0])
                                < T.float32(32000)
                                and peak[0] < INFINITY_BITS,
                                T.nearbyint(real[vi // rows, vi % rows, vc // lanes, vc % lanes] * factor[0]),
                                T.float32(0),
                            ),
                        )

    return function


def lift_cuda(symbol: str, dtype: str) -> Any:
    """PrimFunc of three CUDA kernels; `mixed` f32 (n, t1, t2) and `real` f32 (n, K) are the caller's scratch.

    Other arguments as in lift_cpu. Blocks: mix_element and project_element, each
    with its sum inside; token, with peak, round and scale inside.
    """

    @T.prim_func(s_tir=True)
    def function(
        x_arg: T.handle, in_scale_arg: T.handle, left_arg: T.handle, right_arg: T.handle,
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
                T.reads(real[vt, 0:K])
                T.writes(z[0, vt, 0:K], z_scale[0, vt, 0])
                peak = T.sblock_alloc_buffer((1,), "int32", scope="shared")
                for k in range(K):
                    with T.sblock("peak"):
                        vk = T.axis.reduce(K, k)
                        with T.init():
                            peak[0] = T.min_value("int32")
                        peak[0] = T.max(peak[0], T.reinterpret("int32", real[vt, vk]) & 0x7FFFFFFF)
                for k in range(K):
                    with T.sblock("round"):
                        vk = T.axis.spatial(K, k)
                        z[0, vt, vk] = T.Cast(
                            "int16",
                            T.Select(
                                T.abs(real[vt, vk] * (T.float32(Z_MAX) / T.reinterpret("float32", peak[0])))
                                < T.float32(32000)
                                and peak[0] < INFINITY_BITS,
                                T.nearbyint(
                                    real[vt, vk] * (T.float32(Z_MAX) / T.reinterpret("float32", peak[0]))
                                ),
                                T.float32(0),
                            ),
                        )
                for one in range(1):
                    with T.sblock("scale"):
                        vo = T.axis.spatial(1, one)
                        z_scale[0, vt, vo] = T.reinterpret(
                            "float32", T.Select(peak[0] < INFINITY_BITS, peak[0], NAN_BITS)
                        ) / T.float32(Z_MAX)

    return function
