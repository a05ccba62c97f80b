// Memory alone decides: five arrays pass by for SGD with momentum (gradient, θ and the moment, the last two back again), seven for Adam.
#include "kernels/descent.h"

#include <algorithm>

#include "kernels/cpu/parallel.h"
#include "math/descent.h"

namespace infl {
namespace INFL_ISA {
namespace {

constexpr int64_t kBlock = 4096;  // elements a thread takes at a time

template <bool decays, bool anchored, class T>
void descend_block(const Descent<T>& d, int64_t begin, int64_t end, const T* gradient, T* theta, T* first, T* second) {
  const T* anchor = d.anchor;
  const T decay = d.decay, damping = d.damping, lr = d.lr;
  const auto slope = [=](int64_t i) {
    T g = gradient[i];
    if constexpr (decays) g += decay * theta[i];
    if constexpr (anchored) g += damping * (theta[i] - anchor[i]);
    return g;
  };
  if (d.method == Method::sgd) {
    const T momentum = d.momentum;
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) momentum_step(slope(i), lr, momentum, theta[i], first[i]);
    return;
  }
  const T one_minus_beta1 = d.one_minus_beta1, beta2 = d.beta2, one_minus_beta2 = d.one_minus_beta2;
  const T root_correction = d.root_correction, eps = d.eps;
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    adam_step(slope(i), lr, one_minus_beta1, beta2, one_minus_beta2, root_correction, eps, theta[i], first[i], second[i]);
  }
}

template <class T>
void descend(const Context& ctx, int64_t size, const Descent<T>& d, const T* gradient, T* theta, T* first, T* second) {
  const bool decays = d.decay != T(0), anchored = d.damping != T(0);
  const auto block = decays     ? anchored ? descend_block<true, true, T> : descend_block<true, false, T>
                     : anchored ? descend_block<false, true, T>
                                : descend_block<false, false, T>;
  const int64_t P = anchored && d.anchor_size > 0 ? d.anchor_size : std::max<int64_t>(size, 1), blocks = (P + kBlock - 1) / kBlock;
  parallel_for(threads_for(ctx, size), size / P * blocks, [&](int64_t i) {
    const int64_t at = i / blocks * P, begin = i % blocks * kBlock;
    block(d, begin, std::min(P, begin + kBlock), gradient + at, theta + at, first + at, second ? second + at : nullptr);
  });
}

INFL_REGISTER_CPU(descend_stub, descend)

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
