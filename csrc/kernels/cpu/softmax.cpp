// inner = 1: along contiguous rows; else for a strip of columns side by side.
#include "kernels/softmax.h"

#include "kernels/cpu/parallel.h"
#include "math/exp.h"

namespace infl {
namespace INFL_ISA {
namespace {

constexpr int64_t kStrip = 64;  // columns whose sums stay in registers

template <class T>
void softmax_row(int64_t size, bool log, const T* x, T* y, T* p) {
  T top = x[0];
  for (int64_t s = 1; s < size; ++s) top = std::max(top, x[s]);
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t s = 0; s < size; ++s) {
    p[s] = exp_nonpositive(x[s] - top);
    sum += p[s];
  }
  const T shift = log ? std::log(sum) : T(0);
  for (int64_t s = 0; s < size; ++s) {
    p[s] /= sum;
    y[s] = log ? (x[s] - top) - shift : p[s];
  }
}

template <class T>
void softmax_columns(int64_t size, int64_t inner, int64_t count, bool log, const T* x, T* y, T* p) {
  T top[kStrip], sum[kStrip] = {}, shift[kStrip] = {};
  std::copy(x, x + count, top);
  for (int64_t s = 1; s < size; ++s) {
    for (int64_t i = 0; i < count; ++i) top[i] = std::max(top[i], x[s * inner + i]);
  }
  for (int64_t s = 0; s < size; ++s) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      p[s * inner + i] = exp_nonpositive(x[s * inner + i] - top[i]);
      sum[i] += p[s * inner + i];
    }
  }
  if (log) {
    for (int64_t i = 0; i < count; ++i) shift[i] = std::log(sum[i]);
  }
  for (int64_t s = 0; s < size; ++s) {
    for (int64_t i = 0; i < count; ++i) {
      p[s * inner + i] /= sum[i];
      y[s * inner + i] = log ? (x[s * inner + i] - top[i]) - shift[i] : p[s * inner + i];
    }
  }
}

template <class T>
void softmax(const Context& ctx, int64_t rows, int64_t size, int64_t inner, bool log, const T* x, T* y, T* p) {
  const int threads = threads_for(ctx, 8 * rows * size * inner);
  const int64_t strips = (inner + kStrip - 1) / kStrip;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int64_t at = r * size * inner + strip * kStrip;
      if (inner == 1) {
        softmax_row(size, log, x + at, y + at, p + at);
      } else {
        softmax_columns(size, inner, std::min(kStrip, inner - strip * kStrip), log, x + at, y + at, p + at);
      }
    }
  }
}

template <SoftmaxProduct kPart, class T>
inline T sum_term(T p, T in) {
  return kPart == SoftmaxProduct::log_cotangent ? in : p * in;
}

template <SoftmaxProduct kPart, class T>
inline T element(T p, T in, T sum) {
  if constexpr (kPart == SoftmaxProduct::softmax) return p * (in - sum);
  if constexpr (kPart == SoftmaxProduct::log_tangent) return in - sum;
  return in - p * sum;
}

template <SoftmaxProduct kPart, bool kAccumulate, class T>
void product_row(int64_t size, const T* p, const T* in, T* out) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t s = 0; s < size; ++s) sum += sum_term<kPart>(p[s], in[s]);
#pragma omp simd
  for (int64_t s = 0; s < size; ++s) {
    const T value = element<kPart>(p[s], in[s], sum);
    out[s] = kAccumulate ? out[s] + value : value;
  }
}

template <SoftmaxProduct kPart, bool kAccumulate, class T>
void product_columns(int64_t size, int64_t inner, int64_t count, const T* p, const T* in, T* out) {
  T sum[kStrip] = {};
  for (int64_t s = 0; s < size; ++s) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) sum[i] += sum_term<kPart>(p[s * inner + i], in[s * inner + i]);
  }
  for (int64_t s = 0; s < size; ++s) {
    T* to = out + s * inner;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const T value = element<kPart>(p[s * inner + i], in[s * inner + i], sum[i]);
      to[i] = kAccumulate ? to[i] + value : value;
    }
  }
}

