// One block of positions at a time, every class of the block in turn, so that the innermost loop runs over contiguous positions; a single
// position is a block whose innermost loop runs over the classes. Sums per position live on the stack: whatever K is, nothing is stored
// beyond the results.
#include "kernels/cross_entropy.h"
#include "kernels/cpu/simd.h"
#include "math/exp.h"
#include "math/losses.h"

namespace infl {
namespace INFL_ISA {
namespace {

constexpr int64_t kBlock = 64;  // positions

// What smoothing makes of a target: q_k = w_k (hit · target_k + base).
template <class T>
struct Smoothing {
  T hit, base, total_weight;  // total_weight = Σ_k w_k
};

template <class T>
Smoothing<T> smoothing_of(const CrossEntropy<T>& l) {
  T total = static_cast<T>(l.K);
  if (l.class_weight) {
    total = 0;
    for (int64_t k = 0; k < l.K; ++k) total += l.class_weight[k];
  }
  return {T(1) - l.smoothing, l.smoothing / static_cast<T>(l.K), total};
}

template <class T>
inline T weight_of(const CrossEntropy<T>& l, int64_t k) {
  return l.class_weight ? l.class_weight[k] : T(1);
}

// Q of the positions b < B that start at `first` within example n.
template <class T>
void masses(const CrossEntropy<T>& l, const Smoothing<T>& q, int64_t n, int64_t first, int64_t B, T* Q) {
  if (l.index) {
    for (int64_t b = 0; b < B; ++b) {
      const int64_t y = l.index[n * l.positions + first + b];
      Q[b] = y < 0 ? T(0) : q.hit * weight_of(l, y) + q.base * q.total_weight;
    }
    return;
  }
  for (int64_t b = 0; b < B; ++b) Q[b] = q.base * q.total_weight;
  for (int64_t k = 0; k < l.K; ++k) {
    const T* t = l.target + (n * l.K + k) * l.positions + first;
    const T weight = q.hit * weight_of(l, k);
    for (int64_t b = 0; b < B; ++b) Q[b] += weight * t[b];
  }
}

// top = max_k z; e <- exp(z − top) where it is wanted; sum = Σ_k exp(z − top).
template <class T>
void exponentials(int64_t K, int64_t stride, int64_t B, const T* z, T* e, T* top, T* sum) {
  if (stride == 1) {
    T highest = z[0], total = 0;
#pragma omp simd reduction(max : highest)
    for (int64_t k = 0; k < K; ++k) highest = z[k] > highest ? z[k] : highest;
    if (e) {
#pragma omp simd reduction(+ : total)
      for (int64_t k = 0; k < K; ++k) {
        e[k] = exp_nonpositive(z[k] - highest);
        total += e[k];
      }
    } else {
#pragma omp simd reduction(+ : total)
      for (int64_t k = 0; k < K; ++k) total += exp_nonpositive(z[k] - highest);
    }
    top[0] = highest;
    sum[0] = total;
    return;
  }
  for (int64_t b = 0; b < B; ++b) {
    top[b] = z[b];
    sum[b] = 0;
  }
  for (int64_t k = 1; k < K; ++k) {
    const T* row = z + k * stride;
#pragma omp simd
    for (int64_t b = 0; b < B; ++b) top[b] = row[b] > top[b] ? row[b] : top[b];
  }
  for (int64_t k = 0; k < K; ++k) {
    const T* row = z + k * stride;
    if (e) {
      T* out = e + k * stride;
#pragma omp simd
      for (int64_t b = 0; b < B; ++b) {
        out[b] = exp_nonpositive(row[b] - top[b]);
        sum[b] += out[b];
      }
    } else {
#pragma omp simd
      for (int64_t b = 0; b < B; ++b) sum[b] += exp_nonpositive(row[b] - top[b]);
    }
  }
}

// e <- e/sum
template <class T>
void normalise(int64_t K, int64_t stride, int64_t B, const T* sum, T* e) {
  if (stride == 1) {
    const T inverse = T(1) / sum[0];
#pragma omp simd
    for (int64_t k = 0; k < K; ++k) e[k] *= inverse;
    return;
  }
  T inverse[kBlock];
  for (int64_t b = 0; b < B; ++b) inverse[b] = T(1) / sum[b];
  for (int64_t k = 0; k < K; ++k) {
#pragma omp simd
    for (int64_t b = 0; b < B; ++b) e[k * stride + b] *= inverse[b];
  }
}

// Σ_b (Q log sum + Σ_k q_k (top − z_k)): no term is negative.
template <class T>
T block_value(const CrossEntropy<T>& l, const Smoothing<T>& q, int64_t n, int64_t first, int64_t B, const T* z, const T* top, const T* sum,
              const T* Q) {
  T value = 0;
  for (int64_t b = 0; b < B; ++b) value += Q[b] * std::log(sum[b]);
  if (l.index) {
    for (int64_t b = 0; b < B; ++b) {
      const int64_t y = l.index[n * l.positions + first + b];
      if (y >= 0) value += q.hit * weight_of(l, y) * (top[b] - z[y * l.positions + b]);
    }
    if (q.base == T(0)) return value;
  }
  for (int64_t k = 0; k < l.K; ++k) {
    const T* row = z + k * l.positions;
    const T weight = weight_of(l, k);
    T part = 0;
    for (int64_t b = 0; b < B; ++b) {
      const bool ignored = l.index && l.index[n * l.positions + first + b] < 0;
      const T target = l.index ? T(0) : l.target[(n * l.K + k) * l.positions + first + b];
      if (!ignored) part += (q.hit * target + q.base) * (top[b] - row[b]);
    }
    value += weight * part;
  }
  return value;
}

// g <- s (Q p − q) with p = e/sum. The component of the largest logit is minus the sum of the others: Q p − q would lose its digits where
// p is close to 1.
template <class T>
void block_gradient(const CrossEntropy<T>& l, const Smoothing<T>& q, int64_t n, int64_t first, int64_t B, const T* z, const T* e, const T* top,
                    const T* sum, const T* Q, T* g) {
  T scale[kBlock], rest[kBlock], base[kBlock];
  int64_t highest[kBlock];
  for (int64_t b = 0; b < B; ++b) {
    scale[b] = l.s * Q[b] / sum[b];
    base[b] = l.index && l.index[n * l.positions + first + b] < 0 ? T(0) : l.s * q.base;
    rest[b] = 0;
    highest[b] = -1;
  }
  for (int64_t k = 0; k < l.K; ++k) {
    const int64_t at = k * l.positions;
    const T weight = weight_of(l, k);
    const T* t = l.index ? nullptr : l.target + n * l.K * l.positions + at + first;
    for (int64_t b = 0; b < B; ++b) {
      T value = scale[b] * e[at + b] - weight * base[b];
      if (t) {
        value -= weight * l.s * q.hit * t[b];
      } else if (k == l.index[n * l.positions + first + b]) {
        value -= weight * l.s * q.hit;
      }
      const bool is_highest = highest[b] < 0 && z[at + b] == top[b];
      if (is_highest) highest[b] = k;
      rest[b] += is_highest ? T(0) : value;
      g[at + b] = value;
    }
  }
  for (int64_t b = 0; b < B; ++b) {
    if (highest[b] >= 0) g[highest[b] * l.positions + b] = -rest[b];  // none: the logits are NaN
  }
}

// The same at a single position.
template <class T>
void row_gradient(const CrossEntropy<T>& l, const Smoothing<T>& q, int64_t n, const T* z, const T* e, T top, T sum, T Q, T* g) {
  const int64_t K = l.K, y = l.index ? l.index[n] : -1;
  const T scale = l.s * Q / sum, hit = l.s * q.hit, base = l.index && y < 0 ? T(0) : l.s * q.base;
  int64_t highest = 0;
  while (highest < K && z[highest] != top) ++highest;
  if (l.index) {
    const T* w = base == T(0) ? nullptr : l.class_weight;
#pragma omp simd
    for (int64_t k = 0; k < K; ++k) g[k] = scale * e[k] - (w ? w[k] * base : base);
    if (y >= 0) g[y] -= weight_of(l, y) * hit;
  } else {
    const T* t = l.target + n * K;
    const T* w = l.class_weight;
#pragma omp simd
    for (int64_t k = 0; k < K; ++k) g[k] = scale * e[k] - (w ? w[k] : T(1)) * (base + hit * t[k]);
  }
  if (highest == K) return;  // the logits are NaN
  g[highest] = 0;
  T rest = 0;
#pragma omp simd reduction(+ : rest)
  for (int64_t k = 0; k < K; ++k) rest += g[k];
  g[highest] = -rest;
}

// KL(p_s ‖ p) = log Σ p_s exp(d), d = z − z_s less its mean under p_s. All |d| < 1: log1p of Σ p_s (exp(d) − 1 − d), which loses no digits;
// else a logsumexp.
template <class T>
T divergence_of(T widest, T total, T sum, T highest) {
  const T kl = widest < T(1) ? std::log1p(total / sum) : std::log(total / sum) + highest;
  return kl < T(0) ? T(0) : kl;  // by rounding
}

template <class T>
T row_divergence(int64_t K, const T* z, const T* z_s) {
  T top = 0, sum = 0, mean = 0, widest = 0, highest = -std::numeric_limits<T>::infinity(), total = 0;  // highest: exponent of p_s exp(d)
  exponentials<T>(K, 1, 1, z_s, nullptr, &top, &sum);
#pragma omp simd reduction(+ : mean)
  for (int64_t k = 0; k < K; ++k) mean += exp_nonpositive(z_s[k] - top) * (z[k] - z_s[k]);
  mean /= sum;
#pragma omp simd reduction(max : widest, highest)
  for (int64_t k = 0; k < K; ++k) {
    const T d = z[k] - z_s[k] - mean, size = d < T(0) ? -d : d, exponent = z_s[k] - top + d;
    widest = size > widest ? size : widest;
    highest = exponent > highest ? exponent : highest;
  }
  if (widest < T(1)) {
#pragma omp simd reduction(+ : total)
    for (int64_t k = 0; k < K; ++k) total += exp_nonpositive(z_s[k] - top) * exp_tail_within_one(z[k] - z_s[k] - mean);
  } else {
#pragma omp simd reduction(+ : total)
    for (int64_t k = 0; k < K; ++k) total += exp_nonpositive(z_s[k] - top + (z[k] - z_s[k] - mean) - highest);
  }
  return divergence_of(widest, total, sum, highest);
}

// The same at B positions side by side.
template <class T>
void block_divergence(int64_t K, int64_t stride, int64_t B, const T* z, const T* z_s, T* kl) {
  T top[kBlock], sum[kBlock], mean[kBlock], widest[kBlock], highest[kBlock], total[kBlock];
  exponentials<T>(K, stride, B, z_s, nullptr, top, sum);
  for (int64_t b = 0; b < B; ++b) {
    mean[b] = widest[b] = total[b] = 0;
    highest[b] = -std::numeric_limits<T>::infinity();
  }
  for (int64_t k = 0; k < K; ++k) {
    const int64_t at = k * stride;
#pragma omp simd
    for (int64_t b = 0; b < B; ++b) mean[b] += exp_nonpositive(z_s[at + b] - top[b]) * (z[at + b] - z_s[at + b]);
  }
  for (int64_t b = 0; b < B; ++b) mean[b] /= sum[b];
  for (int64_t k = 0; k < K; ++k) {
    const int64_t at = k * stride;
#pragma omp simd
    for (int64_t b = 0; b < B; ++b) {
      const T d = z[at + b] - z_s[at + b] - mean[b], size = d < T(0) ? -d : d, exponent = z_s[at + b] - top[b] + d;
      widest[b] = size > widest[b] ? size : widest[b];
      highest[b] = exponent > highest[b] ? exponent : highest[b];
    }
  }
  bool any_near = false, any_far = false;
  for (int64_t b = 0; b < B; ++b) {
    any_near = any_near || widest[b] < T(1);
    any_far = any_far || !(widest[b] < T(1));
  }
  for (int64_t k = 0; k < K; ++k) {
    const T* a = z + k * stride;
    const T* s = z_s + k * stride;
    if (any_near) {
#pragma omp simd
      for (int64_t b = 0; b < B; ++b) {
        const T term = exp_nonpositive(s[b] - top[b]) * exp_tail_within_one(a[b] - s[b] - mean[b]);
        total[b] += widest[b] < T(1) ? term : T(0);
      }
    }
    if (any_far) {
#pragma omp simd
      for (int64_t b = 0; b < B; ++b) {
        const T term = exp_nonpositive(s[b] - top[b] + (a[b] - s[b] - mean[b]) - highest[b]);
        total[b] += widest[b] < T(1) ? T(0) : term;
      }
    }
  }
  for (int64_t b = 0; b < B; ++b) kl[b] = divergence_of(widest[b], total[b], sum[b], highest[b]);
}

template <class T>
void cross_entropy(const Context& ctx, const CrossEntropy<T>& l) {
  const Smoothing<T> q = smoothing_of(l);
  const int threads = l.N * l.K * l.positions < 2048 ? 1 : ctx.num_threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t n = 0; n < l.N; ++n) {
    T value = 0, divergence = 0;
    for (int64_t first = 0; first < l.positions; first += kBlock) {
      const int64_t B = std::min(kBlock, l.positions - first), offset = n * l.K * l.positions + first;
      const T* z = l.z + offset;
      T top[kBlock], sum[kBlock], Q[kBlock];
      masses(l, q, n, first, B, Q);
      if (l.bregman) {
        T kl[kBlock];
        if (l.positions == 1) {
          kl[0] = row_divergence(l.K, z, l.z_s + offset);
        } else {
          block_divergence(l.K, l.positions, B, z, l.z_s + offset, kl);
        }
        for (int64_t b = 0; b < B; ++b) divergence += Q[b] * kl[b];
      }
      if (l.mass) {
        for (int64_t b = 0; b < B; ++b) l.mass[n * l.positions + first + b] = l.s * Q[b];
      }
      if (!l.value && !l.gradient && !l.p) continue;
      T* e = l.p ? l.p + offset : l.gradient ? l.gradient + offset : nullptr;
      exponentials(l.K, l.positions, B, z, e, top, sum);
      if (l.value) value += block_value(l, q, n, first, B, z, top, sum, Q);
      if (l.gradient && l.positions == 1) row_gradient(l, q, n, z, e, top[0], sum[0], Q[0], l.gradient + offset);
      if (l.gradient && l.positions > 1) block_gradient(l, q, n, first, B, z, e, top, sum, Q, l.gradient + offset);
      if (l.p) normalise(l.K, l.positions, B, sum, e);
    }
    if (l.value) l.value[n] = l.s * value;
    if (l.bregman) l.bregman[n] = l.s * divergence;
  }
}

INFL_REGISTER_CPU(cross_entropy_stub, cross_entropy)

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
