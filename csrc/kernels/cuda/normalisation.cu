// All of these are bound by memory. A row is a team's: a warp's if it is short, else a block's. The team reads its row for the two sums, and again,
// from the caches, for the pass that writes: a tangent or cotangent costs its own bytes and those of its result, and x̂, weights and scale are read
// once for four right-hand sides. Maps by channel take 16 bytes a thread and read their factors once for all right-hand sides.
//
// Sums by channel: long ones are split into parts, whose sums are added in their order. No atomics.
#include "kernels/normalisation.h"

#include "kernels/cuda/vector.h"
#include "math/normalisation.h"

namespace infl {
namespace cuda {
namespace {

constexpr int kThreads = 256, kSides = 4;
constexpr int64_t kLongRow = 2048;          // elements from which on a row is a block's
constexpr int64_t kWantedBlocks = 2 * 132;  // two for each processor of the largest GPU

// Sum over a team of kTeam threads, a warp or the whole block, in every thread of it.
template <int kTeam, class T>
__device__ T team_sum(T value) {
  value = warp_sum(value);
  if constexpr (kTeam > kWarp) {
    __shared__ T partial[kTeam / kWarp];
    __syncthreads();
    if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = partial[0];
    for (int k = 1; k < kTeam / kWarp; ++k) value += partial[k];
  }
  return value;
}

template <int kTeam>
__device__ int64_t team_index() {
  return int64_t{blockIdx.x} * (kThreads / kTeam) + threadIdx.x / kTeam;
}

template <int kTeam>
dim3 teams(int64_t count) {
  return dim3(static_cast<unsigned>(ceil_div(count, kThreads / kTeam)));
}

// Division of numbers that mostly fit 32 bits, where it costs a fraction, by one that is often 1.
__device__ inline int64_t quotient(int64_t a, int64_t b) {
  if (b == 1) return a;
  return (a | b) >> 32 == 0 ? static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b)) : a / b;
}

template <class T, int kTeam>
__global__ void __launch_bounds__(kThreads)
    layer_norm_kernel(ChannelMap map, int64_t rows, bool centre, T eps, const T* x, const T* w, const T* b, T* y, T* x_hat, T* rstd) {
  const int64_t row = team_index<kTeam>(), size = map.channels * map.run;
  if (row >= rows) return;
  const int thread = static_cast<int>(threadIdx.x) % kTeam;
  x += row * size;
  y += row * size;
  x_hat += row * size;
  T mean = 0;
  if (centre) {
    T sum = 0;
    for (int64_t j = thread; j < size; j += kTeam) sum += x[j];
    mean = team_sum<kTeam>(sum) / T(size);
  }
  T plain = 0, square = 0;
  for (int64_t j = thread; j < size; j += kTeam) {
    const T d = x[j] - mean;
    plain += d;
    square += d * d;
  }
  plain = team_sum<kTeam>(plain);
  square = team_sum<kTeam>(square);
  const T rest = centre ? plain / T(size) : T(0);  // what rounding left of the mean
  // A single element is its own mean: x̂ and its derivative vanish, and no rounding error is to be divided by sqrt(eps).
  const T inverse = centre && size == 1 ? T(0) : inverse_deviation(square / T(size) - rest * rest, eps);
  if (thread == 0) rstd[row] = inverse;
  const int64_t first = map.first(row);
  for (int64_t j = thread; j < size; j += kTeam) {
    const int64_t c = first + quotient(j, map.run);
    const T hat = ((x[j] - mean) - rest) * inverse;
    x_hat[j] = hat;
    y[j] = (w ? w[c] : T(1)) * hat + (b ? b[c] : T(0));
  }
}

template <class T>
void layer_norm(const Context& ctx, const ChannelMap& map, int64_t rows, bool centre, T eps, const T* x, const T* w, const T* b, T* y, T* x_hat,
                T* rstd) {
  if (rows == 0 || map.size() == 0) return;
  const bool is_long = map.size() >= kLongRow;
  launch(ctx, "layer_norm", is_long ? &layer_norm_kernel<T, kThreads> : &layer_norm_kernel<T, kWarp>,
         is_long ? teams<kThreads>(rows) : teams<kWarp>(rows), dim3(kThreads), 0, map, rows, centre, eps, x, w, b, y, x_hat, rstd);
}

// out = (∂x̂ in with w, + x̂ t_w + t_b) ∘ scale
template <class T>
struct Derivative {
  ChannelMap map;
  int64_t V, rows;
  bool centre;
  const T *x_hat, *rstd, *w, *in;
  ChannelTangents<T> t;
  const T* scale;
  T* out;
  bool accumulate;
};

// kTangent: w ∘ ∂x̂ in, else its transpose ∂x̂ (w ∘ in). B right-hand sides, W elements a thread and step.
template <class T, bool kTangent, int kTeam, int B, int W>
__global__ void __launch_bounds__(kThreads) derivative_kernel(const Derivative<T> p) {
  const int64_t item = team_index<kTeam>(), size = p.map.channels * p.map.run;
  if (item >= (p.V + B - 1) / B * p.rows) return;
  const int64_t row = item % p.rows, v0 = item / p.rows * B, first = p.map.first(row), apart = p.rows * size;
  const int thread = static_cast<int>(threadIdx.x) % kTeam, sides = p.V - v0 < B ? static_cast<int>(p.V - v0) : B;
  const T* x_hat = p.x_hat + row * size;
  const T* in = p.in + v0 * apart + row * size;
  T* out = p.out + v0 * apart + row * size;
  T mean[B] = {}, correlation[B] = {};
  for (int64_t j = int64_t{thread} * W; j < size; j += kTeam * W) {
    const auto hat = load<W>(x_hat + j);
    T weight[W];
    INFL_UNROLL(4)
    for (int k = 0; k < W; ++k) weight[k] = !kTangent && p.w ? p.w[first + quotient(j + k, p.map.run)] : T(1);
    INFL_UNROLL(4)
    for (int b = 0; b < B; ++b) {
      if (b >= sides) continue;
      const auto x = load<W>(in + b * apart + j);
      INFL_UNROLL(4)
      for (int k = 0; k < W; ++k) {
        const T z = weight[k] * x.v[k];
        mean[b] += z;
        correlation[b] += z * hat.v[k];
      }
    }
  }
  INFL_UNROLL(4)
  for (int b = 0; b < B; ++b) {
    const T plain = team_sum<kTeam>(mean[b]);
    mean[b] = p.centre ? plain / T(size) : T(0);
    correlation[b] = team_sum<kTeam>(correlation[b]) / T(size);
  }
  const T rstd = p.rstd[row];
  for (int64_t j = int64_t{thread} * W; j < size; j += kTeam * W) {
    const auto hat = load<W>(x_hat + j);
    Vector<T, W> factor;
    if (p.scale) factor = load<W>(p.scale + row * size + j);
    INFL_UNROLL(4)
    for (int b = 0; b < B; ++b) {
      if (b >= sides) continue;
      auto x = load<W>(in + b * apart + j);
      INFL_UNROLL(4)
      for (int k = 0; k < W; ++k) {
        const int64_t c = first + quotient(j + k, p.map.run);
        const T weight = p.w ? p.w[c] : T(1);
        T value = kTangent ? weight * standardised_tangent(x.v[k], hat.v[k], rstd, mean[b], correlation[b])
                           : standardised_tangent(weight * x.v[k], hat.v[k], rstd, mean[b], correlation[b]);
        if (p.t.w) value += hat.v[k] * p.t.w[(v0 + b) * p.t.stride + c];
        if (p.t.b) value += p.t.b[(v0 + b) * p.t.stride + c];
        if (p.scale) value *= factor.v[k];
        x.v[k] = value;
      }
      if (p.accumulate) {
        const auto before = load<W>(out + b * apart + j);
        INFL_UNROLL(4)
        for (int k = 0; k < W; ++k) x.v[k] += before.v[k];
      }
      store<W>(out + b * apart + j, x);
    }
  }
}

template <class T, bool kTangent, int kTeam, int B>
void derivative_of_teams(const Context& ctx, const char* who, const Derivative<T>& p) {
  constexpr int W = kVectorWidth<T>;
  const bool vectorised = p.map.size() % W == 0 && is_aligned({p.x_hat, p.in, p.scale, p.out});
  launch(ctx, who, vectorised ? &derivative_kernel<T, kTangent, kTeam, B, W> : &derivative_kernel<T, kTangent, kTeam, B, 1>,
         teams<kTeam>(ceil_div(p.V, B) * p.rows), dim3(kThreads), 0, p);
}

template <class T, bool kTangent>
void derivative(const Context& ctx, const char* who, const Derivative<T>& p) {
  if (p.V == 0 || p.rows == 0 || p.map.size() == 0) return;
  if (p.map.size() >= kLongRow) {
    p.V == 1 ? derivative_of_teams<T, kTangent, kThreads, 1>(ctx, who, p) : derivative_of_teams<T, kTangent, kThreads, kSides>(ctx, who, p);
  } else {
    p.V == 1 ? derivative_of_teams<T, kTangent, kWarp, 1>(ctx, who, p) : derivative_of_teams<T, kTangent, kWarp, kSides>(ctx, who, p);
  }
}

template <class T>
void layer_norm_jvp(const Context& ctx, const ChannelMap& map, int64_t V, int64_t rows, bool centre, const T* x_hat, const T* rstd, const T* w,
                    const T* t_x, const ChannelTangents<T>& t_theta, const T* scale, T* t_y) {
  derivative<T, true>(ctx, "layer_norm_jvp", {map, V, rows, centre, x_hat, rstd, w, t_x, t_theta, scale, t_y, false});
}

template <class T>
void layer_norm_vjp(const Context& ctx, const ChannelMap& map, int64_t V, int64_t rows, bool centre, const T* x_hat, const T* rstd, const T* w,
                    const T* g_y, const T* scale, T* g_x, bool accumulate) {
  derivative<T, false>(ctx, "layer_norm_vjp", {map, V, rows, centre, x_hat, rstd, w, g_y, {}, scale, g_x, accumulate});
}

// What a row's cotangent changes by: ĝ = w ∘ g, t_ĝ = t_w ∘ g.
template <class T>
struct SecondOrder {
  ChannelMap map;
  int64_t V, rows;
  bool centre;
  const T *x_hat, *rstd, *w, *g, *t, *t_hat, *t_w;
  int64_t t_w_stride;
  T* out;
};

// B right-hand sides, which share x̂ and ĝ; W elements a thread and step. Bytes: t_x and t_x̂ twice (once from the caches), g_x in and out.
template <class T, int kTeam, int B, int W>
__global__ void __launch_bounds__(kThreads) second_order_kernel(const SecondOrder<T> p) {
  const int64_t item = team_index<kTeam>(), size = p.map.channels * p.map.run;
  if (item >= (p.V + B - 1) / B * p.rows) return;
  const int64_t row = item % p.rows, v0 = item / p.rows * B, first = p.map.first(row), apart = p.rows * size;
  const int thread = static_cast<int>(threadIdx.x) % kTeam, sides = p.V - v0 < B ? static_cast<int>(p.V - v0) : B;
  const T *x_hat = p.x_hat + row * size, *g = p.g + row * size, *t = p.t + v0 * apart + row * size, *t_hat = p.t_hat + v0 * apart + row * size;
  const T* t_w = p.t_w ? p.t_w + v0 * p.t_w_stride : nullptr;
  T* out = p.out + v0 * apart + row * size;
  T mean = 0, correlation = 0;                                                     // of ĝ, and of it with x̂
  T moved_mean[B] = {}, moved_correlation[B] = {}, stretch[B] = {}, turn[B] = {};  // of t_ĝ; m(x̂ ∘ t_x), m(t_x̂ ∘ ĝ)
  for (int64_t j = int64_t{thread} * W; j < size; j += kTeam * W) {
    const auto hat = load<W>(x_hat + j), from = load<W>(g + j);
    int64_t channel[W];
    T weighted[W];
    INFL_UNROLL(4)
    for (int k = 0; k < W; ++k) {
      channel[k] = first + quotient(j + k, p.map.run);
      weighted[k] = p.w ? p.w[channel[k]] * from.v[k] : from.v[k];
      mean += weighted[k];
      correlation += weighted[k] * hat.v[k];
    }
    INFL_UNROLL(4)
    for (int b = 0; b < B; ++b) {
      if (b >= sides) continue;
      const auto tangent = load<W>(t + b * apart + j), tangent_hat = load<W>(t_hat + b * apart + j);
      INFL_UNROLL(4)
      for (int k = 0; k < W; ++k) {
        stretch[b] += hat.v[k] * tangent.v[k];
        turn[b] += tangent_hat.v[k] * weighted[k];
        const T moved = t_w ? t_w[b * p.t_w_stride + channel[k]] * from.v[k] : T(0);
        moved_mean[b] += moved;
        moved_correlation[b] += moved * hat.v[k];
      }
    }
  }
  const auto row_mean = [size](T sum) { return team_sum<kTeam>(sum) / T(size); };
  mean = row_mean(mean);
  correlation = row_mean(correlation);
  if (!p.centre) mean = T(0);
  INFL_UNROLL(4)
  for (int b = 0; b < B; ++b) {
    moved_mean[b] = row_mean(moved_mean[b]);
    if (!p.centre) moved_mean[b] = T(0);
    moved_correlation[b] = row_mean(moved_correlation[b]);
    stretch[b] = row_mean(stretch[b]);
    turn[b] = row_mean(turn[b]);
  }
  const T rstd = p.rstd[row];
  for (int64_t j = int64_t{thread} * W; j < size; j += kTeam * W) {
    const auto hat = load<W>(x_hat + j), from = load<W>(g + j);
    int64_t channel[W];
    T own[W];  // what layer_norm_vjp gives, over rstd
    INFL_UNROLL(4)
    for (int k = 0; k < W; ++k) {
      channel[k] = first + quotient(j + k, p.map.run);
      own[k] = (p.w ? p.w[channel[k]] * from.v[k] : from.v[k]) - mean - hat.v[k] * correlation;
    }
    INFL_UNROLL(4)
    for (int b = 0; b < B; ++b) {
      if (b >= sides) continue;
      const auto tangent_hat = load<W>(t_hat + b * apart + j);
      auto sum = load<W>(out + b * apart + j);
      INFL_UNROLL(4)
      for (int k = 0; k < W; ++k) {
        const T moved = t_w ? t_w[b * p.t_w_stride + channel[k]] * from.v[k] : T(0);
        const T other = moved - moved_mean[b] - hat.v[k] * (moved_correlation[b] + turn[b]) - tangent_hat.v[k] * correlation;
        sum.v[k] += rstd * (other - rstd * stretch[b] * own[k]);
      }
      store<W>(out + b * apart + j, sum);
    }
  }
}

template <class T, int kTeam, int B>
void second_order_of_teams(const Context& ctx, const SecondOrder<T>& p) {
  constexpr int W = kVectorWidth<T>;
  const bool vectorised = p.map.size() % W == 0 && is_aligned({p.x_hat, p.g, p.t, p.t_hat, p.out});
  launch(ctx, "layer_norm_second_order", vectorised ? &second_order_kernel<T, kTeam, B, W> : &second_order_kernel<T, kTeam, B, 1>,
         teams<kTeam>(ceil_div(p.V, B) * p.rows), dim3(kThreads), 0, p);
}

template <class T>
void layer_norm_second_order(const Context& ctx, const ChannelMap& map, int64_t V, int64_t rows, bool centre, const T* x_hat, const T* rstd,
                             const T* w, const T* g_y, const T* t_x, const T* t_x_hat, const ChannelTangents<T>& t_theta, T* g_x) {
  if (V == 0 || rows == 0 || map.size() == 0) return;
  const SecondOrder<T> p{map, V, rows, centre, x_hat, rstd, w, g_y, t_x, t_x_hat, t_theta.w, t_theta.stride, g_x};
  if (map.size() >= kLongRow) {
    V == 1 ? second_order_of_teams<T, kThreads, 1>(ctx, p) : second_order_of_teams<T, kThreads, kSides>(ctx, p);
  } else {
    V == 1 ? second_order_of_teams<T, kWarp, 1>(ctx, p) : second_order_of_teams<T, kWarp, kSides>(ctx, p);
  }
}

template <class T>
struct BatchNormPack {
  int64_t channels;
  T eps;
  const T *variance, *w;
  int64_t w_batch;
  T* packed;
  template <int W>
  __device__ void run(int64_t i) const {
    const int64_t row = i / channels, c = i % channels;
    const T rstd = inverse_deviation(variance[c], eps);
    packed[i] = row > 0 && w ? w[(row - 1) * w_batch + c] * rstd : rstd;
  }
};

template <class T>
void batch_norm_pack(const Context& ctx, int64_t channels, T eps, const T* variance, int64_t num, const T* w, int64_t w_batch, T* packed) {
  for_each_element(ctx, "batch_norm_pack", (1 + num) * channels, BatchNormPack<T>{channels, eps, variance, w, w_batch, packed});
}

// Channel of an element of an array of rows, which lie channel after channel, and its place in the weights.
struct Channel {
  int64_t number, weight;
};

__device__ inline Channel channel_of(const ChannelMap& map, int64_t element) {
  const int64_t run = quotient(element, map.run), total = map.groups * map.channels, c = run - quotient(run, total) * total;
  return {c, map.rows_of_set ? quotient(run, map.rows_of_set * map.channels) * map.set_stride + c : c};
}

template <class T>
struct BatchNorm {
  ChannelMap map;
  const T *x, *mean, *rstd, *w, *b;
  T *y, *x_hat;
  template <int W>
  __device__ void run(int64_t i) const {
    const auto from = load<W>(x + i);
    Vector<T, W> to, hat;
    for (int k = 0; k < W; ++k) {
      const Channel c = channel_of(map, i + k);
      hat.v[k] = (from.v[k] - mean[c.number]) * rstd[c.number];
      to.v[k] = (w ? w[c.weight] * hat.v[k] : hat.v[k]) + (b ? b[c.weight] : T(0));
    }
    store<W>(y + i, to);
    if (x_hat) store<W>(x_hat + i, hat);
  }
};

template <class T>
void batch_norm(const Context& ctx, const ChannelMap& map, int64_t rows, const T* x, const T* mean, const T* rstd, const T* w, const T* b, T* y,
                T* x_hat) {
  for_each_flat<T>(ctx, "batch_norm", 1, rows * map.size(), {x, y, x_hat}, BatchNorm<T>{map, x, mean, rstd, w, b, y, x_hat});
}

template <class T>
struct ChannelAffine {
  ChannelMap map;
  int64_t V, size;
  const T *a, *t, *x_hat;
  ChannelTangents<T> t_theta;
  const T* scale;
  T* out;
  bool accumulate;
  template <int W>
  __device__ void run(int64_t i) const {
    int64_t channel[W];
    Vector<T, W> weight, hat, factor;
    for (int k = 0; k < W; ++k) {
      channel[k] = channel_of(map, i + k).weight;
      weight.v[k] = a ? a[channel[k]] : T(1);
    }
    if (t_theta.w) hat = load<W>(x_hat + i);
    if (scale) factor = load<W>(scale + i);
    write_sides<W>(V, out + i, size, [&](int64_t v) {
      Vector<T, W> value{};
      if (t) {
        value = load<W>(t + v * size + i);
        for (int k = 0; k < W; ++k) value.v[k] *= weight.v[k];
      }
      for (int k = 0; k < W; ++k) {
        if (t_theta.w) value.v[k] += hat.v[k] * t_theta.w[v * t_theta.stride + channel[k]];
        if (t_theta.b) value.v[k] += t_theta.b[v * t_theta.stride + channel[k]];
        if (scale) value.v[k] *= factor.v[k];
      }
      if (accumulate) {
        const auto before = load<W>(out + v * size + i);
        for (int k = 0; k < W; ++k) value.v[k] += before.v[k];
      }
      return value;
    });
  }
};

template <class T>
void channel_affine(const Context& ctx, const ChannelMap& map, int64_t V, int64_t rows, const T* a, const T* t, const T* x_hat,
                    const ChannelTangents<T>& t_theta, const T* scale, T* out, bool accumulate) {
  const int64_t size = rows * map.size();
  for_each_flat<T>(ctx, "channel_affine", V, size, {t, x_hat, scale, out},
                   ChannelAffine<T>{map, V, size, a, t, x_hat, t_theta, scale, out, accumulate});
}

// ---- Sums by channel -----------------------------------------------------------------------------------------------------------------------------

// For v and o, g_y is [lines, channels, run].
template <class T>
struct Gradient {
  int64_t V, num, lines, channels, run;
  const T *g_y, *x_hat;  // x̂ absent: no sum with it
  ChannelGradients<T> out;
  int64_t parts, lines_of_part;
  T* partial;  // [parts, 2, V, num, channels], where there are several parts
};

template <class T>
__device__ void put(const Gradient<T>& p, int64_t part, int64_t v, int64_t o, int64_t c, T weighted, T plain) {
  const int64_t all = p.V * p.num * p.channels;
  if (p.partial) {
    T* to = p.partial + 2 * part * all + (v * p.num + o) * p.channels + c;
    to[0] = weighted;
    to[all] = plain;
    return;
  }
  const int64_t at = v * p.out.v_stride + o * p.out.o_stride + c;
  if (p.out.w) p.out.w[at] = p.out.accumulate ? p.out.w[at] + weighted : weighted;
  if (p.out.b) p.out.b[at] = p.out.accumulate ? p.out.b[at] + plain : plain;
}

struct GradientWork {
  int64_t tile, part, o, v0;
};

__device__ inline GradientWork gradient_work(int64_t tiles, int64_t parts, int64_t num) {
  const int64_t b = blockIdx.x;
  return {b % tiles, b / tiles % parts, b / tiles / parts % num, b / tiles / parts / num * kSides};
}

// Runs of one element: a block takes 32 channels, its warps lines in turn.
template <class T>
__global__ void __launch_bounds__(kThreads) columns_kernel(const Gradient<T> p) {
  constexpr int kLines = kThreads / kWarp;
  __shared__ T sums[2 * kSides][kLines][kWarp];
  const GradientWork work = gradient_work((p.channels + kWarp - 1) / kWarp, p.parts, p.num);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t c = work.tile * kWarp + lane, begin = work.part * p.lines_of_part, width = p.lines * p.channels;
  const int64_t end = begin + p.lines_of_part < p.lines ? begin + p.lines_of_part : p.lines;
  const int sides = p.V - work.v0 < kSides ? static_cast<int>(p.V - work.v0) : kSides;
  const T* g = p.g_y + (work.v0 * p.num + work.o) * width;
  const T* hats = p.x_hat ? p.x_hat + work.o * width : nullptr;
  T weighted[kSides] = {}, plain[kSides] = {};
  if (c < p.channels) {
    for (int64_t line = begin + warp; line < end; line += kLines) {
      const T hat = hats ? hats[line * p.channels + c] : T(0);
      INFL_UNROLL(4)
      for (int b = 0; b < kSides; ++b) {
        if (b >= sides) continue;
        const T value = g[b * p.num * width + line * p.channels + c];
        plain[b] += value;
        weighted[b] += value * hat;
      }
    }
  }
  INFL_UNROLL(4)
  for (int b = 0; b < kSides; ++b) {
    sums[2 * b][warp][lane] = weighted[b];
    sums[2 * b + 1][warp][lane] = plain[b];
  }
  __syncthreads();
  if (warp >= sides || c >= p.channels) return;
  T total[2] = {};
  for (int k = 0; k < kLines; ++k) {
    total[0] += sums[2 * warp][k][lane];
    total[1] += sums[2 * warp + 1][k][lane];
  }
  put(p, work.part, work.v0 + warp, work.o, c, total[0], total[1]);
}

// Longer runs: a block takes one channel.
template <class T>
__global__ void __launch_bounds__(kThreads) runs_kernel(const Gradient<T> p) {
  const GradientWork work = gradient_work(p.channels, p.parts, p.num);
  const int64_t begin = work.part * p.lines_of_part, width = p.lines * p.channels * p.run;
  const int64_t end = begin + p.lines_of_part < p.lines ? begin + p.lines_of_part : p.lines;
  const int sides = p.V - work.v0 < kSides ? static_cast<int>(p.V - work.v0) : kSides;
  const T* g = p.g_y + (work.v0 * p.num + work.o) * width + work.tile * p.run;
  const T* hats = p.x_hat ? p.x_hat + work.o * width + work.tile * p.run : nullptr;
  T weighted[kSides] = {}, plain[kSides] = {};
  const int64_t line_step = kThreads / p.run, step = kThreads % p.run;
  int64_t line = begin + threadIdx.x / p.run, j = threadIdx.x % p.run;
  while (line < end) {
    const int64_t at = line * p.channels * p.run + j;
    const T hat = hats ? hats[at] : T(0);
    INFL_UNROLL(4)
    for (int b = 0; b < kSides; ++b) {
      if (b >= sides) continue;
      const T value = g[b * p.num * width + at];
      plain[b] += value;
      weighted[b] += value * hat;
    }
    line += line_step;
    j += step;
    if (j >= p.run) {
      j -= p.run;
      ++line;
    }
  }
  INFL_UNROLL(4)
  for (int b = 0; b < kSides; ++b) {
    const T w = team_sum<kThreads>(weighted[b]), s = team_sum<kThreads>(plain[b]);
    if (threadIdx.x == 0 && b < sides) put(p, work.part, work.v0 + b, work.o, work.tile, w, s);
  }
}

template <class T>
struct AddParts {
  Gradient<T> p;
  const T* sums;
  template <int W>
  __device__ void run(int64_t i) const {
    const int64_t all = p.V * p.num * p.channels;
    T weighted = 0, plain = 0;
    for (int64_t k = 0; k < p.parts; ++k) {
      weighted += sums[2 * k * all + i];
      plain += sums[(2 * k + 1) * all + i];
    }
    put(p, 0, i / p.channels / p.num, i / p.channels % p.num, i % p.channels, weighted, plain);
  }
};

template <class T>
void channel_gradient(const Context& ctx, const ChannelMap& map, int64_t V, int64_t num, int64_t rows, const T* g_y, const T* x_hat,
                      const ChannelGradients<T>& out) {
  if (V == 0 || num == 0 || map.total() == 0 || (!out.w && !out.b)) return;
  Gradient<T> p{V, num, rows / map.groups, map.total(), map.run, g_y, out.w ? x_hat : nullptr, out, 1, 0, nullptr};
  const int64_t tiles = p.run == 1 ? ceil_div(p.channels, kWarp) : p.channels, blocks = tiles * num * ceil_div(V, kSides);
  constexpr int64_t kTermsOfPart = 4096;  // of a channel, or of 32 of them: as much work as adding the part up
  p.parts = std::clamp<int64_t>(ceil_div(kWantedBlocks, blocks), 1, std::max<int64_t>(1, p.lines * (p.run == 1 ? kWarp : p.run) / kTermsOfPart));
  p.lines_of_part = ceil_div(p.lines, p.parts);
  Buffer<T> sums;
  if (p.parts > 1) {
    sums.resize(ctx, 2 * p.parts * V * num * p.channels);
    p.partial = sums.data();
  }
  launch(ctx, "channel_gradient", p.run == 1 ? &columns_kernel<T> : &runs_kernel<T>, dim3(static_cast<unsigned>(blocks * p.parts)), dim3(kThreads), 0,
         p);
  if (p.parts == 1) return;
  p.partial = nullptr;
  for_each_element(ctx, "channel_gradient", V * num * p.channels, AddParts<T>{p, sums.data()});
}

INFL_REGISTER_CUDA(layer_norm_stub, layer_norm)
INFL_REGISTER_CUDA(layer_norm_jvp_stub, layer_norm_jvp)
INFL_REGISTER_CUDA(layer_norm_vjp_stub, layer_norm_vjp)
INFL_REGISTER_CUDA(layer_norm_second_order_stub, layer_norm_second_order)
INFL_REGISTER_CUDA(batch_norm_pack_stub, batch_norm_pack)
INFL_REGISTER_CUDA(batch_norm_stub, batch_norm)
INFL_REGISTER_CUDA(channel_affine_stub, channel_affine)
INFL_REGISTER_CUDA(channel_gradient_stub, channel_gradient)

}  // namespace
}  // namespace cuda
}  // namespace infl
