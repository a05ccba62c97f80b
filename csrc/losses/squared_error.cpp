// squared_error: ℓ = s Σ_c (z_c − t_c)²,  ∇ℓ = 2 s (z − t),  H = 2 s I,  D(z, z_s) = s ‖z − z_s‖².
#include "kernels/loss.h"
#include "losses/loss.h"

namespace infl {
namespace {

template <class T>
class SquaredErrorLoss final : public Loss<T> {
 public:
  void evaluate(const Context& ctx, const LossArguments<T>& a) const override {
    squared_error_stub<T>(ctx, {a.N, a.C, a.s, a.z, a.target, a.value, a.gradient, nullptr});
  }
  void bregman(const Context& ctx, int64_t N, int64_t C, T s, const T* z, const T* z_s, T* out) const override {
    squared_error_bregman_stub<T>(ctx, N, C, s, z, z_s, out);
  }
  HessianShape hessian_shape() const override { return HessianShape::scaled_identity; }
  T hessian_scale(T s) const override { return T(2) * s; }
};

INFL_REGISTER_LOSS("squared_error", SquaredErrorLoss)

}  // namespace
}  // namespace infl
