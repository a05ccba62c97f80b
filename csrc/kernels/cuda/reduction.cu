// Sums and other reductions by one reduction a line (row_reduction.h); what is spread along a line is one pass, 16 bytes a thread and step where the
// line is contiguous. d is shared by all right-hand sides: lines that differ in v alone are neighbours. Scans: a warp or block a contiguous line, a
// thread a strided one.
#include "kernels/reduction.h"

#include <cmath>

#include "kernels/cuda/row_reduction.h"
#include "kernels/cuda/vector.h"

namespace infl {
namespace cuda {
namespace {

using row_reduction::grid;

template <class T>
struct SumLine {
  int64_t step;
  T factor;
  const T* x;
  T* out;
  __device__ T load(int64_t s) const { return x[s * step]; }
  __device__ void add(Sum<T>& sum, T value, int64_t) const { sum.value += value; }
  __device__ void merge(Sum<T>& sum, const Sum<T>& other) const { sum.value += other.value; }
  __device__ void store(int64_t, T, const Sum<T>&) const {}
  __device__ void finish(const Sum<T>& sum) const { *out = factor * sum.value; }
};

template <class T>
struct SumAxis {
  using State = Sum<T>;
  using Item = T;
  static constexpr bool kStores = false;
  int64_t size, inner;
  T factor;
  const T* x;
  T* out;
  __device__ SumLine<T> at(int64_t r, int64_t i) const { return {inner, factor, x + r * size * inner + i, out + r * inner + i}; }
};

template <class T>
void sum_axis(const Context& ctx, int64_t rows, int64_t size, int64_t inner, T factor, const T* x, T* out) {
  reduce_rows(ctx, "sum_axis", rows, size, inner, SumAxis<T>{size, inner, factor, x, out});
}

template <class T>
struct WeightedSumLine {
  struct Item {
    T d, t;
  };
  int64_t step;
  const T *d, *t;
  T* out;
  __device__ Item load(int64_t s) const { return {d[s * step], t[s * step]}; }
  __device__ void add(Sum<T>& sum, const Item& item, int64_t) const { sum.value += item.d * item.t; }
  __device__ void merge(Sum<T>& sum, const Sum<T>& other) const { sum.value += other.value; }
  __device__ void store(int64_t, const Item&, const Sum<T>&) const {}
  __device__ void finish(const Sum<T>& sum) const { *out = sum.value; }
};

template <class T>
struct WeightedSumAxis {
  using State = Sum<T>;
  using Item = typename WeightedSumLine<T>::Item;
  static constexpr bool kStores = false;
  int64_t V, rows, size, inner;
  const T *d, *t;
  T* out;
  __device__ WeightedSumLine<T> at(int64_t vr, int64_t i) const {
    const int64_t r = vr / V, v = vr - r * V;
    return {inner, d + r * size * inner + i, t + (v * rows + r) * size * inner + i, out + (v * rows + r) * inner + i};
  }
};

template <class T>
void weighted_sum_axis(const Context& ctx, int64_t V, int64_t rows, int64_t size, int64_t inner, const T* d, const T* t, T* out) {
  reduce_rows(ctx, "weighted_sum_axis", V * rows, size, inner, WeightedSumAxis<T>{V, rows, size, inner, d, t, out});
}

// Elements i of [rows, size, inner] and all right-hand sides of each; d absent: ones.
template <class T>
struct Broadcast {
  int64_t V, rows, size, inner;
  T factor;
  const T *d, *g;
  T* out;
  bool accumulate;
  template <int W>
  __device__ void run(int64_t i) const {
    const int64_t row = i / (size * inner), column = i % inner;
    Vector<T, W> weight;
    for (int k = 0; k < W; ++k) weight.v[k] = T(1);
    if (d) weight = load<W>(d + i);
    const int64_t apart = rows * size * inner;
    write_sides<W>(V, out + i, apart, [&](int64_t v) {
      const T* from = g + (v * rows + row) * inner;
      Vector<T, W> value{};
      if (accumulate) value = load<W>(out + v * apart + i);
      for (int k = 0; k < W; ++k) value.v[k] += weight.v[k] * (factor * from[inner == 1 ? 0 : column + k]);
      return value;
    });
  }
};

template <class T>
void broadcast(const Context& ctx, const char* who, const Broadcast<T>& b) {
  const int64_t W = kVectorWidth<T>, width = b.inner == 1 ? b.size : b.inner;  // a vector must lie within one line, or beside another's
  for_each<T>(ctx, who, b.rows * b.size * b.inner, width % W == 0 && is_aligned({b.d, b.out}), b);
}

template <class T>
void broadcast_axis(const Context& ctx, int64_t rows, int64_t size, int64_t inner, T factor, const T* g, T* out, bool accumulate) {
  broadcast(ctx, "broadcast_axis", Broadcast<T>{1, rows, size, inner, factor, nullptr, g, out, accumulate});
}

template <class T>
void weighted_broadcast_axis(const Context& ctx, int64_t V, int64_t rows, int64_t size, int64_t inner, const T* d, const T* g, T* out,
                             bool accumulate) {
  broadcast(ctx, "weighted_broadcast_axis", Broadcast<T>{V, rows, size, inner, T(1), d, g, out, accumulate});
}

constexpr int kThreads = 256;
constexpr int64_t kWarpScan = 1024;  // elements of a line above which a block scans it

// kLanes threads a line, one element each and step: a scan within warps by shuffles, then over the warps' totals.
template <int kLanes, class T>
__global__ void scan_kernel(int64_t rows, int64_t size, bool reverse, const T* x, T* out, bool accumulate) {
  constexpr int kWarps = kLanes / kWarp, kRows = kThreads / kLanes;
  __shared__ T totals[kThreads / kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kLanes, in_warp = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / kLanes;
  const bool exists = row < rows;
  T before = 0;  // of the steps so far
  for (int64_t first = 0; first < size; first += kLanes) {
    const int64_t s = first + lane, at = row * size + (reverse ? size - 1 - s : s);
    const bool inside = exists && s < size;
    T sum = inside ? x[at] : T(0);
    for (int step = 1; step < kWarp; step *= 2) {
      const T other = __shfl_up_sync(0xffffffffu, sum, step);
      if (in_warp >= step) sum += other;
    }
    T total = __shfl_sync(0xffffffffu, sum, kWarp - 1);
    if constexpr (kWarps > 1) {
      __syncthreads();  // the totals of the last step have been read
      if (in_warp == 0) totals[threadIdx.x / kWarp] = total;
      __syncthreads();
      total = 0;
      for (int w = 0; w < kWarps; ++w) {
        if (w == lane / kWarp) sum += total;
        total += totals[w];
      }
    }
    sum += before;
    before += total;
    if (inside) out[at] = accumulate ? out[at] + sum : sum;
  }
}

template <class T>
__global__ void column_scan_kernel(int64_t rows, int64_t size, int64_t inner, bool reverse, const T* x, T* out, bool accumulate) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t e = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; e < rows * inner; e += step) {
    const int64_t r = e / inner, i = e - r * inner;
    T sum = 0;
    for (int64_t s = 0; s < size; ++s) {
      const int64_t at = (r * size + (reverse ? size - 1 - s : s)) * inner + i;
      sum += x[at];
      out[at] = accumulate ? out[at] + sum : sum;
    }
  }
}

template <class T>
void cumulative_sum(const Context& ctx, int64_t rows, int64_t size, int64_t inner, bool reverse, const T* x, T* out, bool accumulate) {
  constexpr const char* kWho = "cumulative_sum";
  if (rows == 0 || size == 0 || inner == 0) return;
  if (inner > 1) {
    launch(ctx, kWho, &column_scan_kernel<T>, blocks_for(rows * inner, kThreads), dim3(kThreads), 0, rows, size, inner, reverse, x, out, accumulate);
  } else if (size <= kWarpScan) {
    launch(ctx, kWho, &scan_kernel<kWarp, T>, grid(ceil_div(rows, kThreads / kWarp), kWho), dim3(kThreads), 0, rows, size, reverse, x, out,
           accumulate);
  } else {
    launch(ctx, kWho, &scan_kernel<kThreads, T>, grid(rows, kWho), dim3(kThreads), 0, rows, size, reverse, x, out, accumulate);
  }
}

// What each kind carries along a line:
//   extrema           a = the extremum, b = how many are equal to it, first = the first of these
//   log_sum_exp       a = the maximum, b = Σ exp(x − a)
//   variance, deviation  of x − x[0], from which a common offset has gone: a = mean, b = Σ (x − x[0] − a)², count
//   norm              a = max |x|, b = Σ (x/a)²: neither overflows nor underflows
//   absolute_norm     b = Σ |x|
template <class T>
struct ReductionState {
  T a = 0, b = 0;
  int64_t count = 0, first = 0;
};

template <class T>
struct ReductionLine {
  using State = ReductionState<T>;
  Reduction kind;
  T correction;
  int64_t step;
  const T* x;
  T *y, *d;

