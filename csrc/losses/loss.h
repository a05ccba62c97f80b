// The contract of a loss: ℓ_n(z_n), its gradient, its Hessian as one of three shapes (kernels/output_hessian.h), its Bregman divergence.
//
// Rows are examples: z [N, C]. `s` weighs each element in its example's loss (1/C where the loss averages over elements).
// To add one: its formulas in math/losses.h and a line in elementwise.cpp, or a file here; a row in influence_ext/losses/resolve.py and
// in tests/cases/losses.py.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/context.h"
#include "kernels/output_hessian.h"

namespace infl {

template <class T>
struct LossArguments {
  int64_t N = 0, C = 0, positions = 1;  // C = classes · positions for a loss over classes
  T s = 1, a = 0;                       // a: the loss's own parameter
  const T* z = nullptr;                 // [N, C]
  const T* target = nullptr;            // [N, C], or
  const int64_t* index = nullptr;       // [N, positions], in [0, classes), or -1 where the position does not count
  const T* weight = nullptr;            // of the elements [C], of the examples' elements [N, C], or of the classes; or absent
  bool weight_per_example = false;
  T* value = nullptr;     // [N] or not wanted
  T* gradient = nullptr;  // [N, C] or not wanted
  T* state = nullptr;     // [N, C] or not wanted: the Hessian's state, s included unless there is a mass
  T* mass = nullptr;      // [N, positions] or not wanted: weights of the Hessian (softmax shape), s included
  const T* z_s = nullptr;
  T* bregman = nullptr;  // [N] or not wanted; needs z_s
};

template <class T>
class Loss {
 public:
  virtual ~Loss() = default;
  virtual void evaluate(const Context& ctx, const LossArguments<T>& arguments) const = 0;
  virtual HessianShape hessian_shape() const = 0;
};

template <class T>
const Loss<T>* find_loss(const std::string& name);

template <class T>
void register_loss(const std::string& name, std::unique_ptr<Loss<T>> loss);

std::vector<std::string> loss_names();

#define INFL_REGISTER_LOSS(name, Type)                                     \
  [[maybe_unused]] static const bool Type##_is_registered = [] {           \
    ::infl::register_loss<float>(name, std::make_unique<Type<float>>());   \
    ::infl::register_loss<double>(name, std::make_unique<Type<double>>()); \
    return true;                                                           \
  }();

}  // namespace infl
