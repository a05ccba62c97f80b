// Normalisation at one element: x̂ = (x − mean) / std over a group, and the derivative of x̂ applied to a vector.
#pragma once

#include <cmath>

#include "common/macros.h"

namespace infl {

template <class T>
INFL_HD T inverse_deviation(T variance, T eps) {
  return T(1) / std::sqrt(variance + eps);
}

// (∂x̂/∂x t)_j = rstd (t_j − mean(t) − x̂_j mean(x̂ ∘ t)); the matrix is symmetric, so this is its transpose too. Without a centre mean(t) is 0.
template <class T>
INFL_HD T standardised_tangent(T t, T x_hat, T rstd, T mean, T correlation) {
  return rstd * ((t - mean) - x_hat * correlation);
}

}  // namespace infl
