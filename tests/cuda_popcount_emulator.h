// What the binary tensor-core product needs beyond cuda_warp_emulator.h: mma on bits of a whole warp, and loads past L1.
#pragma once
#include "cuda_warp_emulator.h"

inline void tvm_builtin_ptx_mma_int_sync_aligned_m16n8k256_row_col_s32_b1_b1_s32_and_popc(
    uint32_t& d0, uint32_t& d1, uint32_t& d2, uint32_t& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
    uint32_t b0, uint32_t b1, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  int w = block::current / 32, lane = block::current % 32;
  uint32_t mine[4] = {a0, a1, a2, a3};
  std::memcpy(warp::a[w][lane], mine, 16);
  warp::b[w][lane][0] = b0, warp::b[w][lane][1] = b1;
  block::meet(block::warps[w]);
  uint32_t out[4] = {c0, c1, c2, c3};
  for (int q = 0; q < 4; ++q) {
    int row = lane / 4 + q / 2 * 8, column = lane % 4 * 2 + q % 2;
    for (int k = 0; k < 8; ++k)  // words of 32 columns; PTX ISA, fragments of mma.m16n8k256
      out[q] += __builtin_popcount(warp::a[w][row % 8 * 4 + k % 4][row / 8 + k / 4 * 2] &
                                   warp::b[w][column * 4 + k % 4][k / 4]);
  }
  block::meet(block::warps[w]);
  d0 = out[0], d1 = out[1], d2 = out[2], d3 = out[3];
}
inline unsigned long long liftc_address(const void* at) { return reinterpret_cast<unsigned long long>(at); }
inline void liftc_load_bytes(unsigned long long from, int apart, void* out) {
  for (int q = 0; q < 4; ++q) {
    const char* at = reinterpret_cast<const char*>(from) + q * apart;
    if (warp::inside(at, 16)) std::memcpy(static_cast<char*>(out) + 16 * q, at, 16);
  }
}
