"""Small device functions of the kernels that read tiles as numbers: bits to rows, signs to halves, stores."""

LAY_ROWS = r"""
__device__ __forceinline__ void liftc_lay_rows(unsigned w0, unsigned w1, unsigned w2, unsigned w3, void* out,
                                               int place, int stride) {
  const unsigned words[4] = {w0, w1, w2, w3};
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const unsigned a = words[s], b = words[2 + s];
    unsigned x[2] = {(a & 0x0f0f0f0fu) | ((b << 4) & 0xf0f0f0f0u), ((a >> 4) & 0x0f0f0f0fu) | (b & 0xf0f0f0f0u)};
    unsigned short* to = static_cast<unsigned short*>(out) + s * 8 * stride + place;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      unsigned t = ((x[i] >> 14) ^ x[i]) & 0x0000ccccu;
      x[i] ^= t ^ (t << 14);
      t = ((x[i] >> 7) ^ x[i]) & 0x00aa00aau;
      x[i] = ~(x[i] ^ t ^ (t << 7));
      to[i * 8] = static_cast<unsigned short>(x[i]);
      to[i * 8 + 4] = static_cast<unsigned short>(x[i] >> 16);
    }
  }
}
"""
"""The words of a lane of a tile, bit 8 b + j of word 2 h + s, become strings of bits in column order, inverted:
row g at `out`, row g + 8 after 8 strides, in units of 16 columns; four units from
`place` on, 64 columns apart. One exchange
between the two words of a row and two exchanges of index bits within a word do the permutation."""

STORE_VECTOR = r"""
#ifndef LIFTC_STORE_VECTOR
#define LIFTC_STORE_VECTOR
__device__ __forceinline__ void liftc_store_vector(void* to, unsigned a, unsigned b, unsigned c, unsigned d) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" :: "l"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
#endif
"""
"""An assignment of a uint4 becomes four stores here."""

WARP_MAX = r"""
__device__ __forceinline__ void liftc_warp_max(void* highest, int value, int lane) {
  const int top = __reduce_max_sync(0xffffffffu, value);
  if (lane == 0) atomicMax(static_cast<int*>(highest), top);
}
"""

LOAD_TILE = r"""
__device__ __forceinline__ void liftc_load_tile(const void* from, void* to) {
  *static_cast<uint4*>(to) = __ldg(static_cast<const uint4*>(from));
}
"""

WORDS_OF_LANE = r"""
__device__ __forceinline__ void liftc_words_of_lane(const void* from, int lane, void* to) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    static_cast<unsigned*>(to)[i] = __shfl_sync(0xffffffffu, static_cast<const unsigned*>(from)[i], lane);
}
"""

SIGN_PAIRS = r"""
__device__ __forceinline__ unsigned liftc_sign_pairs(const void* words, int bit, int half) {
  const unsigned* from = static_cast<const unsigned*>(words) + (bit >> 5);
  const unsigned run = __funnelshift_r(from[0], from[1], bit & 31);
  return __byte_perm(run, run >> half, 0x5410);
}
"""
"""Bits `bit`... of a string in the lower 16 bits and those `half` later in the upper 16."""

PACK_F16 = r"""
__device__ __forceinline__ unsigned liftc_pack_f16(float low, float high) {
  unsigned both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
"""

REST_F16 = r"""
__device__ __forceinline__ float liftc_rest_f16(float value) {
  unsigned short half;
  float rounded;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  asm("cvt.f32.f16 %0, %1;" : "=f"(rounded) : "h"(half));
  return value - rounded;
}
"""
"""What rounding to float16 loses."""

ROUND_TWO = r"""
#ifndef LIFTC_TWO_KIND
#define LIFTC_TWO_KIND
__device__ __forceinline__ unsigned liftc_two_KIND(float low, float high) {
  unsigned both;
  asm("cvt.rn.KINDx2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
#endif
"""

STORE_HALVES = r"""
__device__ __forceinline__ void liftc_store_eight_KIND(void* out, long long at, int count, int vector, float scale,
                                                       float v0, float v1, float v2, float v3, float v4, float v5,
                                                       float v6, float v7) {
  const unsigned w[4] = {liftc_two_KIND(v0 * scale, v1 * scale), liftc_two_KIND(v2 * scale, v3 * scale),
                         liftc_two_KIND(v4 * scale, v5 * scale), liftc_two_KIND(v6 * scale, v7 * scale)};
  unsigned short* to = static_cast<unsigned short*>(out) + at;
  if (vector) {
    if (count > 0) liftc_store_vector(to, w[0], w[1], w[2], w[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count) to[i] = static_cast<unsigned short>(w[i / 2] >> (i % 2 * 16));
  }
}
"""

STORE_F32 = r"""
__device__ __forceinline__ void liftc_store_eight_f32(void* out, long long at, int count, int vector, float scale,
                                                      float v0, float v1, float v2, float v3, float v4, float v5,
                                                      float v6, float v7) {
  const float v[8] = {v0 * scale, v1 * scale, v2 * scale, v3 * scale, v4 * scale, v5 * scale, v6 * scale, v7 * scale};
  float* to = static_cast<float*>(out) + at;
  if (vector) {
#pragma unroll
    for (int i = 0; i < 8; i += 4)
      if (count > 0)
        liftc_store_vector(to + i, __float_as_uint(v[i]), __float_as_uint(v[i + 1]), __float_as_uint(v[i + 2]),
                           __float_as_uint(v[i + 3]));
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count) to[i] = v[i];
  }
}
"""

