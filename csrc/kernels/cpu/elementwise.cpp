// Plain loops over contiguous memory, vectorised by the compiler; split between threads only where a pass takes longer than starting them.
#include "kernels/elementwise.h"

#include "kernels/cpu/parallel.h"

namespace infl {
namespace INFL_ISA {
namespace {

// Call body(begin, end) on slices of [0, size).
template <class Body>
void parallel_slices(int threads, int64_t size, const Body& body) {
  if (threads <= 1) {
    body(int64_t{0}, size);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int64_t count = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t slice = ((size + count - 1) / count + 15) / 16 * 16;
    const int64_t begin = std::min(size, me * slice), end = std::min(size, begin + slice);
    if (begin < end) body(begin, end);
  }
}

template <Activation kind, class T>
void activation_loop(const Context& ctx, T a, T b, int64_t size, const T* x, T* y, T* derivative) {
  parallel_slices(threads_for(ctx, 8 * size), size, [=](int64_t begin, int64_t end) {
    if (derivative == nullptr) {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) y[i] = infl::activation<kind>(x[i], a, b).value;
      return;
    }
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      const auto r = infl::activation<kind>(x[i], a, b);
      y[i] = r.value;
      derivative[i] = r.derivative;
    }
  });
}

template <class T>
void activation(const Context& ctx, Activation kind, T a, T b, int64_t size, const T* x, T* y, T* derivative) {
#define INFL_CASE(name)  \
  case Activation::name: \
    return activation_loop<Activation::name>(ctx, a, b, size, x, y, derivative);
  switch (kind) { INFL_FOR_EACH_ACTIVATION(INFL_CASE) }
#undef INFL_CASE
  throw std::invalid_argument("activation: unknown kind " + std::to_string(static_cast<int>(kind)) + ".");
}

template <Activation kind, class T>
void second_derivative_loop(const Context& ctx, T a, T b, int64_t size, const T* x, T* out) {
  parallel_slices(threads_for(ctx, 8 * size), size, [=](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) out[i] = infl::second_derivative<kind>(x[i], a, b);
  });
}

template <class T>
void second_derivative(const Context& ctx, Activation kind, T a, T b, int64_t size, const T* x, T* out) {
#define INFL_CASE(name)  \
  case Activation::name: \
    return second_derivative_loop<Activation::name>(ctx, a, b, size, x, out);
  switch (kind) { INFL_FOR_EACH_ACTIVATION(INFL_CASE) }
#undef INFL_CASE
  throw std::invalid_argument("second_derivative: unknown kind " + std::to_string(static_cast<int>(kind)) + ".");
}

template <class T>
void add_scaled(const Context& ctx, int64_t V, int64_t size, const T* d, const T* g, const T* in, T* out) {
  parallel_slices(threads_for(ctx, V * size), size, [=](int64_t begin, int64_t end) {
    for (int64_t v = 0; v < V; ++v) {
      const T* from = in + v * size;
      T* to = out + v * size;
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) to[i] += d[i] * g[i] * from[i];
    }
  });
}

template <class T>
void scale(const Context& ctx, int64_t V, int64_t size, const T* d, const T* in, T* out, bool accumulate) {
  parallel_slices(threads_for(ctx, V * size), size, [=](int64_t begin, int64_t end) {
    for (int64_t v = 0; v < V; ++v) {
      const T* from = in + v * size;
      T* to = out + v * size;
      if (accumulate) {
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) to[i] += d[i] * from[i];
      } else {
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) to[i] = d[i] * from[i];
      }
    }
  });
}

template <class T>
void combine(const Context& ctx, int64_t size, T a, const T* x1, T b, const T* x2, T* out, bool accumulate) {
  parallel_slices(threads_for(ctx, size), size, [=](int64_t begin, int64_t end) {
    const T keep = accumulate ? T(1) : T(0);
    if (x2 == nullptr) {
      if (accumulate) {
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) out[i] += a * x1[i];
      } else {
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) out[i] = a * x1[i];
      }
    } else if (keep != T(0)) {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) out[i] += a * x1[i] + b * x2[i];
    } else {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) out[i] = a * x1[i] + b * x2[i];
    }
  });
}

template <class T>
void affine(const Context& ctx, int64_t rows, int64_t width, T a, const T* scale, T b, const T* shift, const T* x, T* out, bool accumulate) {
  parallel_slices(threads_for(ctx, rows * width), rows, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* from = x + r * width;
      T* to = out + r * width;
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) {
        const T value = a * (scale ? scale[j] : T(1)) * from[j] + b + (shift ? shift[j] : T(0));
        to[j] = accumulate ? to[j] + value : value;
      }
    }
  });
}

template <class T>
void column_sum(const Context& ctx, int64_t V, int64_t rows, int64_t width, const T* x, T* out, int64_t out_batch) {
  const int threads = threads_for(ctx, V * rows * width);
  constexpr int64_t kStrip = 64;
  const int64_t strips = (width + kStrip - 1) / kStrip;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < V * strips; ++i) {
    const int64_t v = i / strips, j0 = i % strips * kStrip, count = std::min(kStrip, width - j0);
    const T* from = x + v * rows * width + j0;
    T sums[kStrip] = {};
    for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) sums[j] += from[r * width + j];
    }
    T* to = out + v * out_batch + j0;
    for (int64_t j = 0; j < count; ++j) to[j] += sums[j];
  }
}

template <class T>
void row_accumulate(const Context& ctx, int64_t num, int64_t size, const T* x, int64_t x_stride, T* out) {
  parallel_slices(threads_for(ctx, num * size), size, [=](int64_t begin, int64_t end) {
    for (int64_t s = 0; s < num; ++s) {
#pragma omp simd
      for (int64_t p = begin; p < end; ++p) out[p] += x[s * x_stride + p];
    }
  });
}

template <class T>
void all_finite(const Context& ctx, int64_t size, const T* x, bool* finite) {
  bool found = true;
  parallel_slices(threads_for(ctx, size), size, [&](int64_t begin, int64_t end) {
    T sum = 0;  // x - x is 0, or NaN where x is not finite
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) sum += x[i] - x[i];
    if (!(sum == T(0))) {
#pragma omp atomic write
      found = false;
    }
  });
  *finite = found;
}

INFL_REGISTER_CPU(activation_stub, activation)
INFL_REGISTER_CPU(second_derivative_stub, second_derivative)
INFL_REGISTER_CPU(add_scaled_stub, add_scaled)
INFL_REGISTER_CPU(scale_stub, scale)
INFL_REGISTER_CPU(combine_stub, combine)
INFL_REGISTER_CPU(affine_stub, affine)
INFL_REGISTER_CPU(column_sum_stub, column_sum)
INFL_REGISTER_CPU(row_accumulate_stub, row_accumulate)
INFL_REGISTER_CPU(all_finite_stub, all_finite)

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
