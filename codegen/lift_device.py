"""Small device functions of the tensor-core lift (codegen/tensorcore_lift.py), beside those of tensorcore_device.py."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from liftc.codegen import tensorcore_device as device

WARP_SUM = r"""
__device__ __forceinline__ void liftc_warp_sum(float value, void* out, int lane) {
#pragma unroll
  for (int away = 16; away > 0; away /= 2) value += __shfl_xor_sync(0xffffffffu, value, away);
  if (lane == 0) *static_cast<float*>(out) = value;
}
"""

LOAD_X8 = r"""
__device__ __forceinline__ void liftc_load_x8(const void* from, int kind, int inside, void* out) {
  unsigned* v = static_cast<unsigned*>(out);
#pragma unroll
  for (int i = 0; i < (kind == 0 ? 8 : 4); ++i) v[i] = 0;
  if (inside) {
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "l"(from));
    if (kind == 0)
      asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(v[4]), "=r"(v[5]), "=r"(v[6]), "=r"(v[7]) : "l"(static_cast<const char*>(from) + 16));
  }
}
"""
"""Eight values of x as they are, or zeros; kind 0 for float32, 1 for float16, 2 for bfloat16."""

CONVERT = r"""
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

__device__ __forceinline__ unsigned liftc_pair(float low, float high, int kind) {
  return kind == 1 ? liftc_pack_half(low, high) : liftc_pack_bf16(low, high);
}

__device__ __forceinline__ float liftc_squares_x8(const void* raw, int kind) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float v = liftc_value(static_cast<const unsigned*>(raw), i, kind);
    sum = fmaf(v, v, sum);
  }
  return sum;
}

__device__ __forceinline__ void liftc_norm_x8(void* raw, const void* gain, float root, int kind) {
  unsigned* r = static_cast<unsigned*>(raw);
  const unsigned* g = static_cast<const unsigned*>(gain);
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    float a = liftc_value(r, i, kind) * root, b = liftc_value(r, i + 1, kind) * root;
    if (kind == 0) {
      r[i] = __float_as_uint(a * liftc_value(g, i, kind));
      r[i + 1] = __float_as_uint(b * liftc_value(g, i + 1, kind));
    } else {
      r[i / 2] = liftc_pair(a, b, kind);
      r[i / 2] = liftc_pair(liftc_value(r, i, kind) * liftc_value(g, i, kind),
                            liftc_value(r, i + 1, kind) * liftc_value(g, i + 1, kind), kind);
    }
  }
}

__device__ __forceinline__ void liftc_gate_x8(void* raw, const void* up, int kind) {
  unsigned* r = static_cast<unsigned*>(raw);
  const unsigned* u = static_cast<const unsigned*>(up);
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    float a = liftc_value(r, i, kind), b = liftc_value(r, i + 1, kind);
    a = a / (1.0f + expf(-a));
    b = b / (1.0f + expf(-b));
    if (kind == 0) {
      r[i] = __float_as_uint(a * liftc_value(u, i, kind));
      r[i + 1] = __float_as_uint(b * liftc_value(u, i + 1, kind));
    } else {
      r[i / 2] = liftc_pair(a, b, kind);
      r[i / 2] = liftc_pair(liftc_value(r, i, kind) * liftc_value(u, i, kind),
                            liftc_value(r, i + 1, kind) * liftc_value(u, i + 1, kind), kind);
    }
  }
}

__device__ __forceinline__ float liftc_split_x4(const void* raw, int kind, int half, const void* scale,
                                                int scaled, void* out) {
  const unsigned* r = static_cast<const unsigned*>(raw) + half * (kind == 0 ? 4 : 2);
  unsigned* b = static_cast<unsigned*>(out);
  float v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = liftc_value(r, i, kind);
  if (scaled) {
    const float4 s = *static_cast<const float4*>(scale);
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
__device__ __forceinline__ void liftc_store_mixed(const void* part, void* out) {
  const float* p = static_cast<const float*>(part);
  uint2 high, low;
  liftc_split_pair(p[0] + p[4], p[1] + p[5], high.x, low.x);
  liftc_split_pair(p[2] + p[6], p[3] + p[7], high.y, low.y);
  uint2* to = static_cast<uint2*>(out);
  to[0] = high;
  to[64] = low;
}
"""
"""Floats as sums of two bfloat16 numbers, to 16 bits each. norm_x8, gate_x8: x of a norm or of a gate, rounded
after each of its steps. split_x4: half of eight values of x, scaled, as two words
of high parts and two of low parts (none where bfloat16 says it all); returns the sum of squares. store_mixed: four
sums of 16 x 8 results as half an operand of high parts, and of low parts 512 bytes on."""

BF16 = f"\n#ifndef LIFTC_BF16\n#define LIFTC_BF16\n{CONVERT}{SPLIT}#endif\n"
"""Both, once in a source however many of their functions are called."""

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

Z_SCALE = r"""
__device__ __forceinline__ float liftc_z_scale(float squares, float bound) {
  const float scale = __fmul_rn(__fsqrt_rn(squares), __fdiv_rn(bound, 16383.0f));
  if (!(squares <= 3.402823466e38f && scale <= 3.402823466e38f)) return __int_as_float(0x7fc00000);
  return squares < 0x1p-100f || scale < 0x1p-100f ? 0.0f : scale;
}
"""
"""The step of z from the sum of squares of a token: NaN where it is not finite, 0 where it is next to nothing."""

ROUND = r"""
__device__ __forceinline__ int liftc_round(float value, float scale, void* planes, int k, int column,
                                           int columns, int pieces) {
  int z = scale > 0.0f ? __float2int_rn(value * (1.0f / scale)) : 0;
  z = z < -16383 ? -16383 : z > 16383 ? 16383 : z;
  const int wide = 256 / pieces, piece = pieces == 4 ? k / 64 % 4 : k / 64 % 4 * 4 + k / 4 % 4;
  const int at = pieces == 4 ? k % 64 : k / 16 % 4 * 4 + k % 4;
  signed char* to = static_cast<signed char*>(planes);
  to += (static_cast<long long>(k / 256 * pieces + piece) * columns + column) * wide + at;
  to[0] = static_cast<signed char>((z + 128) >> 8);
  to[wide] = static_cast<signed char>(z);
  return z;
}
"""
"""z of one value and the step, stored as its two bytes at column k of both layouts of planes."""

DEVICE: dict[str, tuple[str, str]] = {
    "dependent_start": (device.DEPENDENT_START, ""),
    "dependent_wait": (device.DEPENDENT_WAIT, ""),
    "gate_x8": (BF16, ""),
    "load_words": (LOAD_WORDS, ""),
    "load_x8": (LOAD_X8, ""),
    "mma_bf16": (MMA_BF16, ""),
    "norm_x8": (BF16, ""),
    "prefetch": (device.PREFETCH, ""),
    "round": (ROUND, "int32"),
    "split_x4": (BF16, "float32"),
    "squares_x8": (BF16, "float32"),
    "store_mixed": (BF16, ""),
    "warp_add": (device.WARP_ADD, ""),
    "warp_sum": (WARP_SUM, ""),
    "z_scale": (Z_SCALE, "float32"),
}
"""Source and result type of the device functions."""


def call(name: str, *arguments: Any) -> Any:
    """A call of the device function liftc_<name>."""
    source, returns = DEVICE[name]
    result = {"return_type": returns} if returns else {}
    return T.cuda.func_call(f"liftc_{name}", *arguments, source_code=source, **result)
