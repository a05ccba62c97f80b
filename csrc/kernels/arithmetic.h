// Pointwise kernels on two operands. Arrays are [V, rows, width]; what has no V axis is shared by all right-hand sides. Deterministic.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "math/activations.h"

namespace infl {

// out[v, r, j] = a (scale[j] t_x[v, r, j] + t_scale[v, j] x[r, j]) + t_shift[v, j]; absent (null): scale is 1, the tangents are 0.
// t_scale and t_shift have rows t_scale_ld and t_shift_ld apart.
template <class T>
inline KernelStub<void(const Context&, int64_t V, int64_t rows, int64_t width, T a, const T* scale, const T* t_x, const T* t_scale,
                       int64_t t_scale_ld, const T* x, const T* t_shift, int64_t t_shift_ld, T* out)>
    affine_tangent_stub{"affine_tangent"};

// out[v, j] += a Σ_r g[v, r, j] x[r, j]; out rows out_ld apart; r in order.
template <class T>
inline KernelStub<void(const Context&, int64_t V, int64_t rows, int64_t width, T a, const T* g, const T* x, T* out, int64_t out_ld)> column_dot_stub{
    "column_dot"};

// out[v, i] = d1[i] t1[v, i] + d2[i] t2[v, i], i < size.
template <class T>
inline KernelStub<void(const Context&, int64_t V, int64_t size, const T* d1, const T* t1, const T* d2, const T* t2, T* out)> product_tangent_stub{
    "product_tangent"};

// y = max(x1, x2) (sign = 1) or min (sign = −1), NaN if either is; weight = the share of x1 in the derivative: 1, 0, or 1/2 where they are equal.
template <class T>
inline KernelStub<void(const Context&, int64_t size, T sign, const T* x1, const T* x2, T* y, T* weight)> extremum_stub{"extremum"};

// y[i] = 1 where x1[i] is in the relation `kind` (greater ... not_equal) to x2[i], else 0.
template <class T>
inline KernelStub<void(const Context&, Activation kind, int64_t size, const T* x1, const T* x2, T* y)> comparison_stub{"comparison"};

// out[v, i] (+)= w[i] t1[v, i] + (1 − w[i]) t2[v, i], either absent (0).
template <class T>
inline KernelStub<void(const Context&, int64_t V, int64_t size, const T* w, const T* t1, const T* t2, T* out, bool accumulate)> blend_stub{"blend"};

// out[v, r, j] (+)= mask[r, j] ≠ 0 ? x1[v, r, j] : x2[v, r, j]; mask rows mask_ld apart (0: one for all); an absent branch is its number.
// Selects: what is in the other branch, NaN included, does not show.
template <class T>
inline KernelStub<void(const Context&, int64_t V, int64_t rows, int64_t width, const T* mask, int64_t mask_ld, const T* x1, T number1, const T* x2,
                       T number2, T* out, bool accumulate)>
    where_stub{"where"};

// y = x for x > 0, else weight[j] x; derivative likewise; below = min(x, 0), may be absent. Arrays [rows, width], weight [width].
template <class T>
inline KernelStub<void(const Context&, int64_t rows, int64_t width, const T* weight, const T* x, T* y, T* derivative, T* below)> prelu_stub{"prelu"};

}  // namespace infl
