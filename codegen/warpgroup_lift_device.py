"""Device functions of the warp-group lift (codegen/warpgroup_lift.py), beside those of lift_device.py.

Their text depends on the number of columns, as the operands of `wgmma` do.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from liftc.codegen import lift_device
from liftc.codegen import warpgroup_device as group_device

GROUP_MMA = r"""
__device__ __forceinline__ void liftc_group_mma_COLUMNS_TURNED(void* sums, unsigned a0, unsigned a1, unsigned a2,
                                                               unsigned a3, const void* second, int along_k,
                                                               int along_n) {
  float* d = static_cast<float*>(sums);
  const unsigned long long at = static_cast<unsigned>(__cvta_generic_to_shared(second)) >> 4 & 0x3fff;
  const unsigned long long matrix = at | static_cast<unsigned long long>(along_k >> 4) << 16 |
                                    static_cast<unsigned long long>(along_n >> 4) << 32;
  asm volatile("wgmma.mma_async.sync.aligned.m64nCOLUMNSk16.f32.bf16.bf16 {DS}, {FIRST}, SECOND, 1, 1, 1, TURNED;"
               : SUMS : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(matrix));
}
"""
"""64 rows of the first operand, a warp's 16 in its registers, by COLUMNS columns of the second one in shared memory, in
matrices of 8 x 8 numbers, `along_k` and `along_n` bytes from each other, with features together (TURNED 0) or columns
(1). Nothing may touch the operands until a wait."""

GROUP_FENCE = r"""
__device__ __forceinline__ void liftc_group_fence_COLUMNS(void* sums) {
  float* d = static_cast<float*>(sums);
  asm volatile("wgmma.fence.sync.aligned;" : SUMS :: "memory");
}
"""
"""Products that follow see the registers as they are now."""

GROUP_COMMIT = r"""
__device__ __forceinline__ void liftc_group_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
"""

GROUP_WAIT = r"""
__device__ __forceinline__ void liftc_group_wait_COLUMNS_HELD(void* sums, void* words) {
  float* d = static_cast<float*>(sums);
  unsigned* a = static_cast<unsigned*>(words);
  asm volatile("wgmma.wait_group.sync.aligned 0;" : SUMS, KEPT :: "memory");
}
"""
"""Wait for all products; their sums appear here, and the registers of their first operand are kept until here."""

STORE_MIXED = r"""
__device__ __forceinline__ void liftc_store_mixed_COLUMNS(const void* part, void* out, int apart) {
  const float* p = static_cast<const float*>(part);
  unsigned* to = static_cast<unsigned*>(out);
#pragma unroll
  for (int j = 0; j < COLUMNS / 8; ++j) liftc_split_pair(p[4 * j], p[4 * j + 1], to[j * 32], to[apart + j * 32]);
}
"""
"""Eight rows of sums as high and, `apart` words on, low parts: a matrix of 8 x 8 for every eight columns."""

Z_WORDS = r"""
#ifndef LIFTC_Z_WORDS
#define LIFTC_Z_WORDS
__device__ __forceinline__ unsigned liftc_z_bits(float value, float inverse) {
  // 1.5 * 2^23 rounds to an integer; 2^15 + 2^7 make the bytes of z = 256 h + l those of h + 128 and l + 128.
  return __float_as_uint(__fadd_rn(fminf(fmaxf(__fmul_rn(value, inverse), -16383.0f), 16383.0f), 12615808.0f));
}
__device__ __forceinline__ unsigned liftc_low_bytes(int count) { return count >= 4 ? ~0u : (1u << count * 8) - 1; }
__device__ __forceinline__ void liftc_put_word(void* to, unsigned word, bool there) {
#ifdef __CUDA_ARCH__  // without branches, so that the places of all words are computed side by side
  asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p st.global.u32 [%0], %1; }"
               :: "l"(to), "r"(word), "r"(static_cast<int>(there)) : "memory");
#else
  if (there) *static_cast<unsigned*>(to) = word;
