// The normal distribution's tail as arithmetic that a compiler vectorises.
#pragma once

#include "common/macros.h"

namespace infl {

// Φ(−x) e^(x²/2) for x ≥ 0, so that a tail times e^(−x²/2) keeps its digits however small it is: (x + 4) Φ(−x) e^(x²/2) is smooth in
// t = (x − 4) / (x + 4), which covers all x ≥ 0 (the substitution of Shepherd and Laframboise, Math. Comp. 36, 1981). The polynomials are the
// Chebyshev expansions, computed with 50 digits, up to where terms fall below half a unit in the last place; within 3 units.
template <class T>
INFL_HD T scaled_normal_tail(T x) {
  const T w = T(1) / (x + T(4)), t = T(1) - T(8) * w;
  if constexpr (sizeof(T) == sizeof(float)) {
    constexpr T kTerms[] = {T(0.7552851304),    T(-0.6078966314),   T(0.387137402),    T(-0.1865221598),   T(0.0603965535),
                            T(-0.00753771716),  T(-0.003479550269), T(0.001622040106), T(0.0001328735335), T(-0.0002155737763),
                            T(-1.037879134e-6), T(2.118298426e-5),  T(-2.310677224e-7)};
    T sum = kTerms[12];
    INFL_UNROLL(16)
    for (int k = 11; k >= 0; --k) sum = sum * t + kTerms[k];
    return sum * w;
  } else {
    constexpr T kTerms[] = {T(0.755285130415751492),    T(-0.607896641971892125),    T(0.387137400742214917),    T(-0.186521857959654829),
                            T(0.0603965748909178723),   T(-0.00754018896682523998),  T(-0.00347969236704797363), T(0.00163081845939458598),
                            T(0.000133344309411832544), T(-0.000231094953240194385), T(-1.90824635141457105e-6), T(0.0000351447947875335531),
                            T(7.16658764119512099e-7),  T(-5.92058651955689084e-6),  T(-6.29836733849236905e-7), T(1.02256041582960377e-6),
                            T(2.72462969511458721e-7),  T(-1.56502364619931066e-7),  T(-8.68664701599789276e-8), T(1.46307274056511747e-8),
                            T(2.14276038434523559e-8),  T(1.43299184010886129e-9),   T(-3.73064508186837028e-9), T(-8.54652189988014714e-10),
                            T(3.40331230864949465e-10), T(1.17547899148077403e-10)};
    T sum = kTerms[25];
    INFL_UNROLL(32)
    for (int k = 24; k >= 0; --k) sum = sum * t + kTerms[k];
    return sum * w;
  }
}

}  // namespace infl
