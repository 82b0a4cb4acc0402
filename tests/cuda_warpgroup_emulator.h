// What warp-group kernels need beyond cuda_barrier_emulator.h: wgmma whose results appear as late as the waits allow, or
// at once, and clusters of blocks.
#pragma once
#include <cstdint>
static uint32_t window_of_block();
#define SHARED_WINDOW window_of_block()
#include "cuda_barrier_emulator.h"

namespace group {
struct Product { uint32_t* d[32]; uint32_t a[4][4]; uint64_t z; bool add; };
struct Queue { std::vector<Product> open; std::deque<std::vector<Product>> groups; };
static std::map<int, Queue> queues;
static std::map<int, block::Meeting> teams;
static std::map<int, int> arrived;  // threads, by cluster
static int split = 1;

// PTX ISA: fragments of wgmma.m64n64k256; shared memory without swizzle in matrices of 8 x 16 bytes, K-major.
inline void compute(const Product& p) {
  int lane = block::current % 32;
  uint32_t start = (p.z & 0x3FFF) << 4, along_k = (p.z >> 16 & 0x3FFF) << 4, along_n = (p.z >> 32 & 0x3FFF) << 4;
  for (int q = 0; q < 32; ++q) {
    int row = q % 4 / 2, column = q / 4 * 8 + lane % 4 * 2 + q % 2;
    uint32_t sum = p.add ? *p.d[q] : 0;
    for (int k = 0; k < 256; k += 32) {
      uint32_t bits;
      std::memcpy(&bits, pool_buf_ptr + start + column / 8 * along_n + k / 128 * along_k + column % 8 * 16 + k % 128 / 8, 4);
      sum += __builtin_popcount(p.a[k / 32 % 4][row + k / 128 * 2] & bits);
    }
    *p.d[q] = sum;
  }
}
inline void multiply(std::vector<uint32_t*> d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t z, bool add) {
  int w = block::current / 32, lane = block::current % 32;
  uint32_t mine[4] = {a0, a1, a2, a3};
  std::memcpy(warp::a[w][lane], mine, 16);
  block::meet(block::warps[w]);
  Product p;
  p.z = z, p.add = add;
  std::copy(d.begin(), d.end(), p.d);
  for (int from = 0; from < 4; ++from) std::memcpy(p.a[from], warp::a[w][lane / 4 * 4 + from], 16);
  block::meet(block::warps[w]);
  if (warp::early)
    compute(p);
  else
    queues[block::current].open.push_back(p);
}
inline void wait(size_t pending) {
  Queue& queue = queues[block::current];
  for (; queue.groups.size() > pending; queue.groups.pop_front())
    for (const Product& p : queue.groups.front()) compute(p);
}
inline int rank() { return blockIdx.x % split; }
}  // namespace group
static uint32_t window_of_block() { return uint32_t(group::rank()) << 24; }

#define FOUR(x) uint32_t &x##0, uint32_t &x##1, uint32_t &x##2, uint32_t &x##3
#define FOUR_AT(x) &x##0, &x##1, &x##2, &x##3
#define OPERANDS uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t z, uint32_t add
#define SIXTEEN(x) FOUR(x##0), FOUR(x##1), FOUR(x##2), FOUR(x##3)
#define SIXTEEN_AT(x) FOUR_AT(x##0), FOUR_AT(x##1), FOUR_AT(x##2), FOUR_AT(x##3)
inline void tvm_builtin_ptx_wgmma_b1_rs_mma_async_sync_aligned_m64n64k256_s32_b1_b1_and_popc(SIXTEEN(c), SIXTEEN(d), OPERANDS) {
  group::multiply({SIXTEEN_AT(c), SIXTEEN_AT(d)}, a0, a1, a2, a3, z, add);
}
inline void tvm_builtin_ptx_wgmma_fence_fence_sync_aligned() {}
inline void tvm_builtin_ptx_wgmma_commit_group_commit_group_sync_aligned() {
  group::Queue& queue = group::queues[block::current];
  queue.groups.push_back(queue.open);
  queue.open.clear();
}
inline void tvm_builtin_ptx_wgmma_wait_group_wait_group_sync_aligned_0() { group::wait(0); }
inline uint32_t tvm_builtin_cluster_ctaid_x() { return group::rank(); }

struct uint4 { uint32_t x, y, z, w; };
struct float4 { float x, y, z, w; };
inline void liftc_fence_shared() {}
inline int liftc_uniform(int value) { return value; }
inline void liftc_warp_signal(void* at) {
  if (block::current % 32) return;
  --static_cast<Barrier*>(at)->pending;
  bulk::complete(at);
}
inline void liftc_cluster_arrive() { ++group::arrived[block::current / (block::block_threads * group::split)]; }
inline void liftc_cluster_await() {
  int threads = block::block_threads * group::split;
  while (group::arrived[block::current / threads] < threads) block::give_way();
}
inline void liftc_add_to_peer(void* at, int value, int rank, void* barrier) {
  int mine = block::current / block::block_threads;
  uchar* peer = reinterpret_cast<uchar*>(pools[mine - group::rank() + rank].data());
  uint32_t* to = reinterpret_cast<uint32_t*>(peer + (static_cast<uchar*>(at) - pool_buf_ptr));
  *to += uint32_t(value);
  bulk::arrived(peer + (static_cast<uchar*>(barrier) - pool_buf_ptr), 4);
}
inline block::Meeting& team_meeting(int barrier, int threads) {
  block::Meeting& meeting = group::teams[block::current / block::block_threads * 16 + barrier];
  meeting.size = threads;
  return meeting;
}
inline void liftc_group_sync_1(int threads) { block::meet(team_meeting(1, threads)); }
inline void liftc_group_sync_2(int threads) { block::meet(team_meeting(2, threads)); }
inline void liftc_group_arrive_2(int threads) {
  block::Meeting& meeting = team_meeting(2, threads);
  if (++meeting.arrived == threads) meeting.arrived = 0, ++meeting.round;
}
inline int liftc_barrier_test(void* at, int parity, int lane) {
  block::Meeting& warp = block::warps[block::current / 32];
  if (lane == 0) warp.values[0] = static_cast<Barrier*>(at)->phase % 2 != parity;
  block::meet(warp);
  int over = warp.values[0];
  block::meet(warp);
  return over;
}
inline void tvm_builtin_ptx_setmaxnreg_inc_sync_aligned_u32_120() {}
inline void tvm_builtin_ptx_setmaxnreg_dec_sync_aligned_u32_56() {}
extern "C" void set_split(int split) {  // before every launch
  group::split = split;
  group::arrived.clear();
}
