// What the kernels that turn tiles into numbers need beyond cuda_warp_emulator.h: half-precision mma of a whole
// warp with float sums, conversions, and vectors of 16 bytes.
#pragma once
#include "cuda_warp_emulator.h"

using half = uint16_t;
using nv_bfloat16 = uint16_t;
struct alignas(16) uint4 { uint32_t x, y, z, w; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint4 __ldg(const uint4* from) {
  uint4 value = {0, 0, 0, 0};
  if (warp::inside(from, 16)) std::memcpy(&value, from, 16);
  return value;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, int shift) {
  return uint32_t(((uint64_t(high) << 32) | low) >> (shift & 31));
}
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, int shift) {
  return uint32_t(((uint64_t(high) << 32) | low) << (shift & 31) >> 32);
}
inline unsigned liftc_pack_f16(float low, float high) { return half_bits(low) | half_bits(high) << 16; }
inline unsigned liftc_two_f16(float low, float high) { return half_bits(low) | half_bits(high) << 16; }
inline unsigned liftc_two_bf16(float low, float high) { return bfloat_bits(low) | bfloat_bits(high) << 16; }
inline float liftc_low_f16(uint32_t w) { return half_value(w); }
inline float liftc_high_f16(uint32_t w) { return half_value(w >> 16); }
inline float liftc_low_bf16(uint32_t w) { return bfloat_value(w << 16); }
inline float liftc_high_bf16(uint32_t w) { return bfloat_value(w & 0xffff0000u); }
inline int __float_as_int(float value) {
  int bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline void liftc_store_vector(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  uint32_t words[4] = {a, b, c, d};
  std::memcpy(to, words, 16);
}
inline void liftc_store_pair(void* to, uint32_t a, uint32_t b) {
  uint32_t words[2] = {a, b};
  std::memcpy(to, words, 8);
}
inline uint32_t __float_as_uint(float value) { return uint32_t(__float_as_int(value)); }
inline uint32_t __shfl_sync(uint32_t, uint32_t value, int lane) {
  block::Meeting& group = block::warps[block::current / 32];
  group.values[block::current % 32] = int(value);
  block::meet(group);
  uint32_t other = uint32_t(group.values[lane & 31]);
  block::meet(group);
  return other;
}
inline float liftc_rest_f16(float value) { return value - half_value(half_bits(value)); }

namespace warp {
static uint32_t half_a[64][32][4], half_b[64][32][2];
}
inline void tvm_builtin_ptx_mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(
    float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
    uint32_t b1, float c0, float c1, float c2, float c3) {
  int w = block::current / 32, lane = block::current % 32;
  uint32_t mine[4] = {a0, a1, a2, a3};
  std::memcpy(warp::half_a[w][lane], mine, 16);
  warp::half_b[w][lane][0] = b0, warp::half_b[w][lane][1] = b1;
  block::meet(block::warps[w]);
  float out[4] = {c0, c1, c2, c3};
  for (int q = 0; q < 4; ++q) {
    int row = lane / 4 + q / 2 * 8, column = lane % 4 * 2 + q % 2;
    for (int k = 0; k < 16; ++k) {  // PTX ISA, fragments of mma.m16n8k16 for .f16
      int from = k % 8 / 2, shift = k % 2 * 16;
      uint32_t av = warp::half_a[w][row % 8 * 4 + from][row / 8 + k / 8 * 2] >> shift;
      uint32_t bv = warp::half_b[w][column * 4 + from][k / 8] >> shift;
      out[q] += half_value(av) * half_value(bv);
    }
  }
  block::meet(block::warps[w]);
  d0 = out[0], d1 = out[1], d2 = out[2], d3 = out[3];
}
