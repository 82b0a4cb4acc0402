# mypy: disable-error-code="misc, untyped-decorator, no-untyped-def, used-before-def"
# ruff: noqa: F823, F841, B007  (TIRx inline functions share the scope of their caller)
"""sign_matmul on binary tensor cores for a few tokens: the TIRx template behind `sign_matmul_popcount`.

Arithmetic. Each byte of z = 256 h + l (tensorcore_sign.py) is cut into eight bits; with .and.popc, `mma.m16n8k256`
counts for 16 rows of signs in how many of 256 columns sign and bit are both set, for eight bit positions at once. A
tile of signs is the operand as it lies in memory: no masks, two instructions per tile and token where the integer form
has eight and 32 masks. Counts are exact in int32; once per run of tiles they are added up with the weights of their
bits, 1, 2, .., 64 and -128 for l, 256 times that for h. The signs' sum is 2 p - sum z, p the sum of z over set bits,
modulo 2^32 as in the other forms, so results do not depend on tiles, warps or blocks.

Bits. Planes of z come as bytes. A block reads them from L2 once per chunk of columns, turns eight words of four bytes
into eight words of bits in registers, and keeps the words in shared memory as operands.

Blocks. As in the integer form a block owns consecutive row blocks of 16 rows and all columns, warps share its tiles
evenly, and each streams its tiles through a ring of its own. A lane reads back only what it has copied itself, so a
slot is filled again as soon as it has been read, and no warp waits for another. Only a part of the ring is asked for
before z has come, one tile after the other: a warp that still waits for its tiles would be late for z. The rest is
asked for when z has been turned into bits.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from liftc.codegen import popcount_device
from liftc.codegen import tensorcore_device as device
from liftc.codegen.knobs import PopcountKnobs

COUNT = "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"
LOAD4 = "ld.shared.v4.u32"
TILE_WORDS = 128  # 16 rows x 256 columns
TILE_BYTES = 512
ROLLED = {"disable_unroll": True}


def sign_matmul_popcount(symbol: str, knobs: PopcountKnobs) -> Any:
    """PrimFunc with the arguments and the results of tensorcore_sign.sign_matmul_tiled."""
    WARPS, RING, TOKENS = knobs.warps, knobs.ring, knobs.tokens
    COLS = 2 * TOKENS
    CHUNK = knobs.chunk_blocks
    ROWS = knobs.block_rows * 16
    SUMS = ROWS + 8
    THREADS = WARPS * 32
    MINE = -(-ROWS // THREADS)  # rows of a thread
    SMEM = knobs.shared_bytes()
    EARLY = min(knobs.early_tiles, RING) or RING
    FIRST = min(knobs.first_tiles, EARLY) or EARLY
    if THREADS % (8 * TOKENS):
        raise ValueError(f"{WARPS} warps cannot share z of {TOKENS} tokens")

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
        T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", 1)  # else nvcc saves registers for two, and spills
        pool = T.SMEMPool()
        bits = pool.alloc((CHUNK * TOKENS * TILE_WORDS,), "uint32", align=16)
        ring = pool.alloc((WARPS * RING * TILE_WORDS,), "uint32", align=16)
        sums = pool.alloc((TOKENS * SUMS,), "int32", align=16)
        begin = pool.alloc((WARPS * 4,), "int32", align=16)
        total = pool.alloc((TOKENS,), "int32", align=16)
        token_scale = pool.alloc((TOKENS,), "float32", align=16)
        pool.commit(SMEM)
        acc = T.alloc_local((TOKENS * 8,), "uint32")
        w = T.alloc_local((4,), "uint32")
        b = T.alloc_local((4,), "uint32")
        raw = T.alloc_local((16,), "uint32")
        row_scale = T.alloc_local((MINE,), "float32")
        parts = T.alloc_local((4,), "int32")
        late = T.alloc_local((MINE * (TOKENS + 1),), "uint32")

        lane: T.let[T.int32] = tx % 32
        warp: T.let[T.int32] = tx // 32
        row0: T.int32 = T.truncdiv(bx * NB, grid)
        blocks: T.int32 = T.truncdiv((bx + 1) * NB, grid) - row0
        count: T.int32 = (KB + CHUNK - 1) // CHUNK
        chunk: T.int32 = KB
        if count > 1:  # equal chunks of at most CHUNK
            chunk = T.truncdiv(KB + count - 1, count)
            count = T.truncdiv(KB + chunk - 1, chunk)
        base: T.let[T.int32] = row0 * KB * TILE_WORDS + lane * 4

        # Shared-memory addresses live in registers; a generic pointer would be converted at every use.
        ring_at: T.uint32 = T.cuda.cvta_generic_to_shared(
            ring.ptr_to([warp * (RING * TILE_WORDS) + lane * 4])
        )
        bits_at: T.uint32 = T.cuda.cvta_generic_to_shared(bits.ptr_to([lane * 4]))

        # A warp's share of a chunk: its next run of tiles in one row block, and the tiles of the share behind it.
        row: T.int32 = 0
        col: T.int32 = 0
        run: T.int32 = 0
        rest: T.int32 = 0

        @T.inline
        def share(length):
            rest = warp * (blocks * length) // WARPS
            row = warp * blocks // WARPS  # as rest // length, without a division by a variable
            col = rest - row * length
            rest = (warp + 1) * (blocks * length) // WARPS - rest
            run = T.min(length - col, rest)
            rest = rest - run

        # Prefetch cursor: where the next tile is, tiles to the end of its row or share, and tiles of the share behind.
        p_start: T.int32 = chunk
        p_len: T.int32 = chunk
        share(chunk)
        p_off: T.int32 = base + (row * KB + col) * TILE_WORDS
        p_run: T.int32 = run
        p_left: T.int32 = rest
        slot: T.int32 = 0
        step: T.int32 = 0
        if lane == 0:  # kept for the time when z is there
            begin[warp * 4] = row
            begin[warp * 4 + 1] = col
            begin[warp * 4 + 2] = run
            begin[warp * 4 + 3] = rest

        @T.inline
        def seek():  # the first tile of the warp's share of the next chunk that has one
            while p_run == 0 and p_start < KB:
                p_len = T.min(chunk, KB - p_start)
                p_first: T.int32 = warp * (blocks * p_len) // WARPS
                p_left = (warp + 1) * (blocks * p_len) // WARPS - p_first
                p_row: T.int32 = warp * blocks // WARPS
                p_first = p_first - p_row * p_len
                p_off = base + (p_row * KB + p_start + p_first) * TILE_WORDS
                p_run = T.min(p_len - p_first, p_left)
                p_left = p_left - p_run
                p_start = p_start + chunk

        @T.inline
        def issue():
            if p_run > 0:
                T.ptx["cp.async.cg.shared.global"](
                    ring_at + T.Cast("uint32", slot), tiles.ptr_to([0, 0, 0, p_off]), 16
                )
                p_off = p_off + TILE_WORDS
                p_run = p_run - 1
                if p_run == 0:
                    p_off = p_off + (KB - p_len) * TILE_WORDS
                    p_run = T.min(p_len, p_left)
                    p_left = p_left - p_run
                    seek()
            T.ptx["cp.async.commit_group"]()
            slot = T.Select(slot == (RING - 1) * TILE_BYTES, 0, slot + TILE_BYTES)

        if knobs.dependent_launch:
            T.cuda.func_call("liftc_dependent_start", source_code=device.DEPENDENT_START)
        seek()
        for i in T.serial(EARLY, annotations=ROLLED):
            if FIRST < EARLY:
                if i >= FIRST:
                    T.ptx["cp.async.wait_group"](FIRST - 1)
            issue()
        for i in T.unroll(MINE):
            row_scale[i] = T.float32(0)
            if row0 * 16 + i * THREADS + tx < OC:
                row_scale[i] = scale[row0 * 16 + i * THREADS + tx]
                if adds % 2 > 0:
                    T.cuda.func_call(
                        "liftc_touch", bias.ptr_to([0]), T.Cast("int64", row0 * 16 + i * THREADS + tx), kind,
                        source_code=device.TOUCH,
                    )  # fmt: skip
        for i in T.serial((TOKENS * SUMS - tx + THREADS - 1) // THREADS, annotations=ROLLED):
            sums[i * THREADS + tx] = 0

        task: T.int32 = tx
        z_from: T.uint64 = T.uint64(0)

        @T.inline
        def convert(length):  # z of these blocks of columns, as bits
            task = tx
            while task < length * (8 * TOKENS):
                if task // 8 % TOKENS < m:
                    T.cuda.func_call(
                        "liftc_load_bytes", z_from, COLS * 64, raw.ptr_to([0]),
                        source_code=popcount_device.LOAD_BYTES,
                    )  # fmt: skip
                    T.cuda.func_call(
                        "liftc_store_bits",
                        raw.ptr_to([0]),
                        bits.ptr_to([task // 8 * TILE_WORDS + task % 4 * 4 + task // 4 % 2 * 2]),
                        source_code=popcount_device.STORE_BITS,
                    )
                task = task + THREADS
                z_from = z_from + T.uint64(THREADS // (8 * TOKENS) * COLS * 256)

        @T.inline
        def address_of(first):  # of the bytes of z that a thread converts first
            z_from = T.cuda.func_call(
                "liftc_address", planes.ptr_to([first + tx // (8 * TOKENS), 0, tx // 4 % COLS, tx % 4 * 16]),
                source_code=popcount_device.ADDRESS, return_type="uint64",
            )  # fmt: skip

        address_of(0)
        if knobs.dependent_launch:
            T.cuda.func_call("liftc_dependent_wait", source_code=device.DEPENDENT_WAIT)

        # The last warps, which have less to convert, add up the sums of z; their loads go first.
        which: T.let[T.int32] = WARPS - 1 - warp
        if which < m:
            for q in T.unroll(4):
                parts[q] = 0
                if q * 32 + lane < P:
                    parts[q] = T.cuda.func_call(
                        "liftc_load_word", totals.ptr_to([q * 32 + lane, which]),
                        source_code=device.LOAD_WORD, return_type="int32",
                    )  # fmt: skip
            step = T.cuda.func_call(  # the scale of z waits here until the first chunk
                "liftc_load_word",
                z_scale.ptr_to([which, 0]),
                source_code=device.LOAD_WORD,
                return_type="int32",
            )
        convert(chunk)
        for i in T.serial(RING - EARLY, annotations=ROLLED):
            issue()
        if which < m:
            part: T.int32 = parts[0] + parts[1] + parts[2] + parts[3]
            for q in T.serial((P - lane + 31) // 32 - 4, annotations=ROLLED):
                part = part + T.cuda.func_call(
                    "liftc_load_word", totals.ptr_to([(q + 4) * 32 + lane, which]),
                    source_code=device.LOAD_WORD, return_type="int32",
                )  # fmt: skip
            part = T.cuda.func_call(
                "liftc_lanes_add", part, source_code=popcount_device.LANES_ADD, return_type="int32"
            )
            if lane == 0:
                total[which] = part
                token_scale[which] = T.reinterpret("float32", step)
        T.cuda.cta_sync()
        for q in T.unroll(TOKENS * 8):
            acc[q] = T.uint32(0)
        row = begin[warp * 4]
        col = begin[warp * 4 + 1]
        run = begin[warp * 4 + 2]
        rest = begin[warp * 4 + 3]
        for c in T.serial(count, annotations=ROLLED):
            length: T.int32 = T.min(chunk, KB - c * chunk)
            while run > 0:
                z_at: T.uint32 = bits_at + T.Cast("uint32", col * (TOKENS * TILE_BYTES))
                for i in T.serial(run, annotations=ROLLED):
                    T.ptx["cp.async.wait_group"](RING - 1)
                    T.ptx[LOAD4](w[0], w[1], w[2], w[3], ring_at + T.Cast("uint32", slot))
                    for t in T.unroll(TOKENS):
                        T.ptx[LOAD4](b[0], b[1], b[2], b[3], z_at + T.uint32(t * TILE_BYTES))
                        for g in T.unroll(2):
                            a: T.let[T.int32] = t * 8 + g * 4
                            T.ptx[COUNT](
                                acc[a], acc[a + 1], acc[a + 2], acc[a + 3],
                                w[0], w[1], w[2], w[3], b[2 * g], b[2 * g + 1],
                                acc[a], acc[a + 1], acc[a + 2], acc[a + 3],
                            )  # fmt: skip
                    issue()
                    z_at = z_at + T.uint32(TOKENS * TILE_BYTES)
                for t in T.unroll(TOKENS):
                    for r in T.unroll(2):  # rows lane // 4 and 8 more
                        weighed: T.int32 = T.cuda.func_call(
                            "liftc_weigh_bits",
                            acc[t * 8 + 4 + 2 * r], acc[t * 8 + 5 + 2 * r], acc[t * 8 + 2 * r], acc[t * 8 + 2 * r + 1],
                            lane, source_code=popcount_device.WEIGH_BITS, return_type="int32",
                        )  # fmt: skip
                        if t < m:
                            T.ptx["red.shared.add.u32"](
                                sums.ptr_to([t * SUMS + row * 16 + r * 8 + lane // 4]),
                                T.reinterpret("uint32", weighed),
                            )
                for q in T.unroll(TOKENS * 8):
                    acc[q] = T.uint32(0)
                row = row + 1
                col = 0
                run = T.min(length, rest)
                rest = rest - run
            if c + 1 < count:
                T.cuda.cta_sync()
                task = tx
                address_of((c + 1) * chunk)
                convert(T.min(chunk, KB - (c + 1) * chunk))
                share(T.min(chunk, KB - (c + 1) * chunk))
                T.cuda.cta_sync()

        @T.inline
        def bring():  # what is added arrives while other warps finish
            for i in T.unroll(MINE * (TOKENS + 1)):
                late[i] = T.uint32(0)
            for i in T.unroll(MINE):
                added_to: T.let[T.int32] = i * THREADS + tx
                if added_to < blocks * 16 and row0 * 16 + added_to < OC:
                    if adds % 2 > 0:
                        late[i] = T.cuda.func_call(
                            "liftc_addend", bias.ptr_to([0]), T.Cast("int64", row0 * 16 + added_to), kind,
                            source_code=device.ADDENDS, return_type="uint32",
                        )  # fmt: skip
                    if adds > 1:
                        for token in T.unroll(TOKENS):
                            if token < m:
                                late[MINE + token * MINE + i] = T.cuda.func_call(
                                    "liftc_addend", residual.ptr_to([0]),
                                    T.Cast("int64", token) * OC + (row0 * 16 + added_to), kind,
                                    source_code=device.ADDENDS, return_type="uint32",
                                )  # fmt: skip

        @T.inline
        def finish(added):
            if added:
                bring()
            T.cuda.cta_sync()
            for i in T.unroll(MINE):
                row_of: T.let[T.int32] = i * THREADS + tx
                if row_of < blocks * 16 and row0 * 16 + row_of < OC:
                    for token in T.unroll(TOKENS):
                        if token < m:
                            T.cuda.func_call(
                                "liftc_store_y",
                                y.ptr_to([0]), T.Cast("int64", token) * OC + (row0 * 16 + row_of), kind,
                                sums[token * SUMS + row_of], total[token], token_scale[token], row_scale[i],
                                adds if added else 0, late[i] if added else T.uint32(0),
                                late[MINE + token * MINE + i] if added else T.uint32(0),
                                source_code=device.STORE_Y,
                            )  # fmt: skip

        # Code that is not executed is fetched all the same where it lies between what is.
        if adds == 0:
            finish(False)
        else:
            finish(True)

    if knobs.dependent_launch:
        function = function.with_attr("tirx.kernel_launch_params", ["tirx.use_programtic_dependent_launch"])
    return function
