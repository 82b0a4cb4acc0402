"""Small device functions of the tensor-core lift (codegen/tensorcore_lift.py), beside those of tensorcore_device.py."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from liftc.codegen import lift_forms_device
from liftc.codegen import tensorcore_device as device
from liftc.codegen import warpgroup_device as group_device

PEERS = r"""
#ifndef LIFTC_PEERS
#define LIFTC_PEERS
__device__ __forceinline__ unsigned liftc_peer(const void* at, int rank) {
  unsigned peer;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(peer) : "r"(static_cast<unsigned>(__cvta_generic_to_shared(at))), "r"(rank));
  return peer;
}
__device__ __forceinline__ void liftc_share_float(float value, void* at, int to, void* barrier, int rank, int peers) {
  if (peers == 1 || to == rank) *static_cast<float*>(at) = value;
  else asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
                    :: "r"(liftc_peer(at, to)), "r"(__float_as_uint(value)), "r"(liftc_peer(barrier, to))
                    : "memory");
}
__device__ __forceinline__ void liftc_share(const void* words, void* at, void* barrier, int rank, int peers) {
  const unsigned* v = static_cast<const unsigned*>(words);
  static_cast<uint2*>(at)[0] = make_uint2(v[0], v[1]);
  static_cast<uint2*>(at)[64] = make_uint2(v[2], v[3]);
  if (peers > 1) {
#pragma unroll
    for (int away = 1; away < peers; ++away) {
      const int other = rank + away < peers ? rank + away : rank + away - peers;
      const unsigned to = liftc_peer(at, other), full = liftc_peer(barrier, other);
      asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1,%2}, [%3];"
                   :: "r"(to), "r"(v[0]), "r"(v[1]), "r"(full) : "memory");
      asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1,%2}, [%3];"
                   :: "r"(to + 512), "r"(v[2]), "r"(v[3]), "r"(full) : "memory");
    }
  }
}
#endif
"""
"""Block `rank` of a cluster of `peers` stores to the place `at` of the shared memory of block `to`, or of all, whose
barrier counts the bytes of others: a float; two words, and two more 512 bytes on."""

WARP_SUM = r"""
__device__ __forceinline__ void liftc_warp_sum(float value, void* out, int lane, void* barrier, int rank, int peers) {
#pragma unroll
  for (int away = 16; away > 0; away /= 2) value += __shfl_xor_sync(0xffffffffu, value, away);
  if (lane < peers) liftc_share_float(value, out, peers == 1 ? rank : lane, barrier, rank, peers);
}
"""
"""The sum of a value over the lanes of a warp, for every block of the cluster."""

LOAD_X8 = r"""
__device__ __forceinline__ void liftc_load_x8(const void* from, int kind, int there, void* out) {
  unsigned* v = static_cast<unsigned*>(out);
#pragma unroll
  for (int i = 0; i < (kind == 0 ? 8 : 4); i += 4)
    asm volatile("{ .reg .pred p;\n\tsetp.gt.s32 p, %5, 0;\n\tmov.b32 %0, 0;\n\tmov.b32 %1, 0;\n\tmov.b32 %2, 0;\n\t"
                 "mov.b32 %3, 0;\n\t@p ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4]; }"
                 : "=r"(v[i]), "=r"(v[i + 1]), "=r"(v[i + 2]), "=r"(v[i + 3])
                 : "l"(static_cast<const char*>(from) + i * 4), "r"(there));
}
"""
"""Eight values of x as they are, or zeros where none are there; kind 0 for float32, 1 for float16, 2 for bfloat16."""

CONVERT = r"""
__device__ __forceinline__ float4 liftc_load_floats(const void* from, int there) {
  float4 v;
  asm volatile("{ .reg .pred p;\n\tsetp.gt.s32 p, %5, 0;\n\tmov.b32 %0, 0;\n\tmov.b32 %1, 0;\n\tmov.b32 %2, 0;\n\t"
               "mov.b32 %3, 0;\n\t@p ld.global.nc.v4.f32 {%0,%1,%2,%3}, [%4]; }"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from), "r"(there));
  return v;
}
__device__ __forceinline__ unsigned liftc_pack_bf16(float low, float high) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ unsigned liftc_pack_half(float low, float high) {
  unsigned pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ float liftc_from_half(unsigned bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<unsigned short>(bits)));
  return value;
}
"""
"""Two floats as bfloat16 or float16 in a word, the first one low; a float16 as a float."""

SPLIT = r"""
__device__ __forceinline__ void liftc_split_pair(float a, float b, unsigned& high, unsigned& low) {
  high = liftc_pack_bf16(a, b);
  low = liftc_pack_bf16(a - __uint_as_float(high << 16), b - __uint_as_float(high & 0xffff0000u));
}
__device__ __forceinline__ float liftc_value(const unsigned* r, int i, int kind) {
  if (kind == 0) return __uint_as_float(r[i]);
  if (kind == 1) return liftc_from_half(r[i / 2] >> (i % 2 * 16));
  return __uint_as_float(i % 2 ? r[i / 2] & 0xffff0000u : r[i / 2] << 16);
}

