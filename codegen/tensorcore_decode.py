# mypy: disable-error-code="misc, untyped-decorator, no-untyped-def, used-before-def"
# ruff: noqa: B007  (names of unrolled loops)
"""Dense weights from tiles on half-precision tensor cores: the TIRx template behind `decode_tiles`.

In the space of whitened activations a lifted weight is block diagonal in its mapping: columns b d ... b d + d - 1
of row r are scale[r] * (the D signs of block b) M^T. A block of threads takes 16 rows and a run of blocks of
columns. It lays the bits of its tiles out as strings in column order in shared memory, so that a block may
begin at any bit; then every warp takes two neighbouring blocks in turn. The order in which the D signs enter the
sum is free: lane t of a quad takes 2 H neighbouring columns, H = 2 steps, the signs at one place of its first and
second H being a pair, which a shift and a lop3 turn into two halves of +1 and -1. The words of M match
(runtime/half_words.py). The order of the d results is free too: a lane gets eight neighbouring columns of each
block, and lanes of neighbouring rows exchange theirs, so that a store of a warp is whole lines of memory.

M is float16 (11 bits), for float32 results split in two such parts (22 bits). Sums are in float32. Results do not
depend on the grid.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from liftc.codegen import tile_device

MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
LOAD4 = "ld.shared.v4.u32"
WARPS = 4
AHEAD = 3
"""Tiles that a warp loads before it lays them out."""
MOST_TILES = 48
"""Tiles of a block of rows that a block of threads has as strings at a time."""
MOST_FRAGMENTS = 24
"""Parts of the mapping, 1 KiB of shared memory each, that a block has room for."""
BLOCKS = 4
"""Blocks of threads on a processor, for which registers are saved."""
STRIDE = MOST_TILES * 8 + 4  # words of a string; 4 more than a multiple of 32 keep eight rows in other banks
SHARED_BYTES = MOST_FRAGMENTS * 1024 + 16 * STRIDE * 4


def decode_tiles(symbol: str, dtype: str, short: str) -> Any:
    """PrimFunc out[r, b d + c] = times factor[0] scale[r] sum over e of sign[r, b D + e] mapping[c, e].

    tiles int32 (NB, KB, 32, 4) in the layout of codegen/tir_tiles.py; words int32 (F, 2, 32, 4), F = pieces steps
    ceil(d / 32) (doubled for float32) <= MOST_FRAGMENTS, and factor f32 (1,) of runtime/half_words.py; scale f32
    (OC,), out `dtype` (OC, P); then d, D, pieces = ceil(D / 128), steps = ceil(D / (16 pieces)), times; runs, into
    which the P / d blocks of columns are cut, such that those of one (an even number) and 255 columns more fill at
    most MOST_TILES tiles; and the number of blocks of threads. P is a multiple of d, 256 KB >= P / d D, 16 NB >= OC.
    """
    PARTS = 2 if short == "f32" else 1
    THREADS = WARPS * 32

    @T.prim_func
    def function(
        tiles_arg: T.handle, words_arg: T.handle, factor_arg: T.handle, scale_arg: T.handle, out_arg: T.handle,
        d: T.int32, D: T.int32, pieces: T.int32, steps: T.int32, times: T.float32, runs: T.int32, grid: T.int32,
    ) -> None:  # fmt: skip
        T.func_attr({"tirx.noalias": True, "global_symbol": symbol})
        NB = T.int32()
        KB = T.int32()
        OC = T.int32()
        P = T.int32()
        F = T.int32()
        tiles = T.match_buffer(tiles_arg, (NB, KB, 32, 4), "int32", align=16)
        words = T.match_buffer(words_arg, (F, 2, 32, 4), "int32", align=16)
        factor = T.match_buffer(factor_arg, (1,), "float32", align=4)
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
        pool.commit(SHARED_BYTES)
        acc = T.alloc_local((32,), "float32")
        v = T.alloc_local((4 * AHEAD,), "uint32")
        rows = T.alloc_local((2,), "float32")
        a = T.alloc_local((8,), "uint32")
        b = T.alloc_local((8,), "uint32")
        w = T.alloc_local((4,), "uint32")

        lane: T.let[T.int32] = tx % 32
        warp: T.let[T.int32] = tx // 32
        g: T.let[T.int32] = lane // 4
        t: T.let[T.int32] = lane % 4
        half: T.int32 = steps * 2
        groups: T.int32 = (d + 31) // 32
        blocks: T.int32 = T.truncdiv(P, d)
        for i in T.serial((F * 64 - tx + (THREADS - 1)) // THREADS):
            T.ptx["cp.async.cg.shared.global"](
                fragments.ptr_to([(i * THREADS + tx) * 4]),
                words.ptr_to([0, 0, 0, (i * THREADS + tx) * 4]),
                16,
            )
        T.ptx["cp.async.commit_group"]()
        T.ptx["cp.async.wait_group"](0)

        fragments_at: T.uint32 = T.cuda.cvta_generic_to_shared(fragments.ptr_to([lane * 4]))
        item: T.int32 = bx
        while item < NB * runs:
            rb: T.int32 = T.truncdiv(item, runs)
            run: T.int32 = item - rb * runs
            begin: T.int32 = T.truncdiv(run * ((blocks + 1) // 2), runs) * 2
            end: T.int32 = T.min(T.truncdiv((run + 1) * ((blocks + 1) // 2), runs) * 2, blocks)
            first: T.int32 = T.truncdiv(begin * D, 256)
            width: T.int32 = T.truncdiv(end * D + 255, 256) - first
            T.cuda.cta_sync()
            for i in T.serial((width - warp + (WARPS * AHEAD - 1)) // (WARPS * AHEAD)):
                for n in T.unroll(AHEAD):  # loads first, so that their latencies overlap
                    if (i * AHEAD + n) * WARPS + warp < width:
                        T.cuda.func_call(
                            "liftc_load_tile",
                            tiles.ptr_to([rb, first + (i * AHEAD + n) * WARPS + warp, lane, 0]), v.ptr_to([n * 4]),
                            source_code=tile_device.LOAD_TILE,
                        )  # fmt: skip
                for n in T.unroll(AHEAD):
                    if (i * AHEAD + n) * WARPS + warp < width:
                        T.cuda.func_call(
                            "liftc_lay_rows", v[n * 4], v[n * 4 + 1], v[n * 4 + 2], v[n * 4 + 3],
                            strings.ptr_to([g * STRIDE + ((i * AHEAD + n) * WARPS + warp) * 8]), t, STRIDE * 2,
                            source_code=tile_device.LAY_ROWS,
                        )  # fmt: skip
            for r in T.unroll(2):  # rows g and g + 8
                rows[r] = T.float32(0)
                if rb * 16 + r * 8 + g < OC:
                    rows[r] = scale[rb * 16 + r * 8 + g] * factor[0] * times
            T.cuda.cta_sync()
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
                                    a[r * 4 + u] = T.cuda.func_call(
                                        "liftc_halves_of_signs", T.shift_left(w[r * 2 + u % 2], T.uint32(u // 2)),
                                        source_code=tile_device.HALVES_OF_SIGNS, return_type="uint32",
                                    )  # fmt: skip
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
                    for r in T.unroll(2):
                        T.cuda.func_call(
                            f"liftc_store_blocks_{short}",
                            out.ptr_to([0, 0]), OC, P, rb * 16 + r * 8 + g, block * d + group * 32 + t * 8, d,
                            d - group * 32 - t * 8, T.Select(block + 1 < end, 1, 0), T.Select(d % 8 == 0, 1, 0),
                            rows[r],
                            acc[r * 2], acc[r * 2 + 1], acc[r * 2 + 4], acc[r * 2 + 5],
                            acc[r * 2 + 8], acc[r * 2 + 9], acc[r * 2 + 12], acc[r * 2 + 13],
                            acc[r * 2 + 16], acc[r * 2 + 17], acc[r * 2 + 20], acc[r * 2 + 21],
                            acc[r * 2 + 24], acc[r * 2 + 25], acc[r * 2 + 28], acc[r * 2 + 29],
                            source_code=tile_device.STORE_BLOCKS[short],
                        )  # fmt: skip
            item = item + grid

    return function