#endif
}
__device__ __forceinline__ void liftc_put_bytes(void* to, unsigned bytes, int first, int last) {
#pragma unroll
  for (int e = 0; e < 4; ++e)
    if (e >= first && e < last) static_cast<unsigned char*>(to)[e] = static_cast<unsigned char>(bytes >> 8 * e);
}
#endif
"""
"""z of a value as an integer of which 16 bits count; masks; words and parts of them, where they are there."""

STORE_GROUP_Z = r"""
__device__ __forceinline__ int liftc_store_group_z_COLUMNS(const void* part, float inverse, int k0, int lifted,
                                                           int before, int after, int rows, void* planes, int column,
                                                           int columns, int pieces, int lane) {
  constexpr int eights = COLUMNS / 8, whole = eights / 4 * 4;
  const float* p = static_cast<const float*>(part);
  const bool none = !(inverse > 0.0f);
  const int side = lane >> 1 & 1;
  const int far = columns * 64, near = pieces == 16 ? columns * 16 : 4, step = pieces == 16 ? 1 : 4;
  char* to = static_cast<char*>(planes) + (column + lane % 2) * (pieces == 16 ? 16 : 64);
  int total = 0;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = r * 8 + lane / 4, begin = k0 + row * lifted, past = begin & 3, up = past > 0 ? 4 : 0;
    // Bytes of this row that are this block's, counted from the word in which its columns begin.
    const int first = before > 0 ? up : past;
    const int end = row >= rows ? 0 : past + after < COLUMNS - 4 + up ? past + after : COLUMNS - 4 + up;
    const int last = (end - 1) >> 2;
    auto at = [&](int word) {  // four columns lie `near` bytes after the four before, runs of 64 `far` after each other
      const int k = (begin >> 2) + word;
      return to + ((k >> 4) * far + (k & 3) * near + (k & 12) * step);
    };
    unsigned word[eights], head = 0, tail = 0, carry = 0, other = 0;
    bool has_tail = false;
#pragma unroll
    for (int j = 0; j < eights; ++j) {
      const unsigned u = liftc_z_bits(none ? 0.0f : p[4 * j + 2 * r], inverse);
      const unsigned v = liftc_z_bits(none ? 0.0f : p[4 * j + 2 * r + 1], inverse);
      const unsigned bytes = __byte_perm(u, v, 0x4051);  // high and low bytes of two columns; of four in two lanes
      word[j] = __byte_perm(bytes, __shfl_xor_sync(0xffffffffu, bytes, 1), lane & 1 ? 0x3276 : 0x5410);
    }
#pragma unroll
    for (int j = 0; j < eights; ++j) {
      const int i = j < whole ? j / 4 * 8 + side * 4 + j % 4 : 2 * j + side;
      if (j < whole ? j % 4 == 0 : true) other = __shfl_xor_sync(0xffffffffu, word[j < whole ? j + 3 : j], 2);
      const unsigned left = j < whole && j % 4 > 0 ? word[j > 0 ? j - 1 : 0] : side ? other : carry;
      if (j < whole ? j % 4 == 3 : true) carry = other;
      const unsigned bytes = __funnelshift_l(left, word[j], past * 8) ^ 0x80808080u;
      const bool full = i * 4 >= first && i * 4 + 4 <= end;
      liftc_put_word(at(i), bytes, full);
      total = __dp4a(static_cast<int>(full ? bytes : 0), 0x01010101, total);
      head = j == 0 ? bytes : head;
      tail = i == last ? bytes : tail;
      has_tail = has_tail || i == last;
    }
    if (before == 0 || after < COLUMNS) {  // a row of T* x begins or ends within a word
      const bool one = side == 0 && (first & 3) > 0 && first < end;
      const int most = end < 4 ? end : 4;
      liftc_put_bytes(at(0), head, one ? first : 4, most);
      const unsigned mine = ~liftc_low_bytes(first & 3) & liftc_low_bytes(most);
      total = __dp4a(static_cast<int>(one ? head & mine : 0), 0x01010101, total);
      const bool rest = has_tail && (end & 3) > 0 && first < end && !(last == 0 && (first & 3) > 0);
      liftc_put_bytes(at(last), tail, 0, rest ? end & 3 : 0);
      total = __dp4a(static_cast<int>(rest ? tail & liftc_low_bytes(end & 3) : 0), 0x01010101, total);
    }
  }
  return lane & 1 ? total : total * 256;
}
"""
"""z of a warp's 16 rows of sums, as bytes in the planes; row r begins at column k0 + r lifted of T* x, of whose row
`before` columns lie ahead and `after` are left. Of COLUMNS columns computed all but four are stored, the whole words
that begin in them; the words at the ends of a row byte by byte. rows: that there are. Returns the sum of what is
stored. 0 where the inverse of the step is 0.

Columns are in the order of column_place: lanes side by side have the two bytes of a z and of the one 16 columns on,
which lie in the same 32 bytes of the planes."""

READ_X8 = r"""
__device__ __forceinline__ void liftc_read_x8(const void* from, int there, void* out) {
  const uint4 v = there > 0 ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
  unsigned* to = static_cast<unsigned*>(out);
  to[0] = v.x;
  to[1] = v.y;
  to[2] = v.z;
  to[3] = v.w;
}
"""
"""Eight values of x in shared memory, or zeros where none are there."""

_FAMILIES = {
    "group_mma": (GROUP_MMA, ""),
    "group_fence": (GROUP_FENCE, ""),
    "group_wait": (GROUP_WAIT, ""),
    "store_mixed": (lift_device.BF16 + STORE_MIXED, ""),
    "store_group_z": (Z_WORDS + STORE_GROUP_Z, "int32"),
}
_OTHERS = {
    "bulk_copy": (group_device.BULK_COPY, ""),
    "group_commit": (GROUP_COMMIT, ""),
    "launch_registers": (group_device.LAUNCH_REGISTERS, ""),
    "fence_shared": (group_device.FENCE_SHARED, ""),
    "read_x8": (READ_X8, ""),
}


def call(name: str, *arguments: Any) -> Any:
    """A call of the device function liftc_<name>; numbers in the name are columns and what else its text depends on."""
    words = name.split("_")
    numbers = [int(word) for word in words if word.isdigit()]
    if not numbers and name not in _OTHERS:
        return lift_device.call(name, *arguments)
    family = "_".join(word for word in words if not word.isdigit())
    source, returns = _OTHERS[name] if name in _OTHERS else _FAMILIES[family]
    if numbers:
        source = fill(source, *numbers)
    result = {"return_type": returns} if returns else {}
    return T.cuda.func_call(f"liftc_{name}", *arguments, source_code=source, **result)


def fill(source: str, columns: int, other: int = 0) -> str:
    """The text of a device function for so many columns; `other`: what else its name has a number for."""
    sums = columns // 2
    places = ",".join(f"%{i}" for i in range(sums))
    first = ",".join(f"%{sums + i}" for i in range(4))
    return (
        source.replace("DS}", places + "}")
        .replace("FIRST", first)
        .replace("SECOND", f"%{sums + 4}")
        .replace("SUMS", ", ".join(f'"+f"(d[{i}])' for i in range(sums)))
        .replace("KEPT", ", ".join(f'"+r"(a[{i}])' for i in range(other)))
        .replace("COLUMNS", str(columns))
        .replace("TURNED", str(other))
        .replace("HELD", str(other))
    )
