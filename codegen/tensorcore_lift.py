# mypy: disable-error-code="misc, untyped-decorator, no-untyped-def, used-before-def"
"""The lift in one launch, straight to the operand bytes of the tensor-core sign_matmul, and z split into them.

Planes are int8 (KB, 4, COLS, 64): column k of token c is bytes [k div 256, k mod 256 div 64, 2 c and 2 c + 1, k mod
64], the high and the low byte of z = 256 h + l (codegen/tensorcore_sign.py). Columns past K are never written:
their signs are 0 bits, so that they count for nothing.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from liftc.codegen import tensorcore_device as device
from liftc.codegen.knobs import LiftKnobs

KINDS = {"float32": 0, "float16": 1, "bfloat16": 2}


def lift_planes(symbol: str, dtype: str, knobs: LiftKnobs) -> Any:
    """PrimFunc x -> planes, totals, z_scale; z as in liftc/reference.py up to the order of float32 sums.

    x `dtype` (m, IC), left f32 (t1, t1), right f32 (t2, C) -> planes int8 (KB, 4, COLS, 64), totals int32 (m, grid)
    parts of the sums of z, z_scale f32 (m, 1). state int32 (words,), at least 2 + 2 m grid, zero before the
    first launch and used by one launch at a time. tiles int32 (NB, KB, 32, 4) are those of a product that will
    read the planes with `readers` warps in each of `blocks` blocks: the first `ahead` tiles of each go to L2.
    grid: ceil(t1 / knobs.rows) x col_blocks blocks of knobs.rows rows and ceil(C / col_blocks) columns of T* x, all
    resident at once. Limits: those of LiftKnobs, t2 even, x 16-byte aligned with rows of whole 16 bytes.

    A block brings its slice of the factors to shared memory before it waits for x, mixes its rows with all of
    x, projects them on its columns, waits until every block has published its peak, and rounds.
    """
    R, THREADS = knobs.rows, knobs.threads
    KIND = KINDS[dtype]
    SIZE = 4 if dtype == "float32" else 2

    @T.prim_func
    def function(
        x_arg: T.handle, left_arg: T.handle, right_arg: T.handle, planes_arg: T.handle, totals_arg: T.handle,
        z_scale_arg: T.handle, state_arg: T.handle, tiles_arg: T.handle, grid: T.int32, col_blocks: T.int32,
        blocks: T.int32, readers: T.int32, ahead: T.int32,
    ) -> None:  # fmt: skip
        T.func_attr({"tirx.noalias": True, "global_symbol": symbol})
        m = T.int32()
        IC = T.int32()
        t1 = T.int32()
        t2 = T.int32()
        C = T.int32()
        KB = T.int32()
        NB = T.int32()
        COLS = T.int32()
        words = T.int32()
        x = T.match_buffer(x_arg, (m, IC), dtype, align=16)
        left = T.match_buffer(left_arg, (t1, t1), "float32", align=4)
        right = T.match_buffer(right_arg, (t2, C), "float32", align=4)
        planes = T.match_buffer(planes_arg, (KB, 4, COLS, 64), "int8", align=16)
        totals = T.match_buffer(totals_arg, (m, grid), "int32", align=4)
        z_scale = T.match_buffer(z_scale_arg, (m, 1), "float32", align=4)
        state = T.match_buffer(state_arg, (words,), "int32", align=8)
        tiles = T.match_buffer(tiles_arg, (NB, KB, 32, 4), "int32", align=16)
        T.device_entry()
        bx = T.cta_id([grid])
        tx = T.thread_id([THREADS])
        pool = T.SMEMPool()
        x_s = pool.alloc((knobs.x_buffers * knobs.x_bytes // SIZE,), dtype, align=16)
        slice_s = pool.alloc((knobs.slice_values,), "float32", align=16)  # right, columns of the block
        left_s = pool.alloc(
            (knobs.most_left * R,), "float32", align=16
        )  # left, rows of the block, transposed
        mixed = pool.alloc((knobs.most_right * R,), "float32", align=16)
        parts = pool.alloc((2 * THREADS * R,), "float32", align=16)
        real = pool.alloc((knobs.tokens * knobs.results,), "float32", align=16)
        peaks = pool.alloc((knobs.tokens,), "int32", align=16)
        sums = pool.alloc((knobs.tokens,), "int32", align=16)
        now = pool.alloc((1,), "int32", align=16)
        pool.commit(knobs.shared_bytes())
        acc = T.alloc_local((2 * R,), "float32")
        pair = T.alloc_local((2,), "float32")

        i0: T.int32 = T.truncdiv(bx, col_blocks) * R
        rows: T.int32 = T.min(t1 - i0, R)
        col_block: T.int32 = bx - T.truncdiv(bx, col_blocks) * col_blocks
        c0: T.int32 = T.truncdiv(col_block * C, col_blocks)
        width: T.int32 = T.truncdiv((col_block + 1) * C, col_blocks) - c0
        if knobs.dependent_launch:
            T.cuda.func_call("liftc_dependent_launch", source_code=device.DEPENDENT_LAUNCH)
        for i in T.serial((t2 * width - tx + THREADS - 1) // THREADS):
            at: T.int32 = i * THREADS + tx
            j0: T.int32 = T.truncdiv(at, width)
            T.ptx["cp.async.ca.shared.global"](
                slice_s.ptr_to([at]), right.ptr_to([j0, c0 + at - j0 * width]), 4
            )
        T.ptx["cp.async.commit_group"]()
        if ahead > 0:
            for i in T.serial(
                (blocks * readers - bx * THREADS - tx + grid * THREADS - 1) // (grid * THREADS)
            ):
                reader: T.int32 = i * (grid * THREADS) + bx * THREADS + tx
                block: T.int32 = T.truncdiv(reader, readers)
                row: T.int32 = T.truncdiv(block * NB, blocks)
                tile_count: T.int32 = (T.truncdiv((block + 1) * NB, blocks) - row) * KB
                begin_tile: T.int32 = T.truncdiv((reader - block * readers) * tile_count, readers)
                end_tile: T.int32 = T.truncdiv((reader - block * readers + 1) * tile_count, readers)
                T.cuda.func_call(
                    "liftc_prefetch", tiles.ptr_to([row, begin_tile, 0, 0]),
                    T.min(end_tile - begin_tile, ahead) * 512, 0, source_code=device.PREFETCH,
                )  # fmt: skip
        for i in T.serial((t1 * R - tx + THREADS - 1) // THREADS):
            at1: T.int32 = i * THREADS + tx
            left_s[at1] = T.float32(0)
            if at1 % R < rows:
                left_s[at1] = left[i0 + at1 % R, at1 // R]
        for b in T.serial(knobs.x_buffers):  # what the padding of the features reads
            for i in T.serial((t1 * t2 - IC - tx + THREADS - 1) // THREADS):
                x_s[b * (knobs.x_bytes // SIZE) + IC + i * THREADS + tx] = T.Cast(dtype, T.float32(0))
        if tx < knobs.tokens:
            peaks[tx] = 0
            sums[tx] = 0
        if knobs.dependent_launch:
            T.cuda.func_call("liftc_dependent_wait", source_code=device.DEPENDENT_WAIT)
        if tx == 0:
            now[0] = 1 + T.cuda.func_call(
                "liftc_load_word", state.ptr_to([0]), source_code=device.LOAD_WORD, return_type="int32"
            )

        @T.inline
        def bring(token):
            if token < m:
                for i in T.serial((IC * SIZE // 16 - tx + THREADS - 1) // THREADS):
                    T.ptx["cp.async.cg.shared.global"](
                        x_s.ptr_to(
                            [
                                token % knobs.x_buffers * (knobs.x_bytes // SIZE)
                                + (i * THREADS + tx) * (16 // SIZE)
                            ]
                        ),
                        x.ptr_to([token, (i * THREADS + tx) * (16 // SIZE)]),
                        16,
                    )
            T.ptx["cp.async.commit_group"]()

        for token in T.serial(knobs.x_buffers):
            bring(token)
        pairs: T.int32 = t2 // 2
        slices: T.int32 = T.truncdiv(THREADS, pairs)
        depth: T.int32 = T.truncdiv(t1 + slices - 1, slices)
        cuts: T.int32 = T.truncdiv(THREADS, width)
        reach: T.int32 = T.truncdiv(t2 + cuts - 1, cuts)
        s: T.int32 = T.truncdiv(tx, pairs)
        j: T.int32 = (tx - s * pairs) * 2
        cut: T.int32 = T.truncdiv(tx, width)
        col: T.int32 = tx - cut * width
        for token in T.serial(m):
            T.ptx["cp.async.wait_group"](knobs.x_buffers - 1)
            T.cuda.cta_sync()
            # mixed[j, r] = sum over a of left[i0 + r, a] x[a t2 + j]; slices of the threads share the sum.
            for r in T.unroll(2 * R):
                acc[r] = T.float32(0)
            if s < slices:
                for a in T.serial(T.min(depth, t1 - s * depth)):
                    T.cuda.func_call(
                        "liftc_pair", x_s.ptr_to([token % knobs.x_buffers * (knobs.x_bytes // SIZE)]),
                        (s * depth + a) * t2 + j, KIND, pair.ptr_to([0]), source_code=device.PAIR,
                    )  # fmt: skip
                    for r in T.unroll(R):
                        acc[r] = acc[r] + pair[0] * left_s[(s * depth + a) * R + r]
                        acc[R + r] = acc[R + r] + pair[1] * left_s[(s * depth + a) * R + r]
                for r in T.unroll(2 * R):
                    parts[(s * t2 + j) * R + r] = acc[r]
            T.cuda.cta_sync()
            bring(token + knobs.x_buffers)
            for i in T.serial((t2 * R - tx + THREADS - 1) // THREADS):
                at4: T.int32 = i * THREADS + tx
                value4: T.float32 = T.float32(0)
                for q in T.serial(slices):
                    value4 = value4 + parts[q * t2 * R + at4]
                mixed[at4] = value4
            T.cuda.cta_sync()
            # real[r, c] = sum over j of mixed[j, r] right[j, c0 + c]; cuts of the threads share the sum.
            for r in T.unroll(R):
                acc[r] = T.float32(0)
            if cut < cuts:
                for k in T.serial(T.min(reach, t2 - cut * reach)):
                    pair[0] = slice_s[(cut * reach + k) * width + col]
                    for r in T.unroll(R):
                        acc[r] = acc[r] + pair[0] * mixed[(cut * reach + k) * R + r]
                for r in T.unroll(R):
                    parts[tx * R + r] = acc[r]
            T.cuda.cta_sync()
            peak: T.int32 = 0
            for i in T.serial((rows * width - tx + THREADS - 1) // THREADS):
                at2: T.int32 = i * THREADS + tx
                r2: T.int32 = T.truncdiv(at2, width)
                value: T.float32 = T.float32(0)
                for q in T.serial(cuts):
                    value = value + parts[(q * width + at2 - r2 * width) * R + r2]
                real[token * knobs.results + at2] = value
                peak = T.max(peak, T.reinterpret("int32", value) & 0x7FFFFFFF)
            T.cuda.func_call(
                "liftc_warp_max", peaks.ptr_to([token]), peak, tx % 32, source_code=device.WARP_MAX
            )
        T.cuda.cta_sync()
        if tx < m:
            T.cuda.func_call(
                "liftc_publish", state.ptr_to([2 + (tx * grid + bx) * 2]), peaks[tx], now[0],
                source_code=device.PUBLISH,
            )  # fmt: skip
        for token in T.serial(m):
            highest: T.int32 = 0
            for i in T.serial((grid - tx + THREADS - 1) // THREADS):
                highest = T.max(
                    highest,
                    T.cuda.func_call(
                        "liftc_await", state.ptr_to([2 + (token * grid + i * THREADS + tx) * 2]), now[0],
                        source_code=device.AWAIT, return_type="int32",
                    ),
                )  # fmt: skip
            T.cuda.func_call(
                "liftc_warp_max", peaks.ptr_to([token]), highest, tx % 32, source_code=device.WARP_MAX
            )
        T.cuda.cta_sync()
        for token in T.serial(m):
            total: T.int32 = 0
            for i in T.serial((rows * width - tx + THREADS - 1) // THREADS):
                at3: T.int32 = i * THREADS + tx
                r3: T.int32 = T.truncdiv(at3, width)
                k3: T.int32 = (i0 + r3) * C + c0 + at3 - r3 * width
                total = total + T.cuda.func_call(
                    "liftc_round", real[token * knobs.results + at3], peaks[token],
                    planes.ptr_to([k3 // 256, k3 // 64 % 4, 2 * token, k3 % 64]),
                    source_code=device.ROUND, return_type="int32",
                )  # fmt: skip
            T.cuda.func_call(
                "liftc_warp_add", sums.ptr_to([token]), total, tx % 32, source_code=device.WARP_ADD
            )
        T.cuda.cta_sync()
        if tx < m:
            totals[tx, bx] = sums[tx]
            if bx == 0:
                z_scale[tx, 0] = T.cuda.func_call(
                    "liftc_scale", peaks[tx], source_code=device.SCALE, return_type="float32"
                )
        if bx == 0 and tx == 0:
            state[0] = now[0]

    if knobs.dependent_launch:
        function = function.with_attr("tirx.kernel_launch_params", ["tirx.use_programtic_dependent_launch"])
    return function


def split_z(symbol: str) -> Any:
    """PrimFunc z int16 (m, K) -> planes int8 (KB, 4, COLS, 64), totals int32 (m, 1). One block per token.

    z needs 16-byte alignment where K % 8 == 0. |z| <= 16383.
    """

    @T.prim_func
    def function(z_arg: T.handle, planes_arg: T.handle, totals_arg: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "global_symbol": symbol})
        m = T.int32()
        K = T.int32()
        KB = T.int32()
        COLS = T.int32()
        z = T.match_buffer(z_arg, (m, K), "int16", align=2)
        planes = T.match_buffer(planes_arg, (KB, 4, COLS, 64), "int8", align=16)
        totals = T.match_buffer(totals_arg, (m, 1), "int32", align=4)
        T.device_entry()
        token = T.cta_id([m])
        tx = T.thread_id([1024])
        pool = T.SMEMPool()
        total = pool.alloc((1,), "int32", align=16)
        pool.commit(16)
        v = T.alloc_local((4,), "uint32")
        if tx == 0:
            total[0] = 0
        T.cuda.cta_sync()
        part: T.int32 = 0
        for i in T.serial((KB * 32 - tx + 1023) // 1024):
            at: T.int32 = i * 1024 + tx
            for e in T.unroll(4):
                v[e] = T.uint32(0)
            T.cuda.func_call(
                "liftc_load_z", z.ptr_to([token, 0]), at * 8, K, v.ptr_to([0]), source_code=device.LOAD_Z
            )
            part = part + T.cuda.func_call(
                "liftc_store_planes", v[0], v[1], v[2], v[3],
                planes.ptr_to([at // 32, at // 8 % 4, 2 * token, at % 8 * 8]),
                source_code=device.STORE_PLANES, return_type="int32",
            )  # fmt: skip
        T.cuda.func_call("liftc_warp_add", total.ptr_to([0]), part, tx % 32, source_code=device.WARP_ADD)
        T.cuda.cta_sync()
        if tx == 0:
            totals[token, 0] = total[0]

    return function
