// Plain loops over contiguous memory, vectorised by the compiler; rows are split between threads where a pass takes longer than starting them.
#include "kernels/arithmetic.h"

#include "kernels/cpu/parallel.h"

namespace infl {
namespace INFL_ISA {
namespace {

constexpr int64_t kStrip = 1024;  // elements of a long row that one step of a loop over rows takes

template <bool has_scale, bool has_t_x, bool has_t_scale, bool has_t_shift, class T>
void affine_tangent_loop(const Context& ctx, int64_t V, int64_t rows, int64_t width, T a, const T* scale, const T* t_x, const T* t_scale,
                         int64_t t_scale_ld, const T* x, const T* t_shift, int64_t t_shift_ld, T* out) {
  const int threads = threads_for(ctx, V * rows * width);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t vr = 0; vr < V * rows; ++vr) {
    const int64_t v = vr / rows, r = vr % rows;
    const T* from = has_t_x ? t_x + vr * width : nullptr;
    const T* at = has_t_scale ? x + r * width : nullptr;
    const T* ds = has_t_scale ? t_scale + v * t_scale_ld : nullptr;
    const T* db = has_t_shift ? t_shift + v * t_shift_ld : nullptr;
    T* to = out + vr * width;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      T sum = 0;
      if constexpr (has_t_x) sum = has_scale ? scale[j] * from[j] : from[j];
      if constexpr (has_t_scale) sum += ds[j] * at[j];
      sum *= a;
      if constexpr (has_t_shift) sum += db[j];
      to[j] = sum;
    }
  }
}

template <class T>
void affine_tangent(const Context& ctx, int64_t V, int64_t rows, int64_t width, T a, const T* scale, const T* t_x, const T* t_scale,
                    int64_t t_scale_ld, const T* x, const T* t_shift, int64_t t_shift_ld, T* out) {
  const auto run = [&](auto loop) { loop(ctx, V, rows, width, a, scale, t_x, t_scale, t_scale_ld, x, t_shift, t_shift_ld, out); };
  const int which = (t_x ? 4 : 0) + (t_scale ? 2 : 0) + (t_shift ? 1 : 0);
  switch (which) {
    case 0:
      return run(affine_tangent_loop<false, false, false, false, T>);
    case 1:
      return run(affine_tangent_loop<false, false, false, true, T>);
    case 2:
      return run(affine_tangent_loop<false, false, true, false, T>);
    case 3:
      return run(affine_tangent_loop<false, false, true, true, T>);
    case 4:
      return scale ? run(affine_tangent_loop<true, true, false, false, T>) : run(affine_tangent_loop<false, true, false, false, T>);
    case 5:
      return scale ? run(affine_tangent_loop<true, true, false, true, T>) : run(affine_tangent_loop<false, true, false, true, T>);
    case 6:
      return scale ? run(affine_tangent_loop<true, true, true, false, T>) : run(affine_tangent_loop<false, true, true, false, T>);
    default:
      return scale ? run(affine_tangent_loop<true, true, true, true, T>) : run(affine_tangent_loop<false, true, true, true, T>);
  }
}

template <class T>
void column_dot(const Context& ctx, int64_t V, int64_t rows, int64_t width, T a, const T* g, const T* x, T* out, int64_t out_ld) {
  const int threads = threads_for(ctx, V * rows * width);
  constexpr int64_t kColumns = 64;
  const int64_t strips = (width + kColumns - 1) / kColumns;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < V * strips; ++i) {
    const int64_t v = i / strips, j0 = i % strips * kColumns, count = std::min(kColumns, width - j0);
    const T* from = g + v * rows * width + j0;
    const T* with = x + j0;
    T sums[kColumns] = {};
    for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) sums[j] += from[r * width + j] * with[r * width + j];
    }
    T* to = out + v * out_ld + j0;
    for (int64_t j = 0; j < count; ++j) to[j] += a * sums[j];
  }
}

// body(v, begin, end) over all right-hand sides and strips of [0, size).
template <class Body>
void each_strip(const Context& ctx, int64_t V, int64_t size, const Body& body) {
  const int threads = threads_for(ctx, V * size);
  const int64_t strips = (size + kStrip - 1) / kStrip;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t s = 0; s < strips; ++s) {
    for (int64_t v = 0; v < V; ++v) body(v, s * kStrip, std::min(size, (s + 1) * kStrip));
  }
}

