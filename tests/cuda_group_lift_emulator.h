// What the lift on warp-group products needs beyond cuda_lift_emulator.h: bfloat16 wgmma, whose sums appear as late as the
// waits allow, or at once, and which sees sums and shared memory only as they were at fences.
#pragma once
#include "cuda_lift_emulator.h"

namespace group {
constexpr int MOST_SUMS = 128;
struct Product { uint32_t a[4]; uint64_t matrix; int columns; bool turned; };
struct Thread {
  std::vector<Product> issued;
  size_t committed = 0;
  float sums[MOST_SUMS];  // as the tensor cores see them, not a number where no fence shows them
};
struct Visible { int fences = 0; std::vector<uint64_t> pool; };
static std::map<int, Thread> threads;
static std::map<int, Visible> shared;  // by block, as the tensor cores see it

inline Visible& visible() {
  Visible& mine = shared[block::current / block::block_threads];
  if (mine.pool.empty()) mine.pool.assign(POOL / 8, POOL_FILL);
  return mine;
}
inline void hide(Thread& thread) { std::fill(thread.sums, thread.sums + MOST_SUMS, NAN); }
inline Thread& thread() {
  auto [found, is_new] = threads.try_emplace(block::current);
  if (is_new) hide(found->second);
  return found->second;
}

// PTX ISA: fragments of wgmma.m64nNk16; shared memory without swizzle in matrices of 8 x 16 bytes, K-major or turned.
inline void compute(size_t which) {
  Thread& mine = thread();
  const Product p = mine.issued[which];
  const uchar* pool = reinterpret_cast<const uchar*>(visible().pool.data());
  int lane = block::current % 32, quad = block::current / 4 * 4;
  uint32_t start = (p.matrix & 0x3FFF) << 4, along_k = (p.matrix >> 16 & 0x3FFF) << 4, along_n = (p.matrix >> 32 & 0x3FFF) << 4;
  float first[2][16];
  for (int from = 0; from < 4; ++from) {
    const Product& other = threads[quad + from].issued[which];
    for (int q = 0; q < 4; ++q)
      for (int e = 0; e < 2; ++e) first[q % 2][q / 2 * 8 + from * 2 + e] = bfloat_value(other.a[q] >> 16 * e << 16);
  }
  for (int pair = 0; pair < p.columns / 4; ++pair) {
    int n = lane % 4 * 2 + pair % 2;  // of a matrix
    const uchar* from = pool + start + pair / 2 * along_n + n * (p.turned ? 2 : 16);
    float* d = mine.sums + pair / 2 * 4 + pair % 2;
    for (int k = 0; k < 16; ++k) {
      uint16_t bits;
      std::memcpy(&bits, from + k / 8 * along_k + k % 8 * (p.turned ? 16 : 2), 2);
      float second = bfloat_value(uint32_t(bits) << 16);
      d[0] += first[0][k] * second;
      d[2] += first[1][k] * second;
    }
  }
}
inline void multiply(void* sums, Product p, const void* second, int along_k, int along_n) {
  uint64_t at = tvm_builtin_cuda_cvta_generic_to_shared(const_cast<void*>(second)) >> 4 & 0x3FFF;
  p.matrix = at | uint64_t(along_k >> 4) << 16 | uint64_t(along_n >> 4) << 32;
  Thread& mine = thread();
  mine.issued.push_back(p);
  if (!warp::early) return;
  block::meet(block::warps[block::current / 32]);
  compute(mine.issued.size() - 1);
  std::memcpy(sums, mine.sums, p.columns * 2);
  block::meet(block::warps[block::current / 32]);
}
inline void fence(void* sums, int columns) {
  if (thread().issued.empty()) std::memcpy(thread().sums, sums, columns * 2);
}
// An operand that is no longer among the words that are kept was overwritten before its product was over.
inline void wait(void* sums, int columns, const uint32_t* words, int held) {
  Thread& mine = thread();
  block::Meeting& warp = block::warps[block::current / 32];
  block::meet(warp);
  for (size_t which = 0; which < mine.committed; ++which) {
    if (!warp::early) compute(which);
    for (uint32_t operand : mine.issued[which].a)
      if (std::find(words, words + held, operand) == words + held) hide(mine);
  }
  block::meet(warp);
  if (mine.committed > 0) std::memcpy(sums, mine.sums, columns * 2);
  mine.issued.erase(mine.issued.begin(), mine.issued.begin() + mine.committed);
  mine.committed = 0;
  hide(mine);
}
}  // namespace group

#define GROUP_MMA(COLUMNS, TURNED)                                                                                    \
  inline void liftc_group_mma_##COLUMNS##_##TURNED(void* sums, unsigned a0, unsigned a1, unsigned a2, unsigned a3,    \
                                                   const void* second, int along_k, int along_n) {                    \
    group::multiply(sums, {{a0, a1, a2, a3}, 0, COLUMNS, TURNED == 1}, second, along_k, along_n);                     \
  }
#define GROUP_FENCE(COLUMNS) \
  inline void liftc_group_fence_##COLUMNS(void* sums) { group::fence(sums, COLUMNS); }
#define GROUP_WAIT(COLUMNS, HELD)                                         \
  inline void liftc_group_wait_##COLUMNS##_##HELD(void* sums, void* words) { \
    group::wait(sums, COLUMNS, static_cast<const uint32_t*>(words), HELD); \
  }
inline void liftc_group_commit() { group::thread().committed = group::thread().issued.size(); }
inline void liftc_fence_shared() {  // what a block has written is there when the last of its threads says so
  group::Visible& mine = group::visible();
  if (++mine.fences % block::block_threads == 0) std::memcpy(mine.pool.data(), pool_buf_ptr, POOL);
}
extern "C" long shared_bytes_used() {  // of the blocks of the last launch
  long used = 0;
  const uint64_t fill = POOL_FILL;
  for (const std::vector<uint64_t>& pool : pools)
    for (long at = POOL; at > used; --at)
      if (reinterpret_cast<const uchar*>(pool.data())[at - 1] != reinterpret_cast<const uchar*>(&fill)[(at - 1) % 8]) used = at;
  return used;
}
extern "C" void begin_launch() {
  group::threads.clear();
  group::shared.clear();
}
