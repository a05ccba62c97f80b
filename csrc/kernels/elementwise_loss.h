// elementwise_loss: losses on rows of C outputs. Results that are not wanted are passed as null. Deterministic.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "math/losses.h"

namespace infl {

// Elementwise losses (math/losses.h), each element times s and times its weight: value [N] sums the row; gradient, hessian (diagonal) [N, C];
// bregman [N] sums D(z, z_s) over the row. `weight` [C], or [N, C] with weight_stride = C, or absent.
template <class T>
struct ElementwiseLoss {
  int64_t N = 0, C = 0;
  T s = 1, a = 0;
  const T* z = nullptr;
  const T* target = nullptr;  // [N, C]
  const T* weight = nullptr;
  int64_t weight_stride = 0;
  T* value = nullptr;
  T* gradient = nullptr;
  T* hessian = nullptr;
  const T* z_s = nullptr;  // for bregman
  T* bregman = nullptr;
};

template <class T>
inline KernelStub<void(const Context&, ElementwiseFormula, const ElementwiseLoss<T>&)> elementwise_loss_stub{"elementwise_loss"};

}  // namespace infl
