// One pass over u, one row at a time; the softmax shape reads its row twice, from L1.
#include "kernels/output_hessian.h"

#include "kernels/cpu/simd.h"

namespace infl {
namespace INFL_ISA {
namespace {

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
    T dot = 0;  // p·u, or √p·u for the root
    for (int64_t c = 0; c < C; ++c) dot += (part == HessianPart::root ? std::sqrt(s[c]) : s[c]) * x[c];
    if (product) {
      for (int64_t c = 0; c < C; ++c) x[c] = weight * s[c] * (x[c] - dot);
    } else if (part == HessianPart::root) {
      for (int64_t c = 0; c < C; ++c) x[c] = weight * (std::sqrt(s[c]) * x[c] - s[c] * dot);
    } else {
      for (int64_t c = 0; c < C; ++c) x[c] = weight * std::sqrt(s[c]) * (x[c] - dot);
    }
  }
}

INFL_REGISTER_CPU(output_hessian_stub, output_hessian)

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
