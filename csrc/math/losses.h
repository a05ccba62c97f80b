// Losses at one output z with target t, element by element; `s` is the weight of an element in its example's loss.
// Each D is the Bregman divergence ℓ(z) − ℓ(z_s) − ℓ'(z_s)(z − z_s), written so that it keeps its digits when z is close to z_s.
#pragma once

#include <cmath>

#include "common/macros.h"
#include "math/activations.h"

namespace infl {

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
  // KL between Bernoulli(σ(z_s)) and Bernoulli(σ(z)). With d = z − z_s and p = σ(z_s) it is log(1 + p (eᵈ − 1)) − p d,
  // and the same with p, d replaced by 1 − p, −d: the form with d ≤ 0 never overflows. Small |d|: its Taylor series.
  template <class T>
  static INFL_HD T bregman(T z, T z_s, T s) {
    const T d = z < z_s ? z - z_s : z_s - z;
    const T p = sigmoid(z < z_s ? z_s : -z_s);
    if (d > T(-1e-2)) {
      const T v = p * (T(1) - p);
      return s * v * d * d * (T(0.5) + d * ((T(1) - T(2) * p) / T(6) + d * (T(1) - T(6) * v) / T(24)));
    }
    return s * (std::log1p(p * std::expm1(d)) - p * d);
  }
};

}  // namespace infl
