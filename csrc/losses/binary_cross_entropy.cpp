// binary_cross_entropy: ℓ = s Σ_c (log(1 + exp z_c) − t_c z_c),  ∇ℓ = s (σ(z) − t),  H = diag(s σ(z) σ(−z)),
// D(z, z_s) = s Σ_c KL(Bernoulli σ(z_s) ‖ Bernoulli σ(z)). Targets in [0, 1], one logit an element.
#include "kernels/loss.h"
#include "losses/loss.h"

namespace infl {
namespace {

template <class T>
class BinaryCrossEntropyLoss final : public Loss<T> {
 public:
  void evaluate(const Context& ctx, const LossArguments<T>& a) const override {
    binary_cross_entropy_stub<T>(ctx, {a.N, a.C, a.s, a.z, a.target, a.value, a.gradient, a.state});
  }
  void bregman(const Context& ctx, int64_t N, int64_t C, T s, const T* z, const T* z_s, T* out) const override {
    binary_cross_entropy_bregman_stub<T>(ctx, N, C, s, z, z_s, out);
  }
  HessianShape hessian_shape() const override { return HessianShape::diagonal; }
  T hessian_scale(T) const override { return T(1); }  // s is in the state
};

INFL_REGISTER_LOSS("binary_cross_entropy", BinaryCrossEntropyLoss)

}  // namespace
}  // namespace infl
