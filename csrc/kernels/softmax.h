// Softmax over the middle axis of [rows, size, inner] arrays. All deterministic; each element is written by one thread.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace infl {

// p = exp(x − top) / Σ exp(x − top), with top the maximum: never overflows. y = p, or with `log`: (x − top) − log Σ exp(x − top).
template <class T>
inline KernelStub<void(const Context&, int64_t rows, int64_t size, int64_t inner, bool log, const T* x, T* y, T* p)> softmax_stub{"softmax"};

enum class SoftmaxProduct : int {
  softmax = 0,       // p ∘ (in − Σ p ∘ in): derivative of softmax and its transpose
  log_tangent = 1,   // in − Σ p ∘ in
  log_cotangent = 2  // in − p Σ in
};

// out[v] = the product of each in[v] [rows, size, inner], or += with accumulate; p is shared by all v.
template <class T>
inline KernelStub<void(const Context&, SoftmaxProduct part, int64_t V, int64_t rows, int64_t size, int64_t inner, const T* p, const T* in, T* out,
                       bool accumulate)>
    softmax_product_stub{"softmax_product"};

// out[v] += the cotangent map's derivative along t[v] at the cotangent g [rows, size, inner], with u = t − Σ p ∘ t:
//   softmax  p ∘ (w − Σ p ∘ w),  w = u ∘ (g − Σ p ∘ g)
//   log      −(Σ g) p ∘ u
template <class T>
inline KernelStub<void(const Context&, bool log, int64_t V, int64_t rows, int64_t size, int64_t inner, const T* p, const T* g, const T* t, T* out)>
    softmax_second_order_stub{"softmax_second_order"};

}  // namespace infl
