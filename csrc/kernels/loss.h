// Losses on rows of C outputs. Results that are not wanted are passed as null. Deterministic.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace infl {

// Elementwise losses (math/losses.h): value [N] sums the row; gradient, hessian (diagonal) [N, C]. target [N, C]; s weighs an element.
template <class T>
struct ElementwiseLoss {
  int64_t N = 0, C = 0;
  T s = 1;
  const T* z = nullptr;
  const T* target = nullptr;
  T* value = nullptr;
  T* gradient = nullptr;
  T* hessian = nullptr;
};

template <class T>
inline KernelStub<void(const Context&, const ElementwiseLoss<T>&)> squared_error_stub{"squared_error"};

template <class T>
inline KernelStub<void(const Context&, const ElementwiseLoss<T>&)> binary_cross_entropy_stub{"binary_cross_entropy"};

// out[n] = Σ_c D(z, z_s), the Bregman divergence of the row.
template <class T>
inline KernelStub<void(const Context&, int64_t N, int64_t C, T s, const T* z, const T* z_s, T* out)> squared_error_bregman_stub{
    "squared_error_bregman"};

template <class T>
inline KernelStub<void(const Context&, int64_t N, int64_t C, T s, const T* z, const T* z_s, T* out)> binary_cross_entropy_bregman_stub{
    "binary_cross_entropy_bregman"};

// Softmax cross-entropy with a class index: value = logsumexp(z) − z[target]; gradient = p − e_target; p = softmax(z) is the Hessian's state.
template <class T>
struct CrossEntropy {
  int64_t N = 0, C = 0;
  const T* z = nullptr;
  const int64_t* target = nullptr;
  T* value = nullptr;
  T* gradient = nullptr;
  T* p = nullptr;
};

template <class T>
inline KernelStub<void(const Context&, const CrossEntropy<T>&)> cross_entropy_stub{"cross_entropy"};

// out[n] = KL(softmax(z_s) ‖ softmax(z)) of the row.
template <class T>
inline KernelStub<void(const Context&, int64_t N, int64_t C, const T* z, const T* z_s, T* out)> cross_entropy_bregman_stub{"cross_entropy_bregman"};

}  // namespace infl
