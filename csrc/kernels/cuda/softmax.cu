// One reduction a line (row_reduction.h): the maximum and the sum of exponentials relative to it are found together, so x is read once where a line
// fits in registers and twice where it does not; nothing but the results is stored. p is shared by all right-hand sides: lines that differ in v
// alone are neighbours.
#include "kernels/softmax.h"

#include <cmath>

#include "kernels/cuda/row_reduction.h"

namespace infl {
namespace cuda {
namespace {

template <class T>
struct Exponentials {
  T top = -INFINITY, sum = 0;  // max x, Σ exp(x − top)
};

template <class T>
struct SoftmaxLine {
  using State = Exponentials<T>;
  int64_t step;
  bool log;
  const T* x;
  T *y, *p;

  __device__ T load(int64_t s) const { return x[s * step]; }

  __device__ void add(State& state, T value, int64_t) const {
    if (value > state.top) {
      state.sum = state.sum * std::exp(state.top - value) + T(1);
      state.top = value;
    } else {
      state.sum += value == state.top ? T(1) : std::exp(value - state.top);
    }
  }

  __device__ void merge(State& state, const State& other) const {
    const State lower = exchanged(other.top > state.top, state, other);
    state.sum += state.top == lower.top ? lower.sum : lower.sum * std::exp(lower.top - state.top);
  }

  __device__ void store(int64_t s, T value, const State& state) const {
    const T shifted = value - state.top, share = std::exp(shifted) / state.sum;
    p[s * step] = share;
    y[s * step] = log ? shifted - std::log(state.sum) : share;
  }

  __device__ void finish(const State&) const {}
};

template <class T>
struct Softmax {
  using State = Exponentials<T>;
  using Item = T;
  static constexpr bool kStores = true;
  int64_t size, inner;
  bool log;
  const T* x;
  T *y, *p;
  __device__ SoftmaxLine<T> at(int64_t row, int64_t column) const {
    const int64_t first = row * size * inner + column;
    return {inner, log, x + first, y + first, p + first};
  }
};

template <class T>
void softmax(const Context& ctx, int64_t rows, int64_t size, int64_t inner, bool log, const T* x, T* y, T* p) {
  if (size == 0) return;
  reduce_rows(ctx, "softmax", rows, size, inner, Softmax<T>{size, inner, log, x, y, p});
}

template <class T>
struct ProductLine {
  using State = Sum<T>;
  struct Item {
    T p, in;
  };
  SoftmaxProduct part;
  bool accumulate;
  int64_t step;
  const T *p, *in;
  T* out;

  __device__ Item load(int64_t s) const { return {p[s * step], in[s * step]}; }
  __device__ void add(State& sum, const Item& item, int64_t) const {
    sum.value += part == SoftmaxProduct::log_cotangent ? item.in : item.p * item.in;
  }
  __device__ void merge(State& sum, const State& other) const { sum.value += other.value; }
  __device__ void store(int64_t s, const Item& item, const State& sum) const {
    T value;
    if (part == SoftmaxProduct::log_cotangent) {
      value = item.in - item.p * sum.value;
    } else {
      value = (part == SoftmaxProduct::softmax ? item.p : T(1)) * (item.in - sum.value);
    }
    T& to = out[s * step];
    to = accumulate ? to + value : value;
  }
  __device__ void finish(const State&) const {}
};

template <class T>
struct Product {
  using State = Sum<T>;
  using Item = typename ProductLine<T>::Item;
  static constexpr bool kStores = true;
  SoftmaxProduct part;
  bool accumulate;
  int64_t V, rows, size, inner;
  const T *p, *in;
  T* out;
  __device__ ProductLine<T> at(int64_t vr, int64_t column) const {
    const int64_t r = vr / V, v = vr - r * V;
    const int64_t first = r * size * inner + column, first_of_v = first + v * rows * size * inner;
    return {part, accumulate, inner, p + first, in + first_of_v, out + first_of_v};
  }
};

template <class T>
void softmax_product(const Context& ctx, SoftmaxProduct part, int64_t V, int64_t rows, int64_t size, int64_t inner, const T* p, const T* in, T* out,
                     bool accumulate) {
  reduce_rows(ctx, "softmax_product", V * rows, size, inner, Product<T>{part, accumulate, V, rows, size, inner, p, in, out});
}

// Means of t and g with weights p, and Σ p (t − mean) (g − mean): in one pass, and without what would cancel in Σ p t g − (Σ p t)(Σ p g).
// With `log`, g is Σ g instead and the last is not used.
template <class T>
struct Covariance {
  T weight = 0, t = 0, g = 0, product = 0;
};

template <class T>
struct SecondOrderLine {
  using State = Covariance<T>;
  struct Item {
    T p, g, t;
  };
  bool log;
  int64_t step;
  const T *p, *g, *t;
  T* out;

  __device__ Item load(int64_t s) const { return {p[s * step], g[s * step], t[s * step]}; }
  __device__ void add(State& state, const Item& item, int64_t) const { merge(state, {item.p, item.t, item.g, T(0)}); }
  __device__ void merge(State& state, const State& other) const {
    const bool other_is_heavier = other.weight > state.weight;
    const T heavy = other_is_heavier ? other.weight : state.weight, light = other_is_heavier ? state.weight : other.weight;
    const T weight = heavy + light, share = weight == T(0) ? T(0) : light / weight;
    const T t_change = other.t - state.t, g_change = other.g - state.g;
    state.weight = weight;
    // Halves by their sum: both must find the same number.
    const auto mean = [&](T own, T others) {
      if (share == T(0.5)) return T(0.5) * (own + others);
      return other_is_heavier ? others + share * (own - others) : own + share * (others - own);
    };
    state.t = mean(state.t, other.t);
    if (log) {
      state.g += other.g;
      return;
    }
    state.g = mean(state.g, other.g);
    state.product = (state.product + other.product) + t_change * g_change * (heavy * share);
  }
  __device__ void store(int64_t s, const Item& item, const State& state) const {
    const T moved = item.p * (item.t - state.t);
    out[s * step] += log ? -state.g * moved : moved * (item.g - state.g) - item.p * state.product;
  }
  __device__ void finish(const State&) const {}
};

template <class T>
struct SecondOrder {
  using State = Covariance<T>;
  using Item = typename SecondOrderLine<T>::Item;
  static constexpr bool kStores = true;
  bool log;
  int64_t V, rows, size, inner;
  const T *p, *g, *t;
  T* out;
  __device__ SecondOrderLine<T> at(int64_t vr, int64_t column) const {
    const int64_t r = vr / V, v = vr - r * V;
    const int64_t first = r * size * inner + column, first_of_v = first + v * rows * size * inner;
    return {log, inner, p + first, g + first, t + first_of_v, out + first_of_v};
  }
};

template <class T>
void softmax_second_order(const Context& ctx, bool log, int64_t V, int64_t rows, int64_t size, int64_t inner, const T* p, const T* g, const T* t,
                          T* out) {
  reduce_rows(ctx, "softmax_second_order", V * rows, size, inner, SecondOrder<T>{log, V, rows, size, inner, p, g, t, out});
}

INFL_REGISTER_CUDA(softmax_stub, softmax)
INFL_REGISTER_CUDA(softmax_second_order_stub, softmax_second_order)
INFL_REGISTER_CUDA(softmax_product_stub, softmax_product)

}  // namespace
}  // namespace cuda
}  // namespace infl
