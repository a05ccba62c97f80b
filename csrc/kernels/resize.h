// Interpolation: a linear map of planes [planes, D, H, W] that is a product of one map for each axis. Deterministic: every output is one sum.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace infl {

// Output o of the axis is Σ_k weight[k] · input k over begin[o] <= k < end[o], within the input; the weights of all outputs lie one after another.
template <class T>
struct ResizeAxis {
  int64_t in, out;
  const int64_t *begin, *end;
  const T* weight;
};

// y[p] = (A_0 ⊗ A_1 ⊗ A_2) x[p] for every plane p, or added with accumulate. The transpose is the same kernel with the transposed axes.
template <class T>
inline KernelStub<void(const Context&, const ResizeAxis<T>* axes, int64_t planes, const T* x, T* y, bool accumulate)> resize_stub{"resize"};

}  // namespace infl
