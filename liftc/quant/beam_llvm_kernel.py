# mypy: disable-error-code="misc, no-untyped-def, valid-type, no-untyped-call, name-defined, untyped-decorator"
"""TIR of the CPU beam search, one PrimFunc for every D, beam and batch.

Scratch layout, P = beam rounded up to 16, plus 16 (a compaction may write 15 lanes past its end):
floats: two rows of P costs (the current beam and the next, by parity), then the costs of all children, +1
children first; ints: two sets of ceil(D/32) rows of P packed signs. Prefixes past the last hold cost
infinity up to a multiple of LANES.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm.script import tirx as T

_LARGEST = 3.4028234663852886e38
_INFINITY = float("inf")


def build(cpu: str | None = None) -> Callable[..., None]:
    """Compile the search for `cpu` (LLVM's name; default: this processor).

    The result takes targets (B*D), table, diagonal, signs (B*D) int8, cost (B), floats, ints, D, beam, B.
    """
    target = tvm.target.Target({"kind": "llvm", "mcpu": cpu or tvm.target.codegen.llvm_get_system_cpu()})
    with target:
        lanes, lookup = _lookup_for(target)
        module = tvm.IRModule(
            {"beam_search": _beam_search(lanes, lookup).with_attr("global_symbol", "beam_search")}
        )
        kernel: Callable[..., None] = tvm.compile(module, target=target, tir_pipeline="tirx")["beam_search"]
    return kernel


def _lookup_for(target: Any) -> tuple[int, Callable[[Any, Any, Any], Any]]:
    """(lanes, lookup) for a processor: lookup(table, offset, index) reads table[offset + (index & 15)]."""
    features = set(tvm.target.codegen.llvm_get_cpu_features(target))

    def by_512(table, offset, index):
        return T.call_llvm_pure_intrin(
            "float32x16", "llvm.x86.avx512.permvar.sf.512", table[T.ramp(offset, 1, 16)], index
        )

    def by_256(table, offset, index):
        low, high = (
            T.call_llvm_pure_intrin(
                "float32x8", "llvm.x86.avx2.permps", table[T.ramp(offset + part, 1, 8)], index
            )
            for part in (0, 8)
        )
        return T.Select(T.bitwise_and(index, T.broadcast(8, 8)) != T.broadcast(0, 8), high, low)

    def by_element(table, offset, index):
        return table[T.broadcast(offset, 8) + T.bitwise_and(index, T.broadcast(15, 8))]

    if "avx512f" in features:
        return 16, by_512
    if "avx2" in features:
        return 8, by_256
    return 8, by_element


def _beam_search(lanes: int, lookup: Callable[[Any, Any, Any], Any]) -> Any:
    floats, ints = f"float32x{lanes}", f"int32x{lanes}"

    def intrin(dtype, name, *args):
        return T.call_llvm_pure_intrin(dtype, f"llvm.{name}", *args)

    def at(offset):
        return T.ramp(offset, 1, lanes)

    def all_lanes(value):
        return T.broadcast(value, lanes)

    def compress(dtype, values, mask):
        zero = T.broadcast(T.float32(0) if dtype == floats else 0, lanes)
        return intrin(dtype, "experimental.vector.compress", values, mask, zero)

    def bits(value):
        return T.reinterpret("int32", value)

    @T.prim_func
    def beam_search(
        targets_ptr: T.handle, table_ptr: T.handle, diagonal_ptr: T.handle, signs_ptr: T.handle, cost_ptr: T.handle,
        floats_ptr: T.handle, ints_ptr: T.handle, D: T.int32, beam: T.int32, rows: T.int32,
    ):  # fmt: skip
        size0, size1, size2, size3, size4, size5, size6 = (
            T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        )  # fmt: skip
        targets = T.match_buffer(targets_ptr, (size0,), "float32", align=4)
        table = T.match_buffer(table_ptr, (size1,), "float32", align=4)
        diagonal = T.match_buffer(diagonal_ptr, (size2,), "float32", align=4)
        signs = T.match_buffer(signs_ptr, (size3,), "int8", align=1)
        best = T.match_buffer(cost_ptr, (size4,), "float32", align=4)
        F = T.match_buffer(floats_ptr, (size5,), "float32", align=4)
        words = T.match_buffer(ints_ptr, (size6,), "int32", align=4)

        # scratch scalars live in scope "global": TVM keeps small ones on the stack, others on its workspace
        n = T.alloc_scalar("int32", "global")
        current = T.alloc_scalar("int32", "global")
        i = T.alloc_scalar("int32", "global")
        h = T.alloc_scalar("int32", "global")
        entry = T.alloc_scalar("int32", "global")
        blocks = T.alloc_scalar("int32", "global")
        keep = T.alloc_scalar("int32", "global")
        low = T.alloc_scalar("int32", "global")
        high = T.alloc_scalar("int32", "global")
        middle = T.alloc_scalar("int32", "global")
        count = T.alloc_scalar("int32", "global")
        above = T.alloc_scalar("int32", "global")
        scan = T.alloc_scalar("int32", "global")
        kept = T.alloc_scalar("int32", "global")
        bit = T.alloc_scalar("int32", "global")
        step = T.alloc_scalar("float32", "global")
        threshold = T.alloc_scalar("float32", "global")
        residual = T.alloc_buffer((lanes,), "float32")
        word = T.alloc_buffer((lanes,), "int32")
        plus = T.alloc_buffer((lanes,), "float32")
        minus = T.alloc_buffer((lanes,), "float32")
        least = T.alloc_buffer((lanes,), "float32")
        tally = T.alloc_buffer((lanes,), "int32")

        stride = T.meta_var((beam + 15) // 16 * 16 + 16)
        children = T.meta_var(2 * stride)
        word_rows = T.meta_var((D + 31) // 32)
        groups = T.meta_var((D + 15) // 16)

        for row in T.serial(rows):
            n = 1
            current = 0
            F[at(0)] = T.Select(
                at(0) < all_lanes(1), all_lanes(T.float32(0)), all_lanes(T.float32(_INFINITY))
            )
            for level in T.serial(D):
                i = D - 1 - level
                blocks = (n + lanes - 1) // lanes
                if T.bitwise_and(i, 31) == 31 or level == 0:  # first sign of a word
                    for b in T.serial(blocks):
                        words[at((current * word_rows + T.shift_right(i, 5)) * stride + b * lanes)] = (
                            all_lanes(0)
                        )

                step = diagonal[i]
                least[at(0)] = all_lanes(T.float32(_INFINITY))
                tally[at(0)] = all_lanes(0)
                for b in T.serial(blocks):
                    residual[at(0)] = all_lanes(targets[row * D + i])
                    for g in T.serial(groups - T.shift_right(i + 1, 4)):
                        h = T.shift_right(i + 1, 4) + g
                        entry = (i * groups + h) * 64
                        word[at(0)] = T.shift_right(
                            words[at((current * word_rows + T.shift_right(h, 1)) * stride + b * lanes)],
                            all_lanes(T.bitwise_and(h, 1) * 16),
                        )
                        residual[at(0)] = residual[at(0)] - (
                            (
                                lookup(table, entry, word[at(0)])
                                + lookup(table, entry + 16, T.shift_right(word[at(0)], all_lanes(4)))
                            )
                            + (
                                lookup(table, entry + 32, T.shift_right(word[at(0)], all_lanes(8)))
                                + lookup(table, entry + 48, T.shift_right(word[at(0)], all_lanes(12)))
                            )
                        )
                    plus[at(0)] = residual[at(0)] - all_lanes(step)
                    minus[at(0)] = residual[at(0)] + all_lanes(step)
                    plus[at(0)] = intrin(
                        floats, "fma", plus[at(0)], plus[at(0)], F[at(current * stride + b * lanes)]
                    )
                    minus[at(0)] = intrin(
                        floats, "fma", minus[at(0)], minus[at(0)], F[at(current * stride + b * lanes)]
                    )
                    F[at(children + b * lanes)] = plus[at(0)]
                    F[at(children + (blocks + b) * lanes)] = minus[at(0)]
                    plus[at(0)] = T.min(plus[at(0)], minus[at(0)])
                    least[at(0)] = T.min(least[at(0)], plus[at(0)])
                    tally[at(0)] = T.max(
                        tally[at(0)],
                        T.Select(
                            plus[at(0)] < all_lanes(T.float32(_INFINITY)),
                            T.reinterpret(ints, plus[at(0)]),
                            all_lanes(0),
                        ),
                    )

                keep = T.Select(i == 0, 1, T.min(2 * n, beam))
                threshold = T.float32(_LARGEST)
                if keep < 2 * n:
                    # bisection on the bits of the threshold: count(<= low) < keep <= count(<= high)
                    low = bits(intrin("float32", "vector.reduce.fmin", least[at(0)])) - 1
                    high = T.Select(
                        i == 0,
                        low + 1,
                        T.Select(
                            n == keep, intrin("int32", "vector.reduce.smax", tally[at(0)]), bits(threshold)
                        ),
                    )
                    above = -1  # count(<= high), unknown yet
                    while high - low > 1:
                        middle = low + T.shift_right(high - low, 1)
                        threshold = T.reinterpret("float32", middle)
                        tally[at(0)] = all_lanes(0)
                        for b in T.serial(2 * blocks):
                            tally[at(0)] = tally[at(0)] + T.Cast(
                                ints, F[at(children + b * lanes)] <= all_lanes(threshold)
                            )
                        count = intrin("int32", "vector.reduce.add", tally[at(0)])
                        if count >= keep:
                            high = middle
                            above = count
                            if count == keep:
                                low = middle
                        else:
                            low = middle
                    threshold = T.reinterpret("float32", high)
                    if above < 0:
                        tally[at(0)] = all_lanes(0)
                        for b in T.serial(2 * blocks):
                            tally[at(0)] = tally[at(0)] + T.Cast(
                                ints, F[at(children + b * lanes)] <= all_lanes(threshold)
                            )
                        above = intrin("int32", "vector.reduce.add", tally[at(0)])
                    scan = 2 * blocks * lanes  # drop the last of those that tie at the threshold
                    while above > keep:
                        scan = scan - 1
                        if F[children + scan] == threshold:
                            F[children + scan] = T.float32(_INFINITY)
                            above = above - 1

                kept = 0
                for s in T.serial(2):
                    bit = T.Select(s == 0, T.shift_left(1, T.bitwise_and(i, 31)), 0)
                    for b in T.serial(blocks):
                        mask = T.meta_var(F[at(children + (s * blocks + b) * lanes)] <= all_lanes(threshold))
                        F[at((1 - current) * stride + kept)] = compress(
                            floats, F[at(children + (s * blocks + b) * lanes)], mask
                        )
                        for g in T.serial(word_rows - T.shift_right(i, 5)):
                            words[
                                at(((1 - current) * word_rows + T.shift_right(i, 5) + g) * stride + kept)
                            ] = compress(
                                ints,
                                T.bitwise_or(
                                    words[
                                        at(
                                            (current * word_rows + T.shift_right(i, 5) + g) * stride
                                            + b * lanes
                                        )
                                    ],
                                    all_lanes(T.Select(g == 0, bit, 0)),
                                ),
                                mask,
                            )
                        kept = kept + intrin("int32", "vector.reduce.add", T.Cast(ints, mask))
                F[at((1 - current) * stride + kept)] = all_lanes(T.float32(_INFINITY))
                n = keep
                current = 1 - current

            best[row] = F[current * stride]
            for j in T.serial(D):
                signs[row * D + j] = T.Cast(
                    "int8",
                    T.bitwise_and(
                        T.shift_right(words[(current * word_rows + T.shift_right(j, 5)) * stride], T.bitwise_and(j, 31)), 1
                    ) * 2 - 1,
                )  # fmt: skip

    return beam_search
