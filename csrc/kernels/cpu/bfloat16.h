// Float32 operands rounded to bfloat16: to nearest, ties to even; NaN stays NaN, and denormal numbers are zero, as the instructions have it.
// Rounded numbers are floats whose lower half is zero, or pairs: two of them in the bits of one float, the first in the lower half.
#pragma once

#include "kernels/cpu/simd.h"

#if INFL_VECTOR_BYTES == 64
#include <immintrin.h>
#endif

namespace infl {
namespace INFL_ISA {
namespace {

inline uint32_t bfloat16_bits(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if ((bits & 0x7f800000) == 0) return bits >> 16 & 0x8000;
  return x != x ? (bits >> 16) | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float rounded(float x) { return __builtin_bit_cast(float, bfloat16_bits(x) << 16); }

// The same for every lane.
inline __attribute__((always_inline)) Vec<float> rounded(Vec<float> x) {
  typedef uint32_t Bits __attribute__((vector_size(INFL_VECTOR_BYTES)));
  const Bits bits = reinterpret_cast<Bits>(x);
  Bits result = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
  result = x != x ? (bits & 0xffff0000) | 0x400000 : result;
  result = (bits & 0x7f800000) == 0 ? bits & 0x80000000 : result;
  return reinterpret_cast<Vec<float>>(result);
}

inline float pair_of(float low, float high) { return __builtin_bit_cast(float, bfloat16_bits(low) | bfloat16_bits(high) << 16); }

#if INFL_VECTOR_BYTES == 64
// Instructions of AVX512_BF16 by name: the file is compiled for processors without it, and Form::pairs runs only on those that have it.
inline __attribute__((always_inline)) __m512i bfloat16s(__m512 low, __m512 high) {
  __m512i result;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(result) : "v"(low), "v"(high));
  return result;
}

inline __attribute__((always_inline)) __m512 add_pairs(__m512 sum, __m512 a, __m512 b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
#endif

// out[i] = the pair (low[i], high[i]), or (low[i], 0) without `high`, for i < n.
inline void interleave(int64_t n, const float* low, const float* high, float* out) {
  int64_t i = 0;
#if INFL_VECTOR_BYTES == 64
  const __m512i order =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (; i + 16 <= n; i += 16) {
    const __m512i both = bfloat16s(_mm512_loadu_ps(low + i), high ? _mm512_loadu_ps(high + i) : _mm512_setzero_ps());
    _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(order, both));
  }
#endif
  for (; i < n; ++i) out[i] = pair_of(low[i], high ? high[i] : 0.0f);
}

// out = the pairs of neighbours of in[0..n), the last with 0 if n is odd.
inline void pair_neighbours(int64_t n, const float* in, float* out) {
  int64_t i = 0;
#if INFL_VECTOR_BYTES == 64
  for (; i + 32 <= n; i += 32) _mm512_storeu_si512(out + i / 2, bfloat16s(_mm512_loadu_ps(in + i), _mm512_loadu_ps(in + i + 16)));
#endif
  for (; i < n; i += 2) out[i / 2] = pair_of(in[i], i + 1 < n ? in[i + 1] : 0.0f);
}

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
