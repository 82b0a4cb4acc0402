// What the product that lifts for itself needs: both of its halves, and operands turned while they are loaded.
#pragma once
#include "cuda_lift_emulator.h"
#include "cuda_popcount_emulator.h"

inline void liftc_load_turned(const void* row, void* out) {
  int w = block::current / 32, lane = block::current % 32;
  static std::vector<const uint16_t*> rows;
  if (rows.size() < block::fibers.size()) rows.resize(block::fibers.size());
  rows[block::current] = static_cast<const uint16_t*>(row);
  block::meet(block::warps[w]);
  for (int m = 0; m < 4; ++m) {  // PTX ISA, ldmatrix: lanes 8 m to 8 m + 7 name the rows of matrix m
    const uint16_t** named = &rows[w * 32 + m * 8 + lane % 4 * 2];
    static_cast<uint32_t*>(out)[m] = named[0][lane / 4] | uint32_t(named[1][lane / 4]) << 16;
  }
  block::meet(block::warps[w]);
}
