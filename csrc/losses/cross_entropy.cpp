// cross_entropy: softmax over the first axis of [K, positions], against class indices or probabilities, with class weights and label
// smoothing; formulas in kernels/cross_entropy.h. D does not see which class is the target, only its mass.
#include "kernels/cross_entropy.h"
#include "losses/loss.h"

namespace infl {
namespace {

template <class T>
class CrossEntropyLoss final : public Loss<T> {
 public:
  void evaluate(const Context& ctx, const LossArguments<T>& a) const override {
    CrossEntropy<T> loss;
    loss.N = a.N;
    loss.K = a.C / a.positions;
    loss.positions = a.positions;
    loss.s = a.s;
    loss.smoothing = a.a;
    loss.z = a.z;
    loss.index = a.index;
    loss.target = a.target;
    loss.class_weight = a.weight;
    loss.value = a.value;
    loss.gradient = a.gradient;
    loss.p = a.state;
    loss.mass = a.mass;
    loss.z_s = a.z_s;
    loss.bregman = a.bregman;
    cross_entropy_stub<T>(ctx, loss);
  }
  HessianShape hessian_shape() const override { return HessianShape::softmax; }
};

INFL_REGISTER_LOSS("cross_entropy", CrossEntropyLoss)

}  // namespace
}  // namespace infl
