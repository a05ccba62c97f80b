// The contract of a loss: ℓ_n(z_n), its gradient, its Hessian as one of three shapes (kernels/output_hessian.h), its Bregman divergence.
//
// Rows are examples: z [N, C]. `s` weighs each element in its example's loss (1/C where the loss averages over elements).
// To add one: a file here, a row in influence_ext/losses.py and in tests/cases/losses.py.
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
  int64_t N = 0, C = 0;
  T s = 1;
  const T* z = nullptr;            // [N, C]
  const T* target = nullptr;       // [N, C], or
  const int64_t* index = nullptr;  // [N], in [0, C)
  T* value = nullptr;              // [N] or not wanted
  T* gradient = nullptr;           // [N, C] or not wanted
  T* state = nullptr;              // [N, C] or not wanted: the Hessian's state
};

template <class T>
class Loss {
 public:
  virtual ~Loss() = default;
  virtual void evaluate(const Context& ctx, const LossArguments<T>& arguments) const = 0;
  virtual void bregman(const Context& ctx, int64_t N, int64_t C, T s, const T* z, const T* z_s, T* out) const = 0;
  virtual HessianShape hessian_shape() const = 0;
  virtual T hessian_scale(T s) const = 0;  // H_n = scale * (I | diag state | diag state − state stateᵀ)
  virtual bool takes_index() const { return false; }
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
