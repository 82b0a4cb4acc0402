"""Small device functions of the tensor-core kernels, for what TIRx cannot say: preprocessor guards, packed bytes,
loads that bypass the non-coherent cache, and stores whose type is chosen at run time."""

DEPENDENT_START = r"""
__device__ __forceinline__ void liftc_dependent_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
"""
"""Lets the next kernel start as soon as there is room for it."""

DEPENDENT_WAIT = r"""
__device__ __forceinline__ void liftc_dependent_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
"""
"""Waits until everything the kernels before wrote is visible."""

PREFETCH = r"""
__device__ __forceinline__ void liftc_prefetch(const void* from, int bytes, int lane) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (lane == 0 && bytes > 0)
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(from), "r"(bytes) : "memory");
#else
  for (int at = lane * 128; at < bytes; at += 4096)
    asm volatile("prefetch.global.L2 [%0];" :: "l"(static_cast<const char*>(from) + at));
#endif
}
"""
"""A warp asks for `bytes` (a multiple of 16) to be brought into L2."""

BARRIER_INIT = r"""
__device__ __forceinline__ void liftc_barrier_init(void* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;"
               :: "r"(static_cast<unsigned>(__cvta_generic_to_shared(barrier))), "r"(arrivals) : "memory");
}
"""

BARRIER_ARRIVE = r"""
__device__ __forceinline__ void liftc_barrier_arrive(void* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];"
               :: "r"(static_cast<unsigned>(__cvta_generic_to_shared(barrier))) : "memory");
}
"""
"""A thread arrives when the asynchronous copies it has issued so far are complete."""

BARRIER_WAIT = r"""
__device__ __forceinline__ void liftc_barrier_wait(void* barrier, int parity) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(barrier));
  unsigned done = 0;
  while (!done)
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(at), "r"(parity) : "memory");
}
"""

LOAD_Z = r"""
__device__ __forceinline__ void liftc_load_z(const void* row, int column, int columns, void* out) {
  const short* from = static_cast<const short*>(row) + column;
  unsigned* v = static_cast<unsigned*>(out);
  if (columns % 8 == 0) {
    if (column < columns)
      asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "l"(from));
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      unsigned short one = 0;
      if (column + i < columns) asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(one) : "l"(from + i));
      v[i / 2] |= static_cast<unsigned>(one) << (i % 2 * 16);
    }
  }
}
"""
"""Eight values of z from `column` on into four zeroed words; those past the last column stay zero."""

STORE_PLANES = r"""
__device__ __forceinline__ int liftc_store_planes(unsigned a, unsigned b, unsigned c, unsigned d, void* out,
                                                  int low, int next) {
  unsigned w[4] = {a, b, c, d};
#pragma unroll
  for (int i = 0; i < 4; ++i)  // z + 128 in both halves, no carry between them
    w[i] = ((w[i] & 0x7fff7fffu) + 0x00800080u) ^ (w[i] & 0x80008000u);
  const unsigned h0 = __byte_perm(w[0], w[1], 0x7531), h1 = __byte_perm(w[2], w[3], 0x7531);
  const unsigned l0 = __byte_perm(w[0], w[1], 0x6420) ^ 0x80808080u;
  const unsigned l1 = __byte_perm(w[2], w[3], 0x6420) ^ 0x80808080u;
  unsigned* to = static_cast<unsigned*>(out);
  to[0] = h0;
  to[low] = l0;
  to[next] = h1;
  to[next + low] = l1;
  const int high = __dp4a(static_cast<int>(h0), 0x01010101, __dp4a(static_cast<int>(h1), 0x01010101, 0));
  const int rest = __dp4a(static_cast<int>(l0), 0x01010101, __dp4a(static_cast<int>(l1), 0x01010101, 0));
  return high * 256 + rest;
}
"""
"""Eight values of z become bytes of the two planes, the low one `low` words after the high one, the last four values
`next` words after the first four; returns their sum."""

LOAD_WORD = r"""
__device__ __forceinline__ int liftc_load_word(const void* at) {
  int value;
  asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
"""
"""A word that the kernel before wrote, from L2."""

WARP_ADD = r"""
__device__ __forceinline__ void liftc_warp_add(void* total, int value, int lane) {
  const int sum = __reduce_add_sync(0xffffffffu, value);
  if (lane == 0) atomicAdd(static_cast<int*>(total), sum);
}
"""

WARP_MAX = r"""
__device__ __forceinline__ void liftc_warp_max(void* highest, int value, int lane) {
  const int top = __reduce_max_sync(0xffffffffu, value);
  if (lane == 0) atomicMax(static_cast<int*>(highest), top);
}
"""

ADDENDS = r"""
#ifndef LIFTC_ADDENDS
#define LIFTC_ADDENDS
#include <cuda_fp16.h>
#include <cuda_bf16.h>
__device__ __forceinline__ unsigned liftc_addend(const void* from, long long at, int kind) {
  const unsigned* word = static_cast<const unsigned*>(from) + at;
  const unsigned short* half = static_cast<const unsigned short*>(from) + at;
#ifdef __CUDA_ARCH__  // not before the kernels that wrote it have ended, and not from L1
  unsigned bits;
  unsigned short low;
  if (kind == 0) {
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(bits) : "l"(word) : "memory");
    return bits;
  }
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(low) : "l"(half) : "memory");
  return low;
#else
  return kind == 0 ? *word : *half;
#endif
}
__device__ __forceinline__ float liftc_plus(float value, unsigned bits, int kind) {
  if (kind == 0) return __fadd_rn(value, __uint_as_float(bits));
  const unsigned short half = static_cast<unsigned short>(bits);
  if (kind == 1)
    return __fadd_rn(__half2float(__float2half_rn(value)), __half2float(reinterpret_cast<const __half&>(half)));
  return __fadd_rn(__bfloat162float(__float2bfloat16_rn(value)), __uint_as_float(bits << 16));
}
__device__ __forceinline__ float liftc_sum(float value, int adds, unsigned bias, unsigned residual, int kind) {
  if (adds & 1) value = liftc_plus(value, bias, kind);
  if (adds & 2) value = liftc_plus(value, residual, kind);
  return value;
}
#endif
"""
"""A value that is added to a result, as it lies in memory in the type `kind` says; the sum of a result, a bias and a
residual, of which `adds` says by bits 0 and 1 which there are, rounded to this type before each addition, as separate
operations round."""

STORE_Y = (
    ADDENDS
    + r"""
__device__ __forceinline__ void liftc_store_y(void* y, long long at, int kind, int set, int total, float token_scale,
                                              float scale, int adds, unsigned bias, unsigned residual) {
  const int sum = static_cast<int>(2u * static_cast<unsigned>(set) - static_cast<unsigned>(total));
  const float product = __fmul_rn(__fmul_rn(__int2float_rn(sum), token_scale), scale);
  const float value = liftc_sum(product, adds, bias, residual, kind);
  if (kind == 0) static_cast<float*>(y)[at] = value;
  else if (kind == 1) static_cast<__half*>(y)[at] = __float2half_rn(value);
  else static_cast<__nv_bfloat16*>(y)[at] = __float2bfloat16_rn(value);
}
"""
)
"""A result from the sum of z over set bits and the sum of z, with what is added to it."""

TOUCH = r"""
__device__ __forceinline__ void liftc_touch(const void* from, long long at, int kind) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" :: "l"(static_cast<const char*>(from) + at * (kind == 0 ? 4 : 2)));
#endif
}
"""
"""Asks for an entry of a vector to be brought into L2."""
