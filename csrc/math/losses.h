// Losses at one output z with target t, element by element: value, first and second derivative by z, and the Bregman divergence
// D(z, z_s) = ℓ(z) − ℓ(z_s) − ℓ'(z_s)(z − z_s), written so that it keeps its digits when z is close to z_s. `a` is the loss's own parameter.
#pragma once

#include <cmath>

#include "common/macros.h"
#include "math/activations.h"

namespace infl {

enum class ElementwiseFormula : int {
  squared_error = 0,
  absolute_error = 1,
  huber = 2,
  binary_cross_entropy = 3,
  probability_cross_entropy = 4,
  poisson_log_rate = 5,
  poisson_rate = 6
};

// eˣ − 1 − x; by its series for |x| < 1/2, where the subtraction would cancel.
template <class T>
INFL_HD T exp_tail(T x) {
  if (x <= T(-0.5) || x >= T(0.5)) return std::expm1(x) - x;
  T sum = T(1) / 16;
  for (int k = 15; k >= 3; --k) sum = (T(1) + x * sum) / T(k);
  return x * x * (T(1) + x * sum) / T(2);
}

// The same for |x| ≤ 1 without a branch, Σ_{k≥2} xᵏ/k!: arithmetic that a compiler vectorises.
template <class T>
INFL_HD T exp_tail_within_one(T x) {
  constexpr int last = sizeof(T) == 4 ? 12 : 20;
  constexpr T k_inverse_factorial[] = {
      T(1.0 / 2.0),
      T(1.0 / 6.0),
      T(1.0 / 24.0),
      T(1.0 / 120.0),
      T(1.0 / 720.0),
      T(1.0 / 5040.0),
      T(1.0 / 40320.0),
      T(1.0 / 362880.0),
      T(1.0 / 3628800.0),
      T(1.0 / 39916800.0),
      T(1.0 / 479001600.0),
      T(1.0 / 6227020800.0),
      T(1.0 / 87178291200.0),
      T(1.0 / 1307674368000.0),
      T(1.0 / 20922789888000.0),
      T(1.0 / 355687428096000.0),
      T(1.0 / 6402373705728000.0),
      T(1.0 / 121645100408832000.0),
      T(1.0 / 2432902008176640000.0),
  };
  T sum = k_inverse_factorial[last - 2];
  INFL_UNROLL(20)
  for (int k = last - 3; k >= 0; --k) sum = sum * x + k_inverse_factorial[k];
  return x * x * sum;
}

// x − log(1 + x) for x > −1; for |x| < 1/2 through log(1 + x) = 2 artanh u, u = x/(2 + x): u x − 2 u³ (1/3 + u²/5 + u⁴/7 + ...).
template <class T>
INFL_HD T log1p_tail(T x) {
  if (x <= T(-0.5) || x >= T(0.5)) return x - std::log1p(x);
  const T u = x / (T(2) + x), square = u * u;
  T sum = T(1) / 37;
  for (int k = 35; k >= 3; k -= 2) sum = T(1) / T(k) + square * sum;
  return u * x - T(2) * u * square * sum;
}

// (z − t)²
struct SquaredError {
  template <class T>
  static INFL_HD T value(T z, T t, T) {
    return (z - t) * (z - t);
  }
  template <class T>
  static INFL_HD T gradient(T z, T t, T) {
    return T(2) * (z - t);
  }
  template <class T>
  static INFL_HD T hessian(T, T, T) {
    return T(2);
  }
  template <class T>
  static INFL_HD T bregman(T z, T z_s, T, T) {
    return (z - z_s) * (z - z_s);
  }
};

// |z − t|, with derivative 0 at the kink.
struct AbsoluteError {
  template <class T>
  static INFL_HD T value(T z, T t, T) {
    return std::abs(z - t);
  }
  template <class T>
  static INFL_HD T gradient(T z, T t, T) {
    return z > t ? T(1) : z < t ? T(-1) : T(0);
  }
  template <class T>
  static INFL_HD T hessian(T, T, T) {
    return T(0);
  }
  // Nothing on one side of the kink; 2|z − t| across it; |z − t| from the kink itself.
  template <class T>
  static INFL_HD T bregman(T z, T z_s, T t, T) {
    const T change = gradient(z, t, T(0)) - gradient(z_s, t, T(0));
    return std::abs(change) * std::abs(z - t);
  }
};

// ½ d² for d = |z − t| < a, else a (d − ½ a).
struct Huber {
  template <class T>
  static INFL_HD T value(T z, T t, T a) {
    const T d = std::abs(z - t);
    return d < a ? T(0.5) * d * d : a * (d - T(0.5) * a);
  }
  template <class T>
  static INFL_HD T gradient(T z, T t, T a) {
    const T d = z - t;
    return d < -a ? -a : d > a ? a : d;
  }
  template <class T>
  static INFL_HD T hessian(T z, T t, T a) {
    return std::abs(z - t) < a ? T(1) : T(0);
  }
  // The gradient rises by r from z_s to z: r²/2 under the ramp and, where z lies beyond it, r times the way on the plateau.
  template <class T>
  static INFL_HD T bregman(T z, T z_s, T t, T a) {
    const T g = gradient(z, t, a), g_s = gradient(z_s, t, a);
    const bool inside = std::abs(z - t) < a && std::abs(z_s - t) < a;
    const T rise = inside ? z - z_s : g - g_s;
    return rise * (T(0.5) * rise + (inside ? T(0) : (z - t) - g));
  }
};

// t log(1 + e⁻ᶻ) + (1 − t) log(1 + eᶻ): binary cross-entropy of the logit z with a target t in [0, 1].
struct BinaryCrossEntropy {
  template <class T>
  static INFL_HD T value(T z, T t, T) {
    return t * log1p_exp(-z) + (T(1) - t) * log1p_exp(z);
  }
  template <class T>
  static INFL_HD T gradient(T z, T t, T) {
    return (T(1) - t) * sigmoid(z) - t * sigmoid(-z);
  }
  template <class T>
  static INFL_HD T hessian(T z, T, T) {
    return sigmoid(z) * sigmoid(-z);
  }
  // KL between Bernoulli(p) and Bernoulli(σ(z)) with p = σ(z_s), q = 1 − p, d = z − z_s: log(q e^(−p d) + p e^(q d)), where the terms of
  // first order have cancelled; for large |d| the definition itself, on the side where softplus is small.
  template <class T>
  static INFL_HD T bregman(T z, T z_s, T, T) {
    const T d = z - z_s, p = sigmoid(z_s), q = sigmoid(-z_s);
    if (d > T(-1) && d < T(1)) return std::log1p(q * exp_tail(-p * d) + p * exp_tail(q * d));
    if (z_s < T(0)) return log1p_exp(z) - log1p_exp(z_s) - p * d;
    return log1p_exp(-z) - log1p_exp(-z_s) + q * d;
  }
};

// −t log z − (1 − t) log(1 − z): binary cross-entropy of the probability z. A term whose factor is 0 vanishes at the ends too.
struct ProbabilityCrossEntropy {
  template <class T>
  static INFL_HD T value(T z, T t, T) {
    return (t > T(0) ? -t * std::log(z) : T(0)) + (t < T(1) ? -(T(1) - t) * std::log1p(-z) : T(0));
  }
  template <class T>
  static INFL_HD T gradient(T z, T t, T) {
    return (t > T(0) ? -t / z : T(0)) + (t < T(1) ? (T(1) - t) / (T(1) - z) : T(0));
  }
  template <class T>
  static INFL_HD T hessian(T z, T t, T) {
    return (t > T(0) ? t / (z * z) : T(0)) + (t < T(1) ? (T(1) - t) / ((T(1) - z) * (T(1) - z)) : T(0));
  }
  template <class T>
  static INFL_HD T bregman(T z, T z_s, T t, T) {
    const T d = z - z_s;
    return (t > T(0) ? t * log1p_tail(d / z_s) : T(0)) + (t < T(1) ? (T(1) - t) * log1p_tail(-d / (T(1) - z_s)) : T(0));
  }
};

// eᶻ − t z: Poisson with log rate z, without the terms of t alone.
struct PoissonLogRate {
  template <class T>
  static INFL_HD T value(T z, T t, T) {
    return std::exp(z) - t * z;
  }
  template <class T>
  static INFL_HD T gradient(T z, T t, T) {
    return std::exp(z) - t;
  }
  template <class T>
  static INFL_HD T hessian(T z, T, T) {
    return std::exp(z);
  }
  template <class T>
  static INFL_HD T bregman(T z, T z_s, T, T) {
    return std::exp(z_s) * exp_tail(z - z_s);
  }
};

// z − t log(z + a): Poisson with rate z, without the terms of t alone.
struct PoissonRate {
  template <class T>
  static INFL_HD T value(T z, T t, T a) {
    return z - t * std::log(z + a);
  }
  template <class T>
  static INFL_HD T gradient(T z, T t, T a) {
    return T(1) - t / (z + a);
  }
  template <class T>
  static INFL_HD T hessian(T z, T t, T a) {
    return t / ((z + a) * (z + a));
  }
  template <class T>
  static INFL_HD T bregman(T z, T z_s, T t, T a) {
    return t > T(0) ? t * log1p_tail((z - z_s) / (z_s + a)) : T(0);
  }
};

// visit(Formula{}) for the formula of that name.
template <class Visit>
void with_formula(ElementwiseFormula formula, const Visit& visit) {
  switch (formula) {
    case ElementwiseFormula::squared_error:
      return visit(SquaredError{});
    case ElementwiseFormula::absolute_error:
      return visit(AbsoluteError{});
    case ElementwiseFormula::huber:
      return visit(Huber{});
    case ElementwiseFormula::binary_cross_entropy:
      return visit(BinaryCrossEntropy{});
    case ElementwiseFormula::probability_cross_entropy:
      return visit(ProbabilityCrossEntropy{});
    case ElementwiseFormula::poisson_log_rate:
      return visit(PoissonLogRate{});
    case ElementwiseFormula::poisson_rate:
      return visit(PoissonRate{});
  }
}

}  // namespace infl
