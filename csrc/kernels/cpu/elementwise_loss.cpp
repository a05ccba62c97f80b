// One row of outputs at a time; rows are split between threads.
#include "kernels/elementwise_loss.h"
#include "kernels/cpu/simd.h"

namespace infl {
namespace INFL_ISA {
namespace {

template <class Formula, class T>
void rows(const Context& ctx, const ElementwiseLoss<T>& l) {
  const int threads = l.N * l.C < 2048 ? 1 : ctx.num_threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t n = 0; n < l.N; ++n) {
    T value = 0, divergence = 0;
    for (int64_t c = 0; c < l.C; ++c) {
      const int64_t i = n * l.C + c;
      const T weight = l.weight ? l.s * l.weight[n * l.weight_stride + c] : l.s;
      if (weight == T(0)) {  // also where the loss itself is infinite
        if (l.gradient) l.gradient[i] = 0;
        if (l.hessian) l.hessian[i] = 0;
        continue;
      }
      if (l.value) value += weight * Formula::value(l.z[i], l.target[i], l.a);
      if (l.gradient) l.gradient[i] = weight * Formula::gradient(l.z[i], l.target[i], l.a);
      if (l.hessian) l.hessian[i] = weight * Formula::hessian(l.z[i], l.target[i], l.a);
      if (l.bregman) divergence += weight * Formula::bregman(l.z[i], l.z_s[i], l.target[i], l.a);
    }
    if (l.value) l.value[n] = value;
    if (l.bregman) l.bregman[n] = divergence;
  }
}

template <class T>
void elementwise_loss(const Context& ctx, ElementwiseFormula formula, const ElementwiseLoss<T>& l) {
  with_formula(formula, [&](auto one) { rows<decltype(one)>(ctx, l); });
}

INFL_REGISTER_CPU(elementwise_loss_stub, elementwise_loss)

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
