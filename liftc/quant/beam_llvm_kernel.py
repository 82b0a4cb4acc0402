# ruff: noqa: F823, F841 - T.inline functions assign the scalars of the kernel around them
# mypy: disable-error-code="misc, no-untyped-def, valid-type, no-untyped-call, name-defined"
# mypy: disable-error-code="untyped-decorator, used-before-def"
"""TIR of the CPU beam search: one vector at a time, LANES prefixes at a time.

Costs are handled as the bits of non-negative floats, which order like the floats. Scratch is one int32
buffer of rows of P = beam rounded up to 16, plus 16 (a compaction may write 15 lanes past its end): the
current beam (costs, then ceil(D/32) rows of packed signs), the next beam in the same form, and two rows for
the costs of the children, +1 children first. Past the last prefix a row of costs holds infinity up to a
multiple of LANES.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm.script import tirx as T

_INFINITY_BITS = 0x7F800000
_LARGEST_BITS = 0x7F7FFFFF

Lookup = Callable[[Any, Any, Any], Any]


def build(beam: int = 0, cpu: str | None = None) -> Callable[..., None]:
    """Compile the search for `cpu` (LLVM's name; default: this processor), for one beam or (0) for any.

    The result takes targets (B*D), table, diagonal, signs (B*D) int8, cost (B) int32, scratch, D, beam, B.
    """
    target = tvm.target.Target({"kind": "llvm", "mcpu": cpu or tvm.target.codegen.llvm_get_system_cpu()})
    with target:
        lanes, lookup = _lookup_for(target)
        function = _beam_search(lanes, lookup, beam).with_attr("global_symbol", "beam_search")
        module = tvm.IRModule({"beam_search": function.with_attr("tirx.noalias", True)})
        kernel: Callable[..., None] = tvm.compile(module, target=target, tir_pipeline="tirx")["beam_search"]
    return kernel


def _lookup_for(target: Any) -> tuple[int, Lookup]:
    """(lanes, lookup) for a processor: lookup(table, offset, index) reads table[offset + (index & 15)]."""
    features = set(tvm.target.codegen.llvm_get_cpu_features(target))

    def by_512(table, offset, index):
        values = table[T.ramp(offset, 1, 16)]
        return T.call_llvm_pure_intrin("float32x16", "llvm.x86.avx512.permvar.sf.512", values, index)

    def by_256(table, offset, index):
        low, high = (
            T.call_llvm_pure_intrin("float32x8", "llvm.x86.avx2.permps", table[T.ramp(at, 1, 8)], index)
            for at in (offset, offset + 8)
        )
        return T.Select(T.bitwise_and(index, T.broadcast(8, 8)) != T.broadcast(0, 8), high, low)

    def by_element(table, offset, index):
        return table[T.broadcast(offset, 8) + T.bitwise_and(index, T.broadcast(15, 8))]

    if "avx512f" in features:
        return 16, by_512
    if "avx2" in features:
        return 8, by_256
    return 8, by_element


def _beam_search(lanes: int, lookup: Lookup, static_beam: int) -> Any:
    ints = f"int32x{lanes}"
    static_blocks = -(-static_beam // lanes)

    def at(offset):
        return T.ramp(offset, 1, lanes)

    def every(value):
        return T.broadcast(value, lanes)

    def intrin(dtype, name, *args):
        return T.call_llvm_pure_intrin(dtype, f"llvm.{name}", *args)

    def number_of(mask):
        return intrin("int32", "vector.reduce.add", T.Cast(ints, mask))

    def compress(values, mask):
        return intrin(ints, "experimental.vector.compress", values, mask, every(0))

    def child_cost(residual, step, cost):
        error = residual + step
        return T.reinterpret(ints, intrin(f"float32x{lanes}", "fma", error, error, cost))

    def or_given(static, given):
        return static if static else given

    @T.prim_func
    def beam_search(
        targets_ptr: T.handle, table_ptr: T.handle, diagonal_ptr: T.handle, signs_ptr: T.handle,
        cost_ptr: T.handle, scratch_ptr: T.handle, D: T.int32, given_beam: T.int32, rows: T.int32,
    ):  # fmt: skip
        size0, size1, size2 = T.int32(), T.int32(), T.int32()
        size3, size4, size5 = T.int32(), T.int32(), T.int32()
        targets = T.match_buffer(targets_ptr, (size0,), "float32", align=4)
        table = T.match_buffer(table_ptr, (size1,), "float32", align=4)
        diagonal = T.match_buffer(diagonal_ptr, (size2,), "float32", align=4)
        signs = T.match_buffer(signs_ptr, (size3,), "int8", align=1)
        best = T.match_buffer(cost_ptr, (size4,), "int32", align=4)
        S = T.match_buffer(scratch_ptr, (size5,), "int32", align=4)

        # Scope "global": TVM puts small buffers of other scopes on its heap.
        n = T.alloc_scalar("int32", "global")  # prefixes in the beam
        base = T.alloc_scalar("int32", "global")  # offset of the vector in targets and signs
        i = T.alloc_scalar("int32", "global")  # the row of R and the sign being decided
        here = T.alloc_scalar("int32", "global")  # offset of the current beam
        there = T.alloc_scalar("int32", "global")  # offset of the next beam
        keep = T.alloc_scalar("int32", "global")
        low = T.alloc_scalar("int32", "global")
        high = T.alloc_scalar("int32", "global")
        above = T.alloc_scalar("int32", "global")
        p1 = T.alloc_scalar("int32", "global")
        p2 = T.alloc_scalar("int32", "global")
        p3 = T.alloc_scalar("int32", "global")
        c1 = T.alloc_scalar("int32", "global")
        c2 = T.alloc_scalar("int32", "global")
        c3 = T.alloc_scalar("int32", "global")
        scan = T.alloc_scalar("int32", "global")
        kept = T.alloc_scalar("int32", "global")
        entry = T.alloc_scalar("int32", "global")
        residual = T.alloc_buffer((max(1, static_blocks) * lanes,), "float32")
        word = T.alloc_buffer((lanes,), "int32")
        least = T.alloc_buffer((lanes,), "int32")
        most = T.alloc_buffer((lanes,), "int32")

        beam = T.meta_var(or_given(static_beam, given_beam))
        stride = T.meta_var((beam + 15) // 16 * 16 + 16)
        words = T.meta_var((D + 31) // 32)
        groups = T.meta_var((D + 15) // 16)
        children = T.meta_var(2 * (words + 1) * stride)

        @T.inline
        def subtract_group(h, b, r):
            """residual[r] -= the sixteen signs of group h, for block b of the beam."""
            entry = (i * groups + h) * 64
            word[at(0)] = T.shift_right(
                S[at(here + (1 + T.shift_right(h, 1)) * stride + b * lanes)], every(T.bitwise_and(h, 1) * 16)
            )
            residual[at(r * lanes)] = residual[at(r * lanes)] - (
                (
                    lookup(table, entry, word[at(0)])
                    + lookup(table, entry + 16, T.shift_right(word[at(0)], every(4)))
                )
                + (
                    lookup(table, entry + 32, T.shift_right(word[at(0)], every(8)))
                    + lookup(table, entry + 48, T.shift_right(word[at(0)], every(12)))
                )
            )

        @T.inline
        def make_children(b, r, blocks):
            cost = T.meta_var(T.reinterpret(f"float32x{lanes}", S[at(here + b * lanes)]))
            S[at(children + b * lanes)] = child_cost(residual[at(r * lanes)], every(-diagonal[i]), cost)
            S[at(children + (blocks + b) * lanes)] = child_cost(
                residual[at(r * lanes)], every(diagonal[i]), cost
            )
            word[at(0)] = T.min(S[at(children + b * lanes)], S[at(children + (blocks + b) * lanes)])
            least[at(0)] = T.min(least[at(0)], word[at(0)])
            most[at(0)] = T.max(
                most[at(0)], T.Select(word[at(0)] < every(_INFINITY_BITS), word[at(0)], every(0))
            )

        @T.inline
        def narrow(loop, blocks):
            """Three more pivots: count(<= low) < keep <= count(<= high) = above, until they meet."""
            p2 = low + T.shift_right(high - low, 1)
            p1 = T.Select(above < 0, p2, low + T.shift_right(high - low, 2))
            p2 = T.Select(above < 0, p2 + T.shift_right(high - low, 2), p2)
            p3 = T.Select(above < 0, high, p2 + T.shift_right(high - low, 2))
            c1 = 0
            c2 = 0
            c3 = 0
            for b in loop(2 * blocks):
                c1 = c1 + number_of(S[at(children + b * lanes)] <= every(p1))
                c2 = c2 + number_of(S[at(children + b * lanes)] <= every(p2))
                c3 = c3 + number_of(S[at(children + b * lanes)] <= every(p3))
            above = T.Select(c1 >= keep, c1, T.Select(c2 >= keep, c2, T.Select(c3 >= keep, c3, above)))
            low = T.Select(c1 >= keep, low, T.Select(c2 >= keep, p1, T.Select(c3 >= keep, p2, p3)))
            high = T.Select(c1 >= keep, p1, T.Select(c2 >= keep, p2, T.Select(c3 >= keep, p3, high)))

        @T.inline
        def find_threshold(loop, blocks):
            """high = the largest cost that stays; children that tie at it and do not fit become infinite."""
            low = intrin("int32", "vector.reduce.smin", least[at(0)]) - 1
            high = T.Select(
                i == 0,
                low + 1,
                T.Select(n == keep, intrin("int32", "vector.reduce.smax", most[at(0)]), _LARGEST_BITS),
            )
            above = -1  # not counted yet
            while T.Select(above == keep, 0, high - low) > 1:
                narrow(loop, blocks)
            if above < 0:
                above = 0
                for b in T.serial(2 * blocks):
                    above = above + number_of(S[at(children + b * lanes)] <= every(high))
            scan = 2 * blocks * lanes
            while above > keep:
                scan = scan - 1
                if S[children + scan] == high:
                    S[children + scan] = _INFINITY_BITS
                    above = above - 1

        @T.inline
        def compact(loop, blocks):
            """Move the children at or below `high` to the next beam, in order."""
            kept = 0
            for s in T.unroll(2):
                for b in loop(blocks):
                    mask = T.meta_var(S[at(children + (s * blocks + b) * lanes)] <= every(high))
                    S[at(there + kept)] = compress(S[at(children + (s * blocks + b) * lanes)], mask)
                    word[at(0)] = S[at(here + (1 + T.shift_right(i, 5)) * stride + b * lanes)]
                    if s == 0:
                        word[at(0)] = T.bitwise_or(word[at(0)], every(T.shift_left(1, T.bitwise_and(i, 31))))
                    S[at(there + (1 + T.shift_right(i, 5)) * stride + kept)] = compress(word[at(0)], mask)
                    for g in T.serial(words - 1 - T.shift_right(i, 5)):
                        row_of = T.meta_var((2 + T.shift_right(i, 5) + g) * stride)
                        S[at(there + row_of + kept)] = compress(S[at(here + row_of + b * lanes)], mask)
                    kept = kept + number_of(mask)
            S[at(there + kept)] = every(_INFINITY_BITS)

        @T.inline
        def grow(blocks):
            """One level for a beam of `blocks` blocks, known only at run time."""
            for b in T.serial(blocks):
                residual[at(0)] = every(targets[base + i])
                for g in T.serial(groups - T.shift_right(i + 1, 4)):
                    subtract_group(T.shift_right(i + 1, 4) + g, b, 0)
                make_children(b, 0, blocks)
            if keep < 2 * n:
                find_threshold(T.serial, blocks)
            compact(T.serial, blocks)

        @T.inline
        def steady(blocks):
            """One level for the full beam, unrolled over its blocks."""
            for b in T.unroll(blocks):
                residual[at(b * lanes)] = every(targets[base + i])
            for g in T.serial(groups - T.shift_right(i + 1, 4)):
                for b in T.unroll(blocks):
                    subtract_group(T.shift_right(i + 1, 4) + g, b, b)
            for b in T.unroll(blocks):
                make_children(b, b, blocks)
            find_threshold(T.unroll, blocks)
            compact(T.unroll, blocks)

        for row in T.serial(rows):
            n = 1
            base = row * D
            here = 0
            there = (words + 1) * stride
            S[at(0)] = T.Select(at(0) < every(1), every(0), every(_INFINITY_BITS))
            for level in T.serial(D):
                i = D - 1 - level
                if T.bitwise_and(i, 31) == 31 or level == 0:  # the first sign of a word
                    for b in T.serial((n + (lanes - 1)) // lanes):
                        S[at(here + (1 + T.shift_right(i, 5)) * stride + b * lanes)] = every(0)
                keep = T.Select(i == 0, 1, T.min(2 * n, beam))
                high = _LARGEST_BITS
                least[at(0)] = every(_INFINITY_BITS)
                most[at(0)] = every(0)
                if static_blocks > 0:
                    if n == beam:
                        steady(static_blocks)
                    else:
                        grow((n + (lanes - 1)) // lanes)
                else:
                    grow((n + (lanes - 1)) // lanes)
                n = keep
                scan = here
                here = there
                there = scan

            best[row] = S[here]
            for j in T.serial(D):
                signs[base + j] = T.Cast(
                    "int8",
                    T.bitwise_and(
                        T.shift_right(S[here + (1 + T.shift_right(j, 5)) * stride], T.bitwise_and(j, 31)), 1
                    )
                    * 2
                    - 1,
                )

    return beam_search
