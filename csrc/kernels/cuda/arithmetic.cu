// One pass over memory each, 16 bytes a thread and step where sizes allow: what has no V axis is read once for all right-hand sides, so the bytes
// are those of the V tangents in and out. column_dot splits long sums in two steps.
#include "kernels/arithmetic.h"

#include "kernels/cuda/row_reduction.h"
#include "kernels/cuda/vector.h"

namespace infl {
namespace cuda {
namespace {

// Elements i of [rows, width]; all right-hand sides of each.
template <class T>
struct AffineTangent {
  int64_t V, rows, width;
  T a;
  const T *scale, *t_x, *t_scale;
  int64_t t_scale_ld;
  const T *x, *t_shift;
  int64_t t_shift_ld;
  T* out;
  template <int W>
  __device__ void run(int64_t i) const {
    const int64_t j = i % width;
    Vector<T, W> factor{}, at{};
    if (scale) factor = load<W>(scale + j);
    if (t_scale) at = load<W>(x + i);
    for (int64_t v = 0; v < V; ++v) {
      Vector<T, W> sum{};
      if (t_x) {
        sum = load<W>(t_x + v * rows * width + i);
        if (scale) {
          for (int k = 0; k < W; ++k) sum.v[k] *= factor.v[k];
        }
      }
      // A tangent is one slice of a parameter's: its address is a multiple of sizeof(T) only.
      for (int k = 0; k < W; ++k) {
        if (t_scale) sum.v[k] += t_scale[v * t_scale_ld + j + k] * at.v[k];
        sum.v[k] = a * sum.v[k] + (t_shift ? t_shift[v * t_shift_ld + j + k] : T(0));
      }
      store<W>(out + v * rows * width + i, sum);
    }
  }
};

template <class T>
void affine_tangent(const Context& ctx, int64_t V, int64_t rows, int64_t width, T a, const T* scale, const T* t_x, const T* t_scale,
                    int64_t t_scale_ld, const T* x, const T* t_shift, int64_t t_shift_ld, T* out) {
  const bool vectorised = width % kVectorWidth<T> == 0 && is_aligned({scale, t_x, x, out});
  for_each<T>(ctx, "affine_tangent", rows * width, vectorised,
              AffineTangent<T>{V, rows, width, a, scale, t_x, t_scale, t_scale_ld, x, t_shift, t_shift_ld, out});
}

// Columns of [V, rows, width].
template <class T>
struct ColumnDot {
  using State = Sum<T>;
  struct Item {
    T g, x;
  };
  static constexpr bool kStores = false;
  int64_t rows, width;
  T a;
  const T *g, *x;
  T* out;
  int64_t out_ld;
  struct Line {
    int64_t step;
    T a;
    const T *g, *x;
    T* out;
    __device__ Item load(int64_t r) const { return {g[r * step], x[r * step]}; }
    __device__ void add(State& sum, const Item& item, int64_t) const { sum.value += item.g * item.x; }
    __device__ void merge(State& sum, const State& other) const { sum.value += other.value; }
    __device__ void store(int64_t, const Item&, const State&) const {}
    __device__ void finish(const State& sum) const { *out += a * sum.value; }
  };
  __device__ Line at(int64_t v, int64_t j) const { return {width, a, g + v * rows * width + j, x + j, out + v * out_ld + j}; }
};

template <class T>
void column_dot(const Context& ctx, int64_t V, int64_t rows, int64_t width, T a, const T* g, const T* x, T* out, int64_t out_ld) {
  reduce_columns(ctx, "column_dot", V, rows, width, ColumnDot<T>{rows, width, a, g, x, out, out_ld});
}

template <class T>
struct ProductTangent {
  int64_t V, size;
  const T *d1, *t1, *d2, *t2;
  T* out;
  template <int W>
  __device__ void run(int64_t i) const {
    const auto first = load<W>(d1 + i), second = load<W>(d2 + i);
    write_sides<W>(V, out + i, size, [&](int64_t v) {
      const auto a = load<W>(t1 + v * size + i), b = load<W>(t2 + v * size + i);
      Vector<T, W> sum;
      for (int k = 0; k < W; ++k) sum.v[k] = first.v[k] * a.v[k] + second.v[k] * b.v[k];
      return sum;
    });
  }
};

template <class T>
void product_tangent(const Context& ctx, int64_t V, int64_t size, const T* d1, const T* t1, const T* d2, const T* t2, T* out) {
  for_each_flat<T>(ctx, "product_tangent", V, size, {d1, t1, d2, t2, out}, ProductTangent<T>{V, size, d1, t1, d2, t2, out});
}

template <class T>
struct Extremum {
  T sign;
  const T *x1, *x2;
  T *y, *weight;
  template <int W>
  __device__ void run(int64_t i) const {
    const auto a = load<W>(x1 + i), b = load<W>(x2 + i);
    Vector<T, W> value, share;
    for (int k = 0; k < W; ++k) {
      share.v[k] = a.v[k] == b.v[k] ? T(0.5) : sign * (a.v[k] - b.v[k]) > T(0) ? T(1) : T(0);
      // A NaN stays: in x1 it must be taken by hand, in x2 it is what "not larger" selects.
      value.v[k] = share.v[k] > T(0) || a.v[k] != a.v[k] ? a.v[k] : b.v[k];
    }
    store<W>(y + i, value);
    store<W>(weight + i, share);
  }
};

template <class T>
void extremum(const Context& ctx, int64_t size, T sign, const T* x1, const T* x2, T* y, T* weight) {
  for_each_flat<T>(ctx, "extremum", 1, size, {x1, x2, y, weight}, Extremum<T>{sign, x1, x2, y, weight});
}

// One jump for all threads: the kind is the same.
template <class T>
__device__ T related(Activation kind, T x1, T x2) {
  switch (kind) {
    case Activation::greater:
      return infl::activation<Activation::greater>(x1, x2, T(0)).value;
    case Activation::greater_equal:
      return infl::activation<Activation::greater_equal>(x1, x2, T(0)).value;
    case Activation::less:
      return infl::activation<Activation::less>(x1, x2, T(0)).value;
    case Activation::less_equal:
      return infl::activation<Activation::less_equal>(x1, x2, T(0)).value;
    case Activation::equal:
      return infl::activation<Activation::equal>(x1, x2, T(0)).value;
    default:
      return infl::activation<Activation::not_equal>(x1, x2, T(0)).value;
  }
}

template <class T>
struct Comparison {
  Activation kind;
  const T *x1, *x2;
  T* y;
  template <int W>
  __device__ void run(int64_t i) const {
    auto value = load<W>(x1 + i);
    const auto with = load<W>(x2 + i);
    for (int k = 0; k < W; ++k) value.v[k] = related(kind, value.v[k], with.v[k]);
    store<W>(y + i, value);
  }
};

template <class T>
void comparison(const Context& ctx, Activation kind, int64_t size, const T* x1, const T* x2, T* y) {
  for_each_flat<T>(ctx, "comparison", 1, size, {x1, x2, y}, Comparison<T>{kind, x1, x2, y});
}

template <class T>
struct Blend {
  int64_t V, size;
  const T *w, *t1, *t2;
  T* out;
  bool accumulate;
  template <int W>
  __device__ void run(int64_t i) const {
    const auto share = load<W>(w + i);
    write_sides<W>(V, out + i, size, [&](int64_t v) {
      Vector<T, W> sum{};
      if (accumulate) sum = load<W>(out + v * size + i);
      if (t1) {
        const auto a = load<W>(t1 + v * size + i);
        for (int k = 0; k < W; ++k) sum.v[k] += share.v[k] * a.v[k];
      }
      if (t2) {
        const auto b = load<W>(t2 + v * size + i);
        for (int k = 0; k < W; ++k) sum.v[k] += (T(1) - share.v[k]) * b.v[k];
      }
      return sum;
    });
  }
};

template <class T>
void blend(const Context& ctx, int64_t V, int64_t size, const T* w, const T* t1, const T* t2, T* out, bool accumulate) {
  for_each_flat<T>(ctx, "blend", V, size, {w, t1, t2, out}, Blend<T>{V, size, w, t1, t2, out, accumulate});
}

// Elements i of [rows, width]; the mask is read once for all right-hand sides.
template <class T>
struct Where {
  int64_t V, rows, width;
  const T* mask;
  int64_t mask_ld;
  const T* x1;
  T number1;
  const T* x2;
  T number2;
  T* out;
  bool accumulate;
  template <int W>
  __device__ void run(int64_t i) const {
    const int64_t r = i / width, j = i - r * width;
    const auto m = load<W>(mask + r * mask_ld + j);
    for (int64_t v = 0; v < V; ++v) {
      const int64_t at = v * rows * width + i;
      Vector<T, W> first, second;
      for (int k = 0; k < W; ++k) {
        first.v[k] = number1;
        second.v[k] = number2;
      }
      if (x1) first = load<W>(x1 + at);
      if (x2) second = load<W>(x2 + at);
      for (int k = 0; k < W; ++k) first.v[k] = m.v[k] != T(0) ? first.v[k] : second.v[k];
      if (accumulate) {
        const auto before = load<W>(out + at);
        for (int k = 0; k < W; ++k) first.v[k] += before.v[k];
      }
      store<W>(out + at, first);
    }
  }
};

template <class T>
void where(const Context& ctx, int64_t V, int64_t rows, int64_t width, const T* mask, int64_t mask_ld, const T* x1, T number1, const T* x2, T number2,
           T* out, bool accumulate) {
  const int64_t W = kVectorWidth<T>;
  const bool vectorised = width % W == 0 && mask_ld % W == 0 && is_aligned({mask, x1, x2, out});
  for_each<T>(ctx, "where", rows * width, vectorised, Where<T>{V, rows, width, mask, mask_ld, x1, number1, x2, number2, out, accumulate});
}

template <class T>
struct Prelu {
  int64_t width;
  const T *weight, *x;
  T *y, *derivative, *below;
  template <int W>
  __device__ void run(int64_t i) const {
    const int64_t j = i % width;
    const auto value = load<W>(x + i), leak = load<W>(weight + j);
    Vector<T, W> scaled, slope, negative;
    for (int k = 0; k < W; ++k) {
      const bool positive = value.v[k] > T(0);
      slope.v[k] = positive ? T(1) : leak.v[k];
      scaled.v[k] = slope.v[k] * value.v[k];
      negative.v[k] = positive ? T(0) : value.v[k];
    }
    store<W>(y + i, scaled);
    store<W>(derivative + i, slope);
    if (below) store<W>(below + i, negative);
  }
};

template <class T>
void prelu(const Context& ctx, int64_t rows, int64_t width, const T* weight, const T* x, T* y, T* derivative, T* below) {
  const bool vectorised = width % kVectorWidth<T> == 0 && is_aligned({weight, x, y, derivative, below});
  for_each<T>(ctx, "prelu", rows * width, vectorised, Prelu<T>{width, weight, x, y, derivative, below});
}

INFL_REGISTER_CUDA(affine_tangent_stub, affine_tangent)
INFL_REGISTER_CUDA(column_dot_stub, column_dot)
INFL_REGISTER_CUDA(product_tangent_stub, product_tangent)
INFL_REGISTER_CUDA(extremum_stub, extremum)
INFL_REGISTER_CUDA(comparison_stub, comparison)
INFL_REGISTER_CUDA(blend_stub, blend)
INFL_REGISTER_CUDA(where_stub, where)
INFL_REGISTER_CUDA(prelu_stub, prelu)

}  // namespace
}  // namespace cuda
}  // namespace infl
