"""Device functions of the binary tensor-core sign_matmul (codegen/tensorcore_popcount.py)."""

ADDRESS = r"""
__device__ __forceinline__ unsigned long long liftc_address(const void* at) {
  unsigned long long address = reinterpret_cast<unsigned long long>(at);
  asm volatile("" : "+l"(address));
  return address;
}
"""
"""An address as a number that is computed here and not later, where every instruction counts."""

LOAD_BYTES = r"""
__device__ __forceinline__ void liftc_load_bytes(unsigned long long from, int apart, void* out) {
  unsigned* v = static_cast<unsigned*>(out);
#pragma unroll
  for (int q = 0; q < 4; ++q)
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[4 * q]), "=r"(v[4 * q + 1]), "=r"(v[4 * q + 2]), "=r"(v[4 * q + 3])
                 : "l"(from + q * apart));
}
"""
"""64 bytes of one plane from L2, four vectors of 16 bytes that lie `apart` bytes from each other: word 4 q + 2 e + h
has columns 64 q + 8 e + 4 h and the three after it."""

STORE_BITS = r"""
__device__ __forceinline__ void liftc_exchange(unsigned& a, unsigned& b, int shift, unsigned mask) {
  const unsigned low = (a & mask) | ((b << shift) & ~mask);
  b = ((a >> shift) & mask) | (b & ~mask);
  a = low;
}
__device__ __forceinline__ void liftc_store_bits(const void* words, void* out) {
  const unsigned* v = static_cast<const unsigned*>(words);
  unsigned first[8], second[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    first[j] = v[2 * j];
    second[j] = v[2 * j + 1];
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    unsigned* x = half ? second : first;
#pragma unroll
    for (int i = 0; i < 4; ++i) liftc_exchange(x[i], x[i + 4], 4, 0x0f0f0f0fu);
#pragma unroll
    for (int i = 0; i < 4; ++i) liftc_exchange(x[i + i / 2 * 2], x[i + i / 2 * 2 + 2], 2, 0x33333333u);
#pragma unroll
    for (int i = 0; i < 8; i += 2) liftc_exchange(x[i], x[i + 1], 1, 0x55555555u);
  }
  uint2* to = static_cast<uint2*>(out);
#pragma unroll
  for (int p = 0; p < 8; ++p) to[8 * p] = make_uint2(first[p], second[p]);
}
"""
"""The 16 words of load_bytes become bits: word pair p, 64 bytes after the one before, has bit p of the bytes, bit
8 b + j of the first word that of byte b of word 2 j, of the second that of word 2 j + 1."""

WEIGH_BITS = r"""
__device__ __forceinline__ int liftc_weigh_bits(unsigned low0, unsigned low1, unsigned high0, unsigned high1,
                                                  int lane) {
  const int place = lane % 4 * 2;
  const unsigned last = place == 6 ? 0u - 2u : 2u;  // the eighth bit of a byte counts -128
  const unsigned low = low0 + last * low1, high = high0 + last * high1;
  return static_cast<int>((low + 256u * high) << place);
}
"""
"""Counts of bits 2 (lane mod 4) and the next one, of the low and the high byte, weighed and added."""

LANES_ADD = r"""
__device__ __forceinline__ int liftc_lanes_add(int value) {
#pragma unroll
  for (int away = 16; away > 0; away /= 2) value += __shfl_xor_sync(0xffffffffu, value, away);
  return value;
}
"""
"""The sum of a value over the lanes of a warp."""
