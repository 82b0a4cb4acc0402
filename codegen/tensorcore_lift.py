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
from liftc.spec import Z_MAX

KINDS = {"float32": 0, "float16": 1, "bfloat16": 2}
ROLLED = {"disable_unroll": True}
FORMS = ("plain", "norm", "gate", "layer", "gelu")
PAIRED = ("gate", "gelu")
"""Forms that read two values for each that they lift."""


def lift_planes(symbol: str, dtype: str, knobs: LiftKnobs, form: str = "plain") -> Any:
    """PrimFunc x -> planes, totals, z_scale; z is within one step of liftc/reference.py.

    x `dtype` (m, IC) and gain `dtype` (G,), both 16-byte aligned, in_scale f32 (IC,) or (1,) for none, bound f32 (1,),
    left and right as above -> planes int8 (KB, 4, COLS, 64) or (KB, 16, COLS, 16), totals int32 (P, m) what each block
    adds to the sums of z, z_scale f32 (m, 1). Then f32 eps, and the integers grid = ceil(m / knobs.group) P,
    row_blocks, t1, t2, C and choice. P = row_blocks ceil(ceil(C / 16) / knobs.tiles). Limits: t1 <= most_left, t2 <=
    most_right, m <= tokens, t2 and IC multiples of 8.

    What is lifted, each step rounded to `dtype` as separate operations would, by form:
    "plain": x itself.
    "norm": gain * (x * rsqrt(mean x^2 + eps)), G = IC.
    "gate": silu(gate) * up, x being (m, 2 IC), gate before up.
    "layer": with choice 0 (x - mean x) * rsqrt(mean (x - mean x)^2 + eps) * gain + shift, rounded once; G = 2 IC, gain
    before shift. With choice 1 x * rsqrt(mean x^2 + eps) * (1 + gain), rounded once; G = IC.
    "gelu": by choice 0 gelu(gate) * up as in a gate, 1 the same with the tanh approximation of gelu, 2 gelu(x) of x
    (m, IC), 3 the same with the approximation. The other forms do not look at choice.

    Planes: column k = 256 b + 64 q + 16 s + 4 t + e of token c is bytes [b, q, 2 c and 2 c + 1, 16 s + 4 t + e], or
    [b, 4 q + t, 2 c and 2 c + 1, 4 s + e] as the warp groups read it, the high and the low byte of z = 256 h + l
    (codegen/tensorcore_sign.py); columns past K are never written: their signs are 0 bits, so that they count for
    nothing.
    """
    WARPS, GROUP, TILES, UNITS = knobs.warps, knobs.group, knobs.tiles, knobs.units
    AHEAD = (knobs.ahead + 1) // 2 if form in PAIRED else knobs.ahead
    START = knobs.trigger if knobs.dependent_launch else -1
    THREADS = WARPS * 32
    KIND = KINDS[dtype]
    RAW = 8 if KIND == 0 else 4
    ITEMS = GROUP * UNITS
    DEPTH, KEPT = knobs.left_depth, knobs.left_kept
    CLUSTER = knobs.cluster
    DIRECT = knobs.direct()
    STAGED = 4 * (TILES * 16 + 4)  # words of 8 rows of two bytes
    CHAINS = 2 if ITEMS * TILES <= 2 else 1  # sums of one product that do not wait for each other
    SUMS = 8 * CHAINS
    KA_MOST = (knobs.most_left + 15) // 16
    KJ_MOST = (knobs.most_right + 31) // 32 * 2
    # What a block does at most once, whatever the factors, needs no loop.
    ONE_TURN = -(-2 * KA_MOST // CLUSTER) <= WARPS * UNITS
    ONE_STEP = KJ_MOST // 2 <= AHEAD
    ALL_KEPT = -(-((knobs.most_left + 7) // 8) // CLUSTER) <= WARPS * UNITS

    def slot(t: Any, u: Any, s: Any) -> Any:
        return ((t * UNITS + u) * AHEAD + s) * RAW

    HELD = UNITS * AHEAD  # vectors of a token that a thread has registers for

    def features(width: Any, choice: Any) -> Any:
        if form == "gelu":
            return T.Select(choice < 2, width // 2, width)
        return width // 2 if form == "gate" else width

    def of_up(there: Any, choice: Any) -> Any:
        return T.Select(choice < 2, there, 0) if form == "gelu" else there

    def mma(sums: Any, operand: Any, b0: Any, b1: Any) -> Any:
        return call("mma_bf16", sums, operand, b0, b1)

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
        if CLUSTER > 1:
            T.cta_id_in_cluster([CLUSTER])
        bx = T.cta_id([grid])
        tx = T.thread_id([THREADS])
        T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", knobs.blocks_per_processor)
        pool = T.SMEMPool()
        right_s = pool.alloc((knobs.right_bytes() // 4,), "uint32", align=16)
        mixed = pool.alloc((GROUP * TILES * KA_MOST * 256,), "uint32", align=16)
        squares = pool.alloc((GROUP * WARPS * (CLUSTER + 1),), "float32", align=16)
        sums = pool.alloc((GROUP,), "int32", align=16)
        places = pool.alloc((4 * THREADS,), "int32", align=16) if DIRECT else sums
        ready = pool.alloc((1,), "uint64", align=16)  # P' and squares of the other blocks of the cluster
        kept = pool.alloc((UNITS * KEPT * WARPS * 128,), "uint32", align=16) if KEPT > 0 else mixed
        pool.commit(knobs.shared_bytes())
        raw = T.alloc_local((ITEMS * AHEAD * RAW,), "uint32")
        raw_up = T.alloc_local(((ITEMS * AHEAD if form in PAIRED else 1) * RAW,), "uint32")
        root = T.alloc_local((GROUP,), "float32")
        centre = T.alloc_local((GROUP,), "float32")
        w = T.alloc_local((TILES * 8,), "uint32")
        b = T.alloc_local((max(UNITS, 1) * 4,), "uint32")
        part = T.alloc_local((ITEMS * TILES * SUMS,), "float32")
        rows = T.alloc_local((UNITS * DEPTH * 4,), "uint32")
        source = T.alloc_local((UNITS,), "int32")
        there = T.alloc_local((ITEMS,), "int32")
        norm = T.alloc_local((GROUP,), "float32")
        total = T.alloc_local((GROUP,), "int32")
        place = T.alloc_local((4,), "int32")

        IC: T.let[T.int32] = features(XC, choice)
        lane: T.let[T.int32] = tx % 32
        warp: T.let[T.int32] = tx // 32
        which: T.int32 = bx if knobs.tokens == 1 else T.truncmod(bx, P)
        token0: T.int32 = 0 if knobs.tokens == 1 else T.truncdiv(bx, P) * GROUP
        row_block: T.int32 = T.truncmod(which, row_blocks)
        rank: T.int32 = row_block % CLUSTER
        tile0: T.int32 = T.truncdiv(which, row_blocks) * TILES
        n0: T.int32 = T.truncdiv(row_block * NT, row_blocks)
        n1: T.int32 = T.truncdiv((row_block + 1) * NT, row_blocks)
        u0: T.int32 = rank * (2 * KA) // CLUSTER  # the units of X that this block mixes for its cluster
        u1: T.int32 = (rank + 1) * (2 * KA) // CLUSTER
        if START == 0:
            call("dependent_start")
        vectors: T.int32 = T.min(CT - tile0, TILES) * KJ * 64
        for i in T.serial((vectors - tx + THREADS - 1) // THREADS):
            T.ptx["cp.async.cg.shared.global"](
                right_s.ptr_to([(i * THREADS + tx) * 4]),
                right.ptr_to([tile0, 0, 0, 0, (i * THREADS + tx) * 4]),
                16,
            )
        if TILES > 1:
            for i in T.serial((TILES * KJ * 64 - vectors - tx + THREADS - 1) // THREADS):
                for q in T.unroll(4):  # what results past the last column are made of
                    right_s[(vectors + i * THREADS + tx) * 4 + q] = T.uint32(0)
        for r in T.unroll(UNITS):
            for g in T.unroll(KEPT):
                at_kept: T.let[T.int32] = ((r * KEPT + g) * WARPS + warp) * 128 + lane * 4
                if g < KA and n0 + r * WARPS + warp < n1:
                    T.ptx["cp.async.cg.shared.global"](
                        kept.ptr_to([at_kept]), left.ptr_to([n0 + r * WARPS + warp, g, lane, 0]), 16
                    )
                else:
                    for q in T.unroll(4):
                        kept[at_kept + q] = T.uint32(0)
        T.ptx["cp.async.commit_group"]()
        if KEPT < KA_MOST:
            for i in T.serial((n1 - n0 - warp + WARPS - 1) // WARPS):
                call("prefetch", left.ptr_to([n0 + i * WARPS + warp, 0, 0, 0]), KA * 512, lane)

        unit_scale: T.float32 = bound[0] * T.float32(1 / Z_MAX)
        if tx < GROUP:
            sums[tx] = 0
        if CLUSTER > 1:
            if tx == 0:
                call("barrier_init", ready.ptr_to([0]), 1)
                call("fence_init")
                call(
                    "barrier_expect",
                    ready.ptr_to([0]),
                    GROUP * (TILES * (2 * KA - u1 + u0) * 512 + (CLUSTER - 1) * WARPS * 4),
                )

        @T.inline
        def seek(turn, step):  # where the pieces of x of these units begin, and which of them are there
            for u in T.unroll(UNITS):
                unit0: T.let[T.int32] = u0 + (turn * UNITS + u) * WARPS + warp
                a: T.let[T.int32] = unit0 * 8 + lane // 4
                j: T.let[T.int32] = step * (AHEAD * 32) + lane % 4 * 8
                source[u] = a * t2 + j
                most: T.int32 = T.min(t2 - j, IC - source[u])
                if unit0 >= u1 or a >= t1:
                    most = 0
                for t in T.unroll(GROUP):
                    there[t * UNITS + u] = T.Select(token0 + t < m, most, 0)

        @T.inline
        def locate(i):  # where the bytes of z of these rows go; -1 where there are none
            for q in T.unroll(4):
                row: T.let[T.int32] = (n0 + i * WARPS + warp) * 8 + lane % 4 * 2 + q % 2
                column: T.let[T.int32] = tile0 * 16 + lane // 4 + q // 2 * 8
                place[q] = -1
                if row < T.min(t1, n1 * 8) and column < C:
                    place[q] = call("place", row * C + column, 2 * token0, COLS, PIECES)

        @T.inline
        def bring(i, first):  # operands of left, from `first` on, of these rows of T* x
            for r in T.unroll(UNITS):
                tile: T.let[T.int32] = n0 + (i * UNITS + r) * WARPS + warp
                for g in T.unroll(DEPTH):
                    for q in T.unroll(4):
                        rows[(r * DEPTH + g) * 4 + q] = T.uint32(0)
                    if tile < n1 and first + g < KA:
                        call(
                            "load_words",
                            left.ptr_to([tile, first + g, lane, 0]),
                            rows.ptr_to([(r * DEPTH + g) * 4]),
                        )

        seek(0, 0)
        if DIRECT:  # known before x is there; waits in shared memory, registers being short
            locate(0)
            for q in T.unroll(4):
                places[q * THREADS + tx] = place[q]
        if KEPT < KA_MOST:
            bring(0, KEPT)
        T.ptx["cp.async.wait_group"](0)
        if CLUSTER > 1:
            call("cluster_leave")  # no block writes to the shared memory of another before that has begun
        T.cuda.cta_sync()
        if knobs.dependent_launch:
            call("dependent_wait")

        @T.inline
        def add_up(values, first, apart):
            # Of all threads, by way of squares: rows `first`, `first` + `apart` and so on are those of the tokens.
            for t in T.unroll(GROUP):
                mine: T.let[T.int32] = (first + t * apart) * WARPS + warp
                call("warp_sum", values[t], squares.ptr_to([mine]), lane, ready.ptr_to([0]), 0, 1)
            T.cuda.cta_sync()
            for t in T.unroll(GROUP):
                values[t] = T.float32(0)
                for q in T.unroll(WARPS):
                    values[t] = values[t] + squares[(first + t * apart) * WARPS + q]

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
            add_up(root, GROUP * CLUSTER, 1)
            for t in T.unroll(GROUP):
                root[t] = T.rsqrt(root[t] * (T.float32(1) / T.Cast("float32", IC)) + eps)

        @T.inline
        def bring_vectors(turn):  # vectors of whole tokens, in turn by thread, to where pieces of x will be
            for t in T.unroll(GROUP):
                for h in T.unroll(HELD):
                    vector: T.let[T.int32] = (turn * HELD + h) * THREADS + tx
                    call(
                        "load_x8", x.ptr_to([token0 + t, vector * 8]), KIND,
                        T.Cast("int32", T.And(token0 + t < m, vector < IC // 8)),
                        raw.ptr_to([(t * HELD + h) * RAW]),
                    )  # fmt: skip

        if form == "layer":
            # Whole tokens wait in registers between the two passes where they fit, so that x is awaited once.
            turns: T.int32 = (IC // 8 + THREADS * HELD - 1) // (THREADS * HELD)
            for t in T.unroll(GROUP):
                centre[t] = T.float32(0)
                root[t] = T.float32(0)
            for turn in T.serial(turns):
                bring_vectors(turn)
                if choice == 0:
                    for t in T.unroll(GROUP):
                        for h in T.unroll(HELD):
                            centre[t] = centre[t] + call("sum_x8", raw.ptr_to([(t * HELD + h) * RAW]), KIND)
            if choice == 0:
                # Where nobody but this block stores, and its norm of x much later.
                add_up(centre, rank, CLUSTER)
                for t in T.unroll(GROUP):
                    centre[t] = centre[t] / T.Cast("float32", IC)
            for turn in T.serial(turns):
                if turns > 1:
                    bring_vectors(turn)
                for t in T.unroll(GROUP):
                    for h in T.unroll(HELD):
                        left_of: T.let[T.int32] = IC // 8 - (turn * HELD + h) * THREADS - tx
                        root[t] = root[t] + call(
                            "deviations_x8", raw.ptr_to([(t * HELD + h) * RAW]), centre[t], left_of, KIND
                        )
            add_up(root, GROUP * CLUSTER, 1)
            for t in T.unroll(GROUP):
                root[t] = T.rsqrt(root[t] / T.Cast("float32", IC) + eps)

        @T.inline
        def mix(step, scaled):  # the pieces that have been loaded, with right
            for s in T.unroll(AHEAD):
                # Past the last piece x is zero, and right must be finite.
                piece: T.let[T.int32] = T.min(step * AHEAD + s, KJ // 2 - 1)
                for t in T.unroll(GROUP):
                    for u in T.unroll(UNITS):
                        k1: T.let[T.int32] = source[u] + s * 32
                        if form == "norm":
                            call(
                                "norm_x8",
                                raw.ptr_to([slot(t, u, s)]),
                                gain.ptr_to([T.Select(s * 32 < there[t * UNITS + u], k1, 0)]),
                                root[t],
                                KIND,
                            )
                        if form == "layer":
                            of_piece: T.let[T.int32] = there[t * UNITS + u] - s * 32
                            call(
                                "layer_x8", raw.ptr_to([slot(t, u, s)]), gain.ptr_to([T.Select(of_piece > 0, k1, 0)]),
                                gain.ptr_to([T.Select(T.And(of_piece > 0, choice == 0), IC + k1, 0)]), centre[t],
                                root[t], of_piece, choice, KIND,
                            )  # fmt: skip
                        if form == "gate":
                            call("gate_x8", raw.ptr_to([slot(t, u, s)]), raw_up.ptr_to([slot(t, u, s)]), KIND)
                        if form == "gelu":
                            call(
                                "gelu_x8",
                                raw.ptr_to([slot(t, u, s)]),
                                raw_up.ptr_to([slot(t, u, s)]),
                                choice,
                                KIND,
                            )
                for half in T.unroll(2):
                    if scaled:
                        T.cuda.cta_sync()  # or all loads are brought forward, and registers spill
                    for c in T.unroll(TILES):
                        for part_of in T.unroll(2):
                            call(
                                "load_words",
                                right_s.ptr_to(
                                    [((c * KJ + piece * 2 + half) * 2 + part_of) * 128 + lane * 4]
                                ),
                                w.ptr_to([c * 8 + part_of * 4]),
                            )
                    for t in T.unroll(GROUP):
                        for u in T.unroll(UNITS):
                            k2: T.let[T.int32] = source[u] + s * 32 + half * 4
                            norm[t] = norm[t] + call(
                                "split_x4",
                                raw.ptr_to([slot(t, u, s)]),
                                KIND,
                                half,
                                in_scale.ptr_to([k2]),
                                scaled,
                                there[t * UNITS + u] - s * 32,
                                b.ptr_to([0]),
                            )
                            for c in T.unroll(TILES):
                                at: T.let[T.int32] = ((t * UNITS + u) * TILES + c) * SUMS + half % CHAINS * 8
                                mma(part.ptr_to([at]), w.ptr_to([c * 8]), b[0], b[1])
                                mma(part.ptr_to([at + 4]), w.ptr_to([c * 8 + 4]), b[0], b[1])
                                if KIND != 2 or scaled:
                                    mma(part.ptr_to([at + 4]), w.ptr_to([c * 8]), b[2], b[3])

        # P' for the rows a of X: 8 of them to a unit, units in turn by warp.
        for t in T.unroll(GROUP):
            norm[t] = T.float32(0)
        for turn in T.serial(1 if ONE_TURN else (u1 - u0 + WARPS * UNITS - 1) // (WARPS * UNITS)):
            for q in T.unroll(ITEMS * TILES * SUMS):
                part[q] = T.float32(0)
            for step in T.serial(1 if ONE_STEP else (KJ // 2 + AHEAD - 1) // AHEAD):
                if not (ONE_TURN and ONE_STEP):
                    if turn + step > 0:
                        seek(turn, step)
                for s in T.unroll(AHEAD):
                    for t in T.unroll(GROUP):
                        for u in T.unroll(UNITS):
                            call(
                                "load_x8", x.ptr_to([token0 + t, source[u] + s * 32]), KIND,
                                there[t * UNITS + u] - s * 32, raw.ptr_to([slot(t, u, s)]),
                            )  # fmt: skip
                            if form in PAIRED:
                                call(
                                    "load_x8", x.ptr_to([token0 + t, IC + source[u] + s * 32]), KIND,
                                    of_up(there[t * UNITS + u] - s * 32, choice),
                                    raw_up.ptr_to([slot(t, u, s)]),
                                )  # fmt: skip
                if SC > 1:
                    mix(step, True)
                else:
                    mix(step, False)
            for t in T.unroll(GROUP):
                for u in T.unroll(UNITS):
                    unit: T.let[T.int32] = u0 + (turn * UNITS + u) * WARPS + warp
                    for c in T.unroll(TILES):
                        if unit < u1:
                            call(
                                "mixed_words",
                                part.ptr_to([((t * UNITS + u) * TILES + c) * SUMS]),
                                CHAINS,
                                w.ptr_to([0]),
                            )
                            call(
                                "share",
                                w.ptr_to([0]),
                                mixed.ptr_to(
                                    [((t * TILES + c) * KA + unit // 2) * 256 + lane * 4 + unit % 2 * 2]
                                ),
                                ready.ptr_to([0]),
                                rank,
                                CLUSTER,
                            )

        if START == 1:
            call("dependent_start")
        for t in T.unroll(GROUP):
            call(
                "warp_sum",
                norm[t],
                squares.ptr_to([(t * CLUSTER + rank) * WARPS + warp]),
                lane,
                ready.ptr_to([0]),
                rank,
                CLUSTER,
            )
        T.cuda.cta_sync()
        if CLUSTER > 1:
            call("barrier_await", ready.ptr_to([0]), 0)  # what the other blocks store

        @T.inline
        def multiply(g, chain, words, apart, first):  # P' and operand g of left; zero past the last one
            for t in T.unroll(GROUP):
                for c in T.unroll(TILES):
                    for part_of in T.unroll(2):
                        call(
                            "load_words",
                            mixed.ptr_to(
                                [((t * TILES + c) * KA + T.min(g, KA - 1)) * 256 + part_of * 128 + lane * 4]
                            ),
                            w.ptr_to([part_of * 4]),
                        )
                    for r in T.unroll(UNITS):
                        at: T.let[T.int32] = ((t * UNITS + r) * TILES + c) * SUMS
                        word: T.let[T.int32] = r * apart + first
                        mma(
                            part.ptr_to([at + chain % CHAINS * 8]),
                            w.ptr_to([0]),
                            words[word],
                            words[word + 1],
                        )
                        mma(part.ptr_to([at + 4]), w.ptr_to([4]), words[word], words[word + 1])
                        mma(part.ptr_to([at + SUMS - 4]), w.ptr_to([0]), words[word + 2], words[word + 3])

        @T.inline
        def multiply_rows(i, first, brought):  # with all operands for these rows, from `first` on from L2
            for depth in T.serial(
                1 if first + DEPTH >= KA_MOST else (KA - first + DEPTH - 1) // DEPTH, annotations=ROLLED
            ):
                if depth >= brought:
                    bring(i, first + depth * DEPTH)
                for g in T.unroll(DEPTH):
                    multiply(first + depth * DEPTH + g, g, rows, DEPTH * 4, g * 4)

        @T.inline
        def store(i):  # z of one tile of these rows of one token
            total[0] = 0
            if i > 0:
                locate(i)
            else:
                for q in T.unroll(4):
                    place[q] = places[q * THREADS + tx]
            for q in T.unroll(4):
                if place[q] >= 0:
                    total[0] = total[0] + call(
                        "round",
                        call("total", part.ptr_to([q]), CHAINS),
                        norm[0],
                        planes.ptr_to([0, 0, 0, place[q]]),
                        WIDE,
                    )
            call("warp_add", sums.ptr_to([0]), total[0], lane)

        @T.inline
        def store_together(i):  # through shared memory, where right was, into the order in which z is stored
            for r in T.unroll(UNITS):
                row0: T.let[T.int32] = (n0 + (i * UNITS + r) * WARPS + warp) * 8
                k0: T.let[T.int32] = row0 * C + tile0 * 16
                for t in T.unroll(GROUP):
                    total[t] = 0 if r == 0 else total[t]
                    for c in T.unroll(TILES):
                        total[t] = total[t] + call(
                            "stage_z",
                            part.ptr_to([((t * UNITS + r) * TILES + c) * SUMS]),
                            CHAINS,
                            norm[t],
                            right_s.ptr_to([(warp * GROUP + t) * STAGED]),
                            c * 16,
                            TILES * 16,
                            k0,
                            C,
                            lane,
                        )
                T.cuda.warp_sync()
                for t in T.unroll(GROUP):
                    if token0 + t < m:
                        call(
                            "store_rows", right_s.ptr_to([(warp * GROUP + t) * STAGED]), TILES * 16, k0, C,
                            T.min(C - tile0 * 16, TILES * 16), T.min(t1, n1 * 8) - row0,
                            planes.ptr_to([0, 0, 0, 0]), 2 * (token0 + t), COLS, PIECES, lane,
                        )  # fmt: skip
                T.cuda.warp_sync()
            for t in T.unroll(GROUP):
                call("warp_add", sums.ptr_to([t]), total[t], lane)

        # Z' for the rows of T* x: 8 of them to a unit, units in turn by warp, the first with what waits beside P'.
        for q in T.unroll(ITEMS * TILES * SUMS):
            part[q] = T.float32(0)
        for g in T.unroll(KEPT):
            for r in T.unroll(UNITS):
                call(
                    "load_words",
                    kept.ptr_to([((r * KEPT + g) * WARPS + warp) * 128 + lane * 4]),
                    b.ptr_to([r * 4]),
                )
            multiply(g, g, b, 4, 0)
        if KEPT < KA_MOST:
            multiply_rows(0, KEPT, 1)
        for t in T.unroll(GROUP):
            norm[t] = T.float32(0)
            for q in T.unroll(WARPS * CLUSTER):
                norm[t] = norm[t] + squares[t * CLUSTER * WARPS + q]
            norm[t] = call("z_scale", norm[t], unit_scale)
            if which == 0 and tx == 0 and token0 + t < m:
                z_scale[token0 + t, 0] = norm[t]
            norm[t] = call("inverse", norm[t])
        if DIRECT:
            store(0)
        else:
            store_together(0)
        for i in T.serial(
            0 if ALL_KEPT else (n1 - n0 - warp + WARPS * UNITS - 1) // (WARPS * UNITS) - 1, annotations=ROLLED
        ):
            for q in T.unroll(ITEMS * TILES * SUMS):
                part[q] = T.float32(0)
            multiply_rows(i + 1, 0, 0)
            if DIRECT:
                store(i + 1)
            else:
                store_together(i + 1)
        T.cuda.cta_sync()
        if START == 2:
            call("dependent_start")
        if tx < GROUP and token0 + tx < m:
            totals[which, token0 + tx] = sums[tx]

    if knobs.dependent_launch:
        function = function.with_attr("tirx.kernel_launch_params", ["tirx.use_programtic_dependent_launch"])
    return function
