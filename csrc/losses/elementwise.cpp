// Losses that are a sum over elements, ℓ = s Σ_c w_c φ(z_c, t_c) with φ of math/losses.h: ∇ℓ = s w φ', H = diag(s w φ''), and
// D(z, z_s) = s Σ_c w_c D_φ(z_c, z_s,c; t_c). Without element weights the squared error's Hessian is 2 s I and keeps no state.
#include "kernels/elementwise_loss.h"
#include "losses/loss.h"

namespace infl {
namespace {

template <class T, ElementwiseFormula formula>
class Elementwise : public Loss<T> {
 public:
  void evaluate(const Context& ctx, const LossArguments<T>& a) const override {
    ElementwiseLoss<T> loss;
    loss.N = a.N;
    loss.C = a.C;
    loss.s = a.s;
    loss.a = a.a;
    loss.z = a.z;
    loss.target = a.target;
    loss.weight = a.weight;
    loss.weight_stride = a.weight_per_example ? a.C : 0;
    loss.value = a.value;
    loss.gradient = a.gradient;
    loss.hessian = a.state;
    loss.z_s = a.z_s;
    loss.bregman = a.bregman;
    elementwise_loss_stub<T>(ctx, formula, loss);
  }
  HessianShape hessian_shape() const override { return HessianShape::diagonal; }
};

template <class T>
using SquaredErrorLoss = Elementwise<T, ElementwiseFormula::squared_error>;
template <class T>
using AbsoluteErrorLoss = Elementwise<T, ElementwiseFormula::absolute_error>;
template <class T>
using HuberLoss = Elementwise<T, ElementwiseFormula::huber>;
template <class T>
using BinaryCrossEntropyLoss = Elementwise<T, ElementwiseFormula::binary_cross_entropy>;
template <class T>
using ProbabilityCrossEntropyLoss = Elementwise<T, ElementwiseFormula::probability_cross_entropy>;
template <class T>
using PoissonLogRateLoss = Elementwise<T, ElementwiseFormula::poisson_log_rate>;
template <class T>
using PoissonRateLoss = Elementwise<T, ElementwiseFormula::poisson_rate>;

INFL_REGISTER_LOSS("squared_error", SquaredErrorLoss)
INFL_REGISTER_LOSS("absolute_error", AbsoluteErrorLoss)
INFL_REGISTER_LOSS("huber", HuberLoss)
INFL_REGISTER_LOSS("binary_cross_entropy", BinaryCrossEntropyLoss)
INFL_REGISTER_LOSS("probability_cross_entropy", ProbabilityCrossEntropyLoss)
INFL_REGISTER_LOSS("poisson_log_rate", PoissonLogRateLoss)
INFL_REGISTER_LOSS("poisson_rate", PoissonRateLoss)

}  // namespace
}  // namespace infl
