# mypy: disable-error-code="misc, untyped-decorator, no-untyped-def, used-before-def"
# ruff: noqa: F823, F841, B007  (TIRx inline functions share the scope of their caller)
"""sign_matmul for 2 to 16 tokens on the binary warp-group tensor instruction of sm_90a.

A tile of signs is an operand of `wgmma.m64nNk256` as it is: with and.popc, entry (row, n) of the product counts the
columns whose sign bit and whose bit in column n of the other operand are both set. That other operand is z cut into its
bits: the two signed bytes of codegen/tensorcore_sign.py make sixteen columns per token, whose counts are added up with
weights 1, 2, .. 64, -128 and 256 times these. No sign is decoded, and four warps multiply four tiles, 64 rows x 256
columns, with four tokens in one instruction. All int32 arithmetic is modulo 2^32 and the true value fits.

Blocks. `split` blocks of a cluster share consecutive row blocks of 16 rows; each takes its part of the columns, so
that every processor reads only its part of z, and in the end adds its sums of the rows that another block finishes to
that block's.

Warps. The copy engine brings everything into shared memory. `lanes` warp groups side by side take the same tiles, each
for its part of the tokens; a team of them takes tiles of four row blocks one below the other from a ring of its own,
which one warp fills, several columns at a time. Another warp has z copied, one block of 256 columns after the other,
and adds up its sums; the remaining `cutters` turn its bytes into bits where they lie. Row blocks past the last of a
cluster are multiplied as garbage that nobody reads, columns past the last with bits of zero. Until z has come, one
stage of each ring is on its way at a time, then some stages more into L2, so that the lift's loads wait for few others.

Before z has come a block reads signs and their scales only: warps that touch z wait for the kernels before, and the
others wait for them.

A register operand is loaded only when the product that read it before is complete: it is read while it is in flight.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from liftc.codegen import tensorcore_device as device
from liftc.codegen import warpgroup_calls as call
from liftc.codegen import warpgroup_device as group_device
from liftc.codegen.knobs import BinaryKnobs

LOAD4 = "ld.shared.v4.u32"
TILE_WORDS = 128  # 16 rows x 256 columns
TILE_BYTES = 512
LATE = 2
"""Fours of results with additions that a thread has on their way at a time."""


def sign_matmul_binary(symbol: str, knobs: BinaryKnobs) -> Any:
    """PrimFunc with the results of tensorcore_sign.sign_matmul_tiled.

    Arguments as there, but planes are int8 (KB, 16, 2 knobs.tokens, 16) (codegen/tensorcore_lift.py), and grid is a
    multiple of knobs.split with at least ceil(NB / knobs.block_rows) clusters.
    """
    TEAMS, LANES, RING, DEPTH, SPLIT = knobs.teams, knobs.lanes, knobs.ring, knobs.stage_blocks, knobs.split
    COLS = 2 * knobs.tokens
    FOURS = knobs.tokens // 4 // LANES  # of tokens of a warp group: one instruction each
    WINDOW = knobs.z_stages
    TOKENS = knobs.tokens
    SHARE = 32 // TOKENS  # parts of a sum of z that a warp loads at a time
    ROWS = -(-knobs.block_rows // 4) * 64
    SUMS = ROWS + 8  # keeps the four tokens of a lane quad in different banks
    WARPS = 4 * TEAMS * LANES
    COPIER = WARPS + TEAMS  # the warps between fill a ring each
    CUTTER = COPIER + 1
    THREADS = knobs.threads()
    SMEM = knobs.shared_bytes()
    STAGE_WORDS = DEPTH * 4 * TILE_WORDS  # four row blocks, DEPTH tiles each
    BLOCK_BYTES = COLS * 256  # planes of 256 columns
    STORERS = WARPS * 32 // knobs.tokens  # threads that store the results of a token
    AT_ONCE = min(knobs.first_stages, RING) if knobs.first_stages else RING
    PIECES = -(-DEPTH * 2 * COLS // 32)  # of a stage of z: what a warp cuts at a time
    # No swizzle; matrices of 8 columns x 128 bits in 128 bytes. The next 128 bits of K lie COLS * 16 bytes on, the next
    # eight columns, the next bit of the same four tokens, COLS * 32 bytes on.
    LAYOUT = (COLS << 16) | (2 * COLS << 32)
    MULTIPLY = "wgmma.mma_async.sync.aligned.m64n64k256.s32.b1.b1.and.popc"

    def multiply(acc: Any, first: Any, operand: Any, at: Any, z: Any, add: Any) -> Any:
        results = [acc[first + i] for i in range(32)]
        return T.ptx[MULTIPLY](*results, *(operand[at + q] for q in range(4)), z, add)

    def load(operand: Any, at: Any, source: Any) -> Any:
        return T.ptx[LOAD4](*(operand[at + q] for q in range(4)), source)

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
        planes = T.match_buffer(planes_arg, (KB, 16, COLS, 16), "int8", align=16)
        totals = T.match_buffer(totals_arg, (P, m), "int32", align=4)
        z_scale = T.match_buffer(z_scale_arg, (m, 1), "float32", align=4)
        scale = T.match_buffer(scale_arg, (OC,), "float32", align=4)
        bias = T.match_buffer(bias_arg, (bias_size,), "uint8", align=4)
        residual = T.match_buffer(residual_arg, (size,), "uint8", align=4)
        y = T.match_buffer(y_arg, (size,), "uint8", align=4)
        T.device_entry()
        rank = T.cta_id_in_cluster([SPLIT])
        bx = T.cta_id([grid])
        tx = T.thread_id([THREADS])
        if knobs.multiply_registers > 0:
            call.launch_registers(knobs.launch_registers())
        pool = T.SMEMPool()
        bits = pool.alloc((WINDOW * DEPTH * COLS * 64,), "uint32", align=128)
        ring = pool.alloc((TEAMS * RING * STAGE_WORDS,), "uint32", align=16)
        sums = pool.alloc((knobs.tokens * SUMS,), "int32", align=16)
        landed = pool.alloc((WINDOW,), "uint64", align=16)  # bytes of z are there
        full = pool.alloc((WINDOW,), "uint64", align=16)  # as bits
        empty = pool.alloc((WINDOW,), "uint64", align=16)  # and no longer needed
        filled = pool.alloc((TEAMS * RING,), "uint64", align=16)
        free = pool.alloc((TEAMS * RING,), "uint64", align=16)
        total = pool.alloc((knobs.tokens,), "int32", align=16)
        token_scale = pool.alloc((knobs.tokens,), "float32", align=16)
        row_scale = pool.alloc((ROWS // SPLIT + 16,), "float32", align=16)
        asked = pool.alloc((TEAMS,), "uint64", align=16)  # the last 16 bytes of stages asked into L2 are here
        ready = pool.alloc((1,), "uint64", align=16)  # what the other blocks of the cluster add to the sums
        last_bytes = pool.alloc((TEAMS * 16,), "uint32", align=16)
        pool.commit(SMEM)
        acc = T.alloc_local((FOURS * 32,), "uint32")
        a = T.alloc_local((DEPTH * 4,), "uint32")
        found = T.alloc_local((16,), "int32")
        late = T.alloc_local((LATE * 8,), "uint32")  # biases, residuals

        lane: T.let[T.int32] = tx % 32
        warp: T.int32 = T.cuda.func_call(
            "liftc_uniform", tx // 32, source_code=group_device.UNIFORM, return_type="int32"
        )
        clusters: T.let[T.int32] = T.truncdiv(grid, SPLIT)
        cluster: T.let[T.int32] = T.truncdiv(bx, SPLIT)
        row0: T.int32 = T.truncdiv(cluster * NB, clusters)
        blocks: T.int32 = T.truncdiv((cluster + 1) * NB, clusters) - row0
        quads: T.int32 = (blocks + 3) // 4
        first: T.int32 = T.truncdiv(rank * KB, SPLIT)  # columns of this block, in blocks of 256
        width: T.int32 = T.truncdiv((rank + 1) * KB, SPLIT) - first
        stages: T.int32 = (width + DEPTH - 1) // DEPTH  # of DEPTH blocks of columns, the last one shorter
        chunks: T.int32 = (stages + WINDOW - 1) // WINDOW
        chunk: T.int32 = stages  # stages that all rows take in turn
        if chunks > 1:
            chunk = (stages + chunks - 1) // chunks
        # A team's cursor: of every chunk, by row blocks of four and then by columns, it takes one run of stages.
        team: T.int32 = T.if_then_else(warp < WARPS, warp // (4 * LANES), warp - WARPS)
        begun: T.int32 = 0  # stages of the chunks begun
        length: T.int32 = 0  # of this chunk
        step: T.int32 = 0
        stop: T.int32 = 0
        quad: T.int32 = 0
        col: T.int32 = 0
        slot: T.int32 = 0
        turn: T.int32 = 0  # how often the ring has come round
        ask_begun: T.int32 = 0  # a second cursor
        ask_length: T.int32 = 0
        ask_step: T.int32 = 0
        ask_stop: T.int32 = 0
        ask_quad: T.int32 = 0
        ask_col: T.int32 = 0
        ahead: T.int32 = 0  # stages asked for

        @T.inline
        def next_chunk():
            length = T.min(chunk, stages - begun)
            begun = begun + length
            step = team * (quads * length) // TEAMS
            stop = (team + 1) * (quads * length) // TEAMS
            quad = team * quads // TEAMS  # as step // length, without a division by a variable
            col = step - quad * length

        @T.inline
        def advance():
            step = step + 1
            col = col + 1
            if col == length:
                col = 0
                quad = quad + 1

        @T.inline
        def next_stage():
            advance()
            slot = slot + 1
            if slot == RING:
                slot = 0
                turn = turn + 1

        @T.inline
        def fill():  # one stage: every lane below four has the tiles of its row block copied
            column: T.int32 = (begun - length + col) * DEPTH
            many: T.int32 = T.min(DEPTH, width - column)
            if lane == 0:
                call.barrier_expect(
                    filled.ptr_to([team * RING + slot]), many * T.min(4, blocks - quad * 4) * TILE_BYTES
                )
            if lane < 4 and quad * 4 + lane < blocks:
                call.bulk_copy(
                    ring.ptr_to([(team * RING + slot) * STAGE_WORDS + lane * (DEPTH * TILE_WORDS)]),
                    tiles.ptr_to([row0 + quad * 4 + lane, first + column, 0, 0]),
                    many * TILE_BYTES,
                    filled.ptr_to([team * RING + slot]),
                )
            next_stage()

        @T.inline
        def copy_z(stage):  # every lane below the number of its blocks copies one
            many: T.int32 = T.min(DEPTH, width - stage * DEPTH)
            if lane == 0:
                call.barrier_expect(landed.ptr_to([stage % WINDOW]), many * BLOCK_BYTES)
            if lane < many:
                call.bulk_copy(
                    bits.ptr_to([(stage % WINDOW * DEPTH + lane) * (COLS * 64)]),
                    planes.ptr_to([first + stage * DEPTH + lane, 0, 0, 0]),
                    BLOCK_BYTES,
                    landed.ptr_to([stage % WINDOW]),
                )

        @T.inline
        def sum_z():  # what the lift has left to add up of the sums of z, and its scales
            token_of: T.int32 = lane % TOKENS
            if lane < TOKENS:
                total[lane] = 0
                if lane < m:
                    token_scale[lane] = T.reinterpret("float32", call.load_word(z_scale.ptr_to([lane, 0])))
            T.cuda.warp_sync()
            piece: T.int32 = 0
            for i in T.serial((P + 8 * SHARE - 1) // (8 * SHARE)):
                for j in T.unroll(8):
                    found[j] = call.load_word(
                        totals.ptr_to(
                            [T.min((i * 8 + j) * SHARE + lane // TOKENS, P - 1), T.min(token_of, m - 1)]
                        )
                    )
                for j in T.unroll(8):
                    piece = piece + T.Select((i * 8 + j) * SHARE + lane // TOKENS < P, found[j], 0)
            T.ptx["red.shared.add.u32"](total.ptr_to([token_of]), T.Cast("uint32", piece))
            call.group_arrive(2, WARPS * 32 + 32)

        @T.inline
        def change():  # of the ring's cursor for the one that asks stages into L2
            begun2: T.int32 = begun
            length2: T.int32 = length
            step2: T.int32 = step
            stop2: T.int32 = stop
            quad2: T.int32 = quad
            col2: T.int32 = col
            begun = ask_begun
            length = ask_length
            step = ask_step
            stop = ask_stop
            quad = ask_quad
            col = ask_col
            ask_begun = begun2
            ask_length = length2
            ask_step = step2
            ask_stop = stop2
            ask_quad = quad2
            ask_col = col2

        @T.inline
        def ask(await_it):  # a stage into L2, and see it arrive
            change()
            if step == stop:
                next_chunk()
            else:
                column2: T.int32 = (begun - length + col) * DEPTH
                wide: T.int32 = T.min(DEPTH, width - column2)
                if await_it:
                    if lane == 0:
                        call.barrier_expect(asked.ptr_to([team]), T.min(4, blocks - quad * 4) * 16)
                if lane < 4 and quad * 4 + lane < blocks:
                    T.cuda.func_call(
                        "liftc_prefetch",
                        tiles.ptr_to([row0 + quad * 4 + lane, first + column2, 0, 0]),
                        wide * TILE_BYTES, 0, source_code=device.PREFETCH,
                    )  # fmt: skip
                    if await_it:
                        call.bulk_copy(
                            last_bytes.ptr_to([(team * 4 + lane) * 4]),
                            tiles.ptr_to([row0 + quad * 4 + lane, first + column2 + wide - 1, 31, 0]),
                            16,
                            asked.ptr_to([team]),
                        )
                if await_it:
                    call.barrier_await(asked.ptr_to([team]), ahead % 2)
                    ahead = ahead + 1
                advance()
            change()

        @T.inline
        def fill_rings():
            # Until z is there, one stage is on its way at a time: loads of the lift wait behind no others.
            while turn == 0 and (step < stop or begun < stages):
                if step == stop:
                    next_chunk()
                else:
                    if slot >= AT_ONCE:
                        call.barrier_await(filled.ptr_to([team * RING + slot - AT_ONCE]), 0)
                    fill()
            if knobs.prefetch > 0:
                ask_begun = begun
                ask_length = length
                ask_step = step
                ask_stop = stop
                ask_quad = quad
                ask_col = col
                going: T.int32 = turn
                while going > 0:
                    ask(True)
                    going = T.Select(
                        T.And(ahead < knobs.prefetch, T.Or(ask_step < ask_stop, ask_begun < stages)),
                        1 - call.barrier_test(free.ptr_to([team * RING]), 0, lane),
                        0,
                    )
            while step < stop or begun < stages:
                if step == stop:
                    next_chunk()
                while step < stop:
                    if lane < 4:
                        call.barrier_await(free.ptr_to([team * RING + slot]), (turn + 1) % 2)
                    fill()

        if knobs.dependent_launch:
            call.dependent_start()
        if warp >= WARPS and warp < COPIER:
            if lane < RING:
                call.barrier_init(filled.ptr_to([team * RING + lane]), 1)
                call.barrier_init(free.ptr_to([team * RING + lane]), 4 * LANES)
            if lane == 0:
                call.barrier_init(asked.ptr_to([team]), 1)
            call.fence_init()
            T.cuda.warp_sync()
            next_chunk()
            start: T.int32 = step
            while turn == 0 and step < T.min(stop, start + AT_ONCE):
                fill()
        top: T.int32 = T.truncdiv(rank * (blocks * 16), SPLIT)  # rows that this block finishes
        rows: T.int32 = T.truncdiv((rank + 1) * (blocks * 16), SPLIT) - top
        if warp == COPIER:
            if SPLIT > 1:
                if lane == 0:
                    call.barrier_init(ready.ptr_to([0]), 1)
            if lane < WINDOW:
                call.barrier_init(landed.ptr_to([lane]), 1)
                call.barrier_init(full.ptr_to([lane]), PIECES)
                call.barrier_init(empty.ptr_to([lane]), WARPS)
            call.fence_init()
        T.cuda.cta_sync()

        if warp < WARPS:
            if knobs.multiply_registers > 0:
                T.ptx["setmaxnreg.inc.sync.aligned.u32"](knobs.multiply_registers)
            part: T.int32 = warp % 4
            quarter: T.int32 = warp // 4 % LANES * FOURS  # first four tokens of this warp group
            sums_at: T.int32 = (quarter * 4 + lane % 4) * SUMS + part * 16 + lane // 4
            held: T.int32 = -1  # the row blocks of four whose sums the accumulators hold
            more: T.int32 = 0  # whether the next products add to them
            ring_at: T.uint32 = T.cuda.cvta_generic_to_shared(
                ring.ptr_to([team * (RING * STAGE_WORDS) + part * (DEPTH * TILE_WORDS) + lane * 4])
            )
            # In a cluster the upper bits of the address say which block's shared memory is meant.
            z_begin: T.uint32 = T.cuda.cvta_generic_to_shared(bits.ptr_to([0])) & T.uint32(0x3FFFF)
            z_layout: T.uint64 = (
                T.Cast("uint64", T.shift_right(z_begin, T.uint32(4))) | T.uint64(LAYOUT)
            ) + T.Cast("uint64", quarter * 8)
            last: T.int32 = -1  # the place of z whose last product is in flight
            reached: T.int32 = 0  # from this step on a stage of z is used for the last time
            known: T.int32 = 0  # from this step on all stages of z of the chunk are known to be there
            place0: T.int32 = 0  # of the chunk's first stage
            round0: T.int32 = 0

            @T.inline
            def flush():
                for n in T.unroll(FOURS):
                    for r in T.unroll(2):  # rows lane // 4 and 8 more
                        high: T.uint32 = T.uint32(0) - acc[n * 32 + 28 + 2 * r]
                        low: T.uint32 = T.uint32(0) - acc[n * 32 + 29 + 2 * r]
                        for s in T.unroll(7):
                            high = high * T.uint32(2) + acc[n * 32 + (6 - s) * 4 + 2 * r]
                            low = low * T.uint32(2) + acc[n * 32 + (6 - s) * 4 + 2 * r + 1]
                        # Sums of other tokens and of rows past the last are garbage too.
                        T.ptx["red.shared.add.u32"](
                            sums.ptr_to([sums_at + held * 64 + n * (4 * SUMS) + r * 8]),
                            high * T.uint32(256) + low,
                        )

            @T.inline
            def settle():  # no product is in flight
                T.ptx["wgmma.wait_group.sync.aligned"](0)
                if last >= 0:
                    call.warp_signal(empty.ptr_to([last]))
                last = -1

            @T.inline
            def multiply_stage():
                past: T.int32 = T.Select(place0 + col >= WINDOW, 1, 0)
                place: T.int32 = place0 + col - past * WINDOW
                z_at: T.uint64 = z_layout + T.Cast("uint64", place * (DEPTH * BLOCK_BYTES // 16))
                w_at: T.uint32 = ring_at + T.Cast("uint32", slot * (STAGE_WORDS * 4))
                if step < known:
                    call.barrier_await(full.ptr_to([place]), (round0 + past) % 2)
                call.barrier_await(filled.ptr_to([team * RING + slot]), turn % 2)
                T.ptx["wgmma.wait_group.sync.aligned"](0)
                if quad != held:
                    if held >= 0:
                        flush()
                    held = quad
                    more = 0
                for i in T.unroll(DEPTH):
                    load(a, i * 4, w_at + T.uint32(i * TILE_BYTES))
                T.ptx["wgmma.fence.sync.aligned"]()
                for i in T.unroll(DEPTH):
                    for n in T.unroll(FOURS):
                        multiply(
                            acc, n * 32, a, i * 4, z_at + T.uint64(i * (BLOCK_BYTES // 16) + n * 8),
                            T.Or(i > 0, more > 0),
                        )  # fmt: skip
                T.ptx["wgmma.commit_group.sync.aligned"]()
                more = 1
                call.warp_signal(free.ptr_to([team * RING + slot]))
                if last >= 0:
                    call.warp_signal(empty.ptr_to([last]))
                last = T.Select(step >= reached, place, -1)
                next_stage()

            for i in T.serial((m - warp + WARPS - 1) // WARPS):  # while z is on its way
                for j in T.serial((blocks * 16 - lane + 31) // 32):
                    sums[(i * WARPS + warp) * SUMS + j * 32 + lane] = 0
            for i in T.serial((rows - tx + WARPS * 32 - 1) // (WARPS * 32)):
                if row0 * 16 + top + i * (WARPS * 32) + tx < OC:
                    row_scale[i * (WARPS * 32) + tx] = scale[row0 * 16 + top + i * (WARPS * 32) + tx]
                    if adds % 2 > 0:
                        call.touch(bias.ptr_to([0]), row0 * 16 + top + i * (WARPS * 32) + tx, kind)
            call.group_sync(1, WARPS * 32)
            if SPLIT > 1:
                call.cluster_arrive()
            for c in T.serial(chunks):
                ended: T.int32 = col  # 0 after the last stage of a chunk
                next_chunk()
                reached = stop - length
                known = step + length
                place0 = (begun - length) % WINDOW
                round0 = (begun - length) // WINDOW % 2
                if ended > 0 or step == stop or col >= WINDOW - 1:
                    settle()  # z of this chunk needs the place of the one in flight
                while step < stop:
                    multiply_stage()
                begin: T.int32 = team * (quads * length) // TEAMS
                for i in T.serial(length - T.min(length, stop - begin)):
                    # Stages of z that this team has no rows for: its turn with them is over, too.
                    other: T.int32 = begun - length + T.truncmod(stop + i, length)
                    call.barrier_await(full.ptr_to([other % WINDOW]), other // WINDOW % 2)
                    call.warp_signal(empty.ptr_to([other % WINDOW]))
            settle()
            if held >= 0:
                flush()
            token: T.let[T.int32] = tx // STORERS  # whose sums this thread passes on and stores
            fours: T.int32 = rows // 4  # of rows; the threads of a token have them in turn, some at a time

            @T.inline
            def bring(i):  # what is added to the results that this thread stores next
                for j in T.unroll(LATE * 8):
                    late[j] = T.uint32(0)
                for j in T.unroll(LATE):
                    late_row: T.int32 = ((i * LATE + j) * STORERS + tx % STORERS) * 4
                    if late_row < rows and token < m:
                        left_over: T.int32 = OC - (row0 * 16 + top + late_row)
                        late_at: T.int64 = T.Cast("int64", row0 * 16 + top + late_row)
                        if adds % 2 > 0:
                            call.load_four(bias.ptr_to([0]), late_at, left_over, kind, late.ptr_to([j * 4]))
                        if adds > 1:
                            late_at = late_at + T.Cast("int64", token) * OC
                            call.load_four(
                                residual.ptr_to([0]), late_at, left_over, kind,
                                late.ptr_to([(LATE + j) * 4]),
                            )  # fmt: skip

            @T.inline
            def finish(added, together):  # fours of results at a time
                if added:
                    if stages == 0:  # without columns nothing has been waited for
                        if knobs.dependent_launch:
                            call.dependent_wait()
                    bring(0)
                call.group_sync(2, WARPS * 32 + 32)  # and the sums of z, which another warp adds up
                if SPLIT > 1:
                    call.cluster_await()  # long over: its sums are zero, or hold its own products
                    for other in T.unroll(SPLIT - 1):
                        peer: T.int32 = (rank + 1 + other) % SPLIT
                        from_row: T.int32 = T.truncdiv(peer * (blocks * 16), SPLIT)
                        count: T.int32 = T.truncdiv((peer + 1) * (blocks * 16), SPLIT) - from_row
                        if token < m:
                            for i in T.serial((count - tx % STORERS + STORERS - 1) // STORERS):
                                of: T.int32 = token * SUMS + from_row + i * STORERS + tx % STORERS
                                call.add_to_peer(sums.ptr_to([of]), sums[of], peer, ready.ptr_to([0]))
                    call.barrier_await(ready.ptr_to([0]), 0)
                for i in T.serial((fours - tx % STORERS + together * STORERS - 1) // (together * STORERS)):
                    if added:
                        if i > 0:
                            bring(i)
                    for j in T.unroll(together):
                        if (i * together + j) * STORERS < fours and token < m:
                            four: T.int32 = T.min((i * together + j) * STORERS + tx % STORERS, fours - 1)
                            at: T.int32 = token * SUMS + top + four * 4
                            for q in T.unroll(4):
                                found[j * 4 + q] = sums[at + q]
                    for j in T.unroll(together):
                        row: T.int32 = ((i * together + j) * STORERS + tx % STORERS) * 4
                        if row < rows and token < m:
                            T.cuda.func_call(
                                "liftc_store_four",
                                y.ptr_to([0]), T.Cast("int64", token) * OC + (row0 * 16 + top + row),
                                OC - (row0 * 16 + top + row), kind, found.ptr_to([j * 4]),
                                total[token], token_scale[token], row_scale.ptr_to([row]),
                                adds if added else 0, late.ptr_to([j * 4 if added else 0]),
                                late.ptr_to([(LATE + j) * 4 if added else 0]),
                                source_code=device.ADDENDS + group_device.STORE_FOUR,
                            )  # fmt: skip

            # Code that is not executed is fetched all the same where it lies between what is.
            if adds == 0:
                finish(False, 4)
            else:
                finish(True, LATE)
        else:
            if knobs.helper_registers > 0:
                T.ptx["setmaxnreg.dec.sync.aligned.u32"](knobs.helper_registers)
            if SPLIT > 1:
                if warp == COPIER:
                    if lane == 0:
                        call.barrier_expect(ready.ptr_to([0]), (SPLIT - 1) * rows * m * 4)
                    T.cuda.warp_sync()
                call.cluster_arrive()
            if warp < COPIER:
                fill_rings()
            elif warp == COPIER:
                if knobs.dependent_launch:
                    call.dependent_wait()
                for i in T.serial(T.min(stages, WINDOW)):
                    copy_z(i)
                sum_z()
                for i in T.serial(stages - WINDOW):
                    call.barrier_await(empty.ptr_to([i % WINDOW]), i // WINDOW % 2)
                    copy_z(i + WINDOW)
            else:
                # Every warp waits for every stage, so that none is more than one phase of a barrier ahead.
                due: T.int32 = warp - CUTTER  # pieces until its next one
                for stage2 in T.serial(stages):
                    spot: T.int32 = stage2 % WINDOW
                    call.barrier_await(landed.ptr_to([spot]), stage2 // WINDOW % 2)
                    while due < PIECES:
                        # A thread has 256 columns of one byte of one token, halved: eight vectors of each.
                        task: T.int32 = due * 32 + lane
                        to: T.int32 = (spot * DEPTH + task // (2 * COLS)) * (COLS * 64) + task % (
                            2 * COLS
                        ) * 4
                        if stage2 * DEPTH + task // (2 * COLS) < width:
                            if task < DEPTH * 2 * COLS:
                                call.bits_of_bytes(bits.ptr_to([to]), 2 * COLS)
                        elif task < DEPTH * 2 * COLS:
                            for j in T.unroll(8):
                                for q in T.unroll(4):
                                    bits[to + j * (8 * COLS) + q] = T.uint32(0)
                        call.fence_shared()
                        T.cuda.warp_sync()
                        call.warp_signal(full.ptr_to([spot]))
                        due = due + knobs.cutters
                    due = due - PIECES

    if knobs.dependent_launch:
        function = function.with_attr("tirx.kernel_launch_params", ["tirx.use_programtic_dependent_launch"])
    return function
