// Barriers that count arrivals and bytes, and the copy engine, whose copies land as late as the waits allow, or
// at once.
#pragma once
#include "cuda_warp_emulator.h"

namespace bulk {
struct Copy { void* to; const void* from; int bytes; };
static std::map<void*, std::vector<Copy>> copies;  // on their way, by barrier
static std::map<void*, long> expected;             // bytes, by barrier

inline void complete(void* at) {
  Barrier& barrier = *static_cast<Barrier*>(at);
  if (barrier.pending == 0 && expected[at] == 0) barrier.pending = barrier.arrivals, ++barrier.phase;
}
inline void arrived(void* at, int bytes) {
  expected[at] -= bytes;
  complete(at);
}
inline void land(void* at) {
  for (const Copy& c : copies[at]) {
    std::memcpy(c.to, c.from, c.bytes);
    expected[at] -= c.bytes;
  }
  if (!copies[at].empty()) {
    copies[at].clear();
    complete(at);
  }
}
}  // namespace bulk

inline void tvm_builtin_cuda_warp_sync() { block::meet(block::warps[block::current / 32]); }
inline void liftc_fence_init() {}
inline void liftc_barrier_expect(void* at, int bytes) {
  bulk::expected[at] += bytes;
  --static_cast<Barrier*>(at)->pending;
  bulk::complete(at);
}
inline void liftc_barrier_await(void* at, int parity) {
  while (static_cast<Barrier*>(at)->phase % 2 == parity) {
    bulk::land(at);
    if (static_cast<Barrier*>(at)->phase % 2 == parity) block::give_way();
  }
}
inline void liftc_bulk_copy(void* to, const void* from, int bytes, void* at) {
  if (bytes % 16 || reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16 ||
      !warp::inside(from, bytes)) {
    ++warp::bad_reads;
    return;
  }
  bulk::copies[at].push_back({to, from, bytes});
  if (warp::early) bulk::land(at);
}
inline void liftc_launch_registers(int) {}
