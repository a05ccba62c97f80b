// What register tiles share: vectors with some of their lanes, sums that start at zero, and the tile of a size known at run time.
#pragma once

#include <type_traits>
#include <utility>

#include "kernels/cpu/simd.h"

#if INFL_VECTOR_BYTES == 64
#include <immintrin.h>
#endif

namespace infl {
namespace INFL_ISA {
namespace {

// The first `lanes` elements of a vector, the others zero; and only those written.
#if INFL_VECTOR_BYTES == 64
inline Vec<float> load_lanes(const float* p, int64_t lanes) {
  return reinterpret_cast<Vec<float>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << lanes) - 1), p));
}
inline Vec<double> load_lanes(const double* p, int64_t lanes) {
  return reinterpret_cast<Vec<double>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << lanes) - 1), p));
}
inline void store_lanes(float* p, Vec<float> v, int64_t lanes) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << lanes) - 1), reinterpret_cast<__m512>(v));
}
inline void store_lanes(double* p, Vec<double> v, int64_t lanes) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << lanes) - 1), reinterpret_cast<__m512d>(v));
}
#else
template <class T>
inline Vec<T> load_lanes(const T* p, int64_t lanes) {
  T buffer[kLanes<T>] = {};
  for (int64_t i = 0; i < lanes; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <class T>
inline void store_lanes(T* p, Vec<T> v, int64_t lanes) {
  T buffer[kLanes<T>];
  store(buffer, v);
  for (int64_t i = 0; i < lanes; ++i) p[i] = buffer[i];
}
#endif

template <class T, int R, int C>
inline __attribute__((always_inline)) void clear(T (&sums)[R][C]) {
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sums[r][c] = T{};
}

template <int n>
using Size = std::integral_constant<int, n>;

// make(Size<size>{}) of a size from 1 to `most`. `make` captures nothing: what it returns is a constant of each size.
template <int most, class Make>
auto of_size(int64_t size, const Make&) {
  return [size]<int... I>(std::integer_sequence<int, I...>) {
    static constexpr decltype(Make{}(Size<1>{})) table[] = {Make{}(Size<I + 1>{})...};
    return table[size - 1];
  }(std::make_integer_sequence<int, most>{});
}

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
