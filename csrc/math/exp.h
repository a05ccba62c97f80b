// eˣ and its kin as arithmetic that a compiler vectorises, within 2 to 3 units in the last place; NaN for NaN.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/macros.h"

namespace infl {

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  using Bits = int32_t;
  static constexpr int mantissa_bits = 23, exponent_bias = 127, degree = 7;
  static constexpr float lowest = -87.3f, shifter = 12582912.0f;  // 1.5 · 2²³: adding it rounds to an integer
  static constexpr float ln2_high = 0.693145751953125f, ln2_low = 1.428606765330187e-06f;
};

template <>
struct ExpConstants<double> {
  using Bits = int64_t;
  static constexpr int mantissa_bits = 52, exponent_bias = 1023, degree = 13;
  static constexpr double lowest = -708.0, shifter = 6755399441055744.0;  // 1.5 · 2⁵²
  static constexpr double ln2_high = 0.6931471803691238, ln2_low = 1.9082149292705877e-10;
};

// x = n ln 2 + r, |r| ≤ ln 2 / 2, and e^r = 1 + r Σ rᵏ / (k + 1)!; x from `lowest` to 0.
template <class T>
struct ReducedExp {
  T power, r, sum;  // 2ⁿ, r, (e^r − 1) / r
};

template <class T>
INFL_HD ReducedExp<T> reduced_exp(T x) {
  using C = ExpConstants<T>;
  using Bits = typename C::Bits;
  constexpr T kInverseFactorial[] = {T(1),
                                     T(1),
                                     T(1) / T(2),
                                     T(1) / T(6),
                                     T(1) / T(24),
                                     T(1) / T(120),
                                     T(1) / T(720),
                                     T(1) / T(5040),
                                     T(1) / T(40320),
                                     T(1) / T(362880),
                                     T(1) / T(3628800),
                                     T(1) / T(39916800),
                                     T(1) / T(479001600),
                                     T(1) / T(6227020800.0)};
  const T shifted = x * T(1.44269504088896340736) + C::shifter;
  const T n = shifted - C::shifter;
  const T r = (x - n * C::ln2_high) - n * C::ln2_low;
  T sum = kInverseFactorial[C::degree];
  INFL_UNROLL(16)
  for (int k = C::degree - 1; k >= 1; --k) sum = sum * r + kInverseFactorial[k];
  Bits bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = static_cast<Bits>(static_cast<std::make_unsigned_t<Bits>>(bits) << C::mantissa_bits) + (Bits{C::exponent_bias} << C::mantissa_bits);
  T power;
  std::memcpy(&power, &bits, sizeof(power));
  return {power, r, sum};
}

// eˣ for x ≤ 0; 0 where the result would be subnormal (and for −∞).
template <class T>
INFL_HD T exp_nonpositive(T x) {
  const bool vanishes = x < ExpConstants<T>::lowest;
  const ReducedExp<T> e = reduced_exp(vanishes ? ExpConstants<T>::lowest : x);
  return vanishes ? T(0) : (e.sum * e.r + T(1)) * e.power;
}

// eˣ − 1 for x ≤ 0, without cancellation: 2ⁿ (e^r − 1) + (2ⁿ − 1).
template <class T>
INFL_HD T expm1_nonpositive(T x) {
  const bool vanishes = x < ExpConstants<T>::lowest;
  const ReducedExp<T> e = reduced_exp(vanishes ? ExpConstants<T>::lowest : x);
  return vanishes ? T(-1) : e.power * e.r * e.sum + (e.power - T(1));
}

// log(1 + u) for 0 ≤ u ≤ 1: 2 artanh(s) = 2 s Σ s²ᵏ / (2k + 1), s = u / (2 + u) ≤ 1/3.
template <class T>
INFL_HD T log1p_unit(T u) {
  constexpr int kDegree = sizeof(T) == sizeof(float) ? 7 : 16;
  const T s = u / (T(2) + u), square = s * s;
  T sum = T(1) / T(2 * kDegree + 1);
  INFL_UNROLL(16)
  for (int k = kDegree - 1; k >= 1; --k) sum = sum * square + T(1) / T(2 * k + 1);
  return T(2) * s + T(2) * s * square * sum;
}

}  // namespace infl
