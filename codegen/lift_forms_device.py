"""Device functions of what is done to x before it is lifted: RMS norm, LayerNorm, SiLU gate and GELU.

Eight values of x at a time, as liftc_load_x8 brings them, rounded to the dtype of x where separate operations would.
All are computed in float32; exp and division are right to a few units in its last place, far below half precision.
"""

from __future__ import annotations

PAIRS = r"""
__device__ __forceinline__ void liftc_put_pair(unsigned* r, int i, float a, float b, int kind) {
  if (kind == 0) {
    r[i] = __float_as_uint(a);
    r[i + 1] = __float_as_uint(b);
  } else {
    r[i / 2] = liftc_half_pair(a, b, kind);
  }
}
__device__ __forceinline__ void liftc_multiply_pair(unsigned* r, int i, const void* by, int kind) {
  const unsigned* b = static_cast<const unsigned*>(by);
  liftc_put_pair(r, i, liftc_value(r, i, kind) * liftc_value(b, i, kind),
                 liftc_value(r, i + 1, kind) * liftc_value(b, i + 1, kind), kind);
}
"""
"""Values i and i + 1 of eight, rounded; the same times those of eight others, rounded."""

NORM = r"""
__device__ __forceinline__ float liftc_squares_x8(const void* raw, int kind) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float v = liftc_value(static_cast<const unsigned*>(raw), i, kind);
    sum = fmaf(v, v, sum);
  }
  return sum;
}
__device__ __forceinline__ void liftc_norm_x8(void* raw, const void* gain, float root, int kind) {
  unsigned* r = static_cast<unsigned*>(raw);
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    liftc_put_pair(r, i, liftc_value(r, i, kind) * root, liftc_value(r, i + 1, kind) * root, kind);
    liftc_multiply_pair(r, i, gain, kind);
  }
}
"""
"""The sum of squares; gain * (x * root)."""

LAYER = r"""
__device__ __forceinline__ float liftc_sum_x8(const void* raw, int kind) {
  const unsigned* r = static_cast<const unsigned*>(raw);
  float v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = liftc_value(r, i, kind) + liftc_value(r, i + 4, kind);
  return (v[0] + v[1]) + (v[2] + v[3]);
}
__device__ __forceinline__ float liftc_deviations_x8(const void* raw, float mean, int there, int kind) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float v = liftc_value(static_cast<const unsigned*>(raw), i, kind) - mean;
    sum = fmaf(v, v, sum);
  }
  return there > 0 ? sum : 0.0f;
}
__device__ __forceinline__ void liftc_layer_x8(void* raw, const void* gain, const void* shift, float mean, float root,
                                               int there, int choice, int kind) {
  unsigned *r = static_cast<unsigned*>(raw), g[8], s[8];
#pragma unroll
  for (int i = 0; i < (kind == 0 ? 8 : 4); i += 4) {
    const uint4 a = static_cast<const uint4*>(gain)[i / 4], b = static_cast<const uint4*>(shift)[i / 4];
    g[i] = a.x, g[i + 1] = a.y, g[i + 2] = a.z, g[i + 3] = a.w;
    s[i] = b.x, s[i + 1] = b.y, s[i + 2] = b.z, s[i + 3] = b.w;
  }
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    float v[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float gained = liftc_value(g, i + e, kind), shifted = liftc_value(s, i + e, kind);
      v[e] = (liftc_value(r, i + e, kind) - mean) * root;
      v[e] = choice == 0 ? fmaf(v[e], gained, shifted) : v[e] * (1.0f + gained);
      v[e] = there > 0 ? v[e] : 0.0f;
    }
    liftc_put_pair(r, i, v[0], v[1], kind);
  }
}
"""
"""The sum; the sum of squares of what is away from the mean; (x - mean) * root * gain + shift, or with choice 1
(x - mean) * root * (1 + gain), rounded once. gain and shift are at multiples of 16 bytes. `there` is 0 for values that
are padding, which count for nothing and stay 0."""

GATE = r"""
__device__ __forceinline__ float liftc_silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }
__device__ __forceinline__ void liftc_gate_x8(void* raw, const void* up, int kind) {
  unsigned* r = static_cast<unsigned*>(raw);
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    liftc_put_pair(r, i, liftc_silu(liftc_value(r, i, kind)), liftc_silu(liftc_value(r, i + 1, kind)), kind);
    liftc_multiply_pair(r, i, up, kind);
  }
}
"""
"""silu(gate) * up."""

GELU = r"""
__device__ __forceinline__ float liftc_gelu(float x) {
  const float away = fabsf(x), t = __fdividef(1.0f, fmaf(away, 0.265f, 1.0f));
  float tail = fmaf(t, -0.06779145f, 0.19528807f);
  tail = fmaf(t, tail, -0.06638286f);
  tail = fmaf(t, tail, 0.1425065f);
  tail = fmaf(t, tail, 0.08294216f);
  tail = fmaf(t, tail, 0.10783747f);
  tail = fmaf(t, tail, 0.1055998f);
  return fmaf(-away, t * tail * __expf(-0.5f * x * x), fmaxf(x, 0.0f));
}
__device__ __forceinline__ float liftc_gelu_tanh(float x) {
  return __fdividef(x, 1.0f + __expf(-x * fmaf(x * x, 0.07135481627f, 1.595769122f)));
}
__device__ __forceinline__ void liftc_gelu_x8(void* raw, const void* up, int choice, int kind) {
  unsigned* r = static_cast<unsigned*>(raw);
  if (choice % 2) {
#pragma unroll
    for (int i = 0; i < 8; i += 2)
      liftc_put_pair(r, i, liftc_gelu_tanh(liftc_value(r, i, kind)), liftc_gelu_tanh(liftc_value(r, i + 1, kind)),
                     kind);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i += 2)
      liftc_put_pair(r, i, liftc_gelu(liftc_value(r, i, kind)), liftc_gelu(liftc_value(r, i + 1, kind)), kind);
  }
  if (choice < 2) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) liftc_multiply_pair(r, i, up, kind);
  }
}
"""
"""gelu(x) with erf (choice 0 and 2) or the tanh approximation (1 and 3), times up where choice is below 2.

gelu is max(x, 0) less |x| times the Gaussian tail beyond |x|, which is exp(-x^2 / 2) times a polynomial in
1 / (1 + .265 |x|) fitted to it, at most 6.5e-7 of the tail away. x / 2 (1 + tanh(u)) is x / (1 + exp(-2 u)). Both keep
their relative precision where x is far below 0. A number that is not finite never becomes finite: plus infinity gives
NaN with erf where torch gives infinity, which makes the same z, the rest is as in torch.
"""

FORMS = f"\n#ifndef LIFTC_FORMS\n#define LIFTC_FORMS\n{PAIRS}{NORM}{LAYER}{GATE}{GELU}#endif\n"
"""All of them, once in a source however many are called; they use functions of lift_device.BF16, which comes first."""
