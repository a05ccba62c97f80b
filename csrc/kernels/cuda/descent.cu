// Memory alone decides: SGD with momentum moves 20 bytes a float32 parameter (reads the gradient, θ and the moment, writes the last two), Adam 28;
// 4 more where there is an anchor, of which sets that share it find most in the cache. One launch, 16 bytes a thread and step.
#include "kernels/descent.h"

#include "kernels/cuda/vector.h"
#include "math/descent.h"

namespace infl {
namespace cuda {
namespace {

template <class T>
struct Descend {
  Descent<T> d;
  const T* gradient;
  T *theta, *first, *second;
  template <int W>
  __device__ void run(int64_t i) const {
    auto g = load<W>(gradient + i), x = load<W>(theta + i), m = load<W>(first + i);
    for (int k = 0; k < W; ++k) g.v[k] += d.decay * x.v[k];
    if (d.damping != T(0)) {
      const auto anchor = load<W>(d.anchor + (d.anchor_size > 0 ? i % d.anchor_size : i));
      for (int k = 0; k < W; ++k) g.v[k] += d.damping * (x.v[k] - anchor.v[k]);
    }
    if (d.method == Method::sgd) {
      for (int k = 0; k < W; ++k) momentum_step(g.v[k], d.lr, d.momentum, x.v[k], m.v[k]);
    } else {
      auto s = load<W>(second + i);
      for (int k = 0; k < W; ++k) {
        adam_step(g.v[k], d.lr, d.one_minus_beta1, d.beta2, d.one_minus_beta2, d.root_correction, d.eps, x.v[k], m.v[k], s.v[k]);
      }
      store<W>(second + i, s);
    }
    store<W>(theta + i, x);
    store<W>(first + i, m);
  }
};

template <class T>
void descend(const Context& ctx, int64_t size, const Descent<T>& d, const T* gradient, T* theta, T* first, T* second) {
  const bool whole_anchors = d.damping == T(0) || d.anchor_size % kVectorWidth<T> == 0;
  for_each<T>(ctx, "descend", size, whole_anchors && is_aligned({gradient, theta, first, second, d.anchor}),
              Descend<T>{d, gradient, theta, first, second});
}

INFL_REGISTER_CUDA(descend_stub, descend)

}  // namespace
}  // namespace cuda
}  // namespace infl
