"""Device functions of the warp-group sign_matmul: copies by the copy engine, their barriers, and the shared memory
of the other blocks of a cluster. Only sm_90 and newer assemble them."""

UNIFORM = r"""
__device__ __forceinline__ int liftc_uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }
"""
"""A value that all lanes of a warp have, in a form that lets the compiler know it."""

FENCE_INIT = r"""
__device__ __forceinline__ void liftc_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}
"""
"""Makes the barriers this thread initialised visible to the copy engine."""

BARRIER_EXPECT = r"""
__device__ __forceinline__ void liftc_barrier_expect(void* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;"
               :: "r"(static_cast<unsigned>(__cvta_generic_to_shared(barrier))), "r"(bytes) : "memory");
}
"""
"""Arrive, and keep the phase open until so many bytes have been copied."""

WARP_SIGNAL = r"""
__device__ __forceinline__ void liftc_warp_signal(void* barrier) {
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; @p mbarrier.arrive.shared.b64 _, [%0]; }"
               :: "r"(static_cast<unsigned>(__cvta_generic_to_shared(barrier))) : "memory");
}
"""
"""One thread of a warp arrives, without a branch."""

BARRIER_AWAIT = r"""
__device__ __forceinline__ void liftc_barrier_await(void* barrier, int parity) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(barrier));
  unsigned done = 0;
  while (!done)
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(at), "r"(parity) : "memory");
}
"""
"""Wait until the phase of this parity is over, sleeping where the processor can."""

BULK_COPY = r"""
__device__ __forceinline__ void liftc_bulk_copy(void* to, const void* from, int bytes, void* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :: "r"(static_cast<unsigned>(__cvta_generic_to_shared(to))), "l"(from), "r"(bytes),
                  "r"(static_cast<unsigned>(__cvta_generic_to_shared(barrier))) : "memory");
}
"""
"""One thread copies `bytes` (a multiple of 16) into shared memory; the barrier counts them."""

BARRIER_TEST = r"""
__device__ __forceinline__ int liftc_barrier_test(void* barrier, int parity, int lane) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(barrier));
  unsigned done;
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done) : "r"(at), "r"(parity) : "memory");
  return __shfl_sync(0xffffffffu, static_cast<int>(done), 0);
}
"""
"""Whether the phase of this parity is over, for a whole warp."""

GROUP_BARRIER = r"""
__device__ __forceinline__ void liftc_group_sync_NUMBER(int threads) {
  asm volatile("bar.sync NUMBER, %0;" :: "r"(threads) : "memory");
}
__device__ __forceinline__ void liftc_group_arrive_NUMBER(int threads) {
  asm volatile("bar.arrive NUMBER, %0;" :: "r"(threads) : "memory");
}
"""
"""Barrier NUMBER, 1 to 15, of so many threads of a block, whole warps; to arrive is to count without waiting."""

ADD_TO_PEER = r"""
__device__ __forceinline__ void liftc_add_to_peer(void* at, int value, int rank, void* barrier) {
  unsigned peer, counts;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(peer) : "r"(static_cast<unsigned>(__cvta_generic_to_shared(at))), "r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(counts) : "r"(static_cast<unsigned>(__cvta_generic_to_shared(barrier))), "r"(rank));
  asm volatile("red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [%0], %1, [%2];"
               :: "r"(peer), "r"(value), "r"(counts) : "memory");
}
"""
"""Adds a word to the shared memory of block `rank` of the cluster, at the place where this block has `at`; the barrier
there counts its four bytes."""

CLUSTER_LEAVE = r"""
__device__ __forceinline__ void liftc_cluster_leave() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
}
"""
"""A barrier of all threads of the cluster that makes nothing visible: each has read what it wanted of the others."""

CLUSTER_ARRIVE = r"""
__device__ __forceinline__ void liftc_cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
"""

CLUSTER_AWAIT = r"""
__device__ __forceinline__ void liftc_cluster_await() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
"""
"""Wait until all threads of the cluster have arrived, and see what they had written to shared memory before."""

FENCE_SHARED = r"""
__device__ __forceinline__ void liftc_fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
"""
"""Lets the tensor cores see what this thread has written to shared memory."""

