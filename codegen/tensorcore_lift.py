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

    x `dtype` (m, IC), in_scale f32 (IC,) or (1,) for none, left f32 (t1, t1), right f32 (t2, C) -> planes int8
    (KB, 4, COLS, 64), totals int32 (grid, m) what each block adds to the sums of z, z_scale f32 (m, 1). state int32 (16,): a counter and a
    generation, zero before the first launch and used by one launch at a time. found int32 (at least grid m,):
    scratch. grid: ceil(t1 / knobs.rows) x col_blocks blocks of knobs.rows rows and ceil(C / col_blocks) columns of
    T* x, all resident at once. Limits: t1 <= most_left, t2 <= most_right, m <= tokens, columns of a block <=
    threads and times rows <= results.

    A block mixes its rows with all of x, projects them on its columns, keeps the results in shared memory, waits
    until every block has published its peak, and rounds.
    """
    R, THREADS = knobs.rows, knobs.threads
    KIND = KINDS[dtype]

    @T.prim_func
    def function(
        x_arg: T.handle, in_scale_arg: T.handle, left_arg: T.handle, right_arg: T.handle, planes_arg: T.handle,
        totals_arg: T.handle, z_scale_arg: T.handle, state_arg: T.handle, found_arg: T.handle, grid: T.int32,
        col_blocks: T.int32,
    ) -> None:  # fmt: skip
        T.func_attr({"tirx.noalias": True, "global_symbol": symbol})
        m = T.int32()
        IC = T.int32()
        SC = T.int32()
        t1 = T.int32()
        t2 = T.int32()
        C = T.int32()
        KB = T.int32()
        COLS = T.int32()
        room = T.int32()
        x = T.match_buffer(x_arg, (m, IC), dtype, align=2)
        in_scale = T.match_buffer(in_scale_arg, (SC,), "float32", align=4)
        left = T.match_buffer(left_arg, (t1, t1), "float32", align=4)
        right = T.match_buffer(right_arg, (t2, C), "float32", align=4)
        planes = T.match_buffer(planes_arg, (KB, 4, COLS, 64), "int8", align=16)
        totals = T.match_buffer(totals_arg, (grid, m), "int32", align=4)
        z_scale = T.match_buffer(z_scale_arg, (m, 1), "float32", align=4)
        state = T.match_buffer(state_arg, (16,), "int32", align=4)
        found = T.match_buffer(found_arg, (room,), "int32", align=4)
        T.device_entry()
        bx = T.cta_id([grid])
        tx = T.thread_id([THREADS])
        T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", knobs.blocks_per_processor)
        pool = T.SMEMPool()
        rows_s = pool.alloc((knobs.most_left * R,), "float32", align=16)  # left, transposed
        mixed = pool.alloc((knobs.most_right * R,), "float32", align=16)
        parts = pool.alloc((THREADS * R,), "float32", align=16)
        real = pool.alloc((knobs.tokens * knobs.results,), "float32", align=16)
        peaks = pool.alloc((knobs.tokens,), "int32", align=16)
        sums = pool.alloc((knobs.tokens,), "int32", align=16)
        pool.commit(knobs.shared_bytes())
        acc = T.alloc_local((R,), "float32")
        xs = T.alloc_local((8,), "float32")

        i0: T.int32 = T.truncdiv(bx, col_blocks) * R
        rows: T.int32 = T.min(t1 - i0, R)
        c0: T.int32 = T.truncdiv(T.truncmod(bx, col_blocks) * C, col_blocks)
        width: T.int32 = T.truncdiv((T.truncmod(bx, col_blocks) + 1) * C, col_blocks) - c0
        for i in T.serial((t1 * R + THREADS - 1) // THREADS):
            at: T.int32 = i * THREADS + tx
            if at < t1 * R:
                rows_s[at] = T.float32(0)
                if at % R < rows:
                    rows_s[at] = left[i0 + at % R, at // R]
        if tx < knobs.tokens:
            peaks[tx] = 0
            sums[tx] = 0
        if knobs.dependent_launch:
            T.cuda.func_call("liftc_dependent_launch", source_code=device.DEPENDENT_LAUNCH)
        T.cuda.cta_sync()
        slices: T.int32 = T.max(T.truncdiv(THREADS, t2), 1)
        depth: T.int32 = T.truncdiv(t1 + slices - 1, slices)
        cuts: T.int32 = T.truncdiv(THREADS, width)
        reach: T.int32 = T.truncdiv(t2 + cuts - 1, cuts)
        for token in T.serial(m):
            # mixed[j, r] = sum over a of left[i0 + r, a] x[a t2 + j]; slices of the threads share the sum.
            for tile in T.serial((t2 + THREADS - 1) // THREADS):
                s: T.int32 = T.truncdiv(tx, T.min(t2, THREADS))
                j: T.int32 = tile * THREADS + tx - s * T.min(t2, THREADS)
                for r in T.unroll(R):
                    acc[r] = T.float32(0)
                if s < slices and j < t2:
                    first: T.int32 = s * depth
                    stop: T.int32 = T.min(t1, first + depth)
                    for a8 in T.serial((stop - first + 7) // 8):
                        for u in T.unroll(8):
                            xs[u] = T.float32(0)
                            k: T.int32 = (first + a8 * 8 + u) * t2 + j
                            if first + a8 * 8 + u < stop and k < IC:
                                xs[u] = T.cuda.func_call(
                                    "liftc_load_x", x.ptr_to([token, k]), KIND,
                                    source_code=device.LOAD_X, return_type="float32",
                                )  # fmt: skip
                                if SC > 1:
                                    xs[u] = xs[u] * in_scale[k]
                        for u in T.unroll(8):
                            for r in T.unroll(R):
                                acc[r] = acc[r] + xs[u] * rows_s[T.min(first + a8 * 8 + u, t1 - 1) * R + r]
                for r in T.unroll(R):
                    parts[tx * R + r] = acc[r]
                T.cuda.cta_sync()
                j2: T.int32 = tile * THREADS + tx
                if tx < T.min(t2, THREADS) and j2 < t2:
                    for r in T.unroll(R):
                        acc[r] = T.float32(0)
                    for q in T.serial(slices):
                        for r in T.unroll(R):
                            acc[r] = acc[r] + parts[(q * T.min(t2, THREADS) + tx) * R + r]
                    for r in T.unroll(R):
                        mixed[j2 * R + r] = acc[r]
                T.cuda.cta_sync()
            # real[r, c] = sum over j of mixed[j, r] right[j, c0 + c]; cuts of the threads share the sum.
            cut: T.int32 = T.truncdiv(tx, width)
            col: T.int32 = tx - cut * width
            for r in T.unroll(R):
                acc[r] = T.float32(0)
            if cut < cuts:
                begin: T.int32 = cut * reach
                end: T.int32 = T.min(t2, begin + reach)
                for j8 in T.serial((end - begin + 7) // 8):
                    for u in T.unroll(8):
                        xs[u] = T.float32(0)
                        if begin + j8 * 8 + u < end:
                            xs[u] = right[begin + j8 * 8 + u, c0 + col]
                    for u in T.unroll(8):
                        for r in T.unroll(R):
                            acc[r] = acc[r] + xs[u] * mixed[T.min(begin + j8 * 8 + u, t2 - 1) * R + r]
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
                "liftc_publish", found.ptr_to([bx * m + tx]), peaks[tx], source_code=device.PUBLISH
            )
        T.cuda.cta_sync()
        if tx == 0:
            T.cuda.func_call("liftc_grid_sync", state.ptr_to([0]), grid, source_code=device.GRID_SYNC)
        T.cuda.cta_sync()
        for token in T.serial(m):
            highest: T.int32 = 0
            for i in T.serial((grid - tx + THREADS - 1) // THREADS):
                highest = T.max(
                    highest,
                    T.cuda.func_call(
                        "liftc_published", found.ptr_to([(i * THREADS + tx) * m + token]),
                        source_code=device.PUBLISHED, return_type="int32",
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
            if bx == 0 and tx == 0:
                z_scale[token, 0] = T.cuda.func_call(
                    "liftc_scale", peaks[token], source_code=device.SCALE, return_type="float32"
                )
        T.cuda.cta_sync()
        if tx < m:
            totals[bx, tx] = sums[tx]

    if knobs.dependent_launch:
        function = function.with_attr("tirx.kernel_launch_params", ["tirx.use_programtic_dependent_launch"])
    return function


def split_z(symbol: str) -> Any:
    """PrimFunc z int16 (m, K) -> planes int8 (KB, 4, COLS, 64), totals int32 (1, m). One block per token.

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
        totals = T.match_buffer(totals_arg, (1, m), "int32", align=4)
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
            totals[0, token] = total[0]

    return function