template <SoftmaxProduct kPart, bool kAccumulate, class T>
void product(const Context& ctx, int64_t V, int64_t rows, int64_t size, int64_t inner, const T* p, const T* in, T* out) {
  const int threads = threads_for(ctx, V * rows * size * inner);
  const int64_t strips = (inner + kStrip - 1) / kStrip;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int64_t at = r * size * inner + strip * kStrip, batch = rows * size * inner;
      for (int64_t v = 0; v < V; ++v) {
        if (inner == 1) {
          product_row<kPart, kAccumulate>(size, p + at, in + v * batch + at, out + v * batch + at);
        } else {
          product_columns<kPart, kAccumulate>(size, inner, std::min(kStrip, inner - strip * kStrip), p + at, in + v * batch + at,
                                              out + v * batch + at);
        }
      }
    }
  }
}

template <class T>
void softmax_product(const Context& ctx, SoftmaxProduct part, int64_t V, int64_t rows, int64_t size, int64_t inner, const T* p, const T* in, T* out,
                     bool accumulate) {
  switch (part) {
    case SoftmaxProduct::softmax:
      return accumulate ? product<SoftmaxProduct::softmax, true>(ctx, V, rows, size, inner, p, in, out)
                        : product<SoftmaxProduct::softmax, false>(ctx, V, rows, size, inner, p, in, out);
    case SoftmaxProduct::log_tangent:
      return accumulate ? product<SoftmaxProduct::log_tangent, true>(ctx, V, rows, size, inner, p, in, out)
                        : product<SoftmaxProduct::log_tangent, false>(ctx, V, rows, size, inner, p, in, out);
    case SoftmaxProduct::log_cotangent:
      return accumulate ? product<SoftmaxProduct::log_cotangent, true>(ctx, V, rows, size, inner, p, in, out)
                        : product<SoftmaxProduct::log_cotangent, false>(ctx, V, rows, size, inner, p, in, out);
  }
  throw std::invalid_argument("softmax_product: unknown part " + std::to_string(static_cast<int>(part)) + ".");
}

// One line of elements `step` apart.
template <class T>
void second_order_line(bool log, int64_t size, int64_t step, const T* p, const T* g, const T* t, T* out) {
  T g_sum = 0, t_sum = 0, w_sum = 0;
  for (int64_t s = 0; s < size * step; s += step) {
    g_sum += log ? g[s] : p[s] * g[s];
    t_sum += p[s] * t[s];
  }
  if (log) {
    for (int64_t s = 0; s < size * step; s += step) out[s] -= g_sum * p[s] * (t[s] - t_sum);
    return;
  }
  for (int64_t s = 0; s < size * step; s += step) w_sum += p[s] * (t[s] - t_sum) * (g[s] - g_sum);
  for (int64_t s = 0; s < size * step; s += step) out[s] += p[s] * ((t[s] - t_sum) * (g[s] - g_sum) - w_sum);
}

template <class T>
void softmax_second_order(const Context& ctx, bool log, int64_t V, int64_t rows, int64_t size, int64_t inner, const T* p, const T* g, const T* t,
                          T* out) {
  const int threads = threads_for(ctx, V * rows * size * inner);
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t v = 0; v < V; ++v) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = r * size * inner, batch = v * rows * size * inner;
      for (int64_t i = at; i < at + inner; ++i) second_order_line(log, size, inner, p + i, g + i, t + batch + i, out + batch + i);
    }
  }
}

INFL_REGISTER_CPU(softmax_stub, softmax)
INFL_REGISTER_CPU(softmax_second_order_stub, softmax_second_order)
INFL_REGISTER_CPU(softmax_product_stub, softmax_product)

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
