// One pass over u, one row at a time; the softmax shape reads its row twice, from L1.
#include "kernels/output_hessian.h"

#include "kernels/cpu/simd.h"

namespace infl {
namespace INFL_ISA {
namespace {

// x <- weight (diag p − p pᵀ) x or a root of it. Sums leave out the most probable class m: next to p_m ≈ 1 the others would lose their digits.
// The Hessian does not see a constant added to x, so x_m can be taken as zero; and 1 − p_m is the sum of the others.
template <class T>
void softmax_row(HessianPart part, int64_t C, T weight, const T* p, T* x) {
  int64_t m = 0;
  for (int64_t c = 1; c < C; ++c) {
    if (p[c] > p[m]) m = c;
  }
  if (part == HessianPart::root) {
    // S x = √p ∘ x − p (√p · x)
    T dot = 0, rest = 0;
    for (int64_t c = 0; c < C; ++c) {
      if (c == m) continue;
      dot += std::sqrt(p[c]) * x[c];
      rest += p[c];
    }
    const T top = std::sqrt(p[m]) * x[m], total = dot + top;
    for (int64_t c = 0; c < C; ++c) x[c] = weight * (std::sqrt(p[c]) * x[c] - p[c] * total);
    x[m] = weight * (top * rest - p[m] * dot);
    return;
  }
  // p ∘ (x − p·x), or √p ∘ (x − p·x)
  const T shift = x[m];
  T dot = 0;
  for (int64_t c = 0; c < C; ++c) dot += p[c] * (x[c] - shift);
  if (part == HessianPart::product) {
    for (int64_t c = 0; c < C; ++c) x[c] = weight * p[c] * ((x[c] - shift) - dot);
  } else {
    for (int64_t c = 0; c < C; ++c) x[c] = weight * std::sqrt(p[c]) * ((x[c] - shift) - dot);
  }
}

template <class T>
void output_hessian(const Context& ctx, const OutputHessian<T>& h, HessianPart part, int64_t V, int64_t n, T* u) {
  const int threads = V * n * h.C < 16384 ? 1 : ctx.num_threads;
  const int64_t C = h.C;
  const bool product = part == HessianPart::product;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < V * n; ++i) {
    const int64_t row = i % n;
    T weight = h.scale * (h.weights ? h.weights[row] : T(1));
    if (!product) weight = std::sqrt(weight);
    T* x = u + i * C;
    if (h.shape == HessianShape::scaled_identity) {
      for (int64_t c = 0; c < C; ++c) x[c] *= weight;
      continue;
    }
    const T* s = h.state + row * C;
    if (h.shape == HessianShape::diagonal) {
      for (int64_t c = 0; c < C; ++c) x[c] *= weight * (product ? s[c] : std::sqrt(s[c]));
      continue;
    }
    softmax_row(part, C, weight, s, x);
  }
}

INFL_REGISTER_CPU(output_hessian_stub, output_hessian)

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
