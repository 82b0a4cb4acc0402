# mypy: disable-error-code="misc, untyped-decorator, no-untyped-def, used-before-def"
"""The tile layout of signs, and the kernels that make it from the portable layout and read it back.

A tile is 16 rows x 256 columns in 512 bytes, one 16-byte vector per lane of a warp: tiles int32 (NB, KB, 32, 4)
with NB = ceil(OC / 16), KB = ceil(K / 256). Bit 8 b + j of word 2 h + s of lane 4 g + t is the sign of

    row 16 rb + 8 s + g, column 256 kb + 64 (j div 2) + 16 t + 8 (j mod 2) + 4 h + b,

which makes a word masked with 0x01010101 << j a fragment of `mma.m16n8k32` for step j, and lets a lane turn eight
neighbouring values of z into operand bytes without shuffles. Rows and columns past the last are 0 bits.
"""

from __future__ import annotations

from typing import Any

from tvm import s_tir
from tvm.script import tirx as T

from liftc.codegen import tile_device


def tile_signs(symbol: str) -> Any:
    """PrimFunc packed int32 (G, K) -> tiles int32 (NB, KB, 32, 4). One thread per word of a tile."""

    @T.prim_func(s_tir=True)
    def function(packed_arg: T.handle, tiles_arg: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "global_symbol": symbol})
        G = T.int32()
        K = T.int32()
        NB = T.int32()
        KB = T.int32()
        packed = T.match_buffer(packed_arg, (G, K), "int32", align=4)
        tiles = T.match_buffer(tiles_arg, (NB, KB, 32, 4), "int32", align=16)
        for rb, kb, lane, word in T.grid(NB, KB, 32, 4):
            with T.sblock("tile"):
                vr, vk, vl, vw = T.axis.remap("SSSS", [rb, kb, lane, word])
                bits = T.sblock_alloc_buffer((1,), "uint32", scope="local")
                bits[0] = T.uint32(0)
                for j, b in T.grid(8, 4):
                    with T.sblock("bit"):
                        vj, vb = T.axis.remap("SS", [j, b])
                        column = T.meta_var(
                            vk * 256 + vj // 2 * 64 + vl % 4 * 16 + vj % 2 * 8 + vw // 2 * 4 + vb
                        )
                        if column < K and vr // 2 < G:
                            bits[0] = bits[0] | T.shift_left(
                                T.shift_right(
                                    T.reinterpret("uint32", packed[vr // 2, column]),
                                    T.Cast("uint32", vr % 2 * 16 + vw % 2 * 8 + vl // 4),
                                )
                                & T.uint32(1),
                                T.Cast("uint32", vb * 8 + vj),
                            )
                tiles[vr, vk, vl, vw] = T.reinterpret("int32", bits[0])

    sch = s_tir.Schedule(function)
    rb, kb, lane, word = sch.get_loops(sch.get_sblock("tile"))
    for loop, axis in ((rb, "blockIdx.y"), (kb, "blockIdx.x"), (sch.fuse(lane, word), "threadIdx.x")):
        sch.bind(loop, axis)
    j, b = sch.get_loops(sch.get_sblock("bit"))[-2:]
    sch.unroll(j)
    sch.unroll(b)
    return sch.mod[sch.mod.get_global_vars()[0]]


def unpack_tiles(symbol: str, dtype: str, short: str) -> Any:
    """PrimFunc tiles int32 (NB, KB, 32, 4) -> out `dtype` (OC, K) of -1 and +1, and the number of blocks.

    A warp takes a tile at a time, the next one being on its way, and lanes exchange its words: loads one by one would
    wait behind the stores. A lane writes a vector of 16 bytes of each row, a warp 512 bytes; for float32 two.
    """
    PER_T = 4 if short == "f32" else 2  # lanes whose columns the same lanes of a tile hold
    EACH = 4 if short == "f32" else 8  # columns of a vector

    @T.prim_func
    def function(tiles_arg: T.handle, out_arg: T.handle, grid: T.int32) -> None:
        T.func_attr({"tirx.noalias": True, "global_symbol": symbol})
        NB = T.int32()
        KB = T.int32()
        OC = T.int32()
        K = T.int32()
        tiles = T.match_buffer(tiles_arg, (NB, KB, 32, 4), "int32", align=16)
        out = T.match_buffer(out_arg, (OC, K), dtype, align=16)
        T.device_entry()
        bx = T.cta_id([grid])
        tx = T.thread_id([256])
        v = T.alloc_local((4,), "uint32")
        u = T.alloc_local((4,), "uint32")
        w = T.alloc_local((4,), "uint32")
        lane: T.let[T.int32] = tx % 32

        @T.inline
        def write(rb, kb, vector):
            for r in T.unroll(8):
                T.cuda.func_call(
                    "liftc_words_of_lane", u.ptr_to([0]), r * 4 + lane // PER_T % 4, w.ptr_to([0]),
                    source_code=tile_device.WORDS_OF_LANE,
                )  # fmt: skip
                for s in T.unroll(2):
                    if rb * 16 + s * 8 + r < OC:
                        at: T.let[T.int64] = T.Cast("int64", rb * 16 + s * 8 + r) * K + kb * 256
                        if short == "f32":
                            for half in T.unroll(2):  # 128 columns each, four of a lane
                                T.cuda.func_call(
                                    "liftc_unpack_four_f32", out.ptr_to([0, 0]), at + (half * 128 + lane * 4),
                                    K - kb * 256 - half * 128 - lane * 4, vector,
                                    T.Select(lane % 2 == 0, w[s], w[2 + s]),
                                    half * 4 + lane // 16 * 2 + lane // 2 % 2,
                                    source_code=tile_device.UNPACK[short],
                                )  # fmt: skip
                        else:
                            T.cuda.func_call(
                                f"liftc_unpack_eight_{short}", out.ptr_to([0, 0]), at + lane * 8,
                                K - kb * 256 - lane * 8, vector, w[s], w[2 + s], lane // 8 * 2 + lane % 2,
                                source_code=tile_device.UNPACK[short],
                            )  # fmt: skip

        item: T.int32 = bx * 8 + tx // 32
        if item < NB * KB:
            T.cuda.func_call(
                "liftc_load_tile",
                tiles.ptr_to([0, item, lane, 0]),
                v.ptr_to([0]),
                source_code=tile_device.LOAD_TILE,
            )
        while item < NB * KB:
            rb: T.int32 = T.truncdiv(item, KB)
            kb: T.int32 = item - rb * KB
            for q in T.unroll(4):
                u[q] = v[q]
            if item + grid * 8 < NB * KB:
                T.cuda.func_call(
                    "liftc_load_tile", tiles.ptr_to([0, item + grid * 8, lane, 0]), v.ptr_to([0]),
                    source_code=tile_device.LOAD_TILE,
                )  # fmt: skip
            if T.truncmod(K, EACH) == 0:
                write(rb, kb, 1)
            else:
                write(rb, kb, 0)
            item = item + grid * 8

    return function