template <class T>
void product_tangent(const Context& ctx, int64_t V, int64_t size, const T* d1, const T* t1, const T* d2, const T* t2, T* out) {
  each_strip(ctx, V, size, [=](int64_t v, int64_t begin, int64_t end) {
    const T *a = t1 + v * size, *b = t2 + v * size;
    T* to = out + v * size;
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) to[i] = d1[i] * a[i] + d2[i] * b[i];
  });
}

template <class T>
void extremum(const Context& ctx, int64_t size, T sign, const T* x1, const T* x2, T* y, T* weight) {
  each_strip(ctx, 1, size, [=](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T a = x1[i], b = x2[i], difference = sign * (a - b);
      const T share = a == b ? T(0.5) : difference > T(0) ? T(1) : T(0);
      // A NaN stays: in x1 it must be taken by hand, in x2 it is what "not larger" selects.
      y[i] = share > T(0) || a != a ? a : b;
      weight[i] = share;
    }
  });
}

template <Activation kind, class T>
void comparison_loop(const Context& ctx, int64_t size, const T* x1, const T* x2, T* y) {
  each_strip(ctx, 1, size, [=](int64_t, int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) y[i] = infl::activation<kind>(x1[i], x2[i], T(0)).value;
  });
}

template <class T>
void comparison(const Context& ctx, Activation kind, int64_t size, const T* x1, const T* x2, T* y) {
  switch (kind) {
    case Activation::greater:
      return comparison_loop<Activation::greater>(ctx, size, x1, x2, y);
    case Activation::greater_equal:
      return comparison_loop<Activation::greater_equal>(ctx, size, x1, x2, y);
    case Activation::less:
      return comparison_loop<Activation::less>(ctx, size, x1, x2, y);
    case Activation::less_equal:
      return comparison_loop<Activation::less_equal>(ctx, size, x1, x2, y);
    case Activation::equal:
      return comparison_loop<Activation::equal>(ctx, size, x1, x2, y);
    default:
      return comparison_loop<Activation::not_equal>(ctx, size, x1, x2, y);
  }
}

template <class T>
void blend(const Context& ctx, int64_t V, int64_t size, const T* w, const T* t1, const T* t2, T* out, bool accumulate) {
  each_strip(ctx, V, size, [=](int64_t v, int64_t begin, int64_t end) {
    const T* a = t1 ? t1 + v * size : nullptr;
    const T* b = t2 ? t2 + v * size : nullptr;
    T* to = out + v * size;
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      const T sum = (a ? w[i] * a[i] : T(0)) + (b ? (T(1) - w[i]) * b[i] : T(0));
      to[i] = accumulate ? to[i] + sum : sum;
    }
  });
}

template <class T>
void where(const Context& ctx, int64_t V, int64_t rows, int64_t width, const T* mask, int64_t mask_ld, const T* x1, T number1, const T* x2, T number2,
           T* out, bool accumulate) {
  const int threads = threads_for(ctx, V * rows * width);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t vr = 0; vr < V * rows; ++vr) {
    const T* m = mask + vr % rows * mask_ld;
    const T* a = x1 ? x1 + vr * width : nullptr;
    const T* b = x2 ? x2 + vr * width : nullptr;
    T* to = out + vr * width;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      const T first = a ? a[j] : number1, second = b ? b[j] : number2;
      const T chosen = m[j] != T(0) ? first : second;
      to[j] = accumulate ? to[j] + chosen : chosen;
    }
  }
}

template <class T>
void prelu(const Context& ctx, int64_t rows, int64_t width, const T* weight, const T* x, T* y, T* derivative, T* below) {
  const int threads = threads_for(ctx, rows * width);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = r * width;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      const T value = x[at + j], slope = value > T(0) ? T(1) : weight[j];
      y[at + j] = slope * value;
      derivative[at + j] = slope;
      if (below) below[at + j] = value > T(0) ? T(0) : value;
    }
  }
}

INFL_REGISTER_CPU(affine_tangent_stub, affine_tangent)
INFL_REGISTER_CPU(column_dot_stub, column_dot)
INFL_REGISTER_CPU(product_tangent_stub, product_tangent)
INFL_REGISTER_CPU(extremum_stub, extremum)
INFL_REGISTER_CPU(comparison_stub, comparison)
INFL_REGISTER_CPU(blend_stub, blend)
INFL_REGISTER_CPU(where_stub, where)
INFL_REGISTER_CPU(prelu_stub, prelu)

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
