// What tensor-core kernels need beyond cuda_block_emulator.h: shared memory as 32-bit addresses, asynchronous
// copies that land as late as the waits allow, or at once, and integer mma of a whole warp.
#pragma once
#include "cuda_block_emulator.h"

#include <cstdint>
#include <cstring>
#include <deque>
#include <map>

#define __device__
#define __forceinline__ inline
#define __restrict__
using std::min;
using uchar = unsigned char;
constexpr int POOL = 1 << 18;
#ifndef POOL_FILL
#define POOL_FILL 0xA5A5A5A5A5A5A5A5  // what is in shared memory when a kernel starts
#endif
static std::vector<std::vector<uint64_t>> pools;  // shared memory of every block that runs
inline uchar* pool_of_block() { return reinterpret_cast<uchar*>(pools[block::current / block::block_threads].data()); }
#define pool_buf_ptr pool_of_block()
#ifndef SHARED_WINDOW
#define SHARED_WINDOW 0u  // what 32-bit addresses of this block's shared memory have in their upper eight bits
#endif
inline uchar* shared_at(uint32_t at) { return pool_buf_ptr + (at & 0xFFFFFF); }

namespace warp {
struct Copy { uint32_t to; const void* from; };
struct Pipe { std::vector<Copy> open; std::deque<std::vector<Copy>> groups; };
static std::map<int, Pipe> pipes;
static uint32_t a[256][32][4], b[256][32][2];
static const uchar *begin, *end;  // what asynchronous copies and prefetches may touch besides `tiles`
static const uchar *tiles_begin, *tiles_end;
static long bad_reads;
static bool early;  // whether asynchronous work lands at once

inline void copy(const Copy& c) { std::memcpy(shared_at(c.to), c.from, 16); }
inline void flush(std::vector<Copy>& group) { for (const Copy& c : group) copy(c); group.clear(); }
inline bool inside(const void* p, size_t size) {
  const uchar* at = static_cast<const uchar*>(p);
  if (at >= begin && at + size <= end || at >= tiles_begin && at + size <= tiles_end) return true;
  ++bad_reads;
  return false;
}
inline void begin_blocks(int count) {
  pipes.clear();
  pools.assign(count, std::vector<uint64_t>(POOL / 8, POOL_FILL));
}
}  // namespace warp
extern "C" void set_early(int early) { warp::early = early; }

inline uint32_t tvm_builtin_cuda_cvta_generic_to_shared(void* p) { return uint32_t(static_cast<uchar*>(p) - pool_buf_ptr) | SHARED_WINDOW; }
inline void tvm_builtin_cuda_cta_sync() { __syncthreads(); }
inline void tvm_builtin_ptx_cp_async_cg_async_cg_shared_global_16(uint32_t to, const void* from) {
  if (!warp::inside(from, 16)) return;
  if (warp::early)
    warp::copy({to, from});
  else
    warp::pipes[block::current].open.push_back({to, from});
}
inline void tvm_builtin_ptx_cp_async_commit_group_async_commit_group() {
  warp::Pipe& pipe = warp::pipes[block::current];
  pipe.groups.push_back(pipe.open);
  pipe.open.clear();
}
inline void cp_async_wait_group(int pending) {
  warp::Pipe& pipe = warp::pipes[block::current];
  for (; int(pipe.groups.size()) > pending; pipe.groups.pop_front()) warp::flush(pipe.groups.front());
}
inline void tvm_builtin_ptx_ld_vec_shared_v4_u32(uint32_t& d0, uint32_t& d1, uint32_t& d2, uint32_t& d3, uint32_t at) {
  uint32_t v[4];
  std::memcpy(v, shared_at(at), 16);
  d0 = v[0], d1 = v[1], d2 = v[2], d3 = v[3];
}
inline void tvm_builtin_ptx_ld_vec_shared_v4_u32_pred_undef(uint32_t& d0, uint32_t& d1, uint32_t& d2, uint32_t& d3,
                                                            uint32_t at, uint32_t pred) {
  d0 = d1 = d2 = d3 = 0x7f817f81;
  if (pred) tvm_builtin_ptx_ld_vec_shared_v4_u32(d0, d1, d2, d3, at);
}
inline void tvm_builtin_ptx_red_shared_add_u32(uint32_t at, uint32_t value) {
  uint32_t old;
  std::memcpy(&old, shared_at(at), 4);
  old += value;
  std::memcpy(shared_at(at), &old, 4);
}
inline void tvm_builtin_ptx_mma_int_sync_aligned_m16n8k32_row_col_s32_u8_s8_s32(
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
    for (int k = 0; k < 32; ++k) {  // PTX ISA, fragments of mma.m16n8k32 for .u8 and .s8
      int from = k % 16 / 4;
      uint32_t av = warp::a[w][row % 8 * 4 + from][row / 8 + k / 16 * 2] >> (k % 4 * 8) & 255;
      int8_t bv = int8_t(warp::b[w][column * 4 + from][k / 16] >> (k % 4 * 8));
      out[q] += uint32_t(int(av) * bv);
    }
  }
  block::meet(block::warps[w]);
  d0 = out[0], d1 = out[1], d2 = out[2], d3 = out[3];
}