STORE_EIGHT = {
    "f16": STORE_VECTOR + (ROUND_TWO + STORE_HALVES).replace("KIND", "f16"),
    "bf16": STORE_VECTOR + (ROUND_TWO + STORE_HALVES).replace("KIND", "bf16"),
    "f32": STORE_VECTOR + STORE_F32,
}
"""Eight neighbouring values times a scale, at most `count` of them; as one vector where rows are so aligned."""

_UNPACK_HALVES = r"""
__device__ __forceinline__ void liftc_unpack_eight_KIND(void* out, long long at, int count, int vector, unsigned low,
                                                        unsigned high, int j) {
  unsigned w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const unsigned x = ~((i / 2 ? high : low) >> (i % 2 * 16 + j));
    w[i] = ONES | ((x & 1u) << 15) | ((x & 0x100u) << 23);
  }
  unsigned short* to = static_cast<unsigned short*>(out) + at;
  if (vector) {
    if (count > 0) liftc_store_vector(to, w[0], w[1], w[2], w[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count) to[i] = static_cast<unsigned short>(w[i / 2] >> (i % 2 * 16));
  }
}
"""

_UNPACK_FOUR = r"""
__device__ __forceinline__ void liftc_unpack_four_f32(void* out, long long at, int count, int vector, unsigned word,
                                                      int j) {
  unsigned w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = 0x3f800000u | (~(word >> (i * 8 + j)) << 31);
  unsigned* to = static_cast<unsigned*>(out) + at;
  if (vector) {
    if (count > 0) liftc_store_vector(to, w[0], w[1], w[2], w[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) to[i] = w[i];
  }
}
"""

UNPACK = {
    "f16": STORE_VECTOR + _UNPACK_HALVES.replace("KIND", "f16").replace("ONES", "0x3c003c00u"),
    "bf16": STORE_VECTOR + _UNPACK_HALVES.replace("KIND", "bf16").replace("ONES", "0x3f803f80u"),
    "f32": STORE_VECTOR + _UNPACK_FOUR,
}
"""Neighbouring columns of a row as one vector of +1 and -1: eight from two words of a tile, or four from one; column
b of a word is its bit 8 b + j."""

LOAD_EIGHT = {
    short: r"""
__device__ __forceinline__ void liftc_eight_KIND(const void* x, const void* scale, int scaled, float* v) {
  const unsigned* words = static_cast<const unsigned*>(x);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = liftc_low_KIND(words[i]);
    v[2 * i + 1] = liftc_high_KIND(words[i]);
  }
  if (scaled) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= static_cast<const float*>(scale)[i];
  }
}
__device__ __forceinline__ int liftc_peak_of_eight_KIND(const void* x, const void* scale, int scaled) {
  float v[8];
  int peak = 0;
  liftc_eight_KIND(x, scale, scaled, v);
#pragma unroll
  for (int i = 0; i < 8; ++i) peak = max(peak, __float_as_int(v[i]) & 0x7fffffff);
  return peak;
}
__device__ __forceinline__ void liftc_halves_of_eight_KIND(const void* x, const void* scale, int scaled, float times,
                                                           void* out) {
  float v[8];
  unsigned* w = static_cast<unsigned*>(out);
  liftc_eight_KIND(x, scale, scaled, v);
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = liftc_two_f16(v[2 * i] * times, v[2 * i + 1] * times);
}
""".replace("KIND", short)
    for short in ("f16", "bf16")
}
"""Four words with eight values of x, times eight entries of a scale where there is one: the bits of the largest
magnitude, or four words of float16."""

STORE_PAIR = r"""
__device__ __forceinline__ void liftc_store_pair(void* to, unsigned a, unsigned b) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" :: "l"(to), "r"(a), "r"(b) : "memory");
}
"""

VALUES_OF_WORD = r"""
__device__ __forceinline__ float liftc_low_bf16(unsigned w) { return __uint_as_float(w << 16); }
__device__ __forceinline__ float liftc_high_bf16(unsigned w) { return __uint_as_float(w & 0xffff0000u); }
__device__ __forceinline__ float liftc_low_f16(unsigned w) {
  float value;
  asm("{ .reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a; }" : "=f"(value) : "r"(w));
  return value;
}
__device__ __forceinline__ float liftc_high_f16(unsigned w) {
  float value;
  asm("{ .reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, b; }" : "=f"(value) : "r"(w));
  return value;
}
"""

STORE_FOUR = {
    short: r"""
__device__ __forceinline__ void liftc_store_four_KIND(void* out, long long at, float times, float a, float b, float c,
                                                      float d) {
  liftc_store_pair(static_cast<unsigned short*>(out) + at, liftc_two_KIND(a * times, b * times),
                   liftc_two_KIND(c * times, d * times));
}
""".replace("KIND", short)
    for short in ("f16", "bf16")
}
"""Four neighbouring values times a factor."""

WHITEN = (
    "#ifndef LIFTC_WHITEN\n#define LIFTC_WHITEN\n"
    + "".join(ROUND_TWO.replace("KIND", short) for short in LOAD_EIGHT)
    + VALUES_OF_WORD
    + STORE_PAIR
    + "".join(LOAD_EIGHT[short] + STORE_FOUR[short] for short in LOAD_EIGHT)
    + "#endif\n"
)
"""What a kernel that transforms activations needs."""
