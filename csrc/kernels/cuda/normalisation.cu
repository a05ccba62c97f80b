// All of these are bound by memory. A row is a team's: a warp's if it is short, else a block's. Up to 4096 float32 or 2048 float64, each thread keeps
// its elements of the row in registers between the sums and the pass that writes. Bytes of an element of float32, where a scale and parameters cost
// as before:
//
//   kept in registers           y and x̂ from x: 12;  a derivative, of V right-hand sides: 4 ceil(V / 4) + 8 V;  second: 8 ceil(V / 4) + 16 V
//   read again, of long rows    20;  8 ceil(V / 4) + 12 V;  16 ceil(V / 4) + 20 V, of which the second-level cache gives what it still has
//
// (a derivative takes 12 instead of 20 for V = 1 and 288 instead of 448 for V = 32). x̂, weights and scale are read once for four right-hand sides.
// Maps by channel take 16 bytes a thread and read their factors once for all right-hand sides.
//
// Sums by channel: long ones are split into parts, whose sums are added in their order. No atomics.
#include "kernels/normalisation.h"

#include "kernels/cuda/row_teams.h"
#include "math/normalisation.h"

namespace infl {
namespace cuda {
namespace {

using namespace row_teams;

constexpr int kSides = 4;                   // right-hand sides that share what they share
constexpr int64_t kWantedBlocks = 2 * 132;  // two for each processor of the largest GPU

// Division of numbers that mostly fit 32 bits, where it costs a fraction, by one that is often 1.
template <class Index>
__device__ int64_t quotient(Index a, int64_t b) {
  if (b == 1) return a;
  if constexpr (sizeof(Index) == 4) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);  // of a row that has no more elements
  return (a | b) >> 32 == 0 ? static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b)) : a / b;
}

template <class T, int kTeam, int W, int kSteps>
__global__ void __launch_bounds__(kThreads)
    layer_norm_kernel(ChannelMap map, int64_t rows, bool centre, T eps, const T* x, const T* w, const T* b, T* y, T* x_hat, T* rstd) {
  const int64_t row = team_index<kTeam>(), size = map.channels * map.run;
  if (row >= rows) return;
  Vector<T, W> kept[kSteps > 0 ? kSteps : 1];
  const auto read = [&](int step, auto j) { kept[step] = load<W>(x + row * size + j); };
  if constexpr (kSteps > 0) for_each_of_row<kTeam, W, kSteps>(size, read);
  T mean = 0;
  if (centre) {
    T sum[1] = {};
    for_each_of_row<kTeam, W, kSteps>(size, [&](int step, auto j) {
      if constexpr (kSteps == 0) read(step, j);
      INFL_UNROLL(4)
      for (int k = 0; k < W; ++k) sum[0] += kept[step].v[k];
    });
    team_sums<kTeam>(sum);
    mean = sum[0] / T(size);
  }
  T sums[2] = {};  // of the deviations, and of their squares
  for_each_of_row<kTeam, W, kSteps>(size, [&](int step, auto j) {
    if constexpr (kSteps == 0) read(step, j);
    INFL_UNROLL(4)
    for (int k = 0; k < W; ++k) {
      const T d = kept[step].v[k] - mean;
      sums[0] += d;
      sums[1] += d * d;
    }
  });
  team_sums<kTeam>(sums);
  const T rest = centre ? sums[0] / T(size) : T(0);  // what rounding left of the mean
  // A single element is its own mean: x̂ and its derivative vanish, and no rounding error is to be divided by sqrt(eps).
  const T inverse = centre && size == 1 ? T(0) : inverse_deviation(sums[1] / T(size) - rest * rest, eps);
  if (threadIdx.x % kTeam == 0) rstd[row] = inverse;
  const int64_t first = map.first(row);
  for_each_of_row<kTeam, W, kSteps>(size, [&](int step, auto j) {
    if constexpr (kSteps == 0) read(step, j);
    Vector<T, W> hat, to;
    INFL_UNROLL(4)
    for (int k = 0; k < W; ++k) {
      const int64_t c = first + quotient(j + k, map.run);
      hat.v[k] = ((kept[step].v[k] - mean) - rest) * inverse;
      to.v[k] = (w ? w[c] : T(1)) * hat.v[k] + (b ? b[c] : T(0));
    }
    store<W>(x_hat + row * size + j, hat);
    store<W>(y + row * size + j, to);
  });
}

