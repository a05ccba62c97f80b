// One pass over u, one row at a time, all right-hand sides of an example in turn; the softmax shape reads its row twice, from L1 or L2.
#include "kernels/output_hessian.h"

#include "kernels/cpu/parallel.h"

namespace infl {
namespace INFL_ISA {
namespace {

constexpr int64_t kBlock = 64;  // positions, or classes that are searched together

// The first of the largest.
template <class T>
int64_t most_probable(int64_t C, const T* p) {
  T top = p[0];
#pragma omp simd reduction(max : top)
  for (int64_t c = 0; c < C; ++c) top = p[c] > top ? p[c] : top;
  int64_t block = 0;
  for (; block + kBlock < C; block += kBlock) {
    int found = 0;
#pragma omp simd reduction(| : found)
    for (int64_t c = block; c < block + kBlock; ++c) found |= p[c] == top;
    if (found) break;
  }
  while (block + 1 < C && p[block] != top) ++block;
  return block;
}

// x <- weight (diag p − p pᵀ) x or a root of it. Sums leave out the most probable class m: next to p_m ≈ 1 the others would lose their digits.
// The Hessian does not see a constant added to x, so x_m can be taken as zero; and 1 − p_m is the sum of the others.
template <class T>
void softmax_row(HessianPart part, int64_t C, int64_t m, T weight, const T* p, T* x) {
  if (part == HessianPart::root) {
    // S x = √p ∘ x − p (√p · x)
    const T x_m = x[m];
    x[m] = 0;
    T dot = 0, rest = 0;
#pragma omp simd reduction(+ : dot, rest)
    for (int64_t c = 0; c < C; ++c) {
      dot += std::sqrt(p[c]) * x[c];
      rest += c == m ? T(0) : p[c];
    }
    const T top = std::sqrt(p[m]) * x_m, total = dot + top;
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) x[c] = weight * (std::sqrt(p[c]) * x[c] - p[c] * total);
    x[m] = weight * (top * rest - p[m] * dot);
    return;
  }
  // p ∘ (x − p·x), or √p ∘ (x − p·x)
  const T shift = x[m];
  T dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t c = 0; c < C; ++c) dot += p[c] * (x[c] - shift);
  if (part == HessianPart::product) {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) x[c] = weight * p[c] * ((x[c] - shift) - dot);
  } else {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) x[c] = weight * std::sqrt(p[c]) * ((x[c] - shift) - dot);
  }
}

// The same at B positions side by side: class k of position b is at k * stride + b.
template <class T>
void softmax_block(HessianPart part, int64_t K, int64_t stride, int64_t B, const T* weight, const T* p, T* x) {
  int64_t m[kBlock];
  T top[kBlock], shift[kBlock], dot[kBlock], rest[kBlock];
  for (int64_t b = 0; b < B; ++b) {
    m[b] = 0;
    top[b] = p[b];
    dot[b] = rest[b] = 0;
  }
  for (int64_t k = 1; k < K; ++k) {
    for (int64_t b = 0; b < B; ++b) {
      const bool higher = p[k * stride + b] > top[b];
      top[b] = higher ? p[k * stride + b] : top[b];
      m[b] = higher ? k : m[b];
    }
  }
  for (int64_t b = 0; b < B; ++b) shift[b] = x[m[b] * stride + b];
  if (part == HessianPart::root) {
    for (int64_t b = 0; b < B; ++b) x[m[b] * stride + b] = 0;
    for (int64_t k = 0; k < K; ++k) {
      const T* p_k = p + k * stride;
      const T* x_k = x + k * stride;
      for (int64_t b = 0; b < B; ++b) {
        dot[b] += std::sqrt(p_k[b]) * x_k[b];
        rest[b] += k == m[b] ? T(0) : p_k[b];
      }
    }
    for (int64_t b = 0; b < B; ++b) shift[b] *= std::sqrt(top[b]);
    for (int64_t k = 0; k < K; ++k) {
      const T* p_k = p + k * stride;
      T* x_k = x + k * stride;
#pragma omp simd
      for (int64_t b = 0; b < B; ++b) x_k[b] = weight[b] * (std::sqrt(p_k[b]) * x_k[b] - p_k[b] * (dot[b] + shift[b]));
    }
    for (int64_t b = 0; b < B; ++b) x[m[b] * stride + b] = weight[b] * (shift[b] * rest[b] - top[b] * dot[b]);
    return;
  }
  const bool product = part == HessianPart::product;
  for (int64_t k = 0; k < K; ++k) {
    const T* p_k = p + k * stride;
    const T* x_k = x + k * stride;
#pragma omp simd
    for (int64_t b = 0; b < B; ++b) dot[b] += p_k[b] * (x_k[b] - shift[b]);
  }
  for (int64_t k = 0; k < K; ++k) {
    const T* p_k = p + k * stride;
    T* x_k = x + k * stride;
#pragma omp simd
    for (int64_t b = 0; b < B; ++b) x_k[b] = weight[b] * (product ? p_k[b] : std::sqrt(p_k[b])) * ((x_k[b] - shift[b]) - dot[b]);
  }
}

// Of H, or of a root of it.
template <class T>
T weight_of(const OutputHessian<T>& h, bool product, int64_t place) {
  const T weight = h.scale * (h.weights ? h.weights[place] : T(1));
  return product ? weight : std::sqrt(weight);
}

template <class T>
void output_hessian(const Context& ctx, const OutputHessian<T>& h, HessianPart part, int64_t V, int64_t n, T* u) {
  if (h.classes_innermost) return output_hessian(ctx, h.by_position(), part, V, n * h.positions, u);
  const int threads = threads_for(ctx, V * n * h.C);
  const int64_t C = h.C, positions = h.positions;
  const bool product = part == HessianPart::product;
  if (h.shape == HessianShape::softmax && positions == 1) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < n; ++row) {
      const T* p = h.state + row * C;
      const int64_t m = most_probable(C, p);
      const T weight = weight_of(h, product, row);
      for (int64_t v = 0; v < V; ++v) softmax_row(part, C, m, weight, p, u + (v * n + row) * C);
    }
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < V * n; ++i) {
    const int64_t row = i % n;
    T* x = u + i * C;
    if (positions > 1) {
      for (int64_t first = 0; first < positions; first += kBlock) {
        const int64_t B = std::min(kBlock, positions - first);
        T weight[kBlock];
        for (int64_t b = 0; b < B; ++b) weight[b] = weight_of(h, product, row * positions + first + b);
        softmax_block(part, C / positions, positions, B, weight, h.state + row * C + first, x + first);
      }
      continue;
    }
    const T weight = weight_of(h, product, row);
    if (h.shape == HessianShape::scaled_identity) {
      for (int64_t c = 0; c < C; ++c) x[c] *= weight;
      continue;
    }
    const T* s = h.state + row * C;
    for (int64_t c = 0; c < C; ++c) x[c] *= weight * (product ? s[c] : std::sqrt(s[c]));
  }
}

INFL_REGISTER_CPU(output_hessian_stub, output_hessian)

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
