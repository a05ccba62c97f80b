// Reductions over the middle axis of [rows, size, inner] arrays. All deterministic; each element is written by one thread.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace infl {

// out[r, i] = factor Σ_s x[r, s, i]
template <class T>
inline KernelStub<void(const Context&, int64_t rows, int64_t size, int64_t inner, T factor, const T* x, T* out)> sum_axis_stub{"sum_axis"};

// out[r, s, i] = factor g[r, i], or += with accumulate
template <class T>
inline KernelStub<void(const Context&, int64_t rows, int64_t size, int64_t inner, T factor, const T* g, T* out, bool accumulate)> broadcast_axis_stub{
    "broadcast_axis"};

// out[r, s, i] = Σ_{s' <= s} x[r, s', i], with `reverse` over s' >= s; or += with accumulate
template <class T>
inline KernelStub<void(const Context&, int64_t rows, int64_t size, int64_t inner, bool reverse, const T* x, T* out, bool accumulate)>
    cumulative_sum_stub{"cumulative_sum"};

// Reductions that are not linear: y[r, i] with derivative d[r, s, i] = ∂y[r, i]/∂x[r, s, i], PyTorch's conventions where there is none.
enum class Reduction : int {
  amax = 0,  // ties share the derivative equally
  amin = 1,
  max = 2,  // the first of ties has all of it
  min = 3,
  log_sum_exp = 4,
  variance = 5,  // divided by size − a; the derivative of the deviation is 0 where it is 0
  deviation = 6,
  norm = 7,           // Euclidean; derivative 0 at 0
  absolute_norm = 8,  // Σ |x|; derivative 0 at 0
  product = 9
};

inline constexpr int kNumReductions = 10;

template <class T>
inline KernelStub<void(const Context&, Reduction kind, T a, int64_t rows, int64_t size, int64_t inner, const T* x, T* y, T* d)>
    nonlinear_reduction_stub{"nonlinear_reduction"};

// Is the reduction's second derivative 0 wherever there is one?
constexpr bool is_piecewise_linear(Reduction kind) { return kind <= Reduction::min || kind == Reduction::absolute_norm; }

// out[v, r, s, i] += g[r, i] Σ_s' ∂²y[r, i]/∂x[r, s, i]∂x[r, s', i] t[v, r, s', i]; x is read for products alone.
template <class T>
inline KernelStub<void(const Context&, Reduction kind, T a, int64_t V, int64_t rows, int64_t size, int64_t inner, const T* x, const T* y, const T* d,
                       const T* g, const T* t, T* out)>
    reduction_second_order_stub{"reduction_second_order"};

// out[v, r, i] = Σ_s d[r, s, i] t[v, r, s, i]
template <class T>
inline KernelStub<void(const Context&, int64_t V, int64_t rows, int64_t size, int64_t inner, const T* d, const T* t, T* out)> weighted_sum_axis_stub{
    "weighted_sum_axis"};

// out[v, r, s, i] = d[r, s, i] g[v, r, i], or += with accumulate
template <class T>
inline KernelStub<void(const Context&, int64_t V, int64_t rows, int64_t size, int64_t inner, const T* d, const T* g, T* out, bool accumulate)>
    weighted_broadcast_axis_stub{"weighted_broadcast_axis"};

}  // namespace infl