BITS_OF_BYTES = r"""
__device__ __forceinline__ unsigned liftc_choose(unsigned a, unsigned b, unsigned mask) {
#ifdef __CUDA_ARCH__
  unsigned chosen;  // one instruction, which the compiler does not find
  asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(chosen) : "r"(a), "r"(b), "r"(mask));
  return chosen;
#else
  return (a & mask) | (b & ~mask);
#endif
}
__device__ __forceinline__ void liftc_bits_of_bytes(void* at, int apart) {
  uint4* rows = static_cast<uint4*>(at);
  uint4 v[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] = rows[j * apart];
  auto turn = [&](int i, int k, int shift, unsigned low) {  // the high bits of v[i] for the low ones of v[k]
    auto one = [&](unsigned& a, unsigned& b) {
      const unsigned up = b << shift, down = a >> shift;
      a = liftc_choose(a, up, low);
      b = liftc_choose(down, b, low);
    };
    one(v[i].x, v[k].x), one(v[i].y, v[k].y), one(v[i].z, v[k].z), one(v[i].w, v[k].w);
  };
#pragma unroll
  for (int i = 0; i < 4; ++i) turn(i, i + 4, 4, 0x0f0f0f0fu);
#pragma unroll
  for (int i = 0; i < 4; ++i) turn(i + i / 2 * 2, i + i / 2 * 2 + 2, 2, 0x33333333u);
#pragma unroll
  for (int i = 0; i < 8; i += 2) turn(i, i + 1, 1, 0x55555555u);
#pragma unroll
  for (int j = 0; j < 8; ++j) rows[j * apart] = v[j];
}
"""
"""Eight vectors of 16 bytes, `apart` vectors from each other, become vectors of bits where they lie: bit j of byte b of
vector p is what bit p of byte b of vector j was."""

LOAD_FOUR = r"""
__device__ __forceinline__ void liftc_load_four(const void* from, long long at, int count, int kind, void* out) {
  unsigned* w = static_cast<unsigned*>(out);
  const char* place = static_cast<const char*>(from) + at * (kind == 0 ? 4 : 2);
  if (kind != 0 && count >= 4 && reinterpret_cast<unsigned long long>(place) % 8 == 0) {
#ifdef __CUDA_ARCH__
    asm volatile("ld.global.cg.v2.u32 {%0,%1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(place) : "memory");
#else
    w[0] = reinterpret_cast<const unsigned*>(place)[0];
    w[1] = reinterpret_cast<const unsigned*>(place)[1];
#endif
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < count) {
      const unsigned bits = liftc_addend(from, at + i, kind);
      if (kind == 0) w[i] = bits;
      else w[i / 2] |= bits << (i % 2 * 16);
    }
}
"""
"""Up to four values that are added to results, as they lie in memory, into zeroed words."""

STORE_FOUR = r"""
__device__ __forceinline__ unsigned liftc_pair(float a, float b, int kind) {
  if (kind == 1) {
    const __half2 both = __floats2half2_rn(a, b);
    return reinterpret_cast<const unsigned&>(both);
  }
  const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
  return reinterpret_cast<const unsigned&>(both);
}
__device__ __forceinline__ unsigned liftc_plus_pair(unsigned a, unsigned b, int kind) {
  if (kind == 1) {
    const __half2 both = __hadd2_rn(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
    return reinterpret_cast<const unsigned&>(both);
  }
  const __nv_bfloat162 both =
      __hadd2_rn(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
  return reinterpret_cast<const unsigned&>(both);
}
__device__ __forceinline__ void liftc_store_four(void* y, long long at, int count, int kind, const void* sets,
                                                 int total, float token_scale, const void* scales, int adds,
                                                 const void* biases, const void* residuals) {
  const float4 scale = *static_cast<const float4*>(scales);
  const float by[4] = {scale.x, scale.y, scale.z, scale.w};
  const unsigned* bias = static_cast<const unsigned*>(biases);
  const unsigned* residual = static_cast<const unsigned*>(residuals);
  float v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const unsigned set = static_cast<const unsigned*>(sets)[i];
    const int sum = static_cast<int>(2u * set - static_cast<unsigned>(total));
    v[i] = __fmul_rn(__fmul_rn(__int2float_rn(sum), token_scale), by[i]);
  }
  if (kind == 0) {
    float* to = static_cast<float*>(y) + at;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (adds & 1) v[i] = __fadd_rn(v[i], __uint_as_float(bias[i]));
      if (adds & 2) v[i] = __fadd_rn(v[i], __uint_as_float(residual[i]));
      if (i < count) to[i] = v[i];
    }
    return;
  }
  unsigned pair[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    pair[i] = liftc_pair(v[2 * i], v[2 * i + 1], kind);
    if (adds & 1) pair[i] = liftc_plus_pair(pair[i], bias[i], kind);
    if (adds & 2) pair[i] = liftc_plus_pair(pair[i], residual[i], kind);
  }
  unsigned short* to = static_cast<unsigned short*>(y) + at;
  if (count >= 4 && reinterpret_cast<unsigned long long>(to) % 8 == 0) {
#ifdef __CUDA_ARCH__
    asm volatile("st.global.v2.u32 [%0], {%1,%2};" :: "l"(to), "r"(pair[0]), "r"(pair[1]) : "memory");
#else
    *reinterpret_cast<uint2*>(to) = make_uint2(pair[0], pair[1]);
#endif
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < count) to[i] = static_cast<unsigned short>(pair[i / 2] >> (i % 2 * 16));
}
"""
"""Results of up to four rows of a token, with what is added to them, in the type `kind` says, 8 bytes at a time where
they lie so."""

LAUNCH_REGISTERS = r"""
#define liftc_launch_registers(count)
"""
"""Does nothing; the number is read when the source is written."""
