// The vendor's matrix product on the emulated device: plain loops, and what the vendor refuses.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/device.h"

namespace infl::emulation {

// What cublasGemmStridedBatchedEx documents of its arguments, in our terms: sizes and leading dimensions that are ints, leading dimensions not
// below what is stored side by side, results that do not overlap. Of addresses it asks nothing but whole elements (FP8 and arrays of pointers
// aside).
template <class T>
void check(const MatrixProduct<T>& p) {
  const auto expect = [](bool holds, const std::string& what) {
    if (!holds) throw std::invalid_argument("emulated device: expected a matrix product as cuBLAS takes it, got " + what + ".");
  };
  const auto expect_leading = [&](const char* of, int64_t ld, int64_t least) {
    expect(ld >= std::max<int64_t>(1, least) && ld <= INT_MAX, "a leading dimension of " + std::string(of) + " of " + std::to_string(ld) + " where " +
                                                                   std::to_string(least) + " elements are side by side");
  };
  for (const int64_t size : {p.batch, p.M, p.N, p.K}) expect(size >= 0 && size <= INT_MAX, "a size of " + std::to_string(size));
  expect_leading("A", p.lda, p.a_transposed ? p.M : p.K);
  expect_leading("B", p.ldb, p.b_transposed ? p.K : p.N);
  expect_leading("C", p.ldc, p.N);
  for (const T* data : {p.a, p.b, static_cast<const T*>(p.c)}) {
    expect(data != nullptr && reinterpret_cast<uintptr_t>(data) % sizeof(T) == 0, "an address that is none of an element");
  }
  const bool one_after_another = p.c_batch >= (p.M - 1) * p.ldc + p.N, side_by_side = p.c_batch >= p.N && p.ldc >= (p.batch - 1) * p.c_batch + p.N;
  expect(p.batch < 2 || one_after_another || side_by_side, "results " + std::to_string(p.c_batch) + " elements apart, which overlap");
}

template <class T>
void multiply(const MatrixProduct<T>& p) {
  for (int64_t i = 0; i < p.batch; ++i) {
    const T *a = p.a + i * p.a_batch, *b = p.b + i * p.b_batch;
    for (int64_t m = 0; m < p.M; ++m) {
      for (int64_t n = 0; n < p.N; ++n) {
        T sum = 0;
        for (int64_t k = 0; k < p.K; ++k) {
          sum += (p.a_transposed ? a[k * p.lda + m] : a[m * p.lda + k]) * (p.b_transposed ? b[n * p.ldb + k] : b[k * p.ldb + n]);
        }
        T& c = p.c[i * p.c_batch + m * p.ldc + n];
        c = p.accumulate ? c + sum : sum;
      }
    }
  }
}

}  // namespace infl::emulation
