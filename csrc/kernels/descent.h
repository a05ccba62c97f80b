// descent: one step of a gradient method, by elements,
//
//   g = gradient + decay θ + damping (θ − anchor);  θ and the moments move as math/descent.h says
//
// One pass: it reads the gradient, and reads and writes θ and each moment.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace infl {

enum class Method : int { sgd = 0, adam = 1 };

template <class T>
struct Descent {
  Method method = Method::sgd;
  T lr = 0;                          // Adam: over 1 − β₁ᵗ
  T momentum = 0;                    // of SGD
  T one_minus_beta1 = 0, beta2 = 0;  // of Adam
  T one_minus_beta2 = 0;
  T root_correction = 1, eps = 0;  // √(1 − β₂ᵗ)
  T decay = 0, damping = 0;
  const T* anchor = nullptr;  // [size], needed where damping is not 0
  int64_t anchor_size = 0;    // where several parameter sets share it: [anchor_size], again and again
};

// What a step moves, in place; `second` is Adam's alone.
template <class T>
struct Moved {
  T* theta = nullptr;
  T *first = nullptr, *second = nullptr;

  Moved from(int64_t element) const { return {theta + element, first + element, second ? second + element : nullptr}; }
};

// theta, first, second [size].
template <class T>
inline KernelStub<void(const Context&, int64_t size, const Descent<T>& descent, const T* gradient, T* theta, T* first, T* second)> descend_stub{
    "descend"};

// The step of elements [begin, begin + size) of what is moved, by their gradient.
template <class T>
void descend(const Context& ctx, int64_t begin, int64_t size, Descent<T> descent, const T* gradient, const Moved<T>& moved) {
  if (descent.anchor) descent.anchor += begin;
  const Moved<T> part = moved.from(begin);
  descend_stub<T>(ctx, size, descent, gradient, part.theta, part.first, part.second);
}

}  // namespace infl