template <class T>
void layer_norm(const Context& ctx, const ChannelMap& map, int64_t rows, bool centre, T eps, const T* x, const T* w, const T* b, T* y, T* x_hat,
                T* rstd) {
  if (rows == 0 || map.size() == 0) return;
  choose_team<T>(map.size(), is_aligned({x, y, x_hat}), [&]<int kTeam, int W, int kSteps>() {
    launch(ctx, "layer_norm", &layer_norm_kernel<T, kTeam, W, kSteps>, teams<kTeam>(rows), dim3(kThreads), 0, map, rows, centre, eps, x, w, b, y,
           x_hat, rstd);
  });
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

// kTangent: w ∘ ∂x̂ in, else its transpose ∂x̂ (w ∘ in). B right-hand sides, W elements a thread and step. One block a processor will do, lest the
// compiler makes two fit by spilling what is kept.
template <class T, bool kTangent, int B, int kTeam, int W, int kSteps>
__global__ void __launch_bounds__(kThreads, 1) derivative_kernel(const Derivative<T> p) {
  const int64_t item = team_index<kTeam>(), size = p.map.channels * p.map.run;
  if (item >= (p.V + B - 1) / B * p.rows) return;
  const int64_t row = item % p.rows, v0 = item / p.rows * B, first = p.map.first(row), apart = p.rows * size;
  const int sides = p.V - v0 < B ? static_cast<int>(p.V - v0) : B;
  const T* in = p.in + v0 * apart + row * size;
  T* out = p.out + v0 * apart + row * size;
  Vector<T, W> hat[kSteps > 0 ? kSteps : 1], x[kSteps > 0 ? kSteps : 1][B];
  const auto read = [&](int step, auto j) {
    hat[step] = load<W>(p.x_hat + row * size + j);
    INFL_UNROLL(4)
    for (int b = 0; b < B; ++b) {
      if (b < sides) x[step][b] = load<W>(in + b * apart + j);
    }
  };
  if constexpr (kSteps > 0) for_each_of_row<kTeam, W, kSteps>(size, read);
  T sums[2 * B] = {};  // of each right-hand side, and of it with x̂
  for_each_of_row<kTeam, W, kSteps>(size, [&](int step, auto j) {
    if constexpr (kSteps == 0) read(step, j);
    T weight[W];
    INFL_UNROLL(4)
    for (int k = 0; k < W; ++k) weight[k] = !kTangent && p.w ? p.w[first + quotient(j + k, p.map.run)] : T(1);
    INFL_UNROLL(4)
    for (int b = 0; b < B; ++b) {
      if (b >= sides) continue;
      INFL_UNROLL(4)
      for (int k = 0; k < W; ++k) {
        const T z = weight[k] * x[step][b].v[k];
        sums[b] += z;
        sums[B + b] += z * hat[step].v[k];
      }
    }
  });
  team_sums<kTeam>(sums);
  INFL_UNROLL(4)
  for (int b = 0; b < B; ++b) {
    sums[b] = p.centre ? sums[b] / T(size) : T(0);
    sums[B + b] /= T(size);
  }
  const T rstd = p.rstd[row];
  for_each_of_row<kTeam, W, kSteps>(size, [&](int step, auto j) {
    if constexpr (kSteps == 0) read(step, j);
    Vector<T, W> factor;
    if (p.scale) factor = load<W>(p.scale + row * size + j);
    int64_t channel[W];
    T weight[W];
    INFL_UNROLL(4)
    for (int k = 0; k < W; ++k) {
      channel[k] = first + quotient(j + k, p.map.run);
      weight[k] = p.w ? p.w[channel[k]] : T(1);
    }
    INFL_UNROLL(4)
    for (int b = 0; b < B; ++b) {
      if (b >= sides) continue;
      Vector<T, W> to;
      INFL_UNROLL(4)
      for (int k = 0; k < W; ++k) {
        const T z = x[step][b].v[k], h = hat[step].v[k];
        T value = kTangent ? weight[k] * standardised_tangent(z, h, rstd, sums[b], sums[B + b])
                           : standardised_tangent(weight[k] * z, h, rstd, sums[b], sums[B + b]);
        if (p.t.w) value += h * p.t.w[(v0 + b) * p.t.stride + channel[k]];
        if (p.t.b) value += p.t.b[(v0 + b) * p.t.stride + channel[k]];
        if (p.scale) value *= factor.v[k];
        to.v[k] = value;
      }
      if (p.accumulate) {
        const auto before = load<W>(out + b * apart + j);
        INFL_UNROLL(4)
        for (int k = 0; k < W; ++k) to.v[k] += before.v[k];
      }
      store<W>(out + b * apart + j, to);
    }
  });
}

template <class T, bool kTangent, int B>
void derivative_of_sides(const Context& ctx, const char* who, const Derivative<T>& p) {
  choose_team<T>(p.map.size(), is_aligned({p.x_hat, p.in, p.scale, p.out}), [&]<int kTeam, int W, int kSteps>() {
    launch(ctx, who, &derivative_kernel<T, kTangent, B, kTeam, W, kSteps>, teams<kTeam>(ceil_div(p.V, B) * p.rows), dim3(kThreads), 0, p);
  });
}

template <class T, bool kTangent>
void derivative(const Context& ctx, const char* who, const Derivative<T>& p) {
  if (p.V == 0 || p.rows == 0 || p.map.size() == 0) return;
  p.V == 1 ? derivative_of_sides<T, kTangent, 1>(ctx, who, p) : derivative_of_sides<T, kTangent, kSides>(ctx, who, p);
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

// B right-hand sides, which share x̂ and ĝ; W elements a thread and step.
template <class T, int B, int kTeam, int W, int kSteps>
__global__ void __launch_bounds__(kThreads, 1) second_order_kernel(const SecondOrder<T> p) {
  const int64_t item = team_index<kTeam>(), size = p.map.channels * p.map.run;
  if (item >= (p.V + B - 1) / B * p.rows) return;
  const int64_t row = item % p.rows, v0 = item / p.rows * B, first = p.map.first(row), apart = p.rows * size;
  const int sides = p.V - v0 < B ? static_cast<int>(p.V - v0) : B;
  const T *t = p.t + v0 * apart + row * size, *t_hat = p.t_hat + v0 * apart + row * size;
  const T* t_w = p.t_w ? p.t_w + v0 * p.t_w_stride : nullptr;
  T* out = p.out + v0 * apart + row * size;
  Vector<T, W> hat[kSteps > 0 ? kSteps : 1], g[kSteps > 0 ? kSteps : 1], tangent_hat[kSteps > 0 ? kSteps : 1][B];
  const auto read = [&](int step, auto j) {
    hat[step] = load<W>(p.x_hat + row * size + j);
    g[step] = load<W>(p.g + row * size + j);
    INFL_UNROLL(4)
    for (int b = 0; b < B; ++b) {
      if (b < sides) tangent_hat[step][b] = load<W>(t_hat + b * apart + j);
    }
  };
  if constexpr (kSteps > 0) for_each_of_row<kTeam, W, kSteps>(size, read);
  // Of ĝ and ĝ ∘ x̂; for each right-hand side of t_ĝ, t_ĝ ∘ x̂, x̂ ∘ t_x and t_x̂ ∘ ĝ.
  T sums[2 + 4 * B] = {};
  T *const moved_mean = sums + 2, *const moved_correlation = moved_mean + B, *const stretch = moved_correlation + B, *const turn = stretch + B;
  for_each_of_row<kTeam, W, kSteps>(size, [&](int step, auto j) {
    if constexpr (kSteps == 0) read(step, j);
    int64_t channel[W];
    T weighted[W];
    INFL_UNROLL(4)
    for (int k = 0; k < W; ++k) {
      channel[k] = first + quotient(j + k, p.map.run);
      weighted[k] = p.w ? p.w[channel[k]] * g[step].v[k] : g[step].v[k];
      sums[0] += weighted[k];
      sums[1] += weighted[k] * hat[step].v[k];
    }
    INFL_UNROLL(4)
    for (int b = 0; b < B; ++b) {
      if (b >= sides) continue;
      const auto tangent = load<W>(t + b * apart + j);
      INFL_UNROLL(4)
      for (int k = 0; k < W; ++k) {
        stretch[b] += hat[step].v[k] * tangent.v[k];
        turn[b] += tangent_hat[step][b].v[k] * weighted[k];
        const T moved = t_w ? t_w[b * p.t_w_stride + channel[k]] * g[step].v[k] : T(0);
        moved_mean[b] += moved;
        moved_correlation[b] += moved * hat[step].v[k];
      }
    }
  });
  team_sums<kTeam>(sums);
  INFL_UNROLL(20)
  for (int s = 0; s < 2 + 4 * B; ++s) sums[s] /= T(size);
  const T mean = p.centre ? sums[0] : T(0), correlation = sums[1], rstd = p.rstd[row];
  for_each_of_row<kTeam, W, kSteps>(size, [&](int step, auto j) {
    if constexpr (kSteps == 0) read(step, j);
    int64_t channel[W];
    T own[W];  // what layer_norm_vjp gives, over rstd
    INFL_UNROLL(4)
    for (int k = 0; k < W; ++k) {
      channel[k] = first + quotient(j + k, p.map.run);
      own[k] = (p.w ? p.w[channel[k]] * g[step].v[k] : g[step].v[k]) - mean - hat[step].v[k] * correlation;
    }
    INFL_UNROLL(4)
    for (int b = 0; b < B; ++b) {
      if (b >= sides) continue;
      auto sum = load<W>(out + b * apart + j);
      INFL_UNROLL(4)
      for (int k = 0; k < W; ++k) {
        const T moved = t_w ? t_w[b * p.t_w_stride + channel[k]] * g[step].v[k] : T(0);
        const T centred = p.centre ? moved - moved_mean[b] : moved;
        const T other = centred - hat[step].v[k] * (moved_correlation[b] + turn[b]) - tangent_hat[step][b].v[k] * correlation;
        sum.v[k] += rstd * (other - rstd * stretch[b] * own[k]);
      }
      store<W>(out + b * apart + j, sum);
    }
  });
}

template <class T, int B>
void second_order_of_sides(const Context& ctx, const SecondOrder<T>& p) {
  choose_team<T>(p.map.size(), is_aligned({p.x_hat, p.g, p.t, p.t_hat, p.out}), [&]<int kTeam, int W, int kSteps>() {
    constexpr int kTogether = kSteps == 0 && sizeof(T) == 8 ? std::min(B, 2) : B;  // four would take more registers than there are
    launch(ctx, "layer_norm_second_order", &second_order_kernel<T, kTogether, kTeam, W, kSteps>, teams<kTeam>(ceil_div(p.V, kTogether) * p.rows),
           dim3(kThreads), 0, p);
  });
}

template <class T>
void layer_norm_second_order(const Context& ctx, const ChannelMap& map, int64_t V, int64_t rows, bool centre, const T* x_hat, const T* rstd,
                             const T* w, const T* g_y, const T* t_x, const T* t_x_hat, const ChannelTangents<T>& t_theta, T* g_x) {
  if (V == 0 || rows == 0 || map.size() == 0) return;
  const SecondOrder<T> p{map, V, rows, centre, x_hat, rstd, w, g_y, t_x, t_x_hat, t_theta.w, t_theta.stride, g_x};
  V == 1 ? second_order_of_sides<T, 1>(ctx, p) : second_order_of_sides<T, kSides>(ctx, p);
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
  T sums[2 * kSides] = {};  // of each right-hand side, and of it with x̂
  const int64_t line_step = kThreads / p.run, step = kThreads % p.run;
  int64_t line = begin + threadIdx.x / p.run, j = threadIdx.x % p.run;
  while (line < end) {
    const int64_t at = line * p.channels * p.run + j;
    const T hat = hats ? hats[at] : T(0);
    INFL_UNROLL(4)
    for (int b = 0; b < kSides; ++b) {
      if (b >= sides) continue;
      const T value = g[b * p.num * width + at];
      sums[b] += value;
      sums[kSides + b] += value * hat;
    }
    line += line_step;
    j += step;
    if (j >= p.run) {
      j -= p.run;
      ++line;
    }
  }
  team_sums<kThreads>(sums);
  INFL_UNROLL(4)
  for (int b = 0; b < kSides; ++b) {
    if (threadIdx.x == 0 && b < sides) put(p, work.part, work.v0 + b, work.o, work.tile, sums[kSides + b], sums[b]);
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