struct uint2 { uint32_t x, y; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t pick) {
  uint64_t both = uint64_t(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= uint32_t(both >> ((pick >> (4 * i) & 7) * 8) & 255) << (8 * i);
  return result;
}
inline int __dp4a(int x, int y, int c) {
  for (int i = 0; i < 4; ++i) c += int8_t(x >> (8 * i)) * int8_t(y >> (8 * i));
  return c;
}
inline int __reduce_add_sync(uint, int value) {
  block::Meeting& group = block::warps[block::current / 32];
  group.values[block::current % 32] = value;
  block::meet(group);
  uint32_t sum = 0;
  for (int i = 0; i < 32; ++i) sum += uint32_t(group.values[i]);
  block::meet(group);
  return int(sum);
}
inline void atomicAdd(int* at, int value) { *at = int(uint32_t(*at) + uint32_t(value)); }
inline uint32_t __shfl_sync(uint32_t, uint32_t value, int, int) { return value; }
inline int __shfl_xor_sync(uint, int value, int away) {
  block::Meeting& group = block::warps[block::current / 32];
  int lane = block::current % 32;
  group.values[lane] = value;
  block::meet(group);
  int other = group.values[lane ^ away];
  block::meet(group);
  return other;
}
inline uint32_t __shfl_xor_sync(uint mask, uint32_t value, int away) {
  return uint32_t(__shfl_xor_sync(mask, int(value), away));
}
inline void liftc_dependent_start() {}
inline void liftc_dependent_wait() {}
inline void liftc_prefetch(const void* from, int bytes, int lane) {
  if (lane == 0 && bytes > 0) warp::inside(from, bytes);
}
inline int __reduce_max_sync(uint, int value) {
  block::Meeting& group = block::warps[block::current / 32];
  group.values[block::current % 32] = value;
  block::meet(group);
  int top = *std::max_element(group.values, group.values + 32);
  block::meet(group);
  return top;
}
inline void atomicMax(int* at, int value) { *at = std::max(*at, value); }
inline int __float2int_rn(float value) { return value != value ? 0 : int(std::nearbyint(value)); }
inline float __int_as_float(int bits) { float value; std::memcpy(&value, &bits, 4); return value; }

struct Barrier { int16_t arrivals, pending; int32_t phase; };  // as wide as an mbarrier
inline void liftc_barrier_init(void* at, int arrivals) {
  *static_cast<Barrier*>(at) = {int16_t(arrivals), int16_t(arrivals), 0};
}
inline void liftc_barrier_arrive(void* at) {  // the copies issued so far land now
  warp::Pipe& pipe = warp::pipes[block::current];
  for (std::vector<warp::Copy>& group : pipe.groups) warp::flush(group);
  warp::flush(pipe.open);
  Barrier& barrier = *static_cast<Barrier*>(at);
  if (--barrier.pending == 0) barrier.pending = barrier.arrivals, ++barrier.phase;
}
inline void liftc_barrier_wait(void* at, int parity) {
  while (static_cast<Barrier*>(at)->phase % 2 == parity) block::give_way();
}
inline void liftc_load_z(const void* row, int column, int columns, void* out) {
  for (int i = 0; i < 8; ++i)
    if (column + i < columns) {
      const int16_t* at = static_cast<const int16_t*>(row) + column + i;
      if (warp::inside(at, 2)) std::memcpy(static_cast<int16_t*>(out) + i, at, 2);
    }
}
inline int liftc_load_word(const void* at) { return *static_cast<const int*>(at); }
inline float half_value(uint32_t bits) {
  uint16_t one = uint16_t(bits);
  _Float16 value;
  std::memcpy(&value, &one, 2);
  return float(value);
}
inline uint32_t half_bits(float value) {
  _Float16 rounded = _Float16(value);
  uint16_t bits;
  std::memcpy(&bits, &rounded, 2);
  return bits;
}
inline uint32_t bfloat_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline float bfloat_value(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
struct __half { uint16_t bits; };
struct __nv_bfloat16 { uint16_t bits; };
struct __half2 { __half x, y; };
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
inline __half __float2half_rn(float value) { return {uint16_t(half_bits(value))}; }
inline float __half2float(__half value) { return half_value(value.bits); }
inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return {uint16_t(bfloat_bits(value))}; }
inline float __bfloat162float(__nv_bfloat16 value) { return bfloat_value(uint32_t(value.bits) << 16); }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)}; }
inline __half2 __hadd2_rn(__half2 a, __half2 b) {
  return __floats2half2_rn(__half2float(a.x) + __half2float(b.x), __half2float(a.y) + __half2float(b.y));
}
inline __nv_bfloat162 __hadd2_rn(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __floats2bfloat162_rn(__bfloat162float(a.x) + __bfloat162float(b.x),
                               __bfloat162float(a.y) + __bfloat162float(b.y));
}
inline float __uint_as_float(uint32_t bits) { return bfloat_value(bits); }
inline float __int2float_rn(int value) { return float(value); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
