# mypy: disable-error-code="misc, untyped-decorator, no-untyped-def, used-before-def"
"""The lift in one launch on bfloat16 tensor cores, straight to the operand bytes of the tensor-core sign_matmul.

T* x is the matrix left X right with X = x as (t1, t2). A block owns 16 `tiles` columns c of it, all rows or a share
of them, and `group` tokens. First P' = right' X' for its columns and every row a of X, rows in turn by warp; P' goes
to shared memory in the layout of an operand; then Z' = P' left', eight rows of T* x to a warp. Every float is the
sum of two bfloat16 (16 bits), three of the four products are added, in float32: an error of at most about
2^-16 sum |left| |x| |right|, a quarter of a step of z at worst (x in bfloat16 without scale is exact, two products).

The step of z comes from a bound (liftc/reference.py), so blocks need not wait for each other: each computes the norm
of x for itself, in the same order and hence with the same bits.

Factors arrive as operand words (runtime/factors.py): right int32 (CT, KJ, 2, 32, 4), for 16 columns and 16 features
the first operand of the product of high and low parts; features 8 q + 4 s + 2 h + e of 32 are column 2 q + 8 h + e
of step s, so that a lane's 16-byte load of x is its second operand as it lies in memory. left int32 (NT, KA, 32, 4):
for 8 rows and 16 columns a the second operand, high and low.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from liftc.codegen.knobs import LiftKnobs
from liftc.codegen.lift_device import call

KINDS = {"float32": 0, "float16": 1, "bfloat16": 2}
FORMS = ("plain", "norm", "gate")


def lift_planes(symbol: str, dtype: str, knobs: LiftKnobs, form: str = "plain") -> Any:
    """PrimFunc x -> planes, totals, z_scale; z is within one step of liftc/reference.py.

    x `dtype` (m, IC) 16-byte aligned, gain `dtype` (G,), in_scale f32 (IC,) or (1,) for none, bound f32 (1,), left and
    right as above -> planes int8 (KB, 4, COLS, 64) or (KB, 16, COLS, 16), totals int32 (P, m) what each block adds to
    the sums of z, z_scale f32 (m, 1). Then f32 eps, and the integers grid = ceil(m / knobs.group) P, row_blocks, t1, t2
    and C; P = row_blocks ceil(ceil(C / 16) / knobs.tiles). Limits: t1 <= most_left, t2 <= most_right, m <= tokens,
    t2 and IC multiples of 8.

    What is lifted, each step rounded to `dtype` as separate operations would: x itself where form is "plain"; gain *
    (x * rsqrt(mean x^2 + eps)), G = IC, where it is "norm"; silu(gate) * up where it is "gate" and x is (m, 2 IC),
    gate before up.

    Planes: column k = 256 b + 64 q + 16 s + 4 t + e of token c is bytes [b, q, 2 c and 2 c + 1, 16 s + 4 t + e], or
    [b, 4 q + t, 2 c and 2 c + 1, 4 s + e] as the warp groups read it, the high and the low byte of z = 256 h + l
    (codegen/tensorcore_sign.py); columns past K are never written: their signs are 0 bits, so that they count for
    nothing.
    """
    WARPS, GROUP, TILES, UNITS = knobs.warps, knobs.group, knobs.tiles, knobs.units
    AHEAD = (knobs.ahead + 1) // 2 if form == "gate" else knobs.ahead  # two values are loaded for each
    START = knobs.trigger if knobs.dependent_launch else -1
    THREADS = WARPS * 32
    KIND = KINDS[dtype]
    RAW = 8 if KIND == 0 else 4
    ITEMS = GROUP * UNITS
    DEPTH = knobs.left_depth
    KA_MOST = (knobs.most_left + 15) // 16
    KJ_MOST = (knobs.most_right + 31) // 32 * 2

    def unit_of(turn: Any, u: Any, warp: Any) -> Any:
        return (turn * UNITS + u) * WARPS + warp

    def slot(t: Any, u: Any, s: Any) -> Any:
        return ((t * UNITS + u) * AHEAD + s) * RAW

    def mma(sums: Any, operand: Any, b0: Any, b1: Any) -> Any:
        return call("mma_bf16", sums, operand, b0, b1)

    @T.prim_func
    def function(
        x_arg: T.handle, gain_arg: T.handle, in_scale_arg: T.handle, bound_arg: T.handle, left_arg: T.handle,
        right_arg: T.handle, planes_arg: T.handle, totals_arg: T.handle, z_scale_arg: T.handle, eps: T.float32,
        grid: T.int32, row_blocks: T.int32, t1: T.int32, t2: T.int32, C: T.int32,
    ) -> None:  # fmt: skip
        T.func_attr({"tirx.noalias": True, "global_symbol": symbol})
        m = T.int32()
        XC = T.int32()
        G = T.int32()
        SC = T.int32()
        NT = T.int32()
        KA = T.int32()
        CT = T.int32()
        KJ = T.int32()
        KB = T.int32()
        COLS = T.int32()
        PIECES = T.int32()
        WIDE = T.int32()
        P = T.int32()
        x = T.match_buffer(x_arg, (m, XC), dtype, align=16)
        gain = T.match_buffer(gain_arg, (G,), dtype, align=16)
        in_scale = T.match_buffer(in_scale_arg, (SC,), "float32", align=4)
        bound = T.match_buffer(bound_arg, (1,), "float32", align=4)
        left = T.match_buffer(left_arg, (NT, KA, 32, 4), "int32", align=16)
        right = T.match_buffer(right_arg, (CT, KJ, 2, 32, 4), "int32", align=16)
        planes = T.match_buffer(planes_arg, (KB, PIECES, COLS, WIDE), "int8", align=16)
        totals = T.match_buffer(totals_arg, (P, m), "int32", align=4)
        z_scale = T.match_buffer(z_scale_arg, (m, 1), "float32", align=4)
        T.device_entry()
        bx = T.cta_id([grid])
        tx = T.thread_id([THREADS])
        T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", knobs.blocks_per_processor)
        pool = T.SMEMPool()
        right_s = pool.alloc((TILES * KJ_MOST * 256,), "uint32", align=16)
        mixed = pool.alloc((GROUP * TILES * KA_MOST * 256,), "uint32", align=16)
        squares = pool.alloc((2 * GROUP * WARPS,), "float32", align=16)
        sums = pool.alloc((GROUP,), "int32", align=16)
        pool.commit(knobs.shared_bytes())
        raw = T.alloc_local((ITEMS * AHEAD * RAW,), "uint32")
        raw_up = T.alloc_local(((ITEMS * AHEAD if form == "gate" else 1) * RAW,), "uint32")
        root = T.alloc_local((GROUP,), "float32")
        w = T.alloc_local((TILES * 8,), "uint32")
        b = T.alloc_local((8,), "uint32")
        part = T.alloc_local((ITEMS * TILES * 8,), "float32")
        rows = T.alloc_local((DEPTH * 4,), "uint32")
        norm = T.alloc_local((GROUP,), "float32")

        IC: T.let[T.int32] = XC // 2 if form == "gate" else XC
        lane: T.let[T.int32] = tx % 32
        warp: T.let[T.int32] = tx // 32
        which: T.int32 = T.truncmod(bx, P)
        token0: T.int32 = T.truncdiv(bx, P) * GROUP
        row_block: T.int32 = T.truncmod(which, row_blocks)
        tile0: T.int32 = T.truncdiv(which, row_blocks) * TILES
        n0: T.int32 = T.truncdiv(row_block * NT, row_blocks)
        n1: T.int32 = T.truncdiv((row_block + 1) * NT, row_blocks)
        if START == 0:
            call("dependent_start")
        vectors: T.int32 = T.min(CT - tile0, TILES) * KJ * 64
        for i in T.serial((vectors - tx + THREADS - 1) // THREADS):
            T.ptx["cp.async.cg.shared.global"](
                right_s.ptr_to([(i * THREADS + tx) * 4]),
                right.ptr_to([tile0, 0, 0, 0, (i * THREADS + tx) * 4]),
                16,
            )
        T.ptx["cp.async.commit_group"]()
        for i in T.serial((n1 - n0 - warp + WARPS - 1) // WARPS):
            call("prefetch", left.ptr_to([n0 + i * WARPS + warp, 0, 0, 0]), KA * 512, lane)
        largest: T.float32 = bound[0]
        if tx < GROUP:
            sums[tx] = 0
        T.ptx["cp.async.wait_group"](0)
        if knobs.dependent_launch:
            call("dependent_wait")
        T.cuda.cta_sync()

        if form == "norm":
            for t in T.unroll(GROUP):
                root[t] = T.float32(0)
                for i in T.serial((IC // 8 - tx + THREADS - 1) // THREADS):
                    call(
                        "load_x8",
                        x.ptr_to([token0 + t, (i * THREADS + tx) * 8]),
                        KIND,
                        T.Cast("int32", token0 + t < m),
                        raw.ptr_to([0]),
                    )
                    root[t] = root[t] + call("squares_x8", raw.ptr_to([0]), KIND)
                call("warp_sum", root[t], squares.ptr_to([(GROUP + t) * WARPS + warp]), lane)
            T.cuda.cta_sync()
            for t in T.unroll(GROUP):
                root[t] = T.float32(0)
                for q in T.unroll(WARPS):
                    root[t] = root[t] + squares[(GROUP + t) * WARPS + q]
                root[t] = T.rsqrt(root[t] * (T.float32(1) / T.Cast("float32", IC)) + eps)

        # P' for the rows a of X: 8 of them to a unit, units in turn by warp.
        for t in T.unroll(GROUP):
            norm[t] = T.float32(0)
        for turn in T.serial((2 * KA + WARPS * UNITS - 1) // (WARPS * UNITS)):
            for q in T.unroll(ITEMS * TILES * 8):
                part[q] = T.float32(0)
            for step in T.serial((KJ // 2 + AHEAD - 1) // AHEAD):
                for s in T.unroll(AHEAD):
                    for t in T.unroll(GROUP):
                        for u in T.unroll(UNITS):
                            a: T.let[T.int32] = unit_of(turn, u, warp) * 8 + lane // 4
                            j: T.let[T.int32] = (step * AHEAD + s) * 32 + lane % 4 * 8
                            call(
                                "load_x8",
                                x.ptr_to([token0 + t, a * t2 + j]),
                                KIND,
                                T.Cast(
                                    "int32",
                                    T.And(T.And(a < t1, j < t2), T.And(a * t2 + j < IC, token0 + t < m)),
                                ),
                                raw.ptr_to([slot(t, u, s)]),
                            )
                            if form == "gate":
                                call(
                                    "load_x8",
                                    x.ptr_to([token0 + t, IC + a * t2 + j]),
                                    KIND,
                                    T.Cast(
                                        "int32",
                                        T.And(T.And(a < t1, j < t2), T.And(a * t2 + j < IC, token0 + t < m)),
                                    ),
                                    raw_up.ptr_to([slot(t, u, s)]),
                                )
                for s in T.unroll(AHEAD):
                    if step * AHEAD + s < KJ // 2:
                        for t in T.unroll(GROUP):
                            for u in T.unroll(UNITS):
                                k1: T.let[T.int32] = (
                                    (unit_of(turn, u, warp) * 8 + lane // 4) * t2
                                    + (step * AHEAD + s) * 32 + lane % 4 * 8
                                )  # fmt: skip
                                if form == "norm":
                                    call(
                                        "norm_x8",
                                        raw.ptr_to([slot(t, u, s)]),
                                        gain.ptr_to([T.Select(k1 < IC, k1, 0)]),
                                        root[t],
                                        KIND,
                                    )
                                if form == "gate":
                                    call(
                                        "gate_x8",
                                        raw.ptr_to([slot(t, u, s)]),
                                        raw_up.ptr_to([slot(t, u, s)]),
                                        KIND,
                                    )
                        for half in T.unroll(2):
                            for c in T.unroll(TILES):
                                for part_of in T.unroll(2):
                                    call(
                                        "load_words",
                                        right_s.ptr_to(
                                            [
                                                ((c * KJ + (step * AHEAD + s) * 2 + half) * 2 + part_of) * 128
                                                + lane * 4
                                            ]
                                        ),
                                        w.ptr_to([c * 8 + part_of * 4]),
                                    )
                            for t in T.unroll(GROUP):
                                for u in T.unroll(UNITS):
                                    a2: T.let[T.int32] = unit_of(turn, u, warp) * 8 + lane // 4
                                    k2: T.let[T.int32] = (
                                        a2 * t2 + (step * AHEAD + s) * 32 + lane % 4 * 8 + half * 4
                                    )
                                    norm[t] = norm[t] + call(
                                        "split_x4",
                                        raw.ptr_to([slot(t, u, s)]),
                                        KIND,
                                        half,
                                        in_scale.ptr_to([T.Select(T.And(SC > 1, k2 < IC), k2, 0)]),
                                        T.Cast("int32", SC > 1),
                                        b.ptr_to([0]),
                                    )
                                    for c in T.unroll(TILES):
                                        at: T.let[T.int32] = ((t * UNITS + u) * TILES + c) * 8
                                        mma(part.ptr_to([at]), w.ptr_to([c * 8]), b[0], b[1])
                                        mma(part.ptr_to([at + 4]), w.ptr_to([c * 8 + 4]), b[0], b[1])
                                        if KIND != 2 or SC > 1:
                                            mma(part.ptr_to([at + 4]), w.ptr_to([c * 8]), b[2], b[3])
            for t in T.unroll(GROUP):
                for u in T.unroll(UNITS):
                    unit: T.let[T.int32] = unit_of(turn, u, warp)
                    for c in T.unroll(TILES):
                        if unit < 2 * KA:
                            call(
                                "store_mixed",
                                part.ptr_to([((t * UNITS + u) * TILES + c) * 8]),
                                mixed.ptr_to(
                                    [((t * TILES + c) * KA + unit // 2) * 256 + lane * 4 + unit % 2 * 2]
                                ),
                            )

        @T.inline
        def bring(tile, depth):
            for g in T.unroll(DEPTH):
                if tile < n1 and depth * DEPTH + g < KA:
                    call("load_words", left.ptr_to([tile, depth * DEPTH + g, lane, 0]), rows.ptr_to([g * 4]))

        if START == 1:
            call("dependent_start")
        bring(n0 + warp, 0)
        for t in T.unroll(GROUP):
            call("warp_sum", norm[t], squares.ptr_to([t * WARPS + warp]), lane)
        T.cuda.cta_sync()
        for t in T.unroll(GROUP):
            norm[t] = T.float32(0)
            for q in T.unroll(WARPS):
                norm[t] = norm[t] + squares[t * WARPS + q]
            norm[t] = call("z_scale", norm[t], largest)
            if which == 0 and tx == 0 and token0 + t < m:
                z_scale[token0 + t, 0] = norm[t]

        # Z' for the rows of T* x: 8 of them to a warp at a time.
        for i in T.serial((n1 - n0 - warp + WARPS - 1) // WARPS):
            for q in T.unroll(GROUP * TILES * 8):
                part[q] = T.float32(0)
            for depth in T.serial((KA + DEPTH - 1) // DEPTH):
                if i + depth > 0:
                    bring(n0 + i * WARPS + warp, depth)
                for g in T.unroll(DEPTH):
                    if depth * DEPTH + g < KA:
                        for t in T.unroll(GROUP):
                            for c in T.unroll(TILES):
                                for part_of in T.unroll(2):
                                    call(
                                        "load_words",
                                        mixed.ptr_to(
                                            [
                                                ((t * TILES + c) * KA + depth * DEPTH + g) * 256
                                                + part_of * 128
                                                + lane * 4
                                            ]
                                        ),
                                        w.ptr_to([part_of * 4]),
                                    )
                                at4: T.let[T.int32] = (t * TILES + c) * 8
                                mma(part.ptr_to([at4]), w.ptr_to([0]), rows[g * 4], rows[g * 4 + 1])
                                mma(part.ptr_to([at4 + 4]), w.ptr_to([4]), rows[g * 4], rows[g * 4 + 1])
                                mma(part.ptr_to([at4 + 4]), w.ptr_to([0]), rows[g * 4 + 2], rows[g * 4 + 3])
            for t in T.unroll(GROUP):
                total: T.int32 = 0
                for c in T.unroll(TILES):
                    for q in T.unroll(4):
                        row: T.let[T.int32] = (n0 + i * WARPS + warp) * 8 + lane % 4 * 2 + q % 2
                        column: T.let[T.int32] = (tile0 + c) * 16 + lane // 4 + q // 2 * 8
                        k: T.let[T.int32] = row * C + column
                        if row < t1 and column < C and token0 + t < m:
                            total = total + call(
                                "round",
                                part[(t * TILES + c) * 8 + q] + part[(t * TILES + c) * 8 + 4 + q],
                                norm[t],
                                planes.ptr_to([0, 0, 0, 0]),
                                k,
                                2 * (token0 + t),
                                COLS,
                                PIECES,
                            )
                call("warp_add", sums.ptr_to([t]), total, lane)
        T.cuda.cta_sync()
        if START == 2:
            call("dependent_start")
        if tx < GROUP and token0 + tx < m:
            totals[which, token0 + tx] = sums[tx]

    if knobs.dependent_launch:
        function = function.with_attr("tirx.kernel_launch_params", ["tirx.use_programtic_dependent_launch"])
    return function