  __device__ T load(int64_t s) const { return x[s * step]; }

  __device__ void add(State& state, T value, int64_t s) const {
    State one{value, T(1), 1, s};
    if (kind == Reduction::variance || kind == Reduction::deviation) one = {value - x[0], T(0), 1, s};
    if (kind == Reduction::norm || kind == Reduction::absolute_norm) {
      one.a = one.b = std::abs(value);
      if (kind == Reduction::norm) one.b = value == T(0) ? T(0) : T(1);
    }
    merge(state, one);
  }

  __device__ void merge(State& state, const State& other) const {
    if (other.count == 0) return;
    if (state.count == 0) {
      state = other;
      return;
    }
    const int64_t count = state.count + other.count;
    switch (kind) {
      case Reduction::variance:
      case Reduction::deviation: {
        const bool other_is_longer = other.count > state.count;
        const T mean = other_is_longer ? other.a : state.a, change = other_is_longer ? state.a - other.a : other.a - state.a;
        const T share = T(other_is_longer ? state.count : other.count) / T(count);
        state.b += other.b + change * change * (T(other_is_longer ? other.count : state.count) * share);
        // Halves by their sum: both must find the same number.
        state.a = share == T(0.5) ? T(0.5) * (state.a + other.a) : mean + change * share;
        break;
      }
      case Reduction::absolute_norm:
        state.b += other.b;
        break;
      case Reduction::norm:
      case Reduction::log_sum_exp: {
        const bool other_is_higher = other.a > state.a;
        const T high = other_is_higher ? other.a : state.a, low = other_is_higher ? state.a : other.a;
        const T of_high = other_is_higher ? other.b : state.b, of_low = other_is_higher ? state.b : other.b;
        T scale = 1;
        if (high != low) scale = kind == Reduction::norm ? low / high * (low / high) : std::exp(low - high);
        state.a = high;
        state.b = of_high + of_low * scale;
        break;
      }
      default: {
        const bool is_minimum = kind == Reduction::amin || kind == Reduction::min;
        if (is_minimum ? other.a < state.a : other.a > state.a) {
          state = other;
        } else if (other.a == state.a) {
          state.b += other.b;
          state.first = other.first < state.first ? other.first : state.first;
        }
      }
    }
    state.count = count;
  }

