# ruff: noqa: F823, F841 - T.inline functions assign the scalars of the kernel around them
# mypy: disable-error-code="misc, no-untyped-def, valid-type, no-untyped-call, name-defined"
# mypy: disable-error-code="untyped-decorator, used-before-def"
"""TIRx of the CUDA beam search: one group of warps per vector, prefixes in registers.

Thread t of a vector's group holds prefixes t*ENTRIES ... t*ENTRIES + ENTRIES-1: cost and packed signs. The
residual of a row comes from 16-entry tables (64 bytes, so the 32 reads of a warp touch one cache line). The
threshold of the `beam` cheapest children is found by counting below three pivots at a time; survivors are
ranked by a prefix sum and change places through shared memory. Nothing is sorted.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm.script import tirx as T

_INFINITY = float("inf")
_LARGEST_BITS = 0x7F7FFFFF  # the largest finite float32
_ALL = 0xFFFFFFFF


def source(kernels: list[tuple[str, int, int, int]]) -> str:
    """One CUDA C++ file with kernels (name, warps per vector, entries per thread, words of signs) and their
    tvm_ffi host wrappers. Arguments: targets (B*D), table, diagonal, signs (B*D) int8, cost (B), D, beam, B.
    """
    functions = {name: _beam_search(warps, entries, words, name) for name, warps, entries, words in kernels}
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_80"}, host="cuda_host")
    with target:
        module = tvm.tirx.build(tvm.IRModule(functions), target=target, pipeline="tirx")
    return str(tvm.backend.cuda.export_cuda_host(module))


def _beam_search(warps: int, entries: int, word_count: int, name: str) -> Any:
    vectors = 4 if warps == 1 else 1  # per thread block
    capacity = 32 * warps * entries
    lane_bits = 32 * warps * vectors

    @T.prim_func
    def beam_search(
        targets_ptr: T.handle, table_ptr: T.handle, diagonal_ptr: T.handle, signs_ptr: T.handle,
        cost_ptr: T.handle, D: T.int32, beam: T.int32, rows: T.int32,
    ):  # fmt: skip
        size0, size1, size2, size3, size4 = T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        targets = T.match_buffer(targets_ptr, (size0,), "float32", align=4)
        table = T.match_buffer(table_ptr, (size1,), "float32", align=4)
        diagonal = T.match_buffer(diagonal_ptr, (size2,), "float32", align=4)
        signs = T.match_buffer(signs_ptr, (size3,), "int8", align=1)
        best = T.match_buffer(cost_ptr, (size4,), "float32", align=4)
        T.device_entry()
        block = T.cta_id([(rows + (vectors - 1)) // vectors])
        tx = T.thread_id([lane_bits])

        pool = T.SMEMPool()
        cost_s = pool.alloc((vectors * capacity,), "float32", align=16)
        word_s = pool.alloc((vectors * word_count * capacity,), "uint32", align=16)
        part_s = pool.alloc((4 * warps,), "int32", align=16)
        pool.commit()

        cost = T.alloc_local((entries,), "float32")
        word = T.alloc_local((entries * word_count,), "uint32")
        residual = T.alloc_local((entries,), "float32")
        child = T.alloc_local((2 * entries,), "int32")  # bits of the costs: +1 children, then -1 children
        keeps = T.alloc_local((2 * entries,), "int32")
        got = T.alloc_local((3,), "int32")
        took = T.alloc_local((1,), "uint32")

        t: T.int32 = tx % (32 * warps)
        lane: T.int32 = tx % 32
        warp: T.int32 = t // 32
        row: T.int32 = block * vectors + tx // (32 * warps)
        cost_base: T.int32 = tx // (32 * warps) * capacity
        word_base: T.int32 = tx // (32 * warps) * (word_count * capacity)
        groups: T.int32 = (D + 15) // 16
        words: T.int32 = (D + 31) // 32
        n: T.int32 = 1
        parity: T.int32 = 0
        scan: T.int32 = 0
        mine: T.int32 = 0
        total: T.int32 = 0
        excess: T.int32 = 0

        @T.inline
        def sync():
            if warps == 1:
                T.cuda.warp_sync()
            else:
                T.cuda.cta_sync()

        @T.inline
        def subtract_group(i, wd, half):
            entry: T.int32 = (i * groups + (2 * wd + half)) * 64
            for e in T.unroll(entries):
                x: T.uint32 = T.shift_right(word[e * word_count + wd], T.uint32(16 * half))
                residual[e] = residual[e] - (
                    (
                        table[entry + T.Cast("int32", T.bitwise_and(x, T.uint32(15)))]
                        + table[
                            entry
                            + 16
                            + T.Cast("int32", T.bitwise_and(T.shift_right(x, T.uint32(4)), T.uint32(15)))
                        ]
                    )
                    + (
                        table[
                            entry
                            + 32
                            + T.Cast("int32", T.bitwise_and(T.shift_right(x, T.uint32(8)), T.uint32(15)))
                        ]
                        + table[
                            entry
                            + 48
                            + T.Cast("int32", T.bitwise_and(T.shift_right(x, T.uint32(12)), T.uint32(15)))
                        ]
                    )
                )

        @T.inline
        def prefix(packed):
            """mine = sum of `packed` over the threads before this one, total = over all (two 16-bit halves)."""
            scan = packed
            for s in T.unroll(5):
                below: T.int32 = T.cuda.__shfl_up_sync(T.uint32(_ALL), scan, T.shift_left(1, s), 32)
                if lane >= T.shift_left(1, s):
                    scan = scan + below
            mine = scan - packed
            total = T.cuda.__shfl_sync(T.uint32(_ALL), scan, 31, 32)
            if warps > 1:
                if lane == 31:
                    part_s[parity * (2 * warps) + warp] = scan
                T.cuda.cta_sync()
                there: T.int32 = 0
                if lane < warps:
                    there = part_s[parity * (2 * warps) + lane]
                before: T.int32 = 0
                if lane < warp:
                    before = there
                T.ptx["redux_sync.add.s32"](got[0], before, T.uint32(_ALL))
                mine = mine + got[0]
                T.ptx["redux_sync.add.s32"](total, there, T.uint32(_ALL))
                parity = 1 - parity

        if row < rows:
            for e in T.unroll(entries):
                cost[e] = T.float32(_INFINITY)
                for wd in T.unroll(word_count):
                    word[e * word_count + wd] = T.uint32(0)
            if t == 0:
                cost[0] = T.float32(0)

            for level in T.serial(D):
                i: T.int32 = D - 1 - level
                first: T.int32 = T.shift_right(i + 1, 4)  # first group that holds a decided sign
                for e in T.unroll(entries):
                    residual[e] = targets[row * D + i]
                for wd in T.unroll(word_count):
                    if 2 * wd + 1 >= first and 2 * wd < groups:
                        if 2 * wd >= first:
                            subtract_group(i, wd, 0)
                        if 2 * wd + 1 < groups:
                            subtract_group(i, wd, 1)
                step: T.float32 = diagonal[i]
                least: T.int32 = _LARGEST_BITS
                most: T.int32 = 0
                for e in T.unroll(entries):
                    plus: T.float32 = residual[e] - step
                    minus: T.float32 = residual[e] + step
                    child[e] = T.reinterpret(
                        "int32", T.call_pure_extern("float32", "__fmaf_rn", plus, plus, cost[e])
                    )
                    child[entries + e] = T.reinterpret(
                        "int32", T.call_pure_extern("float32", "__fmaf_rn", minus, minus, cost[e])
                    )
                    near: T.int32 = T.min(child[e], child[entries + e])
                    least = T.min(least, near)
                    if near <= _LARGEST_BITS:
                        most = T.max(most, near)

                keep: T.int32 = T.Select(i == 0, 1, T.min(2 * n, beam))
                low: T.int32 = 0
                high: T.int32 = _LARGEST_BITS
                below_low: T.int32 = 0  # children at or below `low`
                below_high: T.int32 = keep
                if keep < 2 * n:
                    T.ptx["redux_sync.min.s32"](got[0], least, T.uint32(_ALL))
                    T.ptx["redux_sync.max.s32"](got[1], most, T.uint32(_ALL))
                    if warps > 1:
                        if lane == 0:
                            part_s[parity * (2 * warps) + warp] = got[0]
                            part_s[parity * (2 * warps) + warps + warp] = got[1]
                        T.cuda.cta_sync()
                        other_least: T.int32 = _LARGEST_BITS
                        other_most: T.int32 = 0
                        if lane < warps:
                            other_least = part_s[parity * (2 * warps) + lane]
                            other_most = part_s[parity * (2 * warps) + warps + lane]
                        T.ptx["redux_sync.min.s32"](got[0], other_least, T.uint32(_ALL))
                        T.ptx["redux_sync.max.s32"](got[1], other_most, T.uint32(_ALL))
                        parity = 1 - parity
                    low = got[0] - 1
                    if i == 0:
                        high = got[0]
                    if i > 0 and n == keep:
                        high = got[1]
                    below_high = -1  # not counted yet
                    while high - low > 1:
                        width: T.int32 = high - low
                        quarter: T.int32 = T.shift_right(width, 2)
                        p1: T.int32 = low + quarter
                        p2: T.int32 = low + T.shift_right(width, 1)
                        p3: T.int32 = p2 + quarter
                        if below_high < 0:
                            p2 = p3
                            p1 = low + T.shift_right(width, 1)
                            p3 = high
                        counts: T.int32 = 0  # three counts of ten bits
                        for e in T.unroll(2 * entries):
                            if child[e] <= p1:
                                counts = counts + 1
                            if child[e] <= p2:
                                counts = counts + 1024
                            if child[e] <= p3:
                                counts = counts + 1048576
                        T.ptx["redux_sync.add.s32"](got[0], counts, T.uint32(_ALL))
                        if warps > 1:
                            if lane == 0:
                                part_s[parity * (2 * warps) + warp] = got[0]
                            T.cuda.cta_sync()
                            counts = 0
                            if lane < warps:
                                counts = part_s[parity * (2 * warps) + lane]
                            T.ptx["redux_sync.add.s32"](got[0], T.bitwise_and(counts, 1023), T.uint32(_ALL))
                            T.ptx["redux_sync.add.s32"](
                                got[1], T.bitwise_and(T.shift_right(counts, 10), 1023), T.uint32(_ALL)
                            )
                            T.ptx["redux_sync.add.s32"](got[2], T.shift_right(counts, 20), T.uint32(_ALL))
                            parity = 1 - parity
                        else:
                            got[2] = T.shift_right(got[0], 20)
                            got[1] = T.bitwise_and(T.shift_right(got[0], 10), 1023)
                            got[0] = T.bitwise_and(got[0], 1023)
                        if got[0] >= keep:
                            high = p1
                            below_high = got[0]
                        else:
                            low = p1
                            below_low = got[0]
                            if got[1] >= keep:
                                high = p2
                                below_high = got[1]
                            else:
                                low = p2
                                below_low = got[1]
                                if got[2] >= keep:
                                    high = p3
                                    below_high = got[2]
                                else:
                                    low = p3
                                    below_low = got[2]
                        if below_high == keep:
                            low = high

                mine_count: T.int32 = 0
                for e in T.unroll(2 * entries):
                    keeps[e] = T.Select(child[e] <= high, 1, 0)
                if below_high != keep:  # more children tie at `high` than fit: the first of them stay
                    excess = 0
                    for e in T.unroll(entries):
                        excess = excess + T.Select(child[e] == high, 1, 0)
                        excess = excess + T.Select(child[entries + e] == high, 65536, 0)
                    prefix(excess)
                    plus_rank: T.int32 = below_low + T.bitwise_and(mine, 65535)
                    minus_rank: T.int32 = below_low + T.bitwise_and(total, 65535) + T.shift_right(mine, 16)
                    for e in T.unroll(entries):
                        if child[e] == high:
                            keeps[e] = T.Select(plus_rank < keep, 1, 0)
                            plus_rank = plus_rank + 1
                        if child[entries + e] == high:
                            keeps[entries + e] = T.Select(minus_rank < keep, 1, 0)
                            minus_rank = minus_rank + 1
                for e in T.unroll(entries):
                    mine_count = mine_count + keeps[e] + keeps[entries + e] * 65536
                prefix(mine_count)
                place: T.int32 = T.bitwise_and(mine, 65535)
                bit: T.uint32 = T.shift_left(T.uint32(1), T.Cast("uint32", T.bitwise_and(i, 31)))
                at_word: T.int32 = T.shift_right(i, 5)
                for s in T.unroll(2):
                    if s == 1:
                        place = T.bitwise_and(total, 65535) + T.shift_right(mine, 16)
                    for e in T.unroll(entries):
                        if keeps[s * entries + e] != 0:
                            cost_s[cost_base + place] = T.reinterpret("float32", child[s * entries + e])
                            for wd in T.unroll(word_count):
                                if wd >= at_word and wd < words:
                                    took[0] = word[e * word_count + wd]
                                    if s == 0 and wd == at_word:
                                        took[0] = T.bitwise_or(took[0], bit)
                                    word_s[word_base + wd * capacity + place] = took[0]
                            place = place + 1
                sync()
                n = keep
                for e in T.unroll(entries):
                    cost[e] = T.float32(_INFINITY)
                    if t * entries + e < n:
                        cost[e] = cost_s[cost_base + t * entries + e]
                        for wd in T.unroll(word_count):
                            if wd >= at_word and wd < words:
                                word[e * word_count + wd] = word_s[
                                    word_base + wd * capacity + t * entries + e
                                ]
                sync()

            if t == 0:
                best[row] = cost_s[cost_base]
            for j in T.serial((D - t + (32 * warps - 1)) // (32 * warps)):
                position: T.int32 = j * (32 * warps) + t
                chosen: T.uint32 = T.shift_right(
                    word_s[word_base + T.shift_right(position, 5) * capacity],
                    T.Cast("uint32", T.bitwise_and(position, 31)),
                )
                signs[row * D + position] = T.Cast(
                    "int8", T.Cast("int32", T.bitwise_and(chosen, T.uint32(1))) * 2 - 1
                )

    return beam_search.with_attr("global_symbol", name).with_attr("tirx.noalias", True)
