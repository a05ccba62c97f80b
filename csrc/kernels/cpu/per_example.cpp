// Bandwidth-bound loops. outer_product writes N·rows·cols elements and reads next to nothing; its stores go past the caches where asked.
#include "kernels/per_example.h"

#include "kernels/cpu/parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace infl {
namespace INFL_ISA {
namespace {

#if defined(__x86_64__)
inline void stream_vector(float* to, Vec<float> v) {
  for (int part = 0; part < INFL_VECTOR_BYTES / 16; ++part) _mm_stream_ps(to + 4 * part, reinterpret_cast<const __m128*>(&v)[part]);
}
inline void stream_vector(double* to, Vec<double> v) {
  for (int part = 0; part < INFL_VECTOR_BYTES / 16; ++part) _mm_stream_pd(to + 2 * part, reinterpret_cast<const __m128d*>(&v)[part]);
}
inline void stream_fence() { _mm_sfence(); }
#else
template <class T>
inline void stream_vector(T* to, Vec<T> v) {
  store(to, v);
}
inline void stream_fence() {}
#endif

// to[c] = a * from[c]
template <class T>
void write_scaled(int64_t cols, T a, const T* from, T* to, bool stream) {
  int64_t c = 0;
  if (stream) {
    while (c < cols && reinterpret_cast<uintptr_t>(to + c) % INFL_VECTOR_BYTES != 0) {
      to[c] = a * from[c];
      ++c;
    }
    for (; c + kLanes<T> <= cols; c += kLanes<T>) stream_vector(to + c, load(from + c) * a);
  }
  for (; c + kLanes<T> <= cols; c += kLanes<T>) store(to + c, load(from + c) * a);
  for (; c < cols; ++c) to[c] = a * from[c];
}

// One example's Σ_t row[t, r] col[t, c] for R rows and C vectors of columns, summed in registers.
template <class T, int R, int C>
inline __attribute__((always_inline)) void sum_tile(int64_t positions, int64_t rows, int64_t cols, const T* row, const T* col, T* to, bool accumulate,
                                                    bool stream) {
  Vec<T> sums[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) sums[r][c] = accumulate ? load(to + r * cols + c * kLanes<T>) : Vec<T>{};
  }
  for (int64_t t = 0; t < positions; ++t) {
    Vec<T> right[C];
    for (int c = 0; c < C; ++c) right[c] = load(col + t * cols + c * kLanes<T>);
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) sums[r][c] += row[t * rows + r] * right[c];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      T* at = to + r * cols + c * kLanes<T>;
      if (stream) {
        stream_vector(at, sums[r][c]);
      } else {
        store(at, sums[r][c]);
      }
    }
  }
}

// R rows of one example, all columns: full vectors, then those left over one by one.
template <class T, int R>
void sum_rows(int64_t positions, int64_t rows, int64_t cols, const T* row, const T* col, T* to, bool accumulate, bool stream) {
  constexpr int kVectors = 3;
  int64_t c = 0;
  for (; c + kVectors * kLanes<T> <= cols; c += kVectors * kLanes<T>) {
    sum_tile<T, R, kVectors>(positions, rows, cols, row, col + c, to + c, accumulate, stream);
  }
  for (; c + kLanes<T> <= cols; c += kLanes<T>) sum_tile<T, R, 1>(positions, rows, cols, row, col + c, to + c, accumulate, stream);
  for (; c < cols; ++c) {
    T sums[R];
    for (int r = 0; r < R; ++r) sums[r] = accumulate ? to[r * cols + c] : T(0);
    for (int64_t t = 0; t < positions; ++t) {
      for (int r = 0; r < R; ++r) sums[r] += row[t * rows + r] * col[t * cols + c];
    }
    for (int r = 0; r < R; ++r) to[r * cols + c] = sums[r];
  }
}

