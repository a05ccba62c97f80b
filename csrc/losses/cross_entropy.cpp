// cross_entropy: ℓ = logsumexp(z) − z[t],  p = softmax(z),  ∇ℓ = p − e_t,  H = diag p − p pᵀ,
// D(z, z_s) = KL(p_s ‖ p), independent of t.
#include "kernels/loss.h"
#include "losses/loss.h"

namespace infl {
namespace {

template <class T>
class CrossEntropyLoss final : public Loss<T> {
 public:
  void evaluate(const Context& ctx, const LossArguments<T>& a) const override {
    cross_entropy_stub<T>(ctx, {a.N, a.C, a.z, a.index, a.value, a.gradient, a.state});
  }
  void bregman(const Context& ctx, int64_t N, int64_t C, T /*s*/, const T* z, const T* z_s, T* out) const override {
    cross_entropy_bregman_stub<T>(ctx, N, C, z, z_s, out);
  }
  HessianShape hessian_shape() const override { return HessianShape::softmax; }
  T hessian_scale(T) const override { return T(1); }
  bool takes_index() const override { return true; }
};

INFL_REGISTER_LOSS("cross_entropy", CrossEntropyLoss)

}  // namespace
}  // namespace infl
