// inner = 1: along contiguous rows; else for a strip of columns side by side. Long sums are taken in blocks, which bounds the rounding error.
#include "kernels/reduction.h"

#include <vector>

#include "kernels/cpu/parallel.h"

namespace infl {
namespace INFL_ISA {
namespace {

constexpr int64_t kStrip = 64;    // columns whose sums stay in registers
constexpr int64_t kBlock = 1024;  // terms of a row summed before they are added to a total
constexpr int64_t kRowBlock = 256;

// body(row, first column, number of columns) for every row and strip of columns
template <class Body>
void for_strips(int threads, int64_t rows, int64_t inner, const Body& body) {
  const int64_t strips = (inner + kStrip - 1) / kStrip;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t strip = 0; strip < strips; ++strip) body(r, strip * kStrip, std::min(kStrip, inner - strip * kStrip));
  }
}

// Σ over a row of x, or of d ∘ x
template <bool kWeighted, class T>
T row_sum(int64_t size, const T* d, const T* x) {
  T total = 0;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = std::min(size, begin + kBlock);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t s = begin; s < end; ++s) sum += kWeighted ? d[s] * x[s] : x[s];
    total += sum;
  }
  return total;
}

template <bool kWeighted, class T>
void column_sums(int64_t size, int64_t inner, int64_t count, T factor, const T* d, const T* x, T* out) {
  T total[kStrip] = {};
  for (int64_t begin = 0; begin < size; begin += kRowBlock) {
    T sum[kStrip] = {};
    for (int64_t s = begin; s < std::min(size, begin + kRowBlock); ++s) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) sum[i] += kWeighted ? d[s * inner + i] * x[s * inner + i] : x[s * inner + i];
    }
    for (int64_t i = 0; i < count; ++i) total[i] += sum[i];
  }
  for (int64_t i = 0; i < count; ++i) out[i] = factor * total[i];
}

template <class T>
void sum_axis(const Context& ctx, int64_t rows, int64_t size, int64_t inner, T factor, const T* x, T* out) {
  for_strips(threads_for(ctx, rows * size * inner), rows, inner, [=](int64_t r, int64_t i, int64_t count) {
    const T* from = x + r * size * inner + i;
    if (inner == 1) {
      out[r] = factor * row_sum<false, T>(size, nullptr, from);
    } else {
      column_sums<false, T>(size, inner, count, factor, nullptr, from, out + r * inner + i);
    }
  });
}

template <class T>
void broadcast_axis(const Context& ctx, int64_t rows, int64_t size, int64_t inner, T factor, const T* g, T* out, bool accumulate) {
  for_strips(threads_for(ctx, rows * size * inner), rows, inner, [=](int64_t r, int64_t i, int64_t count) {
    T* to = out + r * size * inner + i;
    if (inner == 1) {
      const T value = factor * g[r];
#pragma omp simd
      for (int64_t s = 0; s < size; ++s) to[s] = accumulate ? to[s] + value : value;
      return;
    }
    T value[kStrip];
    for (int64_t k = 0; k < count; ++k) value[k] = factor * g[r * inner + i + k];
    for (int64_t s = 0; s < size; ++s, to += inner) {
#pragma omp simd
      for (int64_t k = 0; k < count; ++k) to[k] = accumulate ? to[k] + value[k] : value[k];
    }
  });
}

template <class T>
void cumulative_sum(const Context& ctx, int64_t rows, int64_t size, int64_t inner, bool reverse, const T* x, T* out, bool accumulate) {
  for_strips(threads_for(ctx, rows * size * inner), rows, inner, [=](int64_t r, int64_t i, int64_t count) {
    T sum[kStrip] = {};
    for (int64_t step = 0; step < size; ++step) {
      const int64_t at = (r * size + (reverse ? size - 1 - step : step)) * inner + i;
      for (int64_t k = 0; k < count; ++k) {
        sum[k] += x[at + k];
        out[at + k] = accumulate ? out[at + k] + sum[k] : sum[k];
      }
    }
  });
}

// One column: its elements `step` apart, the derivative into d at the same places.
template <class T>
struct Column {
  int64_t size, step;
  const T* x;
  T* d;

  T at(int64_t s) const { return x[s * step]; }

  T extremum(T sign, bool shared) const {
    T top = at(0);
    for (int64_t s = 1; s < size; ++s) top = sign * at(s) > sign * top ? at(s) : top;
    int64_t count = 0;
    for (int64_t s = 0; s < size; ++s) count += at(s) == top;
    const T value = shared ? T(1) / T(count) : T(1);
    bool taken = false;
    for (int64_t s = 0; s < size; ++s) {
      const bool chosen = at(s) == top && (shared || !taken);
      taken = taken || chosen;
      d[s * step] = chosen ? value : T(0);
    }
    return top;
  }

