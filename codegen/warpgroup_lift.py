# mypy: disable-error-code="misc, untyped-decorator, no-untyped-def, used-before-def"
"""The lift of several tokens on warp-group products of sm_90a.

T* x is the matrix left X right with X = x as (t1, t2), as in codegen/tensorcore_lift.py, whose operand words, bound and
planes these are. There a warp has eight rows and reads all of right, and then all of P', from shared memory; here a
warp group has 64 rows, and `wgmma` reads right and P' once for all of them. A block has one token and 16 `tiles`
columns c of T* x with all their rows, one warp group for each 64.

First P' = X right: rows of X are the first operand, from registers, as they lie in memory (features 8 q + 4 s + 2 h + e
of 32 are column 2 q + 8 h + e of step s), right the second one, eight columns by eight features to a matrix. P' goes
to shared memory as high and low bfloat16 parts, eight rows a by eight columns to a matrix, from which Z = left P' takes
it transposed; left is in registers before x is there. Both accumulate all products of high and low parts in float32.

The planes get whole words of four columns: a block stores, in every row, the words that begin in its columns but the
last four, which it computes for the words that end there.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from liftc.codegen.knobs import GroupLiftKnobs
from liftc.codegen.tensorcore_lift import KINDS
from liftc.codegen.warpgroup_lift_device import call
from liftc.spec import Z_MAX

COPIES = 12
"""Loads of right that a thread has in flight."""


def column_place(column: Any, tiles: int) -> tuple[Any, Any]:
    """Where a block's column lies among its operands: in which matrix of eight columns, and where in that.

    In pairs of tiles two lanes side by side then have words of z 16 columns apart, in the same 32 bytes of the planes.
    """
    paired = tiles // 2 * 32
    block, at = column // 32 * 4 + column // 4 % 4, column // 16 % 2 * 4 + column % 4
    if tiles % 2 == 0:
        return block, at
    block = T.Select(column < paired, block, column // 8)
    return block, T.Select(column < paired, at, column % 8)


def lift_planes_grouped(symbol: str, dtype: str, knobs: GroupLiftKnobs, form: str = "plain") -> Any:
    """PrimFunc x -> planes, totals, z_scale, with the arguments of tensorcore_lift.lift_planes in this form.

    `dtype` is float16 or bfloat16; a gate needs knobs.copied. row_blocks is 1, P = ceil(C / knobs.columns()). z is
    within one step of liftc/reference.py.
    """
    TILES, WARPS, THREADS = knobs.tiles, knobs.threads() // 32, knobs.threads()
    COLUMNS = 16 * TILES
    BLOCKS = 2 * TILES  # matrices of eight columns
    KIND = KINDS[dtype]
    START = knobs.trigger if knobs.dependent_launch else -1
    PARTS = knobs.pieces()  # of 32 features
    DEPTH = (knobs.most_left + 15) // 16
    AGAIN = 2 * WARPS  # matrices of eight rows a
    AT_ONCE = max(1, COPIES // (TILES + 1))  # operands of right that a warp loads at once, for all tiles
    ROWS_OF_X = 8 * knobs.most_right  # words of a warp's 16 rows
    HALVES = 2 if form == "gate" else 1  # of a row of x
    RAW = 4

    def place(column: Any) -> tuple[Any, Any]:
        return column_place(column, TILES)

    @T.prim_func
    def function(
        x_arg: T.handle, gain_arg: T.handle, in_scale_arg: T.handle, bound_arg: T.handle, left_arg: T.handle,
        right_arg: T.handle, planes_arg: T.handle, totals_arg: T.handle, z_scale_arg: T.handle, eps: T.float32,
        grid: T.int32, row_blocks: T.int32, t1: T.int32, t2: T.int32, C: T.int32, choice: T.int32,
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
        T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", 1)
        if knobs.registers > 0:
            call("launch_registers", knobs.registers)
        pool = T.SMEMPool()
        right_s = pool.alloc((TILES * PARTS * 512,), "uint32", align=128)
        mixed = pool.alloc((2 * AGAIN * BLOCKS * 32,), "uint32", align=128)
        rows_of_x = pool.alloc((HALVES * WARPS * ROWS_OF_X,), "uint32", align=128) if knobs.copied else mixed
        arrived = pool.alloc((WARPS,), "uint64", align=16)  # a warp's rows of x
        squares = pool.alloc((2 * WARPS,), "float32", align=16)  # of what is lifted, and of x
        sums = pool.alloc((1,), "int32", align=16)
        pool.commit(knobs.shared_bytes(form))
        raw = T.alloc_local((PARTS * 2 * RAW,), "uint32")
        up = T.alloc_local((RAW,), "uint32")
        b = T.alloc_local((16,), "uint32")
        part = T.alloc_local((8 * TILES,), "float32")
        rows = T.alloc_local((DEPTH * 8,), "uint32")
        copies = T.alloc_local((AT_ONCE * (TILES + 1) * 4,), "uint32")
        spot = T.alloc_local((2 * (TILES + 1),), "int32")
        source = T.alloc_local((2,), "int32")
        there = T.alloc_local((2,), "int32")
        norm = T.alloc_local((1,), "float32")
        total = T.alloc_local((1,), "int32")

        IC: T.let[T.int32] = XC // HALVES
        lane: T.let[T.int32] = tx % 32
        warp: T.let[T.int32] = tx // 32
        which: T.int32 = T.truncmod(bx, P)
        token: T.int32 = T.truncdiv(bx, P)
        c0: T.int32 = which * (COLUMNS - 4)
        if START == 0:
            call("dependent_start")
        if knobs.copied:
            if lane == 0:
                call("barrier_init", arrived.ptr_to([warp]), 1)
                call("fence_init")

        # right: four words of a lane, which lie together in memory, belong to four matrices. Where its columns go:
        for t in T.unroll(TILES + 1):
            for half in T.unroll(2):
                column: T.let[T.int32] = t * 16 + half * 8 + lane // 4 - c0 % 16
                spot[t * 2 + half] = -1
                if column >= 0 and column < COLUMNS:
                    spot[t * 2 + half] = place(column)[0] * 32 + place(column)[1] * 4 + lane % 4
        for i in T.serial(-(-4 * PARTS // (WARPS * AT_ONCE)), annotations={"disable_unroll": True}):
            for u in T.unroll(AT_ONCE):
                operand: T.let[T.int32] = (i * AT_ONCE + u) * WARPS + warp  # a step's high or low part
                for t in T.unroll(TILES + 1):
                    for q in T.unroll(4):
                        copies[(u * (TILES + 1) + t) * 4 + q] = T.uint32(0)
                    if c0 // 16 + t < CT and operand // 2 < KJ:
                        call(
                            "load_words",
                            right.ptr_to([c0 // 16 + t, operand // 2, operand % 2, lane, 0]),
                            copies.ptr_to([(u * (TILES + 1) + t) * 4]),
                        )
            for u in T.unroll(AT_ONCE):
                same: T.let[T.int32] = (i * AT_ONCE + u) * WARPS + warp
                for t in T.unroll(TILES + 1):
                    for q in T.unroll(4):
                        if spot[t * 2 + q % 2] >= 0 and same < 4 * PARTS:
                            right_s[(same * 2 + q // 2) * BLOCKS * 32 + spot[t * 2 + q % 2]] = copies[
                                (u * (TILES + 1) + t) * 4 + q
                            ]
        for g in T.unroll(DEPTH):
            for r in T.unroll(2):
                for q in T.unroll(4):
                    rows[(g * 2 + r) * 4 + q] = T.uint32(0)
                if warp * 2 + r < NT and g < KA:
                    call(
                        "load_words", left.ptr_to([warp * 2 + r, g, lane, 0]), rows.ptr_to([(g * 2 + r) * 4])
                    )
        unit_scale: T.float32 = bound[0] * T.float32(1 / Z_MAX)
        if tx == 0:
            sums[0] = 0
        for r in T.unroll(2):
            a: T.let[T.int32] = (warp * 2 + r) * 8 + lane // 4
            j: T.let[T.int32] = lane % 4 * 8
            source[r] = a * t2 + j
            there[r] = T.Select(a < t1, T.min(t2 - j, IC - source[r]), 0)
        held: T.int32 = T.min(T.min(t1 * t2, IC) - warp * 16 * t2, 16 * t2)  # of a warp's 16 rows of x
        call("fence_shared")
        T.cuda.cta_sync()
        if knobs.dependent_launch:
            call("dependent_wait")

        if knobs.copied:
            if held > 0:
                if lane == 0:
                    call("barrier_expect", arrived.ptr_to([warp]), held * 2 * HALVES)
                    for h in T.unroll(HALVES):
                        call(
                            "bulk_copy", rows_of_x.ptr_to([(h * WARPS + warp) * ROWS_OF_X]),
                            x.ptr_to([token, h * IC + warp * 16 * t2]), held * 2, arrived.ptr_to([warp]),
                        )  # fmt: skip
                call("barrier_await", arrived.ptr_to([warp]), 0)
        for s in T.unroll(PARTS):
            for r in T.unroll(2):
                if knobs.copied:
                    place_of: T.let[T.int32] = (r * 8 + lane // 4) * (t2 // 2) + lane % 4 * 4 + s * 16
                    call(
                        "read_x8",
                        rows_of_x.ptr_to([warp * ROWS_OF_X + place_of]),
                        there[r] - s * 32,
                        raw.ptr_to([(s * 2 + r) * RAW]),
                    )
                    if form == "gate":
                        call(
                            "read_x8",
                            rows_of_x.ptr_to([(WARPS + warp) * ROWS_OF_X + place_of]),
                            there[r] - s * 32,
                            up.ptr_to([0]),
                        )
                        call("gate_x8", raw.ptr_to([(s * 2 + r) * RAW]), up.ptr_to([0]), KIND)
                else:
                    call(
                        "load_x8", x.ptr_to([token, source[r] + s * 32]), KIND, there[r] - s * 32,
                        raw.ptr_to([(s * 2 + r) * RAW]),
                    )  # fmt: skip
        if form == "norm":
            norm[0] = T.float32(0)
            for s in T.unroll(2 * PARTS):
                norm[0] = norm[0] + call("squares_x8", raw.ptr_to([s * RAW]), KIND)
            call("warp_sum", norm[0], squares.ptr_to([WARPS + warp]), lane, squares.ptr_to([0]), 0, 1)
            T.cuda.cta_sync()
            norm[0] = T.float32(0)
            for q in T.unroll(WARPS):
                norm[0] = norm[0] + squares[WARPS + q]
            norm[0] = T.rsqrt(norm[0] * (T.float32(1) / T.Cast("float32", IC)) + eps)
            for s in T.unroll(PARTS):
                for r in T.unroll(2):
                    call(
                        "norm_x8", raw.ptr_to([(s * 2 + r) * RAW]),
                        gain.ptr_to([T.Select(s * 32 < there[r], source[r] + s * 32, 0)]), norm[0], KIND,
                    )  # fmt: skip
        for q in T.unroll(8 * TILES):
            part[q] = T.float32(0)
        norm[0] = T.float32(0)

        @T.inline
        def multiply_right(s, half, words, a0, a1, a2, a3, of_part):
            call(
                f"group_mma_{COLUMNS}_0", part.ptr_to([0]), words[a0], words[a1], words[a2], words[a3],
                right_s.ptr_to([((s * 2 + half) * 2 + of_part) * 2 * BLOCKS * 32]), BLOCKS * 128, 128,
            )  # fmt: skip

        @T.inline
        def mix(scaled):
            for s in T.unroll(PARTS):
                for half in T.unroll(2):
                    for r in T.unroll(2):
                        norm[0] = norm[0] + call(
                            "split_x4", raw.ptr_to([(s * 2 + r) * RAW]), KIND, half,
                            in_scale.ptr_to([source[r] + s * 32 + half * 4]), scaled, there[r] - s * 32,
                            b.ptr_to([half * 8 + r * 4]),
                        )  # fmt: skip
                call(f"group_fence_{COLUMNS}", part.ptr_to([0]))
                for half in T.unroll(2):
                    for of_part in T.unroll(2):
                        multiply_right(
                            s, half, b, half * 8, half * 8 + 4, half * 8 + 1, half * 8 + 5, of_part
                        )
                    multiply_right(s, half, b, half * 8 + 2, half * 8 + 6, half * 8 + 3, half * 8 + 7, 0)
                call("group_commit")
                call(f"group_wait_{COLUMNS}_16", part.ptr_to([0]), b.ptr_to([0]))

        if KIND == 2 and SC == 1:  # bfloat16 says it all
            call(f"group_fence_{COLUMNS}", part.ptr_to([0]))
            for s in T.unroll(PARTS):
                for half in T.unroll(2):
                    for of_part in T.unroll(2):
                        multiply_right(
                            s, half, raw, s * 8 + half * 2, s * 8 + 4 + half * 2, s * 8 + half * 2 + 1,
                            s * 8 + 5 + half * 2, of_part,
                        )  # fmt: skip
            call("group_commit")
            for s in T.unroll(2 * PARTS):
                norm[0] = norm[0] + call("squares_x8", raw.ptr_to([s * RAW]), KIND)
            call(f"group_wait_{COLUMNS}_{8 * PARTS}", part.ptr_to([0]), raw.ptr_to([0]))
        else:
            if SC > 1:
                mix(True)
            else:
                mix(False)
        for r in T.unroll(2):
            call(
                f"store_mixed_{COLUMNS}", part.ptr_to([r * 2]),
                mixed.ptr_to([(warp * 2 + r) * BLOCKS * 32 + lane]), AGAIN * BLOCKS * 32,
            )  # fmt: skip
        if START == 1:
            call("dependent_start")
        call("warp_sum", norm[0], squares.ptr_to([warp]), lane, squares.ptr_to([0]), 0, 1)
        call("fence_shared")
        T.cuda.cta_sync()

        for q in T.unroll(8 * TILES):
            part[q] = T.float32(0)
        call(f"group_fence_{COLUMNS}", part.ptr_to([0]))
        for g in T.unroll(DEPTH):
            for product in T.unroll(3):  # high by high, high by low, low by high
                first: T.let[T.int32] = g * 8 + product // 2 * 2
                call(
                    f"group_mma_{COLUMNS}_1", part.ptr_to([0]), rows[first], rows[first + 4], rows[first + 1],
                    rows[first + 5],
                    mixed.ptr_to([(product % 2 * AGAIN + g * 2) * BLOCKS * 32]), BLOCKS * 128, 128,
                )  # fmt: skip
        call("group_commit")
        norm[0] = T.float32(0)
        for q in T.unroll(WARPS):
            norm[0] = norm[0] + squares[q]
        norm[0] = call("z_scale", norm[0], unit_scale)
        if which == 0 and tx == 0:
            z_scale[token, 0] = norm[0]
        norm[0] = call("inverse", norm[0])
        call(f"group_wait_{COLUMNS}_{8 * DEPTH}", part.ptr_to([0]), rows.ptr_to([0]))
        total[0] = call(
            f"store_group_z_{COLUMNS}", part.ptr_to([0]), norm[0], warp * 16 * C + c0, C, c0, C - c0, t1 - warp * 16,
            planes.ptr_to([0, 0, 0, 0]), 2 * token, COLS, PIECES, lane,
        )  # fmt: skip
        call("warp_add", sums.ptr_to([0]), total[0], lane)
        T.cuda.cta_sync()
        if START == 2:
            call("dependent_start")
        if tx == 0:
            totals[which, token] = sums[0]

    if knobs.dependent_launch:
        function = function.with_attr("tirx.kernel_launch_params", ["tirx.use_programtic_dependent_launch"])
    return function