__device__ __forceinline__ unsigned liftc_half_pair(float low, float high, int kind) {
  return kind == 1 ? liftc_pack_half(low, high) : liftc_pack_bf16(low, high);
}

__device__ __forceinline__ float liftc_split_x4(const void* raw, int kind, int half, const void* scale,
                                                bool scaled, int there, void* out) {
  const unsigned* r = static_cast<const unsigned*>(raw) + half * (kind == 0 ? 4 : 2);
  unsigned* b = static_cast<unsigned*>(out);
  float v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = liftc_value(r, i, kind);
  if (scaled) {
    const float4 s = liftc_load_floats(scale, there);
    v[0] *= s.x;
    v[1] *= s.y;
    v[2] *= s.z;
    v[3] *= s.w;
  }
  if (kind == 2 && !scaled) {
    b[0] = r[0];
    b[1] = r[1];
  } else {
    liftc_split_pair(v[0], v[1], b[0], b[2]);
    liftc_split_pair(v[2], v[3], b[1], b[3]);
  }
  return fmaf(v[0], v[0], v[1] * v[1]) + fmaf(v[2], v[2], v[3] * v[3]);
}
__device__ __forceinline__ float liftc_total(const void* part, int chains) {
  const float* p = static_cast<const float*>(part);
  return chains == 1 ? p[0] + p[4] : (p[0] + p[8]) + (p[4] + p[12]);
}
__device__ __forceinline__ void liftc_mixed_words(const void* part, int chains, void* words) {
  const float* p = static_cast<const float*>(part);
  unsigned* w = static_cast<unsigned*>(words);
  liftc_split_pair(liftc_total(p, chains), liftc_total(p + 1, chains), w[0], w[2]);
  liftc_split_pair(liftc_total(p + 2, chains), liftc_total(p + 3, chains), w[1], w[3]);
}
"""
"""Floats as sums of two bfloat16 numbers, to 16 bits each. split_x4: half of eight values of x, scaled, as two words of
high parts and two of low parts (none where bfloat16 says it all); returns the sum of squares. total: a result of 16 x 8
from what its products of high and low parts, `chains` of each, have added up. mixed_words: four of them as half an
operand, two words of high and two of low parts."""

BF16 = f"\n#ifndef LIFTC_BF16\n#define LIFTC_BF16\n{CONVERT}{SPLIT}#endif\n"
"""Both, once in a source however many of their functions are called."""

FORMS = BF16 + lift_forms_device.FORMS
"""What norms, gates and GELU need."""

LOAD_WORDS = r"""
__device__ __forceinline__ void liftc_load_words(const void* from, void* out) {
  const uint4 v = *static_cast<const uint4*>(from);
  unsigned* to = static_cast<unsigned*>(out);
  to[0] = v.x;
  to[1] = v.y;
  to[2] = v.z;
  to[3] = v.w;
}
"""

MMA_BF16 = r"""
__device__ __forceinline__ void liftc_mma_bf16(void* sums, const void* first, unsigned b0, unsigned b1) {
  float* d = static_cast<float*>(sums);
  const unsigned* a = static_cast<const unsigned*>(first);
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
"""

ROOTS = r"""
#ifndef LIFTC_ROOTS
#define LIFTC_ROOTS
__device__ __forceinline__ float liftc_root(float value) {
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(value));
  return root;
}
__device__ __forceinline__ float liftc_reciprocal(float value) {
  float inverse;
  asm("rcp.approx.f32 %0, %1;" : "=f"(inverse) : "f"(value));
  return inverse;
}
#endif
"""
"""To a unit in the last place, without a branch, so that they can be computed beside the products."""

Z_SCALE = r"""
__device__ __forceinline__ float liftc_z_scale(float squares, float step) {
  const float scale = __fmul_rn(liftc_root(squares), step);
  if (!(squares <= 3.402823466e38f && scale <= 3.402823466e38f)) return __int_as_float(0x7fc00000);
  return squares < 0x1p-100f || scale < 0x1p-100f ? 0.0f : scale;
}
__device__ __forceinline__ float liftc_inverse(float scale) { return scale > 0.0f ? liftc_reciprocal(scale) : 0.0f; }
"""
"""The step of z from the sum of squares of a token and the step at norm 1: NaN where it is not finite, 0 where it is
next to nothing; what results are multiplied with, 0 for these two."""

PLACE = r"""
__device__ __forceinline__ int liftc_place(int k, int column, int columns, int pieces) {
  const int quarter = k >> 6 & 3;
  const int piece = pieces == 4 ? quarter : quarter * 4 + (k >> 2 & 3);
  const int at = pieces == 4 ? k & 63 : (k >> 4 & 3) * 4 + (k & 3);
  return (((k >> 8) * pieces + piece) * columns + column) * (pieces == 4 ? 64 : 16) + at;
}
"""
"""Where the high byte of z of column k is in both layouts of planes; the low one is one column on."""

ROUND = r"""
__device__ __forceinline__ int liftc_round(float value, float inverse, void* high, int next) {
  int z = __float2int_rn(value * inverse);
  z = z < -16383 ? -16383 : z > 16383 ? 16383 : z;
  signed char* to = static_cast<signed char*>(high);
  to[0] = static_cast<signed char>((z + 128) >> 8);
  to[next] = static_cast<signed char>(z);
  return z;
}
"""
"""z of a value, stored as two bytes `next` apart; 0 for one that is not a number, as it is times an inverse of 0."""

STAGE_Z = r"""
__device__ __forceinline__ int liftc_stage_z(const void* part, int chains, float inverse, void* out, int first,
                                             int wide, int k0, int lifted, int lane) {
  const float* p = static_cast<const float*>(part);
  signed char* to = static_cast<signed char*>(out) + lane % 4 * 4 * (wide + 4) + first + lane / 4;
  const int k = k0 + lane % 4 * 2 * lifted;
  int total = 0;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    int z = __float2int_rn(liftc_total(p + q, chains) * inverse);
    z = z < -16383 ? -16383 : z > 16383 ? 16383 : z;
    signed char* high = to + q % 2 * 2 * (wide + 4) + q / 2 * 8 + (k + q % 2 * lifted & 3);
    high[0] = static_cast<signed char>((z + 128) >> 8);
    high[wide + 4] = static_cast<signed char>(z);
    total += z;
  }
  return total;
}
"""
"""z of four of 16 x 8 results; its bytes go to shared memory (8, 2, wide + 4), high ones before low ones, where column
`first` + c of row r, k0 + r lifted + first + c of T* x, is as many bytes into a word as in memory. Returns the sum. 0
for results that are no numbers, as they are times an inverse of 0, and for those that are padding."""

STORE_ROWS = r"""
__device__ __forceinline__ signed char* liftc_bytes_at(void* planes, int k, int column, int columns, int pieces) {
  const int quarter = k >> 6 & 3;
  const int piece = pieces == 4 ? quarter : quarter * 4 + (k >> 2 & 3);
  const int at = pieces == 4 ? k & 60 : (k >> 4 & 3) * 4;
  const int wide = pieces == 4 ? 64 : 16;
  return static_cast<signed char*>(planes) + (((k >> 8) * pieces + piece) * columns + column) * wide + at;
}
__device__ __forceinline__ void liftc_store_word(void* to, unsigned word, bool there) {
#ifdef __CUDA_ARCH__  // without branches, so that the places of all words are computed side by side
  asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p st.global.u32 [%0], %1; }"
               :: "l"(to), "r"(word), "r"(static_cast<int>(there)) : "memory");
