// Elementwise kernels on [V, N, width] arrays. All deterministic; each element is written by one thread.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "math/activations.h"

namespace infl {

// y[i] = φ(x[i]), derivative[i] = φ'(x[i]) (derivative may be absent); i < size.
template <class T>
inline KernelStub<void(const Context&, Activation kind, T a, T b, int64_t size, const T* x, T* y, T* derivative)> activation_stub{"activation"};

// out[i] = φ''(x[i]); i < size.
template <class T>
inline KernelStub<void(const Context&, Activation kind, T a, T b, int64_t size, const T* x, T* out)> second_derivative_stub{"second_derivative"};

// out[v, i] += d[i] * g[i] * in[v, i]; v < V, i < size.
template <class T>
inline KernelStub<void(const Context&, int64_t V, int64_t size, const T* d, const T* g, const T* in, T* out)> add_scaled_stub{"add_scaled"};

// out[v, i] = d[i] * in[v, i], or += with accumulate; v < V, i < size; `in` and `out` may be the same.
template <class T>
inline KernelStub<void(const Context&, int64_t V, int64_t size, const T* d, const T* in, T* out, bool accumulate)> scale_stub{"scale"};

// out[i] = a x1[i] + b x2[i], or += with accumulate; x2 may be absent; `out` may be x1.
template <class T>
inline KernelStub<void(const Context&, int64_t size, T a, const T* x1, T b, const T* x2, T* out, bool accumulate)> combine_stub{"combine"};

// out[r, j] = a scale[j] x[r, j] + b + shift[j], or += with accumulate; r < rows, j < width; scale and shift may be absent (1 and 0).
template <class T>
inline KernelStub<void(const Context&, int64_t rows, int64_t width, T a, const T* scale, T b, const T* shift, const T* x, T* out, bool accumulate)>
    affine_stub{"affine"};

// out[v, j] += sum over r of x[v, r, j]; r < rows, j < width; out rows out_batch apart. Rows are added in order.
template <class T>
inline KernelStub<void(const Context&, int64_t V, int64_t rows, int64_t width, const T* x, T* out, int64_t out_batch)> column_sum_stub{"column_sum"};

// out[p] += sum over s of x[s, p]; s < num, p < size; rows x_stride apart, added in order.
template <class T>
inline KernelStub<void(const Context&, int64_t num, int64_t size, const T* x, int64_t x_stride, T* out)> row_accumulate_stub{"row_accumulate"};

// *finite = whether no x[i] is NaN or infinite, i < size.
template <class T>
inline KernelStub<void(const Context&, int64_t size, const T* x, bool* finite)> all_finite_stub{"all_finite"};

}  // namespace infl