  __device__ void store(int64_t s, T value, const State& state) const {
    T derivative = 0;
    switch (kind) {
      case Reduction::amax:
      case Reduction::amin:
        derivative = value == state.a ? T(1) / state.b : T(0);
        break;
      case Reduction::max:
      case Reduction::min:
        derivative = s == state.first ? T(1) : T(0);
        break;
      case Reduction::log_sum_exp:
        derivative = std::exp(value - state.a) / state.b;
        break;
      case Reduction::variance:
        derivative = (value - x[0] - state.a) * (T(2) / (T(state.count) - correction));
        break;
      case Reduction::deviation:
        derivative = state.b == T(0) ? T(0) : (value - x[0] - state.a) / ((T(state.count) - correction) * result(state));
        break;
      case Reduction::norm:
        derivative = state.a == T(0) ? T(0) : value / state.a / std::sqrt(state.b);
        break;
      case Reduction::absolute_norm:
        derivative = value > T(0) ? T(1) : value < T(0) ? T(-1) : T(0);
        break;
      case Reduction::product:
        break;
    }
    d[s * step] = derivative;
  }

  __device__ T result(const State& state) const {
    switch (kind) {
      case Reduction::log_sum_exp:
        return std::isinf(state.a) ? state.a : state.a + std::log(state.b);
      case Reduction::variance:
        return state.b / (T(state.count) - correction);
      case Reduction::deviation:
        return std::sqrt(state.b / (T(state.count) - correction));
      case Reduction::norm:
        return state.a * std::sqrt(state.b);
      case Reduction::absolute_norm:
        return state.b;
      default:
        return state.a;
    }
  }

