// One row of outputs at a time; rows are split between threads.
#include "kernels/loss.h"

#include "kernels/cpu/simd.h"
#include "math/losses.h"

namespace infl {
namespace INFL_ISA {
namespace {

inline int threads_for(const Context& ctx, int64_t elements) { return elements < 2048 ? 1 : ctx.num_threads; }

template <class Formula, class T>
void elementwise_loss(const Context& ctx, const ElementwiseLoss<T>& l) {
  const int threads = threads_for(ctx, l.N * l.C);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t n = 0; n < l.N; ++n) {
    T sum = 0;
    for (int64_t i = n * l.C; i < (n + 1) * l.C; ++i) {
      if (l.value) sum += Formula::value(l.z[i], l.target[i], l.s);
      if (l.gradient) l.gradient[i] = Formula::gradient(l.z[i], l.target[i], l.s);
      if (l.hessian) l.hessian[i] = Formula::hessian(l.z[i], l.s);
    }
    if (l.value) l.value[n] = sum;
  }
}

template <class Formula, class T>
void elementwise_bregman(const Context& ctx, int64_t N, int64_t C, T s, const T* z, const T* z_s, T* out) {
  const int threads = threads_for(ctx, N * C);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t n = 0; n < N; ++n) {
    T sum = 0;
    for (int64_t i = n * C; i < (n + 1) * C; ++i) sum += Formula::bregman(z[i], z_s[i], s);
    out[n] = sum;
  }
}

template <class T>
void squared_error(const Context& ctx, const ElementwiseLoss<T>& l) {
  elementwise_loss<SquaredError>(ctx, l);
}

template <class T>
void binary_cross_entropy(const Context& ctx, const ElementwiseLoss<T>& l) {
  elementwise_loss<BinaryCrossEntropy>(ctx, l);
}

template <class T>
void squared_error_bregman(const Context& ctx, int64_t N, int64_t C, T s, const T* z, const T* z_s, T* out) {
  elementwise_bregman<SquaredError>(ctx, N, C, s, z, z_s, out);
}

template <class T>
void binary_cross_entropy_bregman(const Context& ctx, int64_t N, int64_t C, T s, const T* z, const T* z_s, T* out) {
  elementwise_bregman<BinaryCrossEntropy>(ctx, N, C, s, z, z_s, out);
}

template <class T>
void cross_entropy(const Context& ctx, const CrossEntropy<T>& l) {
  const int threads = threads_for(ctx, l.N * l.C);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t n = 0; n < l.N; ++n) {
    const T* z = l.z + n * l.C;
    T top = z[0];
    for (int64_t c = 1; c < l.C; ++c) top = std::max(top, z[c]);
    T sum = 0;
    for (int64_t c = 0; c < l.C; ++c) sum += std::exp(z[c] - top);
    if (l.value) l.value[n] = std::log(sum) + (top - z[l.target[n]]);
    if (l.p) {
      for (int64_t c = 0; c < l.C; ++c) l.p[n * l.C + c] = std::exp(z[c] - top) / sum;
    }
    if (l.gradient) {
      T rest = 0;  // the target's component is minus the sum of the others: p − 1 would lose its digits when p is close to 1
      for (int64_t c = 0; c < l.C; ++c) {
        const T p = std::exp(z[c] - top) / sum;
        l.gradient[n * l.C + c] = p;
        if (c != l.target[n]) rest += p;
      }
      l.gradient[n * l.C + l.target[n]] = -rest;
    }
  }
}

// KL(p_s ‖ p) = log Σ p_s exp(d), d = z − z_s less its mean under p_s. All |d| < 1: log1p of Σ p_s (exp(d) − 1 − d), which loses no digits;
// else a logsumexp.
template <class T>
void cross_entropy_bregman(const Context& ctx, int64_t N, int64_t C, const T* z, const T* z_s, T* out) {
  const int threads = threads_for(ctx, N * C);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t n = 0; n < N; ++n) {
    const T* a = z + n * C;
    const T* b = z_s + n * C;
    T top = b[0];
    for (int64_t c = 1; c < C; ++c) top = std::max(top, b[c]);
    T sum = 0, mean = 0;
    for (int64_t c = 0; c < C; ++c) {
      const T weight = std::exp(b[c] - top);
      sum += weight;
      mean += weight * (a[c] - b[c]);
    }
    mean /= sum;
    T widest = 0, highest = -std::numeric_limits<T>::infinity();  // of |d|, and of the exponent of p_s exp(d)
    for (int64_t c = 0; c < C; ++c) {
      const T d = a[c] - b[c] - mean;
      widest = std::max(widest, std::abs(d));
      highest = std::max(highest, b[c] - top + d);
    }
    T total = 0;
    if (widest < T(1)) {
      for (int64_t c = 0; c < C; ++c) total += std::exp(b[c] - top) * exp_tail(a[c] - b[c] - mean);
      out[n] = std::log1p(total / sum);
    } else {
      for (int64_t c = 0; c < C; ++c) total += std::exp(b[c] - top + (a[c] - b[c] - mean) - highest);
      out[n] = std::log(total / sum) + highest;
    }
  }
}

INFL_REGISTER_CPU(squared_error_stub, squared_error)
INFL_REGISTER_CPU(binary_cross_entropy_stub, binary_cross_entropy)
INFL_REGISTER_CPU(squared_error_bregman_stub, squared_error_bregman)
INFL_REGISTER_CPU(binary_cross_entropy_bregman_stub, binary_cross_entropy_bregman)
INFL_REGISTER_CPU(cross_entropy_stub, cross_entropy)
INFL_REGISTER_CPU(cross_entropy_bregman_stub, cross_entropy_bregman)

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
