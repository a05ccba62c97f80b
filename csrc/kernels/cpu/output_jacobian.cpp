// One example after another: its Jacobian comes from memory once and stays in the first-level cache for all right-hand sides.
#include "kernels/output_jacobian.h"

#include <algorithm>

#include "kernels/cpu/parallel.h"

namespace infl {
namespace INFL_ISA {
namespace {

constexpr int64_t kStrip = 64;  // columns whose sums stay in registers

template <class T>
void dot_row(int64_t width, const T* B, const T* t, T* to) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += B[i] * t[i];
  *to += sum;
}

// Four rows a_row apart, which share the loads of b: an example's outputs for one vector, or its vectors for one output.
template <class T>
void dot_rows(int64_t width, const T* a, int64_t a_row, const T* b, T* to, int64_t to_row) {
  const T *a1 = a + a_row, *a2 = a1 + a_row, *a3 = a2 + a_row;
  T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t i = 0; i < width; ++i) {
    s0 += a[i] * b[i];
    s1 += a1[i] * b[i];
    s2 += a2[i] * b[i];
    s3 += a3[i] * b[i];
  }
  to[0] += s0;
  to[to_row] += s1;
  to[2 * to_row] += s2;
  to[3 * to_row] += s3;
}

// body(rows of B of an example, one of its vectors in [V, n, .])
template <class T, class Body>
void each_vector(const Context& ctx, int64_t V, int64_t n, int64_t C, int64_t width, const T* B, const Body& body) {
  parallel_for(threads_for(ctx, V * n * C * width), n, [&](int64_t i) {
    for (int64_t v = 0; v < V; ++v) body(B + i * C * width, v * n + i);
  });
}

template <class T>
void output_jacobian(const Context& ctx, int64_t V, int64_t n, int64_t C, int64_t width, const T* B, const T* t_u, T* t_z) {
  parallel_for(threads_for(ctx, V * n * C * width), n, [&](int64_t i) {
    const T *rows = B + i * C * width, *t = t_u + i * width;
    T* to = t_z + i * C;
    const int64_t in_fours = C / 4 * 4;
    for (int64_t v = 0; v < V; ++v) {
      for (int64_t c = 0; c < in_fours; c += 4) dot_rows<T>(width, rows + c * width, width, t + v * n * width, to + v * n * C + c, 1);
    }
    for (int64_t c = in_fours; c < C; ++c) {
      int64_t v = 0;
      for (; v + 4 <= V; v += 4) dot_rows<T>(width, t + v * n * width, n * width, rows + c * width, to + v * n * C + c, n * C);
      for (; v < V; ++v) dot_row<T>(width, rows + c * width, t + v * n * width, to + v * n * C + c);
    }
  });
}

template <class T>
void output_jacobian_transposed(const Context& ctx, int64_t V, int64_t n, int64_t C, int64_t width, const T* B, const T* g_z, T* g_u) {
  each_vector(ctx, V, n, C, width, B, [&](const T* rows, int64_t at) {
    const T* g = g_z + at * C;
    T* to = g_u + at * width;
    for (int64_t begin = 0; begin < width; begin += kStrip) {
      const int64_t count = std::min(kStrip, width - begin);
      T sum[kStrip] = {};
      for (int64_t c = 0; c < C; ++c) {
        const T* row = rows + c * width + begin;
        if (count == kStrip) {
#pragma omp simd
          for (int64_t k = 0; k < kStrip; ++k) sum[k] += g[c] * row[k];
        } else {
#pragma omp simd
          for (int64_t k = 0; k < count; ++k) sum[k] += g[c] * row[k];
        }
      }
      for (int64_t k = 0; k < count; ++k) to[begin + k] = sum[k];
    }
  });
}

INFL_REGISTER_CPU(output_jacobian_stub, output_jacobian)
INFL_REGISTER_CPU(output_jacobian_transposed_stub, output_jacobian_transposed)

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
