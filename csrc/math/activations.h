// Activations: value, first and second derivative at one point, PyTorch's conventions at kinks (the derivative of relu at 0 is 0).
#pragma once

#include <cmath>

#include "common/macros.h"
#include "math/exp.h"
#include "math/normal.h"

namespace infl {

// Every kind once, in the order of their numbers (capture/lowering/pointwise.py has the same list).
// clang-format off
#define INFL_FOR_EACH_ACTIVATION(F) \
  F(relu) F(tanh) F(gelu) F(gelu_tanh) F(silu) F(sigmoid) F(elu) F(softplus) F(leaky_relu) F(hardswish) F(hardsigmoid) F(clamp) F(hardtanh) \
  F(mish) F(softshrink) F(hardshrink) F(threshold) F(log_sigmoid) F(celu) F(exp) F(exp2) F(expm1) F(log) F(log2) F(log10) F(log1p) F(sqrt) \
  F(rsqrt) F(reciprocal) F(square) F(pow) F(abs) F(sign) F(floor) F(ceil) F(round) F(trunc) F(sin) F(cos) F(tan) F(asin) F(acos) F(atan) \
  F(sinh) F(cosh) F(asinh) F(acosh) F(atanh) F(erf) F(erfc) F(greater) F(greater_equal) F(less) F(less_equal) F(equal) F(not_equal)
// clang-format on

#define INFL_ENUMERATOR(kind) kind,
enum class Activation : int { INFL_FOR_EACH_ACTIVATION(INFL_ENUMERATOR) };
#undef INFL_ENUMERATOR

#define INFL_COUNT(kind) +1
inline constexpr int kNumActivations = 0 INFL_FOR_EACH_ACTIVATION(INFL_COUNT);
#undef INFL_COUNT

// Is the second derivative 0 wherever there is one?
INFL_HD constexpr bool is_piecewise_linear(Activation kind) {
  switch (kind) {
    case Activation::relu:
    case Activation::leaky_relu:
    case Activation::hardsigmoid:
    case Activation::clamp:
    case Activation::hardtanh:
    case Activation::softshrink:
    case Activation::hardshrink:
    case Activation::threshold:
    case Activation::abs:
    case Activation::sign:
    case Activation::floor:
    case Activation::ceil:
    case Activation::round:
    case Activation::trunc:
    case Activation::greater:
    case Activation::greater_equal:
    case Activation::less:
    case Activation::less_equal:
    case Activation::equal:
    case Activation::not_equal:
      return true;
    default:
      return false;
  }
}

template <class T>
struct ValueAndDerivative {
  T value, derivative;
};

// In the functions of a loop's every element there is no branch and no call, so that compilers vectorise it.
template <class T>
INFL_HD T sigmoid(T x) {
  const T e = exp_nonpositive(x < T(0) ? x : -x);
  return (x < T(0) ? e : T(1)) / (T(1) + e);
}

// σ(x) and 1 − σ(x) = σ(−x), which a subtraction would leave without digits where σ is near one.
template <class T>
struct SigmoidAndComplement {
  T value, complement;
};

template <class T>
INFL_HD SigmoidAndComplement<T> sigmoid_and_complement(T x) {
  const T e = exp_nonpositive(x < T(0) ? x : -x);
  const T large = T(1) / (T(1) + e), small = e * large;
  return {x < T(0) ? small : large, x < T(0) ? large : small};
}

// Away from zero by e^(−2|x|), near it as x + x³ P(x²) / Q(x²), where the former would cancel (the rational approximation is that of Cephes).
template <class T>
INFL_HD T hyperbolic_tangent(T x) {
  const T size = x < T(0) ? -x : x, s = x * x;
  const T e = exp_nonpositive(T(-2) * size);
  const T far = (T(1) - e) / (T(1) + e);
  const T p = (T(-9.64399179425052238628e-1) * s - T(9.92877231001918586564e1)) * s - T(1.61468768441708447952e3);
  const T q = ((s + T(1.12811678491632931402e2)) * s + T(2.23548839060100448583e3)) * s + T(4.84406305325125486048e3);
  const T near = x + x * s * (p / q);
  return size < T(0.625) ? near : (x < T(0) ? -far : far);
}

// log(1 + exp(x)) without overflow.
template <class T>
INFL_HD T log1p_exp(T x) {
  return (x > T(0) ? x : T(0)) + log1p_unit(exp_nonpositive(x > T(0) ? -x : x));
}

// t = tanh(log(1 + eˣ)) = (s² − 1) / (s² + 1) with s = 1 + eˣ, by e^(−|x|); and its slope 1 − t², where t near one leaves no digits of it.
template <class T>
struct TanhAndSlope {
  T value, slope;
};

template <class T>
INFL_HD TanhAndSlope<T> tanh_log1p_exp(T x) {
  const T e = exp_nonpositive(x > T(0) ? -x : x);
  const T far = T(1) + T(2) * e, near = e * (e + T(2));
  const T denominator = x > T(0) ? far + T(2) * e * e : near + T(2);
  const T quarter = x > T(0) ? e * e * (far + e * e) : near + T(1);
  return {(x > T(0) ? far : near) / denominator, T(4) * quarter / (denominator * denominator)};
}

// gelu_tanh(x) = x (1 + tanh u) / 2 = x σ(2u), u = √(2/π) (x + 0.044715 x³).
template <class T>
struct TanhArgument {
  T twice, slope, curvature;  // 2u, u', u''
};

template <class T>
INFL_HD TanhArgument<T> gelu_tanh_argument(T x) {
  const T c = T(0.79788456080286535588), k = T(0.044715);
  return {T(2) * c * (x + k * x * x * x), c * (T(1) + T(3) * k * x * x), T(6) * c * k * x};
}

// a, b: elu: alpha, scale; softplus: beta, threshold; leaky_relu: negative slope; clamp, hardtanh: lower and upper bound (they differ in their
// derivative at the bounds); softshrink, hardshrink: half width; threshold: threshold, value below; celu: alpha; pow: exponent;
// comparisons: the number compared with, and 1 or 0 as the answer.
template <Activation kind, class T>
INFL_HD ValueAndDerivative<T> activation(T x, T a, T b) {
  if constexpr (kind == Activation::relu) {
    return {x <= T(0) ? T(0) : x, x > T(0) ? T(1) : T(0)};  // so that NaN stays
  } else if constexpr (kind == Activation::tanh) {
    const T y = hyperbolic_tangent(x);
    return {y, T(1) - y * y};
  } else if constexpr (kind == Activation::gelu) {
    // x Φ(x), derivative Φ(x) + x φ(x)
    const T e = exp_nonpositive(T(-0.5) * x * x);
    const T tail = e * scaled_normal_tail(x < T(0) ? -x : x);
    const T cdf = x < T(0) ? tail : T(1) - tail;
    return {x * cdf, cdf + x * (T(0.39894228040143267794) * e)};
  } else if constexpr (kind == Activation::gelu_tanh) {
    const TanhArgument<T> u = gelu_tanh_argument(x);
    const SigmoidAndComplement<T> s = sigmoid_and_complement(u.twice);
    return {x * s.value, s.value + T(2) * x * (s.value * s.complement) * u.slope};
  } else if constexpr (kind == Activation::silu) {
    const SigmoidAndComplement<T> s = sigmoid_and_complement(x);
    return {x * s.value, s.value * (T(1) + x * s.complement)};
  } else if constexpr (kind == Activation::sigmoid) {
    const T s = sigmoid(x);
    return {s, s * (T(1) - s)};
  } else if constexpr (kind == Activation::elu) {
    const T below = x > T(0) ? T(0) : x;
    return {x > T(0) ? b * x : a * b * expm1_nonpositive(below), x > T(0) ? b : a * b * exp_nonpositive(below)};
  } else if constexpr (kind == Activation::softplus) {
    const T s = a * x;
    return {s > b ? x : log1p_exp(s) / a, s > b ? T(1) : sigmoid(s)};
  } else if constexpr (kind == Activation::leaky_relu) {
    return {x > T(0) ? x : a * x, x > T(0) ? T(1) : a};
  } else if constexpr (kind == Activation::hardswish) {
    const T slope = x / T(3) + T(0.5);
    return {x <= T(-3) ? T(0) : x >= T(3) ? x : x * (x + T(3)) / T(6), x <= T(-3) ? T(0) : x >= T(3) ? T(1) : slope};
  } else if constexpr (kind == Activation::hardsigmoid) {
    const T y = (x + T(3)) / T(6);
    // torch keeps the derivative's 1/6 in float for every type
    return {x <= T(-3) ? T(0) : x >= T(3) ? T(1) : y, x > T(-3) && x < T(3) ? T(1.0f / 6.0f) : T(0)};
  } else if constexpr (kind == Activation::clamp) {
    const T low = x < a ? a : x;  // the upper bound wins where they cross
    return {low > b ? b : low, x >= a && x <= b ? T(1) : T(0)};
  } else if constexpr (kind == Activation::hardtanh) {
    const T low = x < a ? a : x;
    return {low > b ? b : low, x <= a || x >= b ? T(0) : T(1)};
  } else if constexpr (kind == Activation::mish) {
    const TanhAndSlope<T> t = tanh_log1p_exp(x);
    return {x * t.value, t.value + x * sigmoid(x) * t.slope};
  } else if constexpr (kind == Activation::softshrink) {
    return {x > a ? x - a : x < -a ? x + a : x * T(0), x >= -a && x <= a ? T(0) : T(1)};
  } else if constexpr (kind == Activation::hardshrink) {
    return {x >= -a && x <= a ? T(0) : x, x >= -a && x <= a ? T(0) : T(1)};
  } else if constexpr (kind == Activation::threshold) {
    return {x <= a ? b : x, x <= a ? T(0) : T(1)};
  } else if constexpr (kind == Activation::log_sigmoid) {
    return {-log1p_exp(-x), sigmoid(-x)};
  } else if constexpr (kind == Activation::celu) {
    const T rate = T(1) / T(static_cast<float>(a));  // torch rounds alpha to float in the derivative
    return {x > T(0) ? x : a * std::expm1(x / a), x > T(0) ? T(1) : a * rate * std::exp(x * rate)};
  } else if constexpr (kind == Activation::exp) {
    const T y = std::exp(x);
    return {y, y};
  } else if constexpr (kind == Activation::exp2) {
    const T y = std::exp2(x);
    return {y, y * T(0.69314718055994530942)};
  } else if constexpr (kind == Activation::expm1) {
    return {std::expm1(x), std::exp(x)};
  } else if constexpr (kind == Activation::log) {
    return {std::log(x), T(1) / x};
  } else if constexpr (kind == Activation::log2) {
    return {std::log2(x), T(1.4426950408889634074) / x};
  } else if constexpr (kind == Activation::log10) {
    return {std::log10(x), T(0.43429448190325182765) / x};
  } else if constexpr (kind == Activation::log1p) {
    return {std::log1p(x), T(1) / (x + T(1))};
  } else if constexpr (kind == Activation::sqrt) {
    const T y = std::sqrt(x);
    return {y, T(0.5) / y};
  } else if constexpr (kind == Activation::rsqrt) {
    const T y = T(1) / std::sqrt(x);
    return {y, T(-0.5) * y * y * y};
  } else if constexpr (kind == Activation::reciprocal) {
    const T y = T(1) / x;
    return {y, -y * y};
  } else if constexpr (kind == Activation::square) {
    return {x * x, T(2) * x};
  } else if constexpr (kind == Activation::pow) {
    // The derivative of x^0 is 0 at 0 too, where a x^(a−1) would be 0 · ∞.
    return {std::pow(x, a), a == T(0) ? T(0) : a * std::pow(x, a - T(1))};
  } else if constexpr (kind == Activation::abs) {
    return {std::abs(x), x > T(0) ? T(1) : x < T(0) ? T(-1) : T(0)};
  } else if constexpr (kind == Activation::sign) {
    return {x > T(0) ? T(1) : x < T(0) ? T(-1) : x, T(0)};
  } else if constexpr (kind == Activation::floor) {
    return {std::floor(x), T(0)};
  } else if constexpr (kind == Activation::ceil) {
    return {std::ceil(x), T(0)};
  } else if constexpr (kind == Activation::round) {
    return {std::nearbyint(x), T(0)};  // halves to even
  } else if constexpr (kind == Activation::trunc) {
    return {std::trunc(x), T(0)};
  } else if constexpr (kind == Activation::sin) {
    return {std::sin(x), std::cos(x)};
  } else if constexpr (kind == Activation::cos) {
    return {std::cos(x), -std::sin(x)};
  } else if constexpr (kind == Activation::tan) {
    const T y = std::tan(x);
    return {y, T(1) + y * y};
  } else if constexpr (kind == Activation::asin) {
    return {std::asin(x), T(1) / std::sqrt((T(1) - x) * (T(1) + x))};
  } else if constexpr (kind == Activation::acos) {
    return {std::acos(x), T(-1) / std::sqrt((T(1) - x) * (T(1) + x))};
  } else if constexpr (kind == Activation::atan) {
    return {std::atan(x), T(1) / (T(1) + x * x)};
  } else if constexpr (kind == Activation::sinh) {
    return {std::sinh(x), std::cosh(x)};
  } else if constexpr (kind == Activation::cosh) {
    return {std::cosh(x), std::sinh(x)};
  } else if constexpr (kind == Activation::asinh) {
    return {std::asinh(x), T(1) / std::sqrt(x * x + T(1))};
  } else if constexpr (kind == Activation::acosh) {
    return {std::acosh(x), T(1) / std::sqrt((x - T(1)) * (x + T(1)))};
  } else if constexpr (kind == Activation::atanh) {
    return {std::atanh(x), T(1) / ((T(1) - x) * (T(1) + x))};
  } else if constexpr (kind == Activation::erf) {
    return {std::erf(x), T(1.1283791670955125739) * std::exp(-x * x)};
  } else if constexpr (kind == Activation::erfc) {
    return {std::erfc(x), T(-1.1283791670955125739) * std::exp(-x * x)};
  } else if constexpr (kind == Activation::greater) {
    return {x > a ? T(1) : T(0), T(0)};
  } else if constexpr (kind == Activation::greater_equal) {
    return {x >= a ? T(1) : T(0), T(0)};
  } else if constexpr (kind == Activation::less) {
    return {x < a ? T(1) : T(0), T(0)};
  } else if constexpr (kind == Activation::less_equal) {
    return {x <= a ? T(1) : T(0), T(0)};
  } else if constexpr (kind == Activation::equal) {
    return {x == a ? T(1) : T(0), T(0)};
  } else {
    static_assert(kind == Activation::not_equal);
    return {x != a ? T(1) : T(0), T(0)};
  }
}

// Second derivatives; 0 at kinks, and so everywhere for the kinds that are piecewise linear.
template <Activation kind, class T>
INFL_HD T second_derivative(T x, T a, T b) {
  if constexpr (kind == Activation::tanh) {
    const T y = hyperbolic_tangent(x);
    return T(-2) * y * (T(1) - y * y);
  } else if constexpr (kind == Activation::gelu) {
    return T(0.39894228040143267794) * exp_nonpositive(T(-0.5) * x * x) * (T(2) - x * x);
  } else if constexpr (kind == Activation::gelu_tanh) {
    const TanhArgument<T> u = gelu_tanh_argument(x);
    const SigmoidAndComplement<T> s = sigmoid_and_complement(u.twice);
    const T bend = x * (u.curvature + T(2) * (s.complement - s.value) * u.slope * u.slope);
    return T(2) * (s.value * s.complement) * (T(2) * u.slope + bend);
  } else if constexpr (kind == Activation::silu) {
    const SigmoidAndComplement<T> s = sigmoid_and_complement(x);
    return s.value * s.complement * (T(2) + x * (s.complement - s.value));
  } else if constexpr (kind == Activation::sigmoid) {
    const T s = sigmoid(x);
    return s * (T(1) - s) * (T(1) - T(2) * s);
  } else if constexpr (kind == Activation::elu) {
    return x < T(0) ? a * b * exp_nonpositive(x < T(0) ? x : T(0)) : T(0);
  } else if constexpr (kind == Activation::softplus) {
    const T s = sigmoid(a * x);
    return a * x > b ? T(0) : a * s * (T(1) - s);
  } else if constexpr (kind == Activation::hardswish) {
    return x > T(-3) && x < T(3) ? T(1) / T(3) : T(0);
  } else if constexpr (kind == Activation::mish) {
    const TanhAndSlope<T> t = tanh_log1p_exp(x);
    const SigmoidAndComplement<T> s = sigmoid_and_complement(x);
    return t.slope * s.value * (T(2) + x * (s.complement - T(2) * t.value * s.value));
  } else if constexpr (kind == Activation::log_sigmoid) {
    const T s = sigmoid(x);
    return -s * (T(1) - s);
  } else if constexpr (kind == Activation::celu) {
    const T rate = T(1) / T(static_cast<float>(a));
    return x < T(0) ? a * rate * rate * std::exp(x * rate) : T(0);
  } else if constexpr (kind == Activation::exp || kind == Activation::expm1) {
    return std::exp(x);
  } else if constexpr (kind == Activation::exp2) {
    return std::exp2(x) * T(0.48045301391820142467);
  } else if constexpr (kind == Activation::log) {
    return T(-1) / (x * x);
  } else if constexpr (kind == Activation::log2) {
    return T(-1.4426950408889634074) / (x * x);
  } else if constexpr (kind == Activation::log10) {
    return T(-0.43429448190325182765) / (x * x);
  } else if constexpr (kind == Activation::log1p) {
    return T(-1) / ((x + T(1)) * (x + T(1)));
  } else if constexpr (kind == Activation::sqrt) {
    return T(-0.25) / (x * std::sqrt(x));
  } else if constexpr (kind == Activation::rsqrt) {
    return T(0.75) / (x * x * std::sqrt(x));
  } else if constexpr (kind == Activation::reciprocal) {
    return T(2) / (x * x * x);
  } else if constexpr (kind == Activation::square) {
    return T(2);
  } else if constexpr (kind == Activation::pow) {
    return a == T(0) || a == T(1) ? T(0) : a * (a - T(1)) * std::pow(x, a - T(2));
  } else if constexpr (kind == Activation::sin) {
    return -std::sin(x);
  } else if constexpr (kind == Activation::cos) {
    return -std::cos(x);
  } else if constexpr (kind == Activation::tan) {
    const T y = std::tan(x);
    return T(2) * y * (T(1) + y * y);
  } else if constexpr (kind == Activation::asin || kind == Activation::acos) {
    const T s = (T(1) - x) * (T(1) + x);
    return (kind == Activation::asin ? x : -x) / (s * std::sqrt(s));
  } else if constexpr (kind == Activation::atan) {
    const T s = T(1) + x * x;
    return T(-2) * x / (s * s);
  } else if constexpr (kind == Activation::sinh) {
    return std::sinh(x);
  } else if constexpr (kind == Activation::cosh) {
    return std::cosh(x);
  } else if constexpr (kind == Activation::asinh) {
    const T s = x * x + T(1);
    return -x / (s * std::sqrt(s));
  } else if constexpr (kind == Activation::acosh) {
    const T s = (x - T(1)) * (x + T(1));
    return -x / (s * std::sqrt(s));
  } else if constexpr (kind == Activation::atanh) {
    const T s = (T(1) - x) * (T(1) + x);
    return T(2) * x / (s * s);
  } else if constexpr (kind == Activation::erf || kind == Activation::erfc) {
    return (kind == Activation::erf ? T(-2) : T(2)) * x * T(1.1283791670955125739) * std::exp(-x * x);
  } else {
    static_assert(is_piecewise_linear(kind));
    return T(0);
  }
}

}  // namespace infl
