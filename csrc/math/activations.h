// Activations: value and first derivative at one point, PyTorch's conventions at kinks (the derivative of relu at 0 is 0).
#pragma once

#include <cmath>

#include "common/macros.h"

namespace infl {

enum class Activation : int { relu = 0, tanh = 1, gelu = 2, gelu_tanh = 3, silu = 4, sigmoid = 5, elu = 6, softplus = 7, leaky_relu = 8 };

inline constexpr int kNumActivations = 9;

template <class T>
struct ValueAndDerivative {
  T value, derivative;
};

template <class T>
INFL_HD T sigmoid(T x) {
  // exp of a non-positive number only: never overflows.
  const T e = std::exp(x < T(0) ? x : -x);
  return x < T(0) ? e / (T(1) + e) : T(1) / (T(1) + e);
}

// log(1 + exp(x)) without overflow.
template <class T>
INFL_HD T log1p_exp(T x) {
  return (x > T(0) ? x : T(0)) + std::log1p(std::exp(x > T(0) ? -x : x));
}

// a, b: elu: alpha, scale; softplus: beta, threshold; leaky_relu: negative slope.
template <Activation kind, class T>
INFL_HD ValueAndDerivative<T> activation(T x, T a, T b) {
  if constexpr (kind == Activation::relu) {
    return {x > T(0) ? x : T(0), x > T(0) ? T(1) : T(0)};
  } else if constexpr (kind == Activation::tanh) {
    const T y = std::tanh(x);
    return {y, T(1) - y * y};
  } else if constexpr (kind == Activation::gelu) {
    // x Φ(x), derivative Φ(x) + x φ(x)
    const T cdf = T(0.5) * std::erfc(-x * T(0.70710678118654752440));
    const T density = T(0.39894228040143267794) * std::exp(T(-0.5) * x * x);
    return {x * cdf, cdf + x * density};
  } else if constexpr (kind == Activation::gelu_tanh) {
    const T c = T(0.79788456080286535588), k = T(0.044715);
    const T t = std::tanh(c * (x + k * x * x * x));
    return {T(0.5) * x * (T(1) + t), T(0.5) * (T(1) + t) + T(0.5) * x * (T(1) - t * t) * c * (T(1) + T(3) * k * x * x)};
  } else if constexpr (kind == Activation::silu) {
    const T s = sigmoid(x);
    return {x * s, s * (T(1) + x * (T(1) - s))};
  } else if constexpr (kind == Activation::sigmoid) {
    const T s = sigmoid(x);
    return {s, s * (T(1) - s)};
  } else if constexpr (kind == Activation::elu) {
    return {x > T(0) ? b * x : a * b * std::expm1(x), x > T(0) ? b : a * b * std::exp(x)};
  } else if constexpr (kind == Activation::softplus) {
    const T s = a * x;
    return {s > b ? x : log1p_exp(s) / a, s > b ? T(1) : sigmoid(s)};
  } else {
    static_assert(kind == Activation::leaky_relu);
    return {x > T(0) ? x : a * x, x > T(0) ? T(1) : a};
  }
}

}  // namespace infl
