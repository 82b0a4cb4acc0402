# mypy: disable-error-code="misc, untyped-decorator, no-untyped-def, used-before-def"
# ruff: noqa: F823, F841, B007  (TIRx inline functions share the scope of their caller)
"""sign_matmul on integer tensor cores for up to 16 tokens: the TIRx template behind `sign_matmul_tiled`.

Arithmetic. z = 256 h + l with h = floor((z + 128) / 256) and l in [-128, 127], two signed bytes, are two columns
of `mma.m16n8k32` (unsigned signs times signed z, exact int32). A word of signs needs no decoding: masked with
0x01010101 << j it is an operand whose entries are 0 or 2^j, so every bit position j (knob `sets` of them, the
others shifted down first) adds into accumulators of its own, which are shifted back once per run of tiles.
The signs' sum is 2 p - sum z, p the sum of z over set bits; all int32 arithmetic is modulo 2^32 and the true
value fits, so results do not depend on tiles, warps or blocks.

Blocks. Block x of `grid` owns consecutive row blocks of 16 rows and all columns. The columns are cut into chunks
whose planes of z pass through a few buffers in shared memory; in a chunk the warps share the block's tiles evenly,
each streaming through a ring of its own, which runs on across chunks. Before the dependent-launch wait a block
reads signs and their scales only: they are in flight while the kernel before computes z.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from liftc.codegen import tensorcore_device as device
from liftc.codegen.knobs import TensorCoreKnobs

MMA = "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32"
LOAD4 = "ld.shared.v4.u32"
TILE_WORDS = 128  # 16 rows x 256 columns
TILE_BYTES = 512
ROLLED = {"disable_unroll": True}


def sign_matmul_tiled(symbol: str, knobs: TensorCoreKnobs) -> Any:
    """PrimFunc y = cast((float32(B z) * z_scale) * output_scale) (+ bias) (+ residual), as liftc/reference.py has it.

    tiles int32 (NB, KB, 32, 4) in the layout of codegen/tir_tiles.py, planes int8 (KB, 4, 2 knobs.tokens, 64) of
    codegen/tensorcore_lift.py for at least m tokens, totals int32 (P, m) whose columns add up to the sums of z,
    z_scale f32 (m, 1), output_scale f32 (OC,), bias uint8 (bytes of OC values,), residual and y uint8 (bytes of m OC
    values,), then three integers: grid, the number of blocks, at least ceil(NB / knobs.block_rows); kind of bias,
    residual and y, 0 for float32, 1 for float16, 2 for bfloat16; adds, 1 where the bias is added, 2 the residual, 3
    both, each addition rounded to this type. One that is not added is not read. 16 NB >= OC. Results are the same bits
    whatever the knobs and the grid.
    """
    WARPS, RING, PAIR, SETS = knobs.warps, knobs.ring, knobs.row_blocks, knobs.sets
    COLS = 2 * knobs.tokens
    NT = (COLS + 7) // 8
    CHUNK, BUFFERS = knobs.chunk_blocks, knobs.z_buffers
    ROWS = knobs.block_rows * 16
    SUMS = ROWS + 8  # keeps the four tokens of a lane quad in different banks
    SLOT = PAIR * TILE_BYTES
    THREADS = WARPS * 32
    SMEM = knobs.shared_bytes()
    AHEAD = knobs.prefetch_tiles
    FIRST = min(knobs.first_tiles, RING - 1) or RING - 1
    BLOCK_BYTES = COLS * 256  # planes of 256 columns

    @T.prim_func
    def function(
        tiles_arg: T.handle, planes_arg: T.handle, totals_arg: T.handle, z_scale_arg: T.handle, scale_arg: T.handle,
        bias_arg: T.handle, residual_arg: T.handle, y_arg: T.handle, grid: T.int32, kind: T.int32, adds: T.int32,
    ) -> None:  # fmt: skip
        T.func_attr({"tirx.noalias": True, "global_symbol": symbol})
        NB = T.int32()
        KB = T.int32()
        OC = T.int32()
        m = T.int32()
        P = T.int32()
        size = T.int32()
        bias_size = T.int32()
        tiles = T.match_buffer(tiles_arg, (NB, KB, 32, 4), "int32", align=16)
        planes = T.match_buffer(planes_arg, (KB, 4, COLS, 64), "int8", align=16)
        totals = T.match_buffer(totals_arg, (P, m), "int32", align=4)
        z_scale = T.match_buffer(z_scale_arg, (m, 1), "float32", align=4)
        scale = T.match_buffer(scale_arg, (OC,), "float32", align=4)
        bias = T.match_buffer(bias_arg, (bias_size,), "uint8", align=4)
        residual = T.match_buffer(residual_arg, (size,), "uint8", align=4)
        y = T.match_buffer(y_arg, (size,), "uint8", align=4)
        T.device_entry()
        bx = T.cta_id([grid])
        tx = T.thread_id([THREADS])
        pool = T.SMEMPool()
        chunks = pool.alloc((BUFFERS * CHUNK * COLS * 64,), "uint32", align=16)
        ring = pool.alloc((WARPS * RING * SLOT // 4,), "uint32", align=16)
        sums = pool.alloc((knobs.tokens * SUMS,), "int32", align=16)
        ready = pool.alloc((BUFFERS,), "uint64", align=16)
        total = pool.alloc((knobs.tokens,), "int32", align=16)
        token_scale = pool.alloc((knobs.tokens,), "float32", align=16)
        row_scale = pool.alloc((ROWS,), "float32", align=16)
        pool.commit(SMEM)
        acc = T.alloc_local((PAIR * NT * SETS * 4,), "uint32")
        w = T.alloc_local((PAIR * 4,), "uint32")
        b = T.alloc_local((16,), "uint32")
        late = T.alloc_local((2,), "uint32")

        lane: T.let[T.int32] = tx % 32
        warp: T.let[T.int32] = tx // 32
        row0: T.int32 = T.truncdiv(bx * NB, grid)
        blocks: T.int32 = T.truncdiv((bx + 1) * NB, grid) - row0
        groups: T.int32 = (blocks + (PAIR - 1)) // PAIR
        count: T.int32 = (KB + CHUNK - 1) // CHUNK
        chunk: T.int32 = T.truncdiv(KB + count - 1, count)  # equal chunks of at most CHUNK
        count = T.truncdiv(KB + chunk - 1, chunk)
        base: T.let[T.int32] = row0 * KB * TILE_WORDS + lane * 4

        # Shared-memory addresses live in registers; a generic pointer would be converted at every use.
        ring_at: T.uint32 = T.cuda.cvta_generic_to_shared(ring.ptr_to([warp * (RING * SLOT // 4) + lane * 4]))
        planes_at: T.uint32 = T.cuda.cvta_generic_to_shared(chunks.ptr_to([lane * 4]))

        # Prefetch cursor: steps left in this chunk, column block and group of the next step, its word offset.
        p_start: T.int32 = 0
        p_len: T.int32 = T.min(chunk, KB)
        p_group: T.int32 = warp * (groups * p_len) // WARPS
        p_left: T.int32 = (warp + 1) * (groups * p_len) // WARPS - p_group
        p_col: T.int32 = T.truncmod(p_group, p_len)
        p_group = T.truncdiv(p_group, p_len)
        p_off: T.int32 = base + (p_group * PAIR * KB + p_col) * TILE_WORDS
        fill: T.int32 = 0
        slot: T.int32 = 0
        step: T.int32 = 0

        @T.inline
        def advance():
            if p_left == 0:
                while p_left == 0 and p_start + chunk < KB:
                    p_start = p_start + chunk
                    p_len = T.min(chunk, KB - p_start)
                    p_group = warp * (groups * p_len) // WARPS
                    p_left = (warp + 1) * (groups * p_len) // WARPS - p_group
                    p_col = T.truncmod(p_group, p_len)
                    p_group = T.truncdiv(p_group, p_len)
                    p_off = base + (p_group * PAIR * KB + p_start + p_col) * TILE_WORDS

        @T.inline
        def issue():
            if p_left > 0:
                T.ptx["cp.async.cg.shared.global"](
                    ring_at + T.Cast("uint32", fill), tiles.ptr_to([0, 0, 0, p_off]), 16
                )
                if PAIR == 2:
                    if p_group * 2 + 1 < blocks:
                        T.ptx["cp.async.cg.shared.global"](
                            ring_at + T.Cast("uint32", fill + TILE_BYTES),
                            tiles.ptr_to([0, 0, 0, p_off + KB * TILE_WORDS]),
                            16,
                        )
                p_off = p_off + TILE_WORDS
                p_left = p_left - 1
                p_col = p_col + 1
                if p_col == p_len:
                    p_col = 0
                    p_group = p_group + 1
                    p_off = p_off + (PAIR * KB - p_len) * TILE_WORDS
                advance()
            T.ptx["cp.async.commit_group"]()
            fill = T.Select(fill == (RING - 1) * SLOT, 0, fill + SLOT)

        if knobs.dependent_launch:
            T.cuda.func_call("liftc_dependent_start", source_code=device.DEPENDENT_START)
        advance()
        for i in T.serial(FIRST):
            issue()
        for i in T.serial(RING - 1 - FIRST):
            T.ptx["cp.async.wait_group"](FIRST - 1)
            issue()
        if AHEAD > 0:  # the tiles after the ring start moving towards L2
            if FIRST < RING - 1:
                T.ptx["cp.async.wait_group"](0)
            ahead: T.int32 = T.min(p_left, AHEAD)
            if PAIR == 2 or count > 1:
                ahead = T.min(ahead, p_len - p_col)
            T.cuda.func_call(
                "liftc_prefetch", tiles.ptr_to([0, 0, 0, p_off - lane * 4]), ahead * TILE_BYTES, lane,
                source_code=device.PREFETCH,
            )  # fmt: skip
        for i in T.serial((knobs.tokens * SUMS + THREADS - 1) // THREADS):
            if i * THREADS + tx < knobs.tokens * SUMS:
                sums[i * THREADS + tx] = 0
        for i in T.serial((blocks * 16 - tx + THREADS - 1) // THREADS):
            if row0 * 16 + i * THREADS + tx < OC:
                row_scale[i * THREADS + tx] = scale[row0 * 16 + i * THREADS + tx]
                if adds % 2 > 0:
                    T.cuda.func_call(
                        "liftc_touch", bias.ptr_to([0]), T.Cast("int64", row0 * 16 + i * THREADS + tx), kind,
                        source_code=device.TOUCH,
                    )  # fmt: skip
        if tx < knobs.tokens:
            total[tx] = 0
        if tx < BUFFERS:
            T.cuda.func_call(
                "liftc_barrier_init", ready.ptr_to([tx]), THREADS, source_code=device.BARRIER_INIT
            )
        T.cuda.cta_sync()
        if knobs.dependent_launch:
            T.cuda.func_call("liftc_dependent_wait", source_code=device.DEPENDENT_WAIT)

        @T.inline
        def fetch(which, buffer):
            vectors: T.int32 = T.min(chunk, KB - which * chunk) * (COLS * 16)
            for i in T.serial((vectors - tx + THREADS - 1) // THREADS):
                T.ptx["cp.async.cg.shared.global"](
                    chunks.ptr_to([buffer * (CHUNK * COLS * 64) + (i * THREADS + tx) * 4]),
                    planes.ptr_to([0, 0, 0, which * chunk * BLOCK_BYTES + (i * THREADS + tx) * 16]),
                    16,
                )
            T.cuda.func_call(
                "liftc_barrier_arrive", ready.ptr_to([buffer]), source_code=device.BARRIER_ARRIVE
            )

        for c in T.serial(T.min(count, BUFFERS)):
            fetch(c, c)
        for i in T.serial(
            (m - warp + WARPS - 1) // WARPS
        ):  # the sum of z and the scale, while z is on its way
            which_token: T.int32 = i * WARPS + warp
            part: T.int32 = 0
            for q in T.serial((P - lane + 31) // 32):
                part = part + T.cuda.func_call(
                    "liftc_load_word", totals.ptr_to([q * 32 + lane, which_token]),
                    source_code=device.LOAD_WORD, return_type="int32",
                )  # fmt: skip
            T.cuda.func_call(
                "liftc_warp_add", total.ptr_to([which_token]), part, lane, source_code=device.WARP_ADD
            )
            if lane == 0:
                token_scale[which_token] = T.reinterpret(
                    "float32",
                    T.cuda.func_call(
                        "liftc_load_word", z_scale.ptr_to([which_token, 0]),
                        source_code=device.LOAD_WORD, return_type="int32",
                    ),
                )  # fmt: skip
        for q in T.unroll(PAIR * NT * SETS * 4):
            acc[q] = T.uint32(0)
        for c in T.serial(count):
            length: T.int32 = T.min(chunk, KB - c * chunk)
            T.cuda.func_call(
                "liftc_barrier_wait",
                ready.ptr_to([c % BUFFERS]),
                c // BUFFERS % 2,
                source_code=device.BARRIER_WAIT,
            )
            step = warp * (groups * length) // WARPS
            stop: T.int32 = (warp + 1) * (groups * length) // WARPS
            while step < stop:
                group: T.int32 = T.truncdiv(step, length)
                col: T.int32 = step - group * length
                run: T.int32 = T.min(length - col, stop - step)
                z_at: T.uint32 = planes_at + T.Cast("uint32", (c % BUFFERS * CHUNK + col) * BLOCK_BYTES)
                for i in T.serial(run):
                    T.ptx["cp.async.wait_group"](RING - 2)
                    for p in T.unroll(PAIR):
                        T.ptx[LOAD4](
                            w[p * 4], w[p * 4 + 1], w[p * 4 + 2], w[p * 4 + 3],
                            ring_at + T.Cast("uint32", slot + p * TILE_BYTES),
                        )  # fmt: skip
                    slot = T.Select(slot == (RING - 1) * SLOT, 0, slot + SLOT)
                    for n in T.unroll(NT):
                        for q in T.unroll(4):  # lanes past the last column feed results that nobody reads
                            T.ptx[LOAD4](
                                b[q * 4], b[q * 4 + 1], b[q * 4 + 2], b[q * 4 + 3],
                                z_at + T.uint32(q * COLS * 64 + n * 512),
                                pred=(lane // 4 + n * 8 < 2 * m),
                            )  # fmt: skip
                        if n == 0:
                            issue()
                        for p in T.unroll(PAIR):
                            for j in T.unroll(8):
                                mask: T.let[T.uint32] = T.shift_left(T.uint32(0x01010101), T.uint32(j % SETS))
                                down: T.let[T.uint32] = T.uint32(j // SETS * SETS)
                                a: T.let[T.int32] = ((p * NT + n) * SETS + j % SETS) * 4
                                T.ptx[MMA](
                                    acc[a], acc[a + 1], acc[a + 2], acc[a + 3],
                                    T.shift_right(w[p * 4], down) & mask,
                                    T.shift_right(w[p * 4 + 1], down) & mask,
                                    T.shift_right(w[p * 4 + 2], down) & mask,
                                    T.shift_right(w[p * 4 + 3], down) & mask,
                                    b[2 * j], b[2 * j + 1],
                                    acc[a], acc[a + 1], acc[a + 2], acc[a + 3],
                                )  # fmt: skip
                    z_at = z_at + T.uint32(BLOCK_BYTES)
                for p in T.unroll(PAIR):
                    for n in T.unroll(NT):
                        for r in T.unroll(2):  # rows lane // 4 and 8 more
                            high: T.uint32 = T.uint32(0)
                            low: T.uint32 = T.uint32(0)
                            for s in T.unroll(SETS):
                                a2: T.let[T.int32] = ((p * NT + n) * SETS + s) * 4 + 2 * r
                                high = high + T.reinterpret(
                                    "uint32", T.shift_right(T.reinterpret("int32", acc[a2]), s)
                                )
                                low = low + T.reinterpret(
                                    "uint32", T.shift_right(T.reinterpret("int32", acc[a2 + 1]), s)
                                )
                            if n * 4 + lane % 4 < m and group * PAIR + p < blocks:
                                T.ptx["red.shared.add.u32"](
                                    sums.ptr_to(
                                        [
                                            (n * 4 + lane % 4) * SUMS
                                            + (group * PAIR + p) * 16
                                            + r * 8
                                            + lane // 4
                                        ]
                                    ),
                                    high * T.uint32(256) + low,
                                )
                for q in T.unroll(PAIR * NT * SETS * 4):
                    acc[q] = T.uint32(0)
                step = step + run
            if c + BUFFERS < count:
                T.cuda.cta_sync()
                fetch(c + BUFFERS, c % BUFFERS)
        T.cuda.cta_sync()

        @T.inline
        def store(token, row, added):
            T.cuda.func_call(
                "liftc_store_y",
                y.ptr_to([0]), T.Cast("int64", token) * OC + (row0 * 16 + row), kind,
                sums[token * SUMS + row], total[token], token_scale[token], row_scale[row],
                adds if added else 0, late[0] if added else T.uint32(0), late[1] if added else T.uint32(0),
                source_code=device.STORE_Y,
            )  # fmt: skip

        results: T.int32 = blocks * 16  # of a token
        for i in T.serial((m * results - tx + THREADS - 1) // THREADS, annotations=ROLLED):
            token: T.int32 = T.truncdiv(i * THREADS + tx, results)
            row: T.int32 = i * THREADS + tx - token * results
            if row0 * 16 + row < OC:
                if adds == 0:
                    store(token, row, False)
                else:
                    for q in T.unroll(2):
                        late[q] = T.uint32(0)
                    if adds % 2 > 0:
                        late[0] = T.cuda.func_call(
                            "liftc_addend", bias.ptr_to([0]), T.Cast("int64", row0 * 16 + row), kind,
                            source_code=device.ADDENDS, return_type="uint32",
                        )  # fmt: skip
                    if adds > 1:
                        late[1] = T.cuda.func_call(
                            "liftc_addend", residual.ptr_to([0]), T.Cast("int64", token) * OC + (row0 * 16 + row), kind,
                            source_code=device.ADDENDS, return_type="uint32",
                        )  # fmt: skip
                    store(token, row, True)

    if knobs.dependent_launch:
        function = function.with_attr("tirx.kernel_launch_params", ["tirx.use_programtic_dependent_launch"])
    return function
