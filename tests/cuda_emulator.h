// Runs the device code of a generated CUDA file on the CPU: one fiber per thread, switched at every barrier and
// warp collective. Only what the beam search uses is here. The test replaces the file's CUDA preamble by this.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define CUDART_INF_F std::numeric_limits<float>::infinity()
using std::max;
using std::min;
using uint = unsigned int;
using uchar = unsigned char;

struct Index { int x; };
static Index threadIdx, blockIdx;
static std::vector<uchar> shared_memory;

namespace emulator {
struct Group { int size = 0, arrived = 0; long generation = 0; int64_t slots[1024]; };
struct Fiber { ucontext_t context; std::vector<char> stack; bool done = false; };
static std::vector<Fiber> fibers;
static std::vector<Group> warps;
static Group block;
static ucontext_t scheduler;
static int current;
static void (*body)();

inline void yield() {
  int self = current;
  swapcontext(&fibers[self].context, &scheduler);
  current = self;
  threadIdx.x = self;
}
inline void wait(Group& group) {
  long generation = group.generation;
  if (++group.arrived == group.size) {
    group.arrived = 0;
    ++group.generation;
  } else {
    while (group.generation == generation) yield();
  }
}
template <class Combine>
int64_t collective(int64_t value, Combine combine) {
  Group& group = warps[current / 32];
  group.slots[current % 32] = value;
  wait(group);
  int64_t result = combine(group.slots, current % 32);
  wait(group);
  return result;
}
inline void start() {
  body();
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}
inline void launch(int blocks, int threads, int shared_bytes, void (*kernel)()) {
  body = kernel;
  for (int b = 0; b < blocks; ++b) {
    shared_memory.assign(shared_bytes, 0xA5);  // poison: nothing may be read before it is written
    fibers.assign(threads, Fiber());
    warps.assign(threads / 32, Group());
    for (Group& warp : warps) warp.size = 32;
    block = Group();
    block.size = threads;
    for (Fiber& fiber : fibers) {
      fiber.stack.resize(1 << 16);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      makecontext(&fiber.context, start, 0);
    }
    for (int left = threads; left > 0;) {
      left = 0;
      for (int t = 0; t < threads; ++t) {
        if (fibers[t].done) continue;
        ++left;
        current = t;
        threadIdx.x = t;
        blockIdx.x = b;
        swapcontext(&scheduler, &fibers[t].context);
      }
    }
  }
}
}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::block); }
inline void __syncwarp() { emulator::wait(emulator::warps[emulator::current / 32]); }
inline int __shfl_sync(uint, int value, int lane, int) {
  return int(emulator::collective(value, [&](int64_t* all, int) { return all[lane]; }));
}
inline int __shfl_up_sync(uint, int value, int delta, int) {
  return int(emulator::collective(value, [&](int64_t* all, int lane) { return all[lane < delta ? lane : lane - delta]; }));
}
inline void tvm_builtin_ptx_redux_sync_add_s32(int& out, int value, uint) {
  out = int(emulator::collective(value, [](int64_t* all, int) {
    int64_t sum = 0;
    for (int k = 0; k < 32; ++k) sum += all[k];
    return sum;
  }));
}
inline void tvm_builtin_ptx_redux_sync_min_s32(int& out, int value, uint) {
  out = int(emulator::collective(value, [](int64_t* all, int) { return *std::min_element(all, all + 32); }));
}
inline void tvm_builtin_ptx_redux_sync_max_s32(int& out, int value, uint) {
  out = int(emulator::collective(value, [](int64_t* all, int) { return *std::max_element(all, all + 32); }));
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline void tvm_builtin_cuda_cta_sync() { __syncthreads(); }
inline void tvm_builtin_cuda_warp_sync() { __syncwarp(); }
