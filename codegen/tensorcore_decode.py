# mypy: disable-error-code="misc, untyped-decorator, no-untyped-def, used-before-def"
# ruff: noqa: B007  (names of unrolled loops)
"""Dense weights from tiles on half-precision tensor cores: the TIRx template behind `decode_tiles`.

In the space of whitened activations a lifted weight is block diagonal in its mapping: columns b d ... b d + d - 1
of row r are scale[r] * (the D signs of block b) M^T. A block of threads takes 16 rows and a run of blocks of
columns. It lays the bits of its tiles out as strings in column order in shared memory, so that a block may
begin at any bit; then every warp takes two neighbouring blocks in turn, while the tiles of the next run are copied:
a load would wait behind the stores. The order in which the D signs enter the sum is free: lane t of a quad takes 2 H
neighbouring columns, H = 2 steps, the signs at one place of its first and second H being a pair, which a shift, a mask
and an or turn into two halves of +1 and -1. M is scattered to match, once per block of threads. The order of the
d results is free too: a lane gets eight neighbouring columns, which it stores as one vector.

M is scaled by a power of two and rounded to float16 (11 bits), for float32 results split in two such parts (22 bits).
Sums are in float32. Results do not denext_end on the grid.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from liftc.codegen import tile_device

MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
LOAD4 = "ld.shared.v4.u32"
WARPS = 4
MOST_TILES = 24
"""Tiles of a block of rows that a block of threads has as strings at a time."""
MOST_FRAGMENTS = 24
"""Parts of the mapping, 1 KiB of shared memory each, that a block has room for."""
BLOCKS = 4
"""Blocks of threads on a processor, for which registers are saved."""
STRIDE = MOST_TILES * 8 + 4  # words of a string; 4 more than a multiple of 32 keep eight rows in other banks
SHARED_BYTES = MOST_FRAGMENTS * 1024 + 16 * STRIDE * 4 + MOST_TILES * 512 + 16


def decode_tiles(symbol: str, dtype: str, short: str) -> Any:
    """PrimFunc out[r, b d + c] = times scale[r] sum over e of sign[r, b D + e] mapping[c, e].

    tiles int32 (NB, KB, 32, 4) in the layout of codegen/tir_tiles.py, mapping f32 (d, D), scale f32 (OC,), out
    `dtype` (OC, P), times, then two integers: runs, into which the pairs of the P / d blocks of columns are cut, such
    that those of one and 255 columns more fill at most MOST_TILES tiles, and grid, the number of thread blocks. P is a
    multiple of d, 256 KB >= P / d D and 16 NB >= OC; with pieces = ceil(D / 128) and steps = ceil(D / (16 pieces)),
    pieces steps ceil(d / 32), doubled for float32, is at most MOST_FRAGMENTS.
    """
    PARTS = 2 if short == "f32" else 1
    THREADS = WARPS * 32

    @T.prim_func
    def function(
        tiles_arg: T.handle, mapping_arg: T.handle, scale_arg: T.handle, out_arg: T.handle, times: T.float32,
        runs: T.int32, grid: T.int32,
    ) -> None:  # fmt: skip
        T.func_attr({"tirx.noalias": True, "global_symbol": symbol})
        NB = T.int32()
        KB = T.int32()
        OC = T.int32()
        P = T.int32()
        d = T.int32()
        D = T.int32()
        tiles = T.match_buffer(tiles_arg, (NB, KB, 32, 4), "int32", align=16)
        mapping = T.match_buffer(mapping_arg, (d, D), "float32", align=4)
        scale = T.match_buffer(scale_arg, (OC,), "float32", align=4)
        out = T.match_buffer(out_arg, (OC, P), dtype, align=16)
        T.device_entry()
        bx = T.cta_id([grid])
        tx = T.thread_id([THREADS])
        T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", BLOCKS)
        pool = T.SMEMPool()
        # The last block of an odd number reads past its string, at most 36 words: into the fragments.
        strings = pool.alloc((16 * STRIDE,), "uint32", align=16)
        fragments = pool.alloc((MOST_FRAGMENTS * 256,), "uint32", align=16)
        staging = pool.alloc((MOST_TILES * 128,), "uint32", align=16)
        peak = pool.alloc((1,), "int32", align=16)
        pool.commit(SHARED_BYTES)
        acc = T.alloc_local((32,), "float32")
        v = T.alloc_local((4,), "uint32")
        rows = T.alloc_local((2,), "float32")
        a = T.alloc_local((8,), "uint32")
        b = T.alloc_local((8,), "uint32")
        w = T.alloc_local((4,), "uint32")

        lane: T.let[T.int32] = tx % 32
        warp: T.let[T.int32] = tx // 32
        g: T.let[T.int32] = lane // 4
        t: T.let[T.int32] = lane % 4
        pieces: T.int32 = (D + 127) // 128
        steps: T.int32 = T.truncdiv(D + pieces * 16 - 1, pieces * 16)
        half: T.int32 = steps * 2
        groups: T.int32 = (d + 31) // 32
        blocks: T.int32 = T.truncdiv(P, d)
        item: T.int32 = bx

        @T.inline
        def bring(which):
            if which < NB * runs:
                next_rb: T.int32 = T.truncdiv(which, runs)
                next_run: T.int32 = which - next_rb * runs
                next_begin: T.int32 = T.truncdiv(next_run * ((blocks + 1) // 2), runs) * 2
                next_end: T.int32 = T.min(T.truncdiv((next_run + 1) * ((blocks + 1) // 2), runs) * 2, blocks)
                next_first: T.int32 = T.truncdiv(next_begin * D, 256)
                next_width: T.int32 = T.truncdiv(next_end * D + 255, 256) - next_first
                for i in T.serial((next_width * 32 - tx + (THREADS - 1)) // THREADS):
                    T.ptx["cp.async.cg.shared.global"](
                        staging.ptr_to([(i * THREADS + tx) * 4]),
                        tiles.ptr_to([next_rb, next_first, 0, (i * THREADS + tx) * 4]),
                        16,
                    )
            T.ptx["cp.async.commit_group"]()

        bring(item)

        # The largest entry of the mapping gives the power of two.
        if tx == 0:
            peak[0] = 0
        T.cuda.cta_sync()
        highest: T.int32 = 0
        for i in T.serial((d * D - tx + (THREADS - 1)) // THREADS):
            at: T.int32 = i * THREADS + tx
            row: T.int32 = T.truncdiv(at, D)
            highest = T.max(highest, T.reinterpret("int32", mapping[row, at - row * D]) & 0x7FFFFFFF)
        T.cuda.func_call("liftc_warp_max", peak.ptr_to([0]), highest, lane, source_code=tile_device.WARP_MAX)
        T.cuda.cta_sync()
        exponent: T.int32 = T.min(T.max(T.shift_right(peak[0], 23), 11), 253)
        up: T.float32 = T.reinterpret(
            "float32", T.shift_left(264 - exponent, 23)
        )  # largest entry 1024 to 2047
        down: T.float32 = T.reinterpret("float32", T.shift_left(exponent - 10, 23)) * times
        for i in T.serial((PARTS * pieces * steps * groups * 256) // THREADS):
            word: T.int32 = i * THREADS + tx
            f: T.int32 = word // 256
            l2: T.int32 = word // 4 % 32
            part: T.int32 = T.truncmod(f, PARTS)
            f = T.truncdiv(f, PARTS)
            step: T.int32 = T.truncmod(f, steps)
            f = T.truncdiv(f, steps)
            piece: T.int32 = T.truncmod(f, pieces)
            f = T.truncdiv(f, pieces)
            column: T.int32 = f * 32 + l2 // 8 * 8 + (word // 128 % 2 * 2 + word // 2 % 2) * 2 + l2 // 4 % 2
            e: T.int32 = piece * 16 * steps + l2 % 4 * 2 * half + half - 1 - step * 2 - word % 2
            low: T.float32 = T.float32(0)
            high: T.float32 = T.float32(0)
            if column < d and e < D:
                low = mapping[column, e] * up
            if column < d and e + half < D:
                high = mapping[column, e + half] * up
            if part > 0:
                low = T.cuda.func_call(
                    "liftc_rest_f16", low, source_code=tile_device.REST_F16, return_type="float32"
                )
                high = T.cuda.func_call(
                    "liftc_rest_f16", high, source_code=tile_device.REST_F16, return_type="float32"
                )
            fragments[word] = T.cuda.func_call(
                "liftc_pack_f16", low, high, source_code=tile_device.PACK_F16, return_type="uint32"
            )

        staging_at: T.uint32 = T.cuda.cvta_generic_to_shared(staging.ptr_to([lane * 4]))
        fragments_at: T.uint32 = T.cuda.cvta_generic_to_shared(fragments.ptr_to([lane * 4]))
        while item < NB * runs:
            rb: T.int32 = T.truncdiv(item, runs)
            run: T.int32 = item - rb * runs
            begin: T.int32 = T.truncdiv(run * ((blocks + 1) // 2), runs) * 2
            end: T.int32 = T.min(T.truncdiv((run + 1) * ((blocks + 1) // 2), runs) * 2, blocks)
            first: T.int32 = T.truncdiv(begin * D, 256)
            width: T.int32 = T.truncdiv(end * D + 255, 256) - first
            T.ptx["cp.async.wait_group"](0)
            T.cuda.cta_sync()
            for i in T.serial((width - warp + (WARPS - 1)) // WARPS):
                T.ptx[LOAD4](v[0], v[1], v[2], v[3], staging_at + T.Cast("uint32", (i * WARPS + warp) * 512))
                T.cuda.func_call(
                    "liftc_lay_rows",
                    v[0],
                    v[1],
                    v[2],
                    v[3],
                    strings.ptr_to([g * STRIDE + (i * WARPS + warp) * 8]),
                    t,
                    STRIDE * 2,
                    source_code=tile_device.LAY_ROWS,
                )
            for r in T.unroll(2):  # rows g and g + 8
                rows[r] = T.float32(0)
                if rb * 16 + r * 8 + g < OC:
                    rows[r] = scale[rb * 16 + r * 8 + g] * down
            T.cuda.cta_sync()
            bring(item + grid)
            for i in T.serial(((end - begin + 1) // 2 - warp + (WARPS - 1)) // WARPS):
                block: T.int32 = begin + (i * WARPS + warp) * 2
                for group in T.serial(groups):
                    for q in T.unroll(32):
                        acc[q] = T.float32(0)
                    for piece in T.serial(pieces):
                        bit: T.int32 = block * D - first * 256 + piece * 16 * steps + t * 2 * half
                        for r in T.unroll(4):  # rows g and g + 8 of the block, then of the next one
                            w[r] = T.cuda.func_call(
                                "liftc_sign_pairs", strings.ptr_to([(r % 2 * 8 + g) * STRIDE]), bit + r // 2 * D, half,
                                source_code=tile_device.SIGN_PAIRS, return_type="uint32",
                            )  # fmt: skip
                            w[r] = T.shift_left(w[r], T.Cast("uint32", 16 - half))
                        b_at: T.uint32 = fragments_at + T.Cast(
                            "uint32", (group * pieces + piece) * steps * (PARTS * 1024)
                        )
                        for s in T.serial(steps):
                            for r in T.unroll(2):
                                for u in T.unroll(4):
                                    sign: T.let[T.uint32] = T.shift_left(w[r * 2 + u % 2], T.uint32(u // 2))
                                    a[r * 4 + u] = (sign & T.uint32(0x80008000)) | T.uint32(0x3C003C00)
                            for q in T.unroll(4):
                                w[q] = T.shift_left(w[q], T.uint32(2))
                            for part in T.unroll(PARTS):
                                for h in T.unroll(2):
                                    T.ptx[LOAD4](
                                        b[h * 4], b[h * 4 + 1], b[h * 4 + 2], b[h * 4 + 3],
                                        b_at + T.uint32(part * 1024 + h * 512),
                                    )  # fmt: skip
                                for r in T.unroll(2):
                                    for j in T.unroll(4):
                                        c: T.let[T.int32] = (r * 4 + j) * 4
                                        T.ptx[MMA](
                                            acc[c], acc[c + 1], acc[c + 2], acc[c + 3],
                                            a[r * 4], a[r * 4 + 1], a[r * 4 + 2], a[r * 4 + 3],
                                            b[j * 2], b[j * 2 + 1],
                                            acc[c], acc[c + 1], acc[c + 2], acc[c + 3],
                                        )  # fmt: skip
                            b_at = b_at + T.uint32(PARTS * 1024)
                    for r in T.unroll(4):
                        out_row: T.int32 = rb * 16 + r % 2 * 8 + g
                        left: T.int32 = d - group * 32 - t * 8
                        if out_row < OC and block + r // 2 < end:
                            k: T.let[T.int32] = r // 2 * 16 + r % 2 * 2
                            T.cuda.func_call(
                                f"liftc_store_eight_{short}",
                                out.ptr_to([0, 0]),
                                T.Cast("int64", out_row) * P + ((block + r // 2) * d + group * 32 + t * 8),
                                left,
                                T.Select(d % 8 == 0, 1, 0),
                                rows[r % 2],
                                acc[k],
                                acc[k + 1],
                                acc[k + 4],
                                acc[k + 5],
                                acc[k + 8],
                                acc[k + 9],
                                acc[k + 12],
                                acc[k + 13],
                                source_code=tile_device.STORE_EIGHT[short],
                            )
            item = item + grid

    return function
