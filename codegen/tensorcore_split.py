# mypy: disable-error-code="misc, untyped-decorator, no-untyped-def, used-before-def"
"""z int16 split into the operand bytes of the tensor-core sign_matmul (planes: codegen/tensorcore_lift.py)."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from liftc.codegen import tensorcore_device as device


def split_z(symbol: str) -> Any:
    """PrimFunc z int16 (m, K) -> planes int8 (KB, 4, COLS, 64) or (KB, 16, COLS, 16), totals int32 (1, m).

    One block per token.

    z needs 16-byte alignment where K % 8 == 0. |z| <= 16383.
    """

    @T.prim_func
    def function(z_arg: T.handle, planes_arg: T.handle, totals_arg: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "global_symbol": symbol})
        m = T.int32()
        K = T.int32()
        KB = T.int32()
        COLS = T.int32()
        PIECES = T.int32()
        WIDE = T.int32()
        z = T.match_buffer(z_arg, (m, K), "int16", align=2)
        planes = T.match_buffer(planes_arg, (KB, PIECES, COLS, WIDE), "int8", align=16)
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
                planes.ptr_to([
                    at // 32, T.Select(PIECES == 4, at // 8 % 4, at // 8 % 4 * 4 + at % 2 * 2), 2 * token,
                    T.Select(PIECES == 4, at % 8 * 8, at // 2 % 4 * 4),
                ]),
                WIDE // 4, T.Select(PIECES == 4, 1, COLS * 4),
                source_code=device.STORE_PLANES, return_type="int32",
            )  # fmt: skip
        T.cuda.func_call("liftc_warp_add", total.ptr_to([0]), part, tx % 32, source_code=device.WARP_ADD)
        T.cuda.cta_sync()
        if tx == 0:
            totals[0, token] = total[0]

    return function
