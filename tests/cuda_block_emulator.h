// Runs generated CUDA kernels on the CPU: a block's threads are fibers that switch at barriers and shuffles.
// Enough for kernels whose shared arrays were made static variables, with __syncthreads and with
// __shfl_down_sync over whole warps.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __launch_bounds__(...)
#define __maxnreg__(...)
using std::max;
using uint = unsigned int;

struct Index3 { int x, y, z; };
static Index3 threadIdx, blockIdx;

namespace block {
struct Fiber { ucontext_t context; std::vector<char> stack; Index3 index, where; bool done; };
struct Meeting { int size = 0, arrived = 0; long round = 0; int values[32]; };
static std::vector<Fiber> fibers;
static std::vector<Meeting> warps;
static std::vector<Meeting> blocks;
static int block_threads;
static ucontext_t scheduler;
static int current;
static std::function<void()> body;

inline void give_way() {
  int self = current;
  swapcontext(&fibers[self].context, &scheduler);
}
inline void meet(Meeting& meeting) {
  long round = meeting.round;
  if (++meeting.arrived == meeting.size) {
    meeting.arrived = 0;
    ++meeting.round;
  }
  while (meeting.round == round) give_way();
}
inline void enter() {
  body();
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}
inline void run_together(const std::vector<Index3>& which, Index3 threads, std::function<void()> kernel) {
  body = kernel;
  block_threads = threads.x * threads.y;
  int count = block_threads * int(which.size());
  fibers.assign(count, Fiber());
  warps.assign((count + 31) / 32, Meeting());
  blocks.assign(which.size(), Meeting());
  for (Meeting& meeting : blocks) meeting.size = block_threads;
  for (int t = 0; t < count; ++t) {
    Fiber& fiber = fibers[t];
    ++warps[t / 32].size;
    int in_block = t % block_threads;
    fiber.index = {in_block % threads.x, in_block / threads.x, 0};
    fiber.where = which[t / block_threads];
    fiber.done = false;
    fiber.stack.resize(1 << 15);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, enter, 0);
  }
  for (bool left = true; left;) {
    left = false;
    for (int t = 0; t < count; ++t) {
      if (fibers[t].done) continue;
      left = true;
      current = t;
      threadIdx = fibers[t].index;
      blockIdx = fibers[t].where;
      swapcontext(&scheduler, &fibers[t].context);
    }
  }
}
inline void run(Index3 grid, Index3 threads, std::function<void()> kernel) {
  for (int b = 0; b < grid.x * grid.y * grid.z; ++b)
    run_together({{b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y}}, threads, kernel);
}
}  // namespace block

inline void __syncthreads() { block::meet(block::blocks[block::current / block::block_threads]); }
inline uint __activemask() { return ~0u; }
inline int __shfl_down_sync(uint, int value, int delta, int) {
  block::Meeting& warp = block::warps[block::current / 32];
  int lane = block::current % 32;
  warp.values[lane] = value;
  block::meet(warp);
  int result = warp.values[lane + delta < 32 ? lane + delta : lane];
  block::meet(warp);
  return result;
}
inline float __shfl_down_sync(uint mask, float value, int delta, int width) {
  int bits;
  std::memcpy(&bits, &value, 4);
  bits = __shfl_down_sync(mask, bits, delta, width);
  std::memcpy(&value, &bits, 4);
  return value;
}
