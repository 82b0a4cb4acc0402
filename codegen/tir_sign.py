# mypy: disable-error-code="misc, untyped-decorator"
"""Signs times a lifted activation, and signs spelt out: the algorithms, without a schedule.

Sizes are symbolic, so one kernel serves every layer. Shapes: m tiles of `tile` tokens, K = lifted_features,
OC = out_features, G = ceil(OC / 32) words per column (liftc/packing.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm.script import tirx as T


def sign_matmul(symbol: str, dtype: str, tile: int) -> Any:
    """PrimFunc y = cast((float32(B z) * z_scale) * output_scale), B the signs (liftc/reference.py).

    z int16 (m, tile, K), z_scale f32 (m, tile, 1), packed int32 (G, K), output_scale f32 (OC,)
    -> y `dtype` (m, tile, OC). Blocks: widen, sum, count, write.

    The sum of b z over signs b = +-1 is p - q, p the sum of z where the bit is set and q = sum z - p where it
    is not. All three fit an int32 (|z| <= 16383, K <= 131072), which they must: TVM tells LLVM that neither
    signed nor unsigned arithmetic wraps, so 2 p - sum z would be undefined for a large p.
    """
    round_to = partial(round_to_dtype, dtype)

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
        wide = T.sblock_alloc_buffer((m, tile, K), "int32")
        total = T.sblock_alloc_buffer((m, tile), "int32")
        count = T.sblock_alloc_buffer((m, G, tile, 32), "int32")
        for i, t, k in T.grid(m, tile, K):
            with T.sblock("widen"):
                vi, vt, vk = T.axis.remap("SSS", [i, t, k])
                wide[vi, vt, vk] = T.Cast("int32", z[vi, vt, vk])
        for i, t, k in T.grid(m, tile, K):
            with T.sblock("sum"):
                vi, vt, vk = T.axis.remap("SSR", [i, t, k])
                with T.init():
                    total[vi, vt] = 0
                total[vi, vt] = total[vi, vt] + T.Cast("int32", z[vi, vt, vk])
        for g, i, t, r, k in T.grid(G, m, tile, 32, K):
            with T.sblock("count"):
                vg, vi, vt, vr, vk = T.axis.remap("SSSSR", [g, i, t, r, k])
                with T.init():
                    count[vi, vg, vt, vr] = 0
                count[vi, vg, vt, vr] = count[vi, vg, vt, vr] + T.Select(
                    (
                        T.reinterpret("uint32", packed[vg, vk])
                        & T.shift_left(T.uint32(1), T.Cast("uint32", vr))
                    )
                    != T.uint32(0),
                    wide[vi, vt, vk],
                    0,
                )
        for g, i, t, r in T.grid(G, m, tile, 32):
            with T.sblock("write"):
                vg, vi, vt, vr = T.axis.remap("SSSS", [g, i, t, r])
                if vg * 32 + vr < OC:
                    y[vi, vt, vg * 32 + vr] = round_to(
                        T.Cast("float32", count[vi, vg, vt, vr] - (total[vi, vt] - count[vi, vg, vt, vr]))
                        * z_scale[vi, vt, 0]
                        * scale[vg * 32 + vr]
                    )

    return function


def sign_matmul_direct(symbol: str, dtype: str) -> Any:
    """The same function and arguments as sign_matmul with tile 1, summing +z or -z. Blocks: count, write."""

    @T.prim_func(s_tir=True)
    def function(
        z_arg: T.handle, z_scale_arg: T.handle, packed_arg: T.handle, scale_arg: T.handle, y_arg: T.handle
    ) -> None:
        T.func_attr({"tirx.noalias": True, "global_symbol": symbol})
        m = T.int32()
        K = T.int32()
        G = T.int32()
        OC = T.int32()
        z = T.match_buffer(z_arg, (m, 1, K), "int16", align=2)
        z_scale = T.match_buffer(z_scale_arg, (m, 1, 1), "float32", align=4)
        packed = T.match_buffer(packed_arg, (G, K), "int32", align=4)
        scale = T.match_buffer(scale_arg, (OC,), "float32", align=4)
        y = T.match_buffer(y_arg, (m, 1, OC), dtype, align=2)
        count = T.sblock_alloc_buffer((m, G, 32), "int32")
        for i, g, r, k in T.grid(m, G, 32, K):
            with T.sblock("count"):
                vi, vg, vr, vk = T.axis.remap("SSSR", [i, g, r, k])
                with T.init():
                    count[vi, vg, vr] = 0
                count[vi, vg, vr] = count[vi, vg, vr] + T.Select(
                    (T.shift_right(packed[vg, vk], vr) & 1) != 0,
                    T.Cast("int32", z[vi, 0, vk]),
                    0 - T.Cast("int32", z[vi, 0, vk]),
                )
        for i, g, r in T.grid(m, G, 32):
            with T.sblock("write"):
                vi, vg, vr = T.axis.remap("SSS", [i, g, r])
                if vg * 32 + vr < OC:
                    y[vi, 0, vg * 32 + vr] = T.Cast(
                        dtype, T.Cast("float32", count[vi, vg, vr]) * z_scale[vi, 0, 0] * scale[vg * 32 + vr]
                    )

    return function


def round_to_dtype(dtype: str, value: Any) -> Any:
    """Round to nearest even. TVM rounds bfloat16 on CPUs by adding to the bits, which turns a NaN of all ones
    into minus zero, so NaNs are replaced by the plain one first."""
    if dtype != "bfloat16":
        return T.Cast(dtype, value)
    bits = T.reinterpret("int32", value)
    plain = T.Select((bits & 0x7FFFFFFF) > 0x7F800000, T.int32(0x7FC00000), bits)
    return T.Cast(dtype, T.reinterpret("float32", plain))


def unpack_signs(symbol: str, dtype: str) -> Any:
    """PrimFunc packed int32 (G, K) -> out `dtype` (OC, K) of -1 and +1. Block: unpack."""

    @T.prim_func(s_tir=True)
    def function(packed_arg: T.handle, out_arg: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "global_symbol": symbol})
        G = T.int32()
        K = T.int32()
        OC = T.int32()
        packed = T.match_buffer(packed_arg, (G, K), "int32", align=4)
        out = T.match_buffer(out_arg, (OC, K), dtype, align=2)
        for o, k in T.grid(OC, K):
            with T.sblock("unpack"):
                vo, vk = T.axis.remap("SS", [o, k])
                out[vo, vk] = T.Select(
                    (T.shift_right(packed[vo // 32, vk], vo % 32) & 1) != 0,
                    T.Cast(dtype, T.float32(1)),
                    T.Cast(dtype, T.float32(-1)),
                )

    return function