// One example's Σ_t row[t, r] col[t, c] over several positions.
template <class T>
void sum_outer(int64_t positions, int64_t rows, int64_t cols, const T* row, const T* col, T* to, bool accumulate, bool stream) {
  constexpr int kRows = INFL_VECTOR_BYTES == 64 ? 8 : 4;  // rows by vectors: 24 of 32 registers, 12 of 16
  stream = stream && !accumulate && cols % kLanes<T> == 0 && reinterpret_cast<uintptr_t>(to) % INFL_VECTOR_BYTES == 0;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) sum_rows<T, kRows>(positions, rows, cols, row + r, col, to + r * cols, accumulate, stream);
  for (; r < rows; ++r) sum_rows<T, 1>(positions, rows, cols, row + r, col, to + r * cols, accumulate, stream);
}

template <class T>
void outer_product(const Context& ctx, int64_t N, int64_t positions, int64_t rows, int64_t cols, const T* row, const T* col, T* out,
                   int64_t out_stride, bool accumulate, bool stream) {
  const int threads = threads_for(ctx, N * rows * cols * positions);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t n = 0; n < N; ++n) {
      const T* a = row + n * positions * rows;
      T* to = out + n * out_stride;
      if (col == nullptr) {
        for (int64_t r = 0; r < rows; ++r) {
          T sum = accumulate ? to[r] : T(0);
          for (int64_t t = 0; t < positions; ++t) sum += a[t * rows + r];
          to[r] = sum;
        }
      } else if (positions == 1 && !accumulate) {
        const bool past = stream && cols >= 2 * kLanes<T>;
        for (int64_t r = 0; r < rows; ++r) write_scaled(cols, a[r], col + n * cols, to + r * cols, past);
      } else {
        sum_outer(positions, rows, cols, a, col + n * positions * cols, to, accumulate, stream);
      }
    }
    if (stream) stream_fence();
  }
}

template <class T>
T square_sum(int64_t width, const T* x) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < width; ++j) sum += x[j] * x[j];
  return sum;
}

template <class T>
void square_norm(const Context& ctx, int64_t N, int64_t width, const T* x, int64_t x_stride, T* out, bool accumulate) {
  parallel_for(threads_for(ctx, N * width), N, [&](int64_t n) {
    const T sum = square_sum(width, x + n * x_stride);
    out[n] = accumulate ? out[n] + sum : sum;
  });
}

template <class T>
void multiply_accumulate(const Context&, int64_t size, const T* a, const T* b, int64_t period, T* out) {
  for (int64_t i = 0; i < size; ++i) out[i] += a[i] * b[i % period];
}

template <class T>
void square_accumulate(const Context& ctx, int64_t num, int64_t size, const T* x, T* out, bool accumulate) {
  const int threads = threads_for(ctx, num * size);
  constexpr int64_t kStrip = 256;
  const int64_t strips = (size + kStrip - 1) / kStrip;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < strips; ++i) {
    const int64_t begin = i * kStrip, count = std::min(kStrip, size - begin);
    T sums[kStrip] = {};
    for (int64_t s = 0; s < num; ++s) {
      const T* from = x + s * size + begin;
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) sums[j] += from[j] * from[j];
    }
    for (int64_t j = 0; j < count; ++j) out[begin + j] = accumulate ? out[begin + j] + sums[j] : sums[j];
  }
}

template <class T>
void gram_accumulate(const Context& ctx, int64_t rows, int64_t cols, const T* a, int64_t lda, const T* b, int64_t b_cols, int64_t ldb, T* out,
                     int64_t ldo) {
  const int threads = threads_for(ctx, rows * cols);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j0 = 0; j0 < cols; j0 += b_cols) {
      const T* x = a + i * lda + j0;
      const T* y = b + i * ldb;
      T* to = out + i * ldo + j0;
#pragma omp simd
      for (int64_t j = 0; j < b_cols; ++j) to[j] += x[j] * y[j];
    }
  }
}

INFL_REGISTER_CPU(outer_product_stub, outer_product)
INFL_REGISTER_CPU(square_norm_stub, square_norm)
INFL_REGISTER_CPU(multiply_accumulate_stub, multiply_accumulate)
INFL_REGISTER_CPU(square_accumulate_stub, square_accumulate)
INFL_REGISTER_CPU(gram_accumulate_stub, gram_accumulate)

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
