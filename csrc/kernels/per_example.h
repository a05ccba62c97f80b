// Kernels on factors (per_example/factor.h). Deterministic.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace infl {

// out[n, r, c] = Σ_t row[n, t, r] col[n, t, c], or += with accumulate. Shapes: row [N, positions, rows], col [N, positions, cols] (null: ones,
// cols = 1); out [N, rows·cols] with examples out_stride apart. Sums over t in order. `stream`: `out` will not be read soon, so it need not pass
// through the caches.
template <class T>
inline KernelStub<void(const Context&, int64_t N, int64_t positions, int64_t rows, int64_t cols, const T* row, const T* col, T* out,
                       int64_t out_stride, bool accumulate, bool stream)>
    outer_product_stub{"outer_product"};

// out[n] (+)= Σ_j x[n, j]², rows of `width`, x rows x_stride apart.
template <class T>
inline KernelStub<void(const Context&, int64_t N, int64_t width, const T* x, int64_t x_stride, T* out, bool accumulate)> square_norm_stub{
    "square_norm"};

// out[i] += a[i] * b[i % period]
template <class T>
inline KernelStub<void(const Context&, int64_t size, const T* a, const T* b, int64_t period, T* out)> multiply_accumulate_stub{"multiply_accumulate"};

// out[j] (+)= Σ_s x[s, j]², s < num, j < size.
template <class T>
inline KernelStub<void(const Context&, int64_t num, int64_t size, const T* x, T* out, bool accumulate)> square_accumulate_stub{"square_accumulate"};

// out[i, j] += a[i, j] * b[i, j % b_cols] for i < rows, j < cols; leading dimensions as given.
template <class T>
inline KernelStub<void(const Context&, int64_t rows, int64_t cols, const T* a, int64_t lda, const T* b, int64_t b_cols, int64_t ldb, T* out,
                       int64_t ldo)>
    gram_accumulate_stub{"gram_accumulate"};

}  // namespace infl