  T log_sum_exp() const {
    T top = at(0);
    for (int64_t s = 1; s < size; ++s) top = std::max(top, at(s));
    if (std::isinf(top)) top = 0;
    T sum = 0;
    for (int64_t s = 0; s < size; ++s) {
      d[s * step] = std::exp(at(s) - top);
      sum += d[s * step];
    }
    for (int64_t s = 0; s < size; ++s) d[s * step] /= sum;
    return top + std::log(sum);
  }

  // Σ (x − mean)², with d = x − mean; the second pass corrects the mean.
  T squared_deviations() const {
    T mean = 0, rest = 0, sum = 0;
    for (int64_t s = 0; s < size; ++s) mean += at(s);
    mean /= T(size);
    for (int64_t s = 0; s < size; ++s) rest += at(s) - mean;
    rest /= T(size);
    for (int64_t s = 0; s < size; ++s) {
      d[s * step] = (at(s) - mean) - rest;
      sum += d[s * step] * d[s * step];
    }
    return sum;
  }

  T variance(T correction) const {
    const T divisor = T(size) - correction, sum = squared_deviations();
    for (int64_t s = 0; s < size; ++s) d[s * step] *= T(2) / divisor;
    return sum / divisor;
  }

  T deviation(T correction) const {
    const T divisor = T(size) - correction, value = std::sqrt(squared_deviations() / divisor);
    for (int64_t s = 0; s < size; ++s) d[s * step] = value == T(0) ? T(0) : d[s * step] / (divisor * value);
    return value;
  }

  // Scaled by the largest element: neither overflows nor underflows.
  T norm() const {
    T top = 0, sum = 0;
    for (int64_t s = 0; s < size; ++s) top = std::max(top, std::abs(at(s)));
    for (int64_t s = 0; s < size; ++s) {
      const T ratio = top == T(0) ? T(0) : at(s) / top;
      d[s * step] = ratio;
      sum += ratio * ratio;
    }
    const T root = std::sqrt(sum);
    for (int64_t s = 0; s < size; ++s) d[s * step] = top == T(0) ? T(0) : d[s * step] / root;
    return top * root;
  }

  T absolute_norm() const {
    T sum = 0;
    for (int64_t s = 0; s < size; ++s) {
      sum += std::abs(at(s));
      d[s * step] = at(s) > T(0) ? T(1) : at(s) < T(0) ? T(-1) : T(0);
    }
    return sum;
  }

  // d is the product of all before times the product of all after: no division by zero.
  T product() const {
    T before = 1, after = 1;
    for (int64_t s = 0; s < size; ++s) {
      d[s * step] = before;
      before *= at(s);
    }
    for (int64_t s = size - 1; s >= 0; --s) {
      d[s * step] *= after;
      after *= at(s);
    }
    return before;
  }

  T reduce(Reduction kind, T a) const {
    switch (kind) {
      case Reduction::amax:
        return extremum(T(1), true);
      case Reduction::amin:
        return extremum(T(-1), true);
      case Reduction::max:
        return extremum(T(1), false);
      case Reduction::min:
        return extremum(T(-1), false);
      case Reduction::log_sum_exp:
        return log_sum_exp();
      case Reduction::variance:
        return variance(a);
      case Reduction::deviation:
        return deviation(a);
      case Reduction::norm:
        return norm();
      case Reduction::absolute_norm:
        return absolute_norm();
      case Reduction::product:
        return product();
    }
    return std::numeric_limits<T>::quiet_NaN();
  }
};

template <class T>
void nonlinear_reduction(const Context& ctx, Reduction kind, T a, int64_t rows, int64_t size, int64_t inner, const T* x, T* y, T* d) {
  for_strips(threads_for(ctx, 4 * rows * size * inner), rows, inner, [=](int64_t r, int64_t i, int64_t count) {
    for (int64_t k = i; k < i + count; ++k) {
      y[r * inner + k] = Column<T>{size, inner, x + r * size * inner + k, d + r * size * inner + k}.reduce(kind, a);
    }
  });
}

