// batched_matmul: products of two matrices per example and batch entry, for V right-hand sides,
//
//   C[v, n, e] (+)= A₀[v, n, e] B₀[v, n, e] + A₁[v, n, e] B₁[v, n, e]
//
// Operands lie where they are: every axis has a stride of its own, 0 where the operand is shared. A stride of 0 of C sums over that axis, in order.
// What B is shared between right-hand sides is packed once for all of them.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace infl {

inline constexpr int kMaxBatchAxes = 8;

// Element (v, n, batch index, row, col) at data[v * v_stride + n * n_stride + Σ index * batch_strides + row * row_stride + col * col_stride].
template <class T>
struct MatrixView {
  T* data = nullptr;
  int64_t v_stride = 0, n_stride = 0;
  const int64_t* batch_strides = nullptr;
  int64_t row_stride = 0, col_stride = 1;

  MatrixView transposed() const {
    MatrixView t = *this;
    t.row_stride = col_stride;
    t.col_stride = row_stride;
    return t;
  }
};

template <class T>
struct BatchedMatmul {
  int64_t V = 1, n = 1;
  int num_axes = 0;  // batch axes, at most kMaxBatchAxes
  const int64_t* batch = nullptr;
  int64_t M = 0, K = 0, N = 0;
  MatrixView<const T> a[2], b[2];  // [M, K], [K, N]; a term whose A has no data is absent
  MatrixView<T> c;                 // [M, N]; row or column stride 1, or that axis of length 1
  bool accumulate = false;
};

template <class T>
inline KernelStub<void(const Context&, const BatchedMatmul<T>&)> batched_matmul_stub{"batched_matmul"};

}  // namespace infl
