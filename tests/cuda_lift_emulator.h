// What the tensor-core lift needs beyond cuda_half_emulator.h: loads of x that stay inside it, bfloat16 mma of a whole
// warp with float sums, and rounding as CUDA names it.
#pragma once
#define POOL_FILL 0x4400440044004400  // 512 as bfloat16, about as much as float
#include "cuda_barrier_emulator.h"
#include "cuda_half_emulator.h"

#include <array>

struct alignas(16) float4 { float x, y, z, w; };
inline unsigned liftc_pack_bf16(float low, float high) { return bfloat_bits(low) | bfloat_bits(high) << 16; }
inline unsigned liftc_pack_half(float low, float high) { return half_bits(low) | half_bits(high) << 16; }
inline float __expf(float value) { return std::exp(value); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline float liftc_from_half(unsigned bits) { return half_value(bits); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __shfl_xor_sync(uint mask, float value, int away) {
  return __int_as_float(__shfl_xor_sync(mask, __float_as_int(value), away));
}
inline float liftc_root(float value) { return std::sqrt(value); }
inline float liftc_reciprocal(float value) { return 1.0f / value; }
inline void liftc_load_x8(const void* from, int kind, int there, void* out) {
  size_t size = kind == 0 ? 32 : 16;
  std::memset(out, 0, size);
  if (there > 0 && reinterpret_cast<uintptr_t>(from) % 16) ++warp::bad_reads;
  if (there > 0 && warp::inside(from, size)) std::memcpy(out, from, size);
}
inline float4 liftc_load_floats(const void* from, int there) {
  return there > 0 && warp::inside(from, 16) ? *static_cast<const float4*>(from) : float4{0, 0, 0, 0};
}
inline void liftc_load_words(const void* from, void* out) {
  const uchar *at = static_cast<const uchar*>(from), *pool = pool_buf_ptr;
  if (at >= pool && at + 16 <= pool + POOL || warp::inside(from, 16)) std::memcpy(out, from, 16);
}
inline void liftc_mma_bf16(void* sums, const void* first, unsigned b0, unsigned b1) {
  int w = block::current / 32, lane = block::current % 32;
  static std::vector<std::array<uint32_t, 6>> operands;
  if (operands.size() < block::fibers.size()) operands.resize(block::fibers.size());
  std::memcpy(operands[block::current].data(), first, 16);
  operands[block::current][4] = b0, operands[block::current][5] = b1;
  block::meet(block::warps[w]);
  float* d = static_cast<float*>(sums);
  for (int q = 0; q < 4; ++q) {
    int row = lane / 4 + q / 2 * 8, column = lane % 4 * 2 + q % 2;
    for (int k = 0; k < 16; ++k) {  // PTX ISA, fragments of mma.m16n8k16 for .bf16
      int from = k % 8 / 2, shift = k % 2 * 16;
      uint32_t av = operands[w * 32 + row % 8 * 4 + from][row / 8 + k / 8 * 2] >> shift;
      uint32_t bv = operands[w * 32 + column * 4 + from][4 + k / 8] >> shift;
      d[q] += __uint_as_float(av << 16) * __uint_as_float(bv << 16);
    }
  }
  block::meet(block::warps[w]);
}

namespace cluster {
static std::map<int, block::Meeting> meetings;
static int size = 1;  // blocks of one
inline uchar* peer(const void* at, int rank) {
  int mine = block::current / block::block_threads;
  uchar* pool = reinterpret_cast<uchar*>(pools[mine / size * size + rank].data());
  return pool + (static_cast<const uchar*>(at) - pool_buf_ptr);
}
}  // namespace cluster
inline uint32_t tvm_builtin_cluster_ctaid_x() { return blockIdx.x % cluster::size; }
inline void liftc_cluster_leave() {
  int threads = block::block_threads * cluster::size;
  block::Meeting& meeting = cluster::meetings[block::current / threads];
  meeting.size = threads;
  block::meet(meeting);
}
inline void liftc_share_float(float value, void* at, int to, void* barrier, int rank, int peers) {
  if (to != rank) bulk::arrived(cluster::peer(barrier, to), 4);
  std::memcpy(to != rank ? cluster::peer(at, to) : at, &value, 4);
}
inline void liftc_share(const void* words, void* at, void* barrier, int rank, int peers) {
  for (int to = 0; to < peers; ++to) {
    if (peers > 1 && to != rank) bulk::arrived(cluster::peer(barrier, to), 16);
    uchar* there = peers > 1 ? cluster::peer(at, to) : static_cast<uchar*>(at);
    std::memcpy(there, words, 8);
    std::memcpy(there + 512, static_cast<const uint32_t*>(words) + 2, 8);
  }
}
extern "C" void set_cluster(int size) { cluster::size = size; }