// Elements `step` apart: out += g ∇²y t.
template <class T>
void second_order_column(Reduction kind, T a, int64_t size, int64_t step, const T* x, T y, const T* d, T g, const T* t, T* out) {
  const int64_t end = size * step;
  T sum = 0, along = 0;  // Σ t, Σ d ∘ t
  for (int64_t s = 0; s < end; s += step) {
    sum += t[s];
    along += d[s] * t[s];
  }
  const T mean = sum / T(size), divisor = T(size) - a;
  switch (kind) {
    case Reduction::log_sum_exp:
      for (int64_t s = 0; s < end; s += step) out[s] += g * d[s] * (t[s] - along);
      return;
    case Reduction::variance:
      for (int64_t s = 0; s < end; s += step) out[s] += g * T(2) / divisor * (t[s] - mean);
      return;
    case Reduction::deviation:
      for (int64_t s = 0; s < end && y != T(0); s += step) out[s] += g / y * ((t[s] - mean) / divisor - d[s] * along);
      return;
    case Reduction::norm:
      for (int64_t s = 0; s < end && y != T(0); s += step) out[s] += g / y * (t[s] - d[s] * along);
      return;
    case Reduction::product: {
      // The product of all others and its tangent: of all before times of all after, without division.
      static thread_local std::vector<T> after;
      after.resize(2 * size);
      T value = 1, tangent = 0;
      for (int64_t s = size - 1; s >= 0; --s) {
        after[2 * s] = value;
        after[2 * s + 1] = tangent;
        tangent = tangent * x[s * step] + value * t[s * step];
        value *= x[s * step];
      }
      value = 1, tangent = 0;
      for (int64_t s = 0; s < size; ++s) {
        out[s * step] += g * (tangent * after[2 * s] + value * after[2 * s + 1]);
        tangent = tangent * x[s * step] + value * t[s * step];
        value *= x[s * step];
      }
      return;
    }
    default:
      return;
  }
}

template <class T>
void reduction_second_order(const Context& ctx, Reduction kind, T a, int64_t V, int64_t rows, int64_t size, int64_t inner, const T* x, const T* y,
                            const T* d, const T* g, const T* t, T* out) {
  const int threads = threads_for(ctx, 4 * V * rows * size * inner);
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t v = 0; v < V; ++v) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < inner; ++i) {
        const int64_t at = r * size * inner + i, batch = v * rows * size * inner, one = r * inner + i;
        second_order_column(kind, a, size, inner, x ? x + at : nullptr, y[one], d + at, g[one], t + batch + at, out + batch + at);
      }
    }
  }
}

template <class T>
void weighted_sum_axis(const Context& ctx, int64_t V, int64_t rows, int64_t size, int64_t inner, const T* d, const T* t, T* out) {
  for_strips(threads_for(ctx, V * rows * size * inner), rows, inner, [=](int64_t r, int64_t i, int64_t count) {
    const T* weights = d + r * size * inner + i;
    for (int64_t v = 0; v < V; ++v) {
      const T* from = t + (v * rows + r) * size * inner + i;
      T* to = out + (v * rows + r) * inner + i;
      if (inner == 1) {
        *to = row_sum<true, T>(size, weights, from);
      } else {
        column_sums<true, T>(size, inner, count, T(1), weights, from, to);
      }
    }
  });
}

template <class T>
void weighted_broadcast_axis(const Context& ctx, int64_t V, int64_t rows, int64_t size, int64_t inner, const T* d, const T* g, T* out,
                             bool accumulate) {
  for_strips(threads_for(ctx, V * rows * size * inner), rows, inner, [=](int64_t r, int64_t i, int64_t count) {
    const T* weights = d + r * size * inner + i;
    for (int64_t v = 0; v < V; ++v) {
      const T* from = g + (v * rows + r) * inner + i;
      T* to = out + (v * rows + r) * size * inner + i;
      if (inner == 1) {
        const T value = *from;
#pragma omp simd
        for (int64_t s = 0; s < size; ++s) to[s] = accumulate ? to[s] + weights[s] * value : weights[s] * value;
        continue;
      }
      for (int64_t s = 0; s < size; ++s, to += inner) {
#pragma omp simd
        for (int64_t k = 0; k < count; ++k) to[k] = accumulate ? to[k] + weights[s * inner + k] * from[k] : weights[s * inner + k] * from[k];
      }
    }
  });
}

INFL_REGISTER_CPU(sum_axis_stub, sum_axis)
INFL_REGISTER_CPU(broadcast_axis_stub, broadcast_axis)
INFL_REGISTER_CPU(cumulative_sum_stub, cumulative_sum)
INFL_REGISTER_CPU(nonlinear_reduction_stub, nonlinear_reduction)
INFL_REGISTER_CPU(reduction_second_order_stub, reduction_second_order)
INFL_REGISTER_CPU(weighted_sum_axis_stub, weighted_sum_axis)
INFL_REGISTER_CPU(weighted_broadcast_axis_stub, weighted_broadcast_axis)

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