#else
  if (there) *static_cast<unsigned*>(to) = word;
#endif
}
__device__ __forceinline__ void liftc_store_rows(const void* staged, int wide, int k0, int lifted, int most, int rows,
                                                 void* planes, int column, int columns, int pieces, int lane) {
  const unsigned* words = static_cast<const unsigned*>(staged);
  const int side = wide <= 24 ? 16 : 32, low = lane & 1, apart = (wide + 4) / 4;  // lanes of a row
#pragma unroll
  for (int row0 = 0; row0 < 8; row0 += 32 / side) {
    const int row = row0 + lane / side, begin = k0 + row * lifted, past = begin & 3;
#pragma unroll
    for (int first = 0; first < apart; first += side / 2) {
      const int word = first + lane % side / 2;
      const bool whole = row < rows && word * 4 >= past && word * 4 + 4 <= past + most;
      liftc_store_word(liftc_bytes_at(planes, begin - past + word * 4, column + low, columns, pieces),
                       words[(row * 2 + low) * apart + (word < apart ? word : apart - 1)], whole);
    }
  }
  if (lifted % 4 || most % 4) {  // words that are shared with other rows or blocks
    const int row = lane / 4, begin = k0 + row * lifted, past = begin & 3;
    const int last = (past + most - 1) / 4, word = lane & 2 ? last : 0;
    const bool part = lane & 2 ? (past + most) % 4 != 0 && last > 0 : past > 0 || past + most < 4;
    if (row < rows && part) {
      signed char* to = liftc_bytes_at(planes, begin - past + word * 4, column + low, columns, pieces);
      const unsigned bytes = words[(row * 2 + low) * apart + word];
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (word * 4 + e >= past && word * 4 + e < past + most) to[e] = static_cast<signed char>(bytes >> 8 * e);
    }
  }
}
"""
"""Staged bytes of `most` columns of `rows` of 8 rows to both layouts of planes, in whole words where they have them.
Lanes side by side have the two bytes of a z and its neighbours, which lie together: what a store costs is how many runs
of 32 bytes it touches."""

Z_GUARD = f"\n#ifndef LIFTC_Z_SCALE\n#define LIFTC_Z_SCALE\n{Z_SCALE}#endif\n"

DEVICE: dict[str, tuple[str, str]] = {
    "barrier_await": (group_device.BARRIER_AWAIT, ""),
    "barrier_expect": (group_device.BARRIER_EXPECT, ""),
    "barrier_init": (device.BARRIER_INIT, ""),
    "cluster_leave": (group_device.CLUSTER_LEAVE, ""),
    "dependent_start": (device.DEPENDENT_START, ""),
    "dependent_wait": (device.DEPENDENT_WAIT, ""),
    "deviations_x8": (FORMS, "float32"),
    "fence_init": (group_device.FENCE_INIT, ""),
    "gate_x8": (FORMS, ""),
    "gelu_x8": (FORMS, ""),
    "inverse": (ROOTS + Z_GUARD, "float32"),
    "layer_x8": (FORMS, ""),
    "load_words": (LOAD_WORDS, ""),
    "load_x8": (LOAD_X8, ""),
    "mixed_words": (BF16, ""),
    "mma_bf16": (MMA_BF16, ""),
    "norm_x8": (FORMS, ""),
    "prefetch": (device.PREFETCH, ""),
    "place": (PLACE, "int32"),
    "round": (ROUND, "int32"),
    "stage_z": (BF16 + STAGE_Z, "int32"),
    "store_rows": (STORE_ROWS, ""),
    "total": (BF16, "float32"),
    "split_x4": (BF16, "float32"),
    "squares_x8": (FORMS, "float32"),
    "sum_x8": (FORMS, "float32"),
    "share": (PEERS, ""),
    "warp_add": (device.WARP_ADD, ""),
    "warp_sum": (PEERS + WARP_SUM, ""),
    "z_scale": (ROOTS + Z_GUARD, "float32"),
}
"""Source and result type of the device functions."""


def call(name: str, *arguments: Any) -> Any:
    """A call of the device function liftc_<name>."""
    source, returns = DEVICE[name]
    result = {"return_type": returns} if returns else {}
    return T.cuda.func_call(f"liftc_{name}", *arguments, source_code=source, **result)
