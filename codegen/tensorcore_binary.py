# mypy: disable-error-code="misc, untyped-decorator, no-untyped-def, used-before-def"
# ruff: noqa: F823, F841, B007  (TIRx inline functions share the scope of their caller)
"""sign_matmul for 4, 8 and 16 tokens on the binary warp-group tensor instruction of sm_90a.

A tile of signs is an operand of `wgmma.m64nNk256` as it is: with and.popc, entry (row, n) of the product counts the
columns whose sign bit and whose bit in column n of the other operand are both set. That other operand is z cut into its
bits: the two signed bytes of codegen/tensorcore_sign.py make sixteen columns per token, whose counts are added up with
weights 1, 2, .. 64, -128 and 256 times these. No sign is decoded, and four warps multiply four tiles, 64 rows x 256
columns, with four tokens in one instruction. All int32 arithmetic is modulo 2^32 and the true value fits.

Blocks. `split` blocks of a cluster share consecutive row blocks of 16 rows; each takes its part of the columns, so
that every processor reads only its part of z, and in the end adds the sums of the others for its part of the rows.
The last four warps of a block prepare z, one block of 256 columns after the other: one warp has it copied, three turn
bytes into bits where they lie. The warps of the other groups take tiles of four row blocks one below the other, each
through a ring of its own. Row blocks past the last of a cluster are multiplied as garbage that nobody reads. Before
the dependent-launch wait a block reads signs and their scales only.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from liftc.codegen import tensorcore_device as device
from liftc.codegen import warpgroup_device as group_device
from liftc.codegen.knobs import BinaryKnobs

LOAD4 = "ld.shared.v4.u32"
TILE_WORDS = 128  # 16 rows x 256 columns
TILE_BYTES = 512


def sign_matmul_binary(symbol: str, knobs: BinaryKnobs) -> Any:
    """PrimFunc y = cast((float32(B z) * z_scale) * output_scale), bit-identical to liftc/reference.py.

    Arguments as sign_matmul_tiled of codegen/tensorcore_sign.py, but planes are int8 (KB, 16, 2 knobs.tokens, 16)
    (codegen/tensorcore_lift.py), and grid is a multiple of knobs.split with at least ceil(NB / knobs.block_rows)
    clusters.
    """
    GROUPS, RING, SPLIT = knobs.groups, knobs.ring, knobs.split
    COLS = 2 * knobs.tokens
    QUADS = knobs.tokens // 4  # of tokens: one instruction each
    CHUNK, BUFFERS = knobs.chunk_blocks, knobs.z_buffers
    ROWS = knobs.block_rows * 16
    SUMS = ROWS + 8  # keeps the four tokens of a lane quad in different banks
    WARPS = 4 * GROUPS
    THREADS = WARPS * 32 + 128
    CUTTERS = 96  # threads that turn bytes into bits
    SMEM = knobs.shared_bytes()
    BLOCK_BYTES = COLS * 256  # planes of 256 columns
    # No swizzle; matrices of 8 columns x 128 bits in 128 bytes. The next 128 bits of K lie COLS * 16 bytes on, the next
    # eight columns, the next bit of the same four tokens, COLS * 32 bytes on.
    LAYOUT = (COLS << 16) | (2 * COLS << 32)
    MULTIPLY = "wgmma.mma_async.sync.aligned.m64n64k256.s32.b1.b1.and.popc"

    def multiply(acc: Any, first: Any, operand: Any, z: Any, add: Any) -> Any:
        results = [acc[first + i] for i in range(32)]
        return T.ptx[MULTIPLY](*results, *(operand[q] for q in range(4)), z, add)

    @T.prim_func
    def function(
        tiles_arg: T.handle, planes_arg: T.handle, totals_arg: T.handle, z_scale_arg: T.handle, scale_arg: T.handle,
        y_arg: T.handle, grid: T.int32, kind: T.int32,
    ) -> None:  # fmt: skip
        T.func_attr({"tirx.noalias": True, "global_symbol": symbol})
        NB = T.int32()
        KB = T.int32()
        OC = T.int32()
        m = T.int32()
        P = T.int32()
        size = T.int32()
        tiles = T.match_buffer(tiles_arg, (NB, KB, 32, 4), "int32", align=16)
        planes = T.match_buffer(planes_arg, (KB, 16, COLS, 16), "int8", align=16)
        totals = T.match_buffer(totals_arg, (P, m), "int32", align=4)
        z_scale = T.match_buffer(z_scale_arg, (m, 1), "float32", align=4)
        scale = T.match_buffer(scale_arg, (OC,), "float32", align=4)
        y = T.match_buffer(y_arg, (size,), "uint8", align=4)
        T.device_entry()
        rank = T.cta_id_in_cluster([SPLIT])
        bx = T.cta_id([grid])
        tx = T.thread_id([THREADS])
        pool = T.SMEMPool()
        chunks = pool.alloc((BUFFERS * CHUNK * COLS * 64,), "uint32", align=128)
        ring = pool.alloc((WARPS * RING * TILE_WORDS,), "uint32", align=16)
        sums = pool.alloc((knobs.tokens * SUMS,), "int32", align=16)
        landed = pool.alloc((BUFFERS * CHUNK,), "uint64", align=16)
        full = pool.alloc((BUFFERS * CHUNK,), "uint64", align=16)
        empty = pool.alloc((BUFFERS,), "uint64", align=16)
        total = pool.alloc((knobs.tokens,), "int32", align=16)
        token_scale = pool.alloc((knobs.tokens,), "float32", align=16)
        row_scale = pool.alloc((ROWS,), "float32", align=16)
        pool.commit(SMEM)
        acc = T.alloc_local((QUADS * 32,), "uint32")
        w = T.alloc_local((4,), "uint32")
        a = T.alloc_local((4,), "uint32")

        lane: T.let[T.int32] = tx % 32
        warp: T.int32 = T.cuda.func_call(
            "liftc_uniform", tx // 32, source_code=group_device.UNIFORM, return_type="int32"
        )
        group: T.int32 = warp // 4
        part: T.int32 = warp % 4
        clusters: T.let[T.int32] = T.truncdiv(grid, SPLIT)
        cluster: T.let[T.int32] = T.truncdiv(bx, SPLIT)
        row0: T.int32 = T.truncdiv(cluster * NB, clusters)
        blocks: T.int32 = T.truncdiv((cluster + 1) * NB, clusters) - row0
        quads: T.int32 = (blocks + 3) // 4
        first: T.int32 = T.truncdiv(rank * KB, SPLIT)  # columns of this block, in blocks of 256
        width: T.int32 = T.truncdiv((rank + 1) * KB, SPLIT) - first
        count: T.int32 = (width + CHUNK - 1) // CHUNK
        chunk: T.int32 = T.max(
            T.truncdiv(width + count - 1, T.max(count, 1)), 1
        )  # equal chunks of at most CHUNK
        count = T.truncdiv(width + chunk - 1, chunk)
        base: T.let[T.int32] = ((row0 + part) * KB + first) * TILE_WORDS + lane * 4

        ring_at: T.uint32 = T.cuda.cvta_generic_to_shared(
            ring.ptr_to([T.min(warp, WARPS - 1) * (RING * TILE_WORDS) + lane * 4])
        )
        # In a cluster the upper bits of the address say which block's shared memory is meant.
        z_begin: T.uint32 = T.cuda.cvta_generic_to_shared(chunks.ptr_to([0])) & T.uint32(0x3FFFF)
        z_layout: T.uint64 = T.Cast("uint64", T.shift_right(z_begin, T.uint32(4))) | T.uint64(LAYOUT)

        below: T.int32 = 4 * KB  # tiles from a row block to the one four below
        # Prefetch cursor: steps left in this chunk, column block and quad of the next step, its word offset.
        p_start: T.int32 = 0
        p_len: T.int32 = T.min(chunk, width)
        p_quad: T.int32 = group * (quads * p_len) // GROUPS
        p_left: T.int32 = (group + 1) * (quads * p_len) // GROUPS - p_quad
        p_col: T.int32 = T.truncmod(p_quad, T.max(p_len, 1))
        p_quad = T.truncdiv(p_quad, T.max(p_len, 1))
        p_off: T.int32 = base + (p_quad * 4 * KB + p_col) * TILE_WORDS
        fill: T.int32 = 0
        slot: T.int32 = 0
        step: T.int32 = 0
        held: T.int32 = -1  # the quad whose sums the accumulators hold
        more: T.int32 = 0  # whether the next products add to them

        @T.inline
        def advance():
            if p_left == 0:
                while p_left == 0 and p_start + chunk < width:
                    p_start = p_start + chunk
                    p_len = T.min(chunk, width - p_start)
                    p_quad = group * (quads * p_len) // GROUPS
                    p_left = (group + 1) * (quads * p_len) // GROUPS - p_quad
                    p_col = T.truncmod(p_quad, p_len)
                    p_quad = T.truncdiv(p_quad, p_len)
                    p_off = base + (p_quad * 4 * KB + p_start + p_col) * TILE_WORDS

        @T.inline
        def issue():
            if p_left > 0:
                if p_quad * 4 + part < blocks:
                    T.ptx["cp.async.cg.shared.global"](
                        ring_at + T.Cast("uint32", fill), tiles.ptr_to([0, 0, 0, p_off]), 16
                    )
                p_off = p_off + TILE_WORDS
                p_left = p_left - 1
                p_col = p_col + 1
                if p_col == p_len:
                    p_col = 0
                    p_quad = p_quad + 1
                    p_off = p_off + (below - p_len) * TILE_WORDS
                advance()
            T.ptx["cp.async.commit_group"]()
            fill = T.Select(fill == (RING - 1) * TILE_BYTES, 0, fill + TILE_BYTES)

        @T.inline
        def flush():
            for n in T.unroll(QUADS):
                for r in T.unroll(2):  # rows lane // 4 and 8 more
                    high: T.uint32 = T.uint32(0) - acc[n * 32 + 28 + 2 * r]
                    low: T.uint32 = T.uint32(0) - acc[n * 32 + 29 + 2 * r]
                    for s in T.unroll(7):
                        high = high * T.uint32(2) + acc[n * 32 + (6 - s) * 4 + 2 * r]
                        low = low * T.uint32(2) + acc[n * 32 + (6 - s) * 4 + 2 * r + 1]
                    if n * 4 + lane % 4 < m and held * 4 + part < blocks:
                        T.ptx["red.shared.add.u32"](
                            sums.ptr_to(
                                [(n * 4 + lane % 4) * SUMS + (held * 4 + part) * 16 + r * 8 + lane // 4]
                            ),
                            high * T.uint32(256) + low,
                        )

        if knobs.dependent_launch:
            T.cuda.func_call("liftc_dependent_start", source_code=device.DEPENDENT_START)
        if warp < WARPS:
            advance()
            for i in T.serial(RING - 1):
                issue()
        for i in T.serial((knobs.tokens * SUMS + THREADS - 1) // THREADS):
            if i * THREADS + tx < knobs.tokens * SUMS:
                sums[i * THREADS + tx] = 0
        begin: T.int32 = T.truncdiv(rank * (blocks * 16), SPLIT)  # rows that this block finishes
        end: T.int32 = T.truncdiv((rank + 1) * (blocks * 16), SPLIT)
        for i in T.serial((end - begin - tx + THREADS - 1) // THREADS):
            if row0 * 16 + begin + i * THREADS + tx < OC:
                row_scale[i * THREADS + tx] = scale[row0 * 16 + begin + i * THREADS + tx]
        if tx < knobs.tokens:
            total[tx] = 0
        if tx == THREADS - 1:
            for i in T.serial(BUFFERS * CHUNK):
                T.cuda.func_call("liftc_barrier_init", landed.ptr_to([i]), 1, source_code=device.BARRIER_INIT)
                T.cuda.func_call(
                    "liftc_barrier_init", full.ptr_to([i]), 2 * COLS, source_code=device.BARRIER_INIT
                )
            for i in T.serial(BUFFERS):
                T.cuda.func_call(
                    "liftc_barrier_init", empty.ptr_to([i]), WARPS, source_code=device.BARRIER_INIT
                )
            T.cuda.func_call("liftc_fence_init", source_code=group_device.FENCE_INIT)
        T.cuda.cta_sync()
        if knobs.dependent_launch:
            T.cuda.func_call("liftc_dependent_wait", source_code=device.DEPENDENT_WAIT)

        if warp == WARPS:
            if lane == 0:
                for c in T.serial(count):
                    if c >= BUFFERS:
                        T.cuda.func_call(
                            "liftc_barrier_await",
                            empty.ptr_to([c % BUFFERS]),
                            (c // BUFFERS + 1) % 2,
                            source_code=group_device.BARRIER_AWAIT,
                        )
                    for i in T.serial(T.min(chunk, width - c * chunk)):
                        at: T.int32 = c % BUFFERS * CHUNK + i
                        T.cuda.func_call(
                            "liftc_barrier_expect",
                            landed.ptr_to([at]),
                            BLOCK_BYTES,
                            source_code=group_device.BARRIER_EXPECT,
                        )
                        T.cuda.func_call(
                            "liftc_bulk_copy",
                            chunks.ptr_to([at * (COLS * 64)]),
                            planes.ptr_to([first + c * chunk + i, 0, 0, 0]),
                            BLOCK_BYTES,
                            landed.ptr_to([at]),
                            source_code=group_device.BULK_COPY,
                        )
        elif warp > WARPS:
            for c in T.serial(count):
                # One thread for 256 columns of one byte of one token, halved: eight vectors of each.
                tasks: T.int32 = T.min(chunk, width - c * chunk) * (2 * COLS)
                for i in T.serial((tasks - (tx - WARPS * 32 - 32) + CUTTERS - 1) // CUTTERS):
                    task: T.int32 = i * CUTTERS + tx - WARPS * 32 - 32
                    place: T.int32 = c % BUFFERS * CHUNK + task // (2 * COLS)
                    offset: T.int32 = place * (COLS * 64) + task % (2 * COLS) * 4
                    T.cuda.func_call(
                        "liftc_barrier_await",
                        landed.ptr_to([place]),
                        c // BUFFERS % 2,
                        source_code=group_device.BARRIER_AWAIT,
                    )
                    T.cuda.func_call(
                        "liftc_bits_of_bytes",
                        chunks.ptr_to([offset]),
                        2 * COLS,
                        source_code=group_device.BITS_OF_BYTES,
                    )
                    T.cuda.func_call("liftc_fence_shared", source_code=group_device.FENCE_SHARED)
                    T.cuda.func_call(
                        "liftc_barrier_signal",
                        full.ptr_to([place]),
                        source_code=group_device.BARRIER_SIGNAL,
                    )
        else:
            for i in T.serial((m - warp + WARPS - 1) // WARPS):  # sums of z and scales, while z is on its way
                token: T.int32 = i * WARPS + warp
                piece: T.int32 = 0
                for q in T.serial((P - lane + 31) // 32):
                    piece = piece + T.cuda.func_call(
                        "liftc_load_word", totals.ptr_to([q * 32 + lane, token]),
                        source_code=device.LOAD_WORD, return_type="int32",
                    )  # fmt: skip
                T.cuda.func_call(
                    "liftc_warp_add", total.ptr_to([token]), piece, lane, source_code=device.WARP_ADD
                )
                if lane == 0:
                    token_scale[token] = T.reinterpret(
                        "float32",
                        T.cuda.func_call(
                            "liftc_load_word", z_scale.ptr_to([token, 0]),
                            source_code=device.LOAD_WORD, return_type="int32",
                        ),
                    )  # fmt: skip
            for c in T.serial(count):
                length: T.int32 = T.min(chunk, width - c * chunk)
                step = group * (quads * length) // GROUPS
                stop: T.int32 = (group + 1) * (quads * length) // GROUPS
                while step < stop:
                    quad: T.int32 = T.truncdiv(step, length)
                    col: T.int32 = step - quad * length
                    run: T.int32 = T.min(length - col, stop - step)
                    if quad != held:
                        if held >= 0:
                            flush()
                        held = quad
                        more = 0
                    for i in T.serial(run):
                        here: T.int32 = c % BUFFERS * CHUNK + col + i
                        T.cuda.func_call(
                            "liftc_barrier_await",
                            full.ptr_to([here]),
                            c // BUFFERS % 2,
                            source_code=group_device.BARRIER_AWAIT,
                        )
                        T.ptx["cp.async.wait_group"](RING - 2)
                        T.ptx[LOAD4](w[0], w[1], w[2], w[3], ring_at + T.Cast("uint32", slot))
                        slot = T.Select(slot == (RING - 1) * TILE_BYTES, 0, slot + TILE_BYTES)
                        issue()
                        z_at: T.uint64 = z_layout + T.Cast("uint64", here * (BLOCK_BYTES // 16))
                        T.ptx["wgmma.wait_group.sync.aligned"](0)
                        for q in T.unroll(4):  # volatile, so that operands are complete at the fence
                            T.ptx["or.b32"](a[q], w[q], T.uint32(0))
                        T.ptx["wgmma.fence.sync.aligned"]()
                        for n in T.unroll(QUADS):
                            multiply(acc, n * 32, a, z_at + T.Cast("uint64", n * 8), more > 0)
                        T.ptx["wgmma.commit_group.sync.aligned"]()
                        more = 1
                    T.ptx["wgmma.wait_group.sync.aligned"](0)
                    step = step + run
                if lane == 0:
                    T.cuda.func_call(
                        "liftc_barrier_signal",
                        empty.ptr_to([c % BUFFERS]),
                        source_code=group_device.BARRIER_SIGNAL,
                    )
            if held >= 0:
                flush()
        if SPLIT > 1:
            T.cuda.func_call("liftc_cluster_sync", source_code=group_device.CLUSTER_SYNC)
        else:
            T.cuda.cta_sync()
        for token2 in T.serial(m):
            for i in T.serial((end - begin - tx + THREADS - 1) // THREADS):
                row: T.int32 = begin + i * THREADS + tx
                if row0 * 16 + row < OC:
                    value: T.int32 = sums[token2 * SUMS + row]
                    for other in T.unroll(SPLIT - 1):
                        value = value + T.cuda.func_call(
                            "liftc_load_peer", sums.ptr_to([token2 * SUMS + row]), (rank + 1 + other) % SPLIT,
                            source_code=group_device.LOAD_PEER, return_type="int32",
                        )  # fmt: skip
                    T.cuda.func_call(
                        "liftc_store_y",
                        y.ptr_to([0]), T.Cast("int64", token2) * OC + (row0 * 16 + row), kind, value,
                        total[token2], token_scale[token2], row_scale[row - begin],
                        source_code=device.STORE_Y,
                    )  # fmt: skip
        if SPLIT > 1:
            # Nobody leaves while its sums are read.
            T.cuda.func_call("liftc_cluster_sync", source_code=group_device.CLUSTER_SYNC)

    if knobs.dependent_launch:
        function = function.with_attr("tirx.kernel_launch_params", ["tirx.use_programtic_dependent_launch"])
    return function
