// A square of one vector's lanes, transposed in registers.
#pragma once

#include "kernels/cpu/simd.h"

namespace infl {
namespace INFL_ISA {
namespace {

// Lane j of row i becomes lane i of row j: rows i and i + L / 2 are interleaved, log2(L) times.
template <class T>
inline __attribute__((always_inline)) void transpose_square(Vec<T>* rows) {
  constexpr int L = kLanes<T>;
  using Mask = decltype(Vec<T>{} < Vec<T>{});  // integers of the lanes' size
  Mask low, high;
  for (int i = 0; i < L; ++i) {
    low[i] = i / 2 + (i % 2) * L;
    high[i] = low[i] + L / 2;
  }
  Vec<T> mixed[L];
#pragma GCC unroll 4
  for (int stage = 1; stage < L; stage *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      mixed[2 * i] = __builtin_shuffle(rows[i], rows[i + L / 2], low);
      mixed[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + L / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = mixed[i];
  }
}

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
