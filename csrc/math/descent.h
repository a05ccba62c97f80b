// One step of an optimiser at one element, as PyTorch takes it: θ and the moments are replaced.
#pragma once

#include <cmath>

#include "common/macros.h"

namespace infl {

// m = μ m + g,  θ −= η m
template <class T>
INFL_HD void momentum_step(T g, T lr, T momentum, T& theta, T& moment) {
  moment = momentum * moment + g;
  theta -= lr * moment;
}

// m += (1 − β₁) (g − m),  v = β₂ v + (1 − β₂) g²,  θ −= η₁ m / (√v / c₂ + ε); η₁ and c₂ carry the corrections of the bias.
template <class T>
INFL_HD void adam_step(T g, T lr, T one_minus_beta1, T beta2, T one_minus_beta2, T root_correction, T eps, T& theta, T& first, T& second) {
  first += one_minus_beta1 * (g - first);
  second = beta2 * second + one_minus_beta2 * g * g;
  theta -= lr * first / (std::sqrt(second) / root_correction + eps);
}

}  // namespace infl
