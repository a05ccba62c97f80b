// Losses at one output z with target t, element by element; `s` is the weight of an element in its example's loss.
// Each D is the Bregman divergence ℓ(z) − ℓ(z_s) − ℓ'(z_s)(z − z_s), written so that it keeps its digits when z is close to z_s.
#pragma once

#include <cmath>

#include "common/macros.h"
#include "math/activations.h"

namespace infl {

// eˣ − 1 − x; by its series for |x| < 1/2, where the subtraction would cancel.
template <class T>
INFL_HD T exp_tail(T x) {
  if (x <= T(-0.5) || x >= T(0.5)) return std::expm1(x) - x;
  T sum = T(1) / 16;
  for (int k = 15; k >= 3; --k) sum = (T(1) + x * sum) / T(k);
  return x * x * (T(1) + x * sum) / T(2);
}

// s (z − t)²
struct SquaredError {
  template <class T>
  static INFL_HD T value(T z, T t, T s) {
    return s * (z - t) * (z - t);
  }
  template <class T>
  static INFL_HD T gradient(T z, T t, T s) {
    return T(2) * s * (z - t);
  }
  template <class T>
  static INFL_HD T hessian(T, T s) {
    return T(2) * s;
  }
  template <class T>
  static INFL_HD T bregman(T z, T z_s, T s) {
    return s * (z - z_s) * (z - z_s);
  }
};

// s (log(1 + eᶻ) − t z): binary cross-entropy of the logit z with a target t in [0, 1].
struct BinaryCrossEntropy {
  template <class T>
  static INFL_HD T value(T z, T t, T s) {
    return s * (log1p_exp(z) - t * z);
  }
  template <class T>
  static INFL_HD T gradient(T z, T t, T s) {
    return s * (sigmoid(z) - t);
  }
  template <class T>
  static INFL_HD T hessian(T z, T s) {
    return s * sigmoid(z) * sigmoid(-z);
  }
  // KL between Bernoulli(p) and Bernoulli(σ(z)) with p = σ(z_s), q = 1 − p, d = z − z_s: log(q e^(−p d) + p e^(q d)), where the terms of
  // first order have cancelled; for large |d| the definition itself, on the side where softplus is small.
  template <class T>
  static INFL_HD T bregman(T z, T z_s, T s) {
    const T d = z - z_s, p = sigmoid(z_s), q = sigmoid(-z_s);
    if (d > T(-1) && d < T(1)) return s * std::log1p(q * exp_tail(-p * d) + p * exp_tail(q * d));
    if (z_s < T(0)) return s * (log1p_exp(z) - log1p_exp(z_s) - p * d);
    return s * (log1p_exp(-z) - log1p_exp(-z_s) + q * d);
  }
};

}  // namespace infl
