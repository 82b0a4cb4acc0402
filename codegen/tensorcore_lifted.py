# mypy: disable-error-code="misc, untyped-decorator, no-untyped-def, used-before-def"
# ruff: noqa: F823, F841, B007  (TIRx inline functions share the scope of their caller)
"""lift and sign_matmul of one token in one launch, where the factors are small: the TIRx template behind
`lifted_sign_matmul`.

Between a lift and the product that reads it lie a kernel's end, z on its way through L2 and its bytes being cut, about
as long as the lift itself. For factors up to 64 x 64 every block can lift for itself: T* x is left X right with X = x as
(t1, t2), and Q = left X first leaves few products. The block asks for its first signs and brings both factors to shared
memory before it waits for x; then

1. x, a thread's eight values at a time, becomes two bfloat16 numbers each in shared memory, and its norm is added up;
2. Q, 16 x 16 results to a warp, becomes the first operand of the next product;
3. T* x, 16 rows and some 8-column tiles to a warp, is rounded to z with the step from the bound (liftc/reference.py),
   and z lies in shared memory as two bytes;
4. these are cut into bits, and the product goes as in tensorcore_popcount.py, all columns being there.

Every float is the sum of two bfloat16 numbers and three of the four products are added in float32, as in
tensorcore_lift.py. All blocks compute the same z, in the same order. More signs are asked for between the steps, so
that loads of x and of the factors never wait behind many of them.

Factors arrive as operand words (runtime/factors.py): left int32 (ceil(t1 / 16), ceil(t1 / 16), 2, 32, 4), for 16 rows
and 16 columns the first operand of high and of low parts; right int32 (ceil(C / 8), ceil(t2 / 16), 32, 4), for 8
columns of T* x and 16 features the second operand, high and low.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from liftc.codegen import popcount_device
from liftc.codegen import tensorcore_device as device
from liftc.codegen.knobs import LiftedKnobs
from liftc.codegen.lift_device import call
from liftc.codegen.tensorcore_lift import KINDS
from liftc.spec import Z_MAX

COUNT = "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"
LOAD4 = "ld.shared.v4.u32"
TILE_WORDS = 128  # 16 rows x 256 columns
TILE_BYTES = 512
ROLLED = {"disable_unroll": True}


def lifted_sign_matmul(symbol: str, dtype: str, knobs: LiftedKnobs) -> Any:
    """PrimFunc y = cast((float32(B z) * z_scale) * output_scale), z and z_scale being the lift of x.

    tiles int32 (NB, KB, 32, 4), x `dtype` (IC,) 16-byte aligned, in_scale f32 (IC,) or (1,) for none, bound f32 (1,),
    left and right as above but (.., 4), output_scale f32 (OC,), y uint8 (bytes of OC results,), then grid, the number of blocks,
    at least ceil(NB / knobs.block_rows), kind, 0 for float32, 1 for float16, 2 for bfloat16, t1, t2 and C, the columns
    of right. 16 NB >= OC, 256 KB >= t1 C. Limits: t1 <= most_left, t2 <= most_right, C <= most_lifted, t2 and IC
    multiples of 8, IC <= t1 t2.
    """
    WARPS, RING = knobs.warps, knobs.ring
    THREADS = WARPS * 32
    ROWS = knobs.block_rows * 16
    MINE = -(-ROWS // THREADS)  # rows of a thread
    KIND = KINDS[dtype]
    RAW = 8 if KIND == 0 else 4
    KA_MOST, KJ_MOST = knobs.most_left // 16, knobs.most_right // 16
    PITCH = knobs.most_right + 8  # halves of a row of X in shared memory, so that eight rows lie in different banks
    LOW_X = KA_MOST * 16 * PITCH * 2  # bytes from high parts of x to low ones
    LOW_Z = knobs.low_bytes()
    TILES = knobs.tiles
    MIXED = KA_MOST * KA_MOST * 256  # where Q begins behind left
    START, MORE = knobs.start_tiles, knobs.step_tiles
    REST = RING - START - 3 * MORE

    @T.prim_func
    def function(
        tiles_arg: T.handle, x_arg: T.handle, in_scale_arg: T.handle, bound_arg: T.handle, left_arg: T.handle,
        right_arg: T.handle, scale_arg: T.handle, y_arg: T.handle, grid: T.int32, kind: T.int32, t1: T.int32,
        t2: T.int32, C: T.int32,
    ) -> None:  # fmt: skip
        T.func_attr({"tirx.noalias": True, "global_symbol": symbol})
        NB = T.int32()
        KB = T.int32()
        IC = T.int32()
        SC = T.int32()
        LV = T.int32()
        RV = T.int32()
        OC = T.int32()
        size = T.int32()
        tiles = T.match_buffer(tiles_arg, (NB, KB, 32, 4), "int32", align=16)
        x = T.match_buffer(x_arg, (IC,), dtype, align=16)
        in_scale = T.match_buffer(in_scale_arg, (SC,), "float32", align=4)
        bound = T.match_buffer(bound_arg, (1,), "float32", align=4)
        left = T.match_buffer(left_arg, (LV, 4), "int32", align=16)
        right = T.match_buffer(right_arg, (RV, 4), "int32", align=16)
        scale = T.match_buffer(scale_arg, (OC,), "float32", align=4)
        y = T.match_buffer(y_arg, (size,), "uint8", align=4)
        T.device_entry()
        bx = T.cta_id([grid])
        tx = T.thread_id([THREADS])
        T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", 1)  # else nvcc saves registers for two, and spills
        pool = T.SMEMPool()
        right_s = pool.alloc((knobs.right_bytes() // 4,), "uint32", align=16)
        left_s = pool.alloc((knobs.left_bytes() // 4,), "uint32", align=16)  # and Q; later z in bits
        x_s = pool.alloc((knobs.x_bytes() // 4,), "uint32", align=16)  # later z in bytes
        ring = pool.alloc((WARPS * RING * TILE_WORDS,), "uint32", align=16)
        sums = pool.alloc((ROWS + 8,), "int32", align=16)
        squares = pool.alloc((WARPS,), "float32", align=16)
        total = pool.alloc((4,), "int32", align=16)
        pool.commit(knobs.shared_bytes())
        acc = T.alloc_local((8,), "uint32")
        w = T.alloc_local((8,), "uint32")
        b = T.alloc_local((8,), "uint32")
        raw = T.alloc_local((16,), "uint32")
        part = T.alloc_local((max(2, TILES) * 8,), "float32")
        norm = T.alloc_local((1,), "float32")
        z_sum = T.alloc_local((1,), "int32")
        row_scale = T.alloc_local((MINE,), "float32")

        KA: T.int32 = T.truncdiv(t1 + 15, 16)
        KJ: T.int32 = T.truncdiv(t2 + 15, 16)
        CT: T.int32 = T.truncdiv(C + 7, 8)
        lane: T.let[T.int32] = tx % 32
        warp: T.let[T.int32] = tx // 32
        row0: T.int32 = T.truncdiv(bx * NB, grid)
        blocks: T.int32 = T.truncdiv((bx + 1) * NB, grid) - row0
        step: T.int32 = warp * (blocks * KB) // WARPS  # the tiles of a warp, one after the other in memory
        stop: T.let[T.int32] = (warp + 1) * (blocks * KB) // WARPS
        ahead: T.int32 = step  # the next one to ask for
        slot: T.int32 = 0
        ring_at: T.uint32 = T.cuda.cvta_generic_to_shared(
            ring.ptr_to([warp * (RING * TILE_WORDS) + lane * 4])
        )
        bits_at: T.uint32 = T.cuda.cvta_generic_to_shared(left_s.ptr_to([lane * 4]))

        @T.inline
        def issue():
            if ahead < stop:
                T.ptx["cp.async.cg.shared.global"](
                    ring_at + T.Cast("uint32", slot),
                    tiles.ptr_to([0, 0, 0, (row0 * KB + ahead) * TILE_WORDS + lane * 4]),
                    16,
                )
            ahead = ahead + 1
            T.ptx["cp.async.commit_group"]()
            slot = T.Select(slot == (RING - 1) * TILE_BYTES, 0, slot + TILE_BYTES)

        @T.inline
        def issue_some(count):
            for i in T.serial(count, annotations=ROLLED):
                issue()

        if knobs.dependent_launch:
            call("dependent_start")
        for i in T.serial((RV - tx + THREADS - 1) // THREADS, annotations=ROLLED):
            T.ptx["cp.async.cg.shared.global"](
                right_s.ptr_to([(i * THREADS + tx) * 4]), right.ptr_to([i * THREADS + tx, 0]), 16
            )
        for i in T.serial((LV - tx + THREADS - 1) // THREADS, annotations=ROLLED):
            T.ptx["cp.async.cg.shared.global"](
                left_s.ptr_to([(i * THREADS + tx) * 4]), left.ptr_to([i * THREADS + tx, 0]), 16
            )
        T.ptx["cp.async.commit_group"]()
        issue_some(START)
        for i in T.serial((knobs.x_bytes() // 16 - tx + THREADS - 1) // THREADS, annotations=ROLLED):
            for q in T.unroll(4):  # what is past the last row, column or feature counts as zero
                x_s[(i * THREADS + tx) * 4 + q] = T.uint32(0)
        for i in T.unroll(MINE):
            row_scale[i] = T.float32(0)
            if row0 * 16 + i * THREADS + tx < OC:
                row_scale[i] = scale[row0 * 16 + i * THREADS + tx]
        for i in T.serial((ROWS + 8 - tx + THREADS - 1) // THREADS, annotations=ROLLED):
            sums[i * THREADS + tx] = 0
        if tx == 0:
            total[0] = 0
        unit_scale: T.float32 = bound[0] * T.float32(1 / Z_MAX)
        T.ptx["cp.async.wait_group"](START)
        T.cuda.cta_sync()
        if knobs.dependent_launch:
            call("dependent_wait")

        @T.inline
        def stage(scaled):  # x as high and low parts, and the sum of squares of what a thread has
            for i in T.serial((IC // 8 - tx + THREADS - 1) // THREADS, annotations=ROLLED):
                k: T.let[T.int32] = (i * THREADS + tx) * 8
                call("load_x8", x.ptr_to([k]), KIND, 1, raw.ptr_to([0]))
                norm[0] = norm[0] + call(
                    "stage_x8",
                    raw.ptr_to([0]),
                    KIND,
                    in_scale.ptr_to([k if scaled else 0]),
                    scaled,
                    x_s.ptr_to([(T.truncdiv(k, t2) * PITCH + T.truncmod(k, t2)) // 2]),
                    LOW_X,
                )

        norm[0] = T.float32(0)
        if SC > 1:
            stage(True)
        else:
            stage(False)
        call("warp_sum", norm[0], squares.ptr_to([warp]), lane, total.ptr_to([0]), 0, 1)
        issue_some(MORE)
        T.cuda.cta_sync()

        # Q = left X, 16 x 16 results to a warp, in the layout of an operand.
        for turn in T.serial((KA * KJ - warp + WARPS - 1) // WARPS, annotations=ROLLED):
            unit: T.let[T.int32] = turn * WARPS + warp
            for q in T.unroll(16):
                part[q] = T.float32(0)
            for g in T.unroll(KA_MOST):
                if g < KA:
                    for p in T.unroll(2):
                        call(
                            "load_words",
                            left_s.ptr_to([((T.truncdiv(unit, KJ) * KA + g) * 2 + p) * 128 + lane * 4]),
                            w.ptr_to([p * 4]),
                        )
                    at_x: T.let[T.int32] = (
                        (g * 16 + lane % 16) * PITCH + T.truncmod(unit, KJ) * 16 + lane // 16 * 8
                    ) // 2
                    call("load_turned", x_s.ptr_to([at_x]), b.ptr_to([0]))
                    for t in T.unroll(2):
                        call("mma_bf16", part.ptr_to([t * 8]), w.ptr_to([0]), b[t * 2], b[t * 2 + 1])
                        call("mma_bf16", part.ptr_to([t * 8 + 4]), w.ptr_to([4]), b[t * 2], b[t * 2 + 1])
                    if KIND != 2 or SC > 1:
                        call("load_turned", x_s.ptr_to([at_x + LOW_X // 4]), b.ptr_to([0]))
                        for t in T.unroll(2):
                            call("mma_bf16", part.ptr_to([t * 8 + 4]), w.ptr_to([0]), b[t * 2], b[t * 2 + 1])
            for t in T.unroll(2):
                call("mixed_words", part.ptr_to([t * 8]), 1, w.ptr_to([0]))
                call(
                    "share",
                    w.ptr_to([0]),
                    left_s.ptr_to([MIXED + unit * 256 + lane * 4 + t * 2]),
                    total.ptr_to([0]),
                    0,
                    1,
                )
        issue_some(MORE)
        norm[0] = T.float32(0)
        for q in T.unroll(WARPS):
            norm[0] = norm[0] + squares[q]
        norm[0] = call("z_scale", norm[0], unit_scale)
        token_scale: T.float32 = norm[0]
        norm[0] = call("inverse", norm[0])
        T.cuda.cta_sync()

        # T* x = Q right: rows in turn by warp, the columns shared evenly by the warps of the same rows.
        z_sum[0] = 0
        groups: T.let[T.int32] = T.max(T.truncdiv(WARPS, KA), 1)
        for turn in T.serial((KA * groups - warp + WARPS - 1) // WARPS, annotations=ROLLED):
            task: T.let[T.int32] = turn * WARPS + warp
            rows_of: T.let[T.int32] = T.truncmod(task, KA)
            first: T.let[T.int32] = T.truncdiv(T.truncdiv(task, KA) * CT, groups)
            last: T.let[T.int32] = T.truncdiv((T.truncdiv(task, KA) + 1) * CT, groups)
            for some in T.serial((last - first + TILES - 1) // TILES, annotations=ROLLED):
                for q in T.unroll(TILES * 8):
                    part[q] = T.float32(0)
                for g in T.serial(KJ, annotations=ROLLED):
                    for p in T.unroll(2):
                        call(
                            "load_words",
                            left_s.ptr_to([MIXED + (rows_of * KJ + g) * 256 + p * 128 + lane * 4]),
                            w.ptr_to([p * 4]),
                        )
                    for c in T.unroll(TILES):
                        if first + some * TILES + c < last:
                            call(
                                "load_words",
                                right_s.ptr_to([((first + some * TILES + c) * KJ + g) * 128 + lane * 4]),
                                b.ptr_to([0]),
                            )
                            call("mma_bf16", part.ptr_to([c * 8]), w.ptr_to([0]), b[0], b[1])
                            call("mma_bf16", part.ptr_to([c * 8 + 4]), w.ptr_to([4]), b[0], b[1])
                            call("mma_bf16", part.ptr_to([c * 8 + 4]), w.ptr_to([0]), b[2], b[3])
                for c in T.unroll(TILES):
                    if first + some * TILES + c < last:
                        for r in T.unroll(2):
                            n: T.let[T.int32] = rows_of * 16 + r * 8 + lane // 4
                            column: T.let[T.int32] = (first + some * TILES + c) * 8 + lane % 4 * 2
                            if n < t1:
                                z_sum[0] = z_sum[0] + call(
                                    "store_pair",
                                    part.ptr_to([c * 8 + 2 * r]),
                                    norm[0],
                                    x_s.ptr_to([0]),
                                    n * C + column,
                                    C - column,
                                    LOW_Z,
                                )
        call("warp_add", total.ptr_to([0]), z_sum[0], lane)
        issue_some(MORE)
        T.cuda.cta_sync()
        for turn in T.serial((KB * 8 - tx + THREADS - 1) // THREADS, annotations=ROLLED):
            cut: T.let[T.int32] = turn * THREADS + tx
            for q in T.unroll(4):
                call(
                    "load_words",
                    x_s.ptr_to([(cut // 8 * 256 + cut // 4 % 2 * LOW_Z + q * 64 + cut % 4 * 16) // 4]),
                    raw.ptr_to([q * 4]),
                )
            T.cuda.func_call(
                "liftc_store_bits",
                raw.ptr_to([0]),
                left_s.ptr_to([cut // 8 * TILE_WORDS + cut % 4 * 4 + cut // 4 % 2 * 2]),
                source_code=popcount_device.STORE_BITS,
            )
        issue_some(REST)
        T.cuda.cta_sync()

        for q in T.unroll(8):
            acc[q] = T.uint32(0)
        while step < stop:
            row: T.int32 = T.truncdiv(step, KB)
            col: T.int32 = step - row * KB
            run: T.int32 = T.min(KB - col, stop - step)
            z_at: T.uint32 = bits_at + T.Cast("uint32", col * TILE_BYTES)
            for i in T.serial(run, annotations=ROLLED):
                T.ptx["cp.async.wait_group"](RING - 1)
                T.ptx[LOAD4](w[0], w[1], w[2], w[3], ring_at + T.Cast("uint32", slot))
                T.ptx[LOAD4](b[0], b[1], b[2], b[3], z_at)
                for g in T.unroll(2):
                    T.ptx[COUNT](
                        acc[g * 4], acc[g * 4 + 1], acc[g * 4 + 2], acc[g * 4 + 3],
                        w[0], w[1], w[2], w[3], b[2 * g], b[2 * g + 1],
                        acc[g * 4], acc[g * 4 + 1], acc[g * 4 + 2], acc[g * 4 + 3],
                    )  # fmt: skip
                issue()
                z_at = z_at + T.uint32(TILE_BYTES)
            for r in T.unroll(2):  # rows lane // 4 and 8 more
                weighed: T.int32 = T.cuda.func_call(
                    "liftc_weigh_bits",
                    acc[4 + 2 * r], acc[5 + 2 * r], acc[2 * r], acc[2 * r + 1],
                    lane, source_code=popcount_device.WEIGH_BITS, return_type="int32",
                )  # fmt: skip
                if lane % 4 == r:
                    T.ptx["red.shared.add.u32"](
                        sums.ptr_to([row * 16 + r * 8 + lane // 4]), T.reinterpret("uint32", weighed)
                    )
            for q in T.unroll(8):
                acc[q] = T.uint32(0)
            step = step + run
        T.cuda.cta_sync()
        for i in T.unroll(MINE):
            row_of: T.let[T.int32] = i * THREADS + tx
            if row_of < blocks * 16 and row0 * 16 + row_of < OC:
                T.cuda.func_call(
                    "liftc_store_y",
                    y.ptr_to([0]), T.Cast("int64", row0 * 16 + row_of), kind, sums[row_of], total[0], token_scale,
                    row_scale[i], source_code=device.STORE_Y,
                )  # fmt: skip

    if knobs.dependent_launch:
        function = function.with_attr("tirx.kernel_launch_params", ["tirx.use_programtic_dependent_launch"])
    return function