  __device__ void finish(const State& state) const { *y = result(state); }
};

template <class T>
struct NonlinearReduction {
  using State = ReductionState<T>;
  using Item = T;
  static constexpr bool kStores = true;
  Reduction kind;
  T correction;
  int64_t size, inner;
  const T* x;
  T *y, *d;
  __device__ ReductionLine<T> at(int64_t r, int64_t i) const {
    const int64_t first = r * size * inner + i;
    return {kind, correction, inner, x + first, y + r * inner + i, d + first};
  }
};

// d is the product of all before times the product of all after: no division by zero. A thread a line.
template <class T>
__global__ void product_kernel(int64_t rows, int64_t size, int64_t inner, const T* x, T* y, T* d) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t e = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; e < rows * inner; e += stride) {
    const int64_t r = e / inner, first = r * size * inner + (e - r * inner);
    T before = 1, after = 1;
    for (int64_t s = 0; s < size; ++s) {
      d[first + s * inner] = before;
      before *= x[first + s * inner];
    }
    for (int64_t s = size - 1; s >= 0; --s) {
      d[first + s * inner] *= after;
      after *= x[first + s * inner];
    }
    y[e] = before;
  }
}

template <class T>
void nonlinear_reduction(const Context& ctx, Reduction kind, T a, int64_t rows, int64_t size, int64_t inner, const T* x, T* y, T* d) {
  constexpr const char* kWho = "nonlinear_reduction";
  if (rows * inner == 0) return;
  if (kind == Reduction::product) {
    launch(ctx, kWho, &product_kernel<T>, blocks_for(rows * inner, kThreads), dim3(kThreads), 0, rows, size, inner, x, y, d);
  } else {
    reduce_rows(ctx, kWho, rows, size, inner, NonlinearReduction<T>{kind, a, size, inner, x, y, d});
  }
}

// Σ t and Σ d ∘ t of a line.
template <class T>
struct TangentSums {
  T plain = 0, along = 0;
};

template <class T>
struct SecondOrderLine {
  using State = TangentSums<T>;
  struct Item {
    T d, t;
  };
  Reduction kind;
  T correction;
  int64_t size, step;
  T y, g;
  const T *d, *t;
  T* out;

  __device__ Item load(int64_t s) const { return {d[s * step], t[s * step]}; }
  __device__ void add(State& sum, const Item& item, int64_t) const {
    sum.plain += item.t;
    sum.along += item.d * item.t;
  }
  __device__ void merge(State& sum, const State& other) const {
    sum.plain += other.plain;
    sum.along += other.along;
  }
  __device__ void store(int64_t s, const Item& item, const State& sum) const {
    const T centred = item.t - sum.plain / T(size), divisor = T(size) - correction;
    T value = 0;
    switch (kind) {
      case Reduction::log_sum_exp:
        value = g * item.d * (item.t - sum.along);
        break;
      case Reduction::variance:
        value = g * T(2) / divisor * centred;
        break;
      case Reduction::deviation:
        value = y == T(0) ? T(0) : g / y * (centred / divisor - item.d * sum.along);
        break;
      case Reduction::norm:
        value = y == T(0) ? T(0) : g / y * (item.t - item.d * sum.along);
        break;
      default:
        break;
    }
    out[s * step] += value;
  }
  __device__ void finish(const State&) const {}
};

