# mypy: disable-error-code="misc, untyped-decorator, no-untyped-def, used-before-def"

"""The transform of many activations in one launch: the TIRx template behind `whiten`.

Per token Y = left X right with X the token as a (t1, t2) matrix. A block brings some tokens to shared memory as
float16, scaled by a power of two such that the largest entry of a token lies between 1 and 2; the factors are scaled
likewise, so everything is well inside float16 whatever the type of x. Then a warp takes 16 columns of Y: it
computes that part of (X right) transposed, which leaves the tensor cores in the arrangement in which the second product
reads it. The words of the factors come from the L1 cache. Sums are in float32; the result is rounded to the
type of x once.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from liftc.codegen import tile_device

MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
LOAD4 = "ld.shared.v4.u32"
WARPS = 8
SIZES = ((8, 4), (8, 8))
"""Most tiles of 16 of the left and the right factor of each kernel: what its registers hold."""


def shared_bytes(left_tiles: int, right_tiles: int) -> int:
    """Shared memory of a block: the tokens that its warps work on, rows an odd number of times 64 bytes apart."""
    return max(1, WARPS // right_tiles) * left_tiles * 16 * (right_tiles // 2 | 1) * 64 + WARPS * 4


def whiten(symbol: str, dtype: str, short: str, left_tiles: int, right_tiles: int) -> Any:
    """PrimFunc out = times * factor[0] * left reshape(x * in_scale, (t1, t2)) right, per token, in `dtype`.

    x `dtype` (m, IC), in_scale f32 (IC,) or (1,) for none, left_words int32 (n1, n1, 32, 4), right_words int32
    (nj, n2, 32, 4) and factor f32 (1,) of runtime/whiten.py, out `dtype` (m, t1 t2), then t2, times, the number of
    tokens that a block takes (at most WARPS / n2, and it must have room for them), and the number of blocks. IC and
    t2 are multiples of 8; n1 <= left_tiles and n2 <= right_tiles.
    """
    THREADS = WARPS * 32
    ROOM = shared_bytes(left_tiles, right_tiles) - WARPS * 4

    @T.prim_func
    def function(
        x_arg: T.handle, in_scale_arg: T.handle, left_arg: T.handle, right_arg: T.handle, factor_arg: T.handle,
        out_arg: T.handle, t2: T.int32, times: T.float32, together: T.int32, grid: T.int32,
    ) -> None:  # fmt: skip
        T.func_attr({"tirx.noalias": True, "global_symbol": symbol})
        m = T.int32()
        IC = T.int32()
        SC = T.int32()
        P = T.int32()
        n1 = T.int32()
        nj = T.int32()
        n2 = T.int32()
        x = T.match_buffer(x_arg, (m, IC), dtype, align=16)
        in_scale = T.match_buffer(in_scale_arg, (SC,), "float32", align=4)
        left = T.match_buffer(left_arg, (n1, n1, 32, 4), "int32", align=16)
        right = T.match_buffer(right_arg, (nj, n2, 32, 4), "int32", align=16)
        factor = T.match_buffer(factor_arg, (1,), "float32", align=4)
        out = T.match_buffer(out_arg, (m, P), dtype, align=16)
        T.device_entry()
        bx = T.cta_id([grid])
        tx = T.thread_id([THREADS])
        T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", 2)
        pool = T.SMEMPool()
        values = pool.alloc((ROOM // 4,), "uint32", align=16)
        peaks = pool.alloc((WARPS,), "int32", align=16)
        pool.commit(shared_bytes(left_tiles, right_tiles))
        xs = T.alloc_local((left_tiles * 4,), "uint32")
        r = T.alloc_local((right_tiles * 4,), "uint32")
        u = T.alloc_local((left_tiles * 4,), "uint32")
        w = T.alloc_local((4,), "uint32")
        a = T.alloc_local((4,), "uint32")
        acc = T.alloc_local((8,), "float32")

        lane: T.let[T.int32] = tx % 32
        warp: T.let[T.int32] = tx // 32
        g: T.let[T.int32] = lane // 4
        t: T.let[T.int32] = lane % 4
        team: T.int32 = T.truncdiv(WARPS, together)  # warps of a token
        slot: T.int32 = T.truncdiv(warp, team)
        token: T.int32 = bx * together + slot
        member: T.int32 = warp - slot * team
        t1: T.int32 = T.truncdiv(P, t2)
        if tx < WARPS:
            peaks[tx] = 0
        T.cuda.cta_sync()
        peak: T.int32 = 0
        if token < m and slot < together:
            for i in T.unroll(left_tiles):  # all loads first: a lane has at most n1 vectors of its token
                which: T.int32 = (i * team + member) * 32 + lane
                i1: T.int32 = T.truncdiv(which, n2 * 2)
                j1: T.int32 = (which - i1 * (n2 * 2)) * 8
                for e in T.unroll(4):
                    xs[i * 4 + e] = T.uint32(0)
                if i1 < t1 and j1 < t2 and i1 * t2 + j1 < IC:
                    T.cuda.func_call(
                        "liftc_load_tile", x.ptr_to([token, i1 * t2 + j1]), xs.ptr_to([i * 4]),
                        source_code=tile_device.LOAD_TILE,
                    )  # fmt: skip
            for i in T.unroll(left_tiles):
                scaled: T.int32 = (i * team + member) * 32 + lane
                i2: T.int32 = T.truncdiv(scaled, n2 * 2)
                k2: T.int32 = i2 * t2 + (scaled - i2 * (n2 * 2)) * 8
                peak = T.max(
                    peak,
                    T.cuda.func_call(
                        f"liftc_peak_of_eight_{short}", xs.ptr_to([i * 4]),
                        in_scale.ptr_to([T.Select(T.And(SC > 1, k2 < IC), k2, 0)]), T.Select(SC > 1, 1, 0),
                        source_code=tile_device.WHITEN, return_type="int32",
                    ),
                )  # fmt: skip
        if slot < together:
            T.cuda.func_call(
                "liftc_warp_max", peaks.ptr_to([slot]), peak, lane, source_code=tile_device.WARP_MAX
            )
        T.cuda.cta_sync()
        stride: T.int32 = ((t2 + 31) // 32 | 1) * 16  # words of a row
        vectors: T.int32 = n1 * 16 * (n2 * 2)
        base: T.int32 = slot * n1 * 16 * stride
        exponent: T.int32 = T.min(T.max(T.shift_right(peaks[T.min(slot, WARPS - 1)], 23), 1), 253)
        if token < m and slot < together:
            down: T.float32 = T.reinterpret("float32", T.shift_left(254 - exponent, 23))
            for i in T.unroll(left_tiles):
                v: T.int32 = (i * team + member) * 32 + lane
                i0: T.int32 = T.truncdiv(v, n2 * 2)
                j0: T.int32 = (v - i0 * (n2 * 2)) * 8
                k0: T.int32 = i0 * t2 + j0
                if v < vectors:
                    T.cuda.func_call(
                        f"liftc_halves_of_eight_{short}", xs.ptr_to([i * 4]),
                        in_scale.ptr_to([T.Select(T.And(SC > 1, k0 < IC), k0, 0)]), T.Select(SC > 1, 1, 0), down,
                        w.ptr_to([0]), source_code=tile_device.WHITEN,
                    )  # fmt: skip
                    for e in T.unroll(4):
                        values[base + i0 * stride + j0 // 2 + e] = w[e]
        T.cuda.cta_sync()
        values_at: T.uint32 = T.cuda.cvta_generic_to_shared(values.ptr_to([base + g * stride + t * 4]))
        # a token has at least as many warps as columns of tiles
        if token < m and slot < together and member < nj:
            up: T.float32 = T.reinterpret("float32", T.shift_left(exponent, 23)) * factor[0] * times
            for q in T.unroll(right_tiles):
                if q < n2:
                    T.cuda.func_call(
                        "liftc_load_tile", right.ptr_to([member, q, lane, 0]), r.ptr_to([q * 4]),
                        source_code=tile_device.LOAD_TILE,
                    )  # fmt: skip
            for s in T.unroll(left_tiles):
                if s < n1:
                    for q in T.unroll(8):
                        acc[q] = T.float32(0)
                    for q in T.unroll(right_tiles // 2):
                        if q * 2 < n2:
                            for h in T.unroll(2):
                                T.ptx[LOAD4](
                                    w[0], w[1], w[2], w[3],
                                    values_at + T.Cast("uint32", ((s * 16 + h * 8) * stride + q * 16) * 4),
                                )  # fmt: skip
                                for e in T.unroll(2):
                                    T.ptx[MMA](
                                        acc[h * 4], acc[h * 4 + 1], acc[h * 4 + 2], acc[h * 4 + 3],
                                        r[q * 8 + e * 4], r[q * 8 + e * 4 + 1], r[q * 8 + e * 4 + 2],
                                        r[q * 8 + e * 4 + 3], w[e * 2], w[e * 2 + 1],
                                        acc[h * 4], acc[h * 4 + 1], acc[h * 4 + 2], acc[h * 4 + 3],
                                    )  # fmt: skip
                    for e in T.unroll(2):
                        for h in T.unroll(2):
                            u[s * 4 + e * 2 + h] = T.cuda.func_call(
                                "liftc_two_f16", acc[h * 4 + e * 2], acc[h * 4 + e * 2 + 1],
                                source_code=tile_device.WHITEN, return_type="uint32",
                            )  # fmt: skip
            for ib in T.serial(n1):
                for q in T.unroll(8):
                    acc[q] = T.float32(0)
                for s in T.unroll(left_tiles):
                    if s < n1:
                        T.cuda.func_call(
                            "liftc_load_tile", left.ptr_to([ib, s, lane, 0]), a.ptr_to([0]),
                            source_code=tile_device.LOAD_TILE,
                        )  # fmt: skip
                        for e in T.unroll(2):
                            T.ptx[MMA](
                                acc[e * 4], acc[e * 4 + 1], acc[e * 4 + 2], acc[e * 4 + 3],
                                a[0], a[1], a[2], a[3], u[s * 4 + e * 2], u[s * 4 + e * 2 + 1],
                                acc[e * 4], acc[e * 4 + 1], acc[e * 4 + 2], acc[e * 4 + 3],
                            )  # fmt: skip
                for h in T.unroll(2):
                    row: T.int32 = ib * 16 + h * 8 + g
                    if row < t1 and member * 16 + t * 4 < t2:
                        T.cuda.func_call(
                            f"liftc_store_four_{short}", out.ptr_to([0, 0]),
                            T.Cast("int64", token) * P + (row * t2 + member * 16 + t * 4), up,
                            acc[h * 2], acc[h * 2 + 1], acc[4 + h * 2], acc[4 + h * 2 + 1],
                            source_code=tile_device.WHITEN,
                        )  # fmt: skip

    return function