template <class T>
struct SecondOrderReduction {
  using State = TangentSums<T>;
  using Item = typename SecondOrderLine<T>::Item;
  static constexpr bool kStores = true;
  Reduction kind;
  T correction;
  int64_t V, rows, size, inner;
  const T *y, *d, *g, *t;
  T* out;
  __device__ SecondOrderLine<T> at(int64_t vr, int64_t i) const {
    const int64_t r = vr / V, v = vr - r * V, one = r * inner + i, first = r * size * inner + i, first_of_v = first + v * rows * size * inner;
    return {kind, correction, size, inner, y[one], g[one], d + first, t + first_of_v, out + first_of_v};
  }
};

// The products of all elements before and of all after each one, which all right-hand sides share. A thread a line.
template <class T>
__global__ void products_kernel(int64_t rows, int64_t size, int64_t inner, const T* x, T* before, T* after) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t e = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; e < rows * inner; e += stride) {
    const int64_t r = e / inner, first = r * size * inner + (e - r * inner);
    T product = 1;
    for (int64_t s = 0; s < size; ++s) {
      before[first + s * inner] = product;
      product *= x[first + s * inner];
    }
    product = 1;
    for (int64_t s = size - 1; s >= 0; --s) {
      after[first + s * inner] = product;
      product *= x[first + s * inner];
    }
  }
}

// The tangent of before · after: what is before an element moves on the way there, what is after it on the way back. A thread a line.
template <class T>
__global__ void product_second_order_kernel(int64_t V, int64_t rows, int64_t size, int64_t inner, const T* x, const T* before, const T* after,
                                            const T* g, const T* t, T* out) {
  const int64_t lines = rows * inner, stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t e = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; e < V * lines; e += stride) {
    const int64_t v = e / lines, line = e - v * lines, r = line / inner, first = r * size * inner + (line - r * inner);
    const T* t_x = t + v * rows * size * inner + first;
    T* to = out + v * rows * size * inner + first;
    T tangent = 0;
    for (int64_t s = 0; s < size; ++s) {
      const int64_t at = first + s * inner;
      to[s * inner] += g[line] * tangent * after[at];
      tangent = tangent * x[at] + before[at] * t_x[s * inner];
    }
    tangent = 0;
    for (int64_t s = size - 1; s >= 0; --s) {
      const int64_t at = first + s * inner;
      to[s * inner] += g[line] * tangent * before[at];
      tangent = tangent * x[at] + after[at] * t_x[s * inner];
    }
  }
}

template <class T>
void reduction_second_order(const Context& ctx, Reduction kind, T a, int64_t V, int64_t rows, int64_t size, int64_t inner, const T* x, const T* y,
                            const T* d, const T* g, const T* t, T* out) {
  constexpr const char* kWho = "reduction_second_order";
  if (V * rows * size * inner == 0 || is_piecewise_linear(kind)) return;
  if (kind != Reduction::product) {
    return reduce_rows(ctx, kWho, V * rows, size, inner, SecondOrderReduction<T>{kind, a, V, rows, size, inner, y, d, g, t, out});
  }
  Buffer<T> before(ctx, rows * size * inner), after(ctx, rows * size * inner);
  launch(ctx, kWho, &products_kernel<T>, blocks_for(rows * inner, kThreads), dim3(kThreads), 0, rows, size, inner, x, before.data(), after.data());
  launch(ctx, kWho, &product_second_order_kernel<T>, blocks_for(V * rows * inner, kThreads), dim3(kThreads), 0, V, rows, size, inner, x,
         before.data(), after.data(), g, t, out);
}

INFL_REGISTER_CUDA(sum_axis_stub, sum_axis)
INFL_REGISTER_CUDA(reduction_second_order_stub, reduction_second_order)
INFL_REGISTER_CUDA(broadcast_axis_stub, broadcast_axis)
INFL_REGISTER_CUDA(cumulative_sum_stub, cumulative_sum)
INFL_REGISTER_CUDA(nonlinear_reduction_stub, nonlinear_reduction)
INFL_REGISTER_CUDA(weighted_sum_axis_stub, weighted_sum_axis)
INFL_REGISTER_CUDA(weighted_broadcast_axis_stub, weighted_broadcast_axis)

}  // namespace
}  // namespace cuda
}  // namespace infl
