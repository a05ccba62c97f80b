// One row at a time, for all right-hand sides while its x̂ is in the first-level cache: a pass for the row's two sums, a pass that writes.
// A channel's elements lie in runs: of one element (layer norm: weights are vectors along the row) or many (images: weights are numbers).
#include "kernels/normalisation.h"

#include "kernels/cpu/parallel.h"
#include "math/normalisation.h"

namespace infl {
namespace INFL_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // terms summed before they are added to a total: bounds the rounding error

// `count` copies of a value that stand for an absent array; made outside parallel regions, since it allocates.
template <int value, class T>
const T* constant(int64_t count) {
  static thread_local std::vector<T> values;
  if (static_cast<int64_t>(values.size()) < count) values.assign(count, T(value));
  return values.data();
}

template <class T>
struct Sums {
  T plain = 0, weighted = 0;
};

// Σ z and Σ x̂ z over `count` elements, z = w ∘ in (without w: z = in)
template <bool kWeights, class T>
Sums<T> row_sums(int64_t count, const T* w, const T* in, const T* x_hat) {
  Sums<T> total;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(count, begin + kBlock);
    T plain = 0, weighted = 0;
#pragma omp simd reduction(+ : plain, weighted)
    for (int64_t j = begin; j < end; ++j) {
      const T z = kWeights ? w[j] * in[j] : in[j];
      plain += z;
      weighted += z * x_hat[j];
    }
    total.plain += plain;
    total.weighted += weighted;
  }
  return total;
}

// Σ (x − shift) and Σ (x − shift)²
template <class T>
Sums<T> moments(int64_t count, T shift, const T* x) {
  Sums<T> total;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(count, begin + kBlock);
    T plain = 0, square = 0;
#pragma omp simd reduction(+ : plain, square)
    for (int64_t j = begin; j < end; ++j) {
      const T d = x[j] - shift;
      plain += d;
      square += d * d;
    }
    total.plain += plain;
    total.weighted += square;
  }
  return total;
}

template <class T>
void layer_norm(const Context& ctx, const ChannelMap& map, int64_t rows, bool centre, T eps, const T* x, const T* w, const T* b, T* y, T* x_hat,
                T* rstd) {
  const int64_t size = map.size();
  const int threads = threads_for(ctx, rows * size);
  const T *ones = constant<1, T>(map.channels), *zeros = constant<0, T>(map.channels);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = x + r * size;
    T* hat = x_hat + r * size;
    T* to = y + r * size;
    const T mean = centre ? moments(size, T(0), from).plain / T(size) : T(0);
    const Sums<T> about = moments(size, mean, from);
    const T rest = centre ? about.plain / T(size) : T(0);  // what rounding left of the mean
    // A single element is its own mean: x̂ and its derivative vanish, and no rounding error is to be divided by sqrt(eps).
    const T inverse = centre && size == 1 ? T(0) : inverse_deviation(about.weighted / T(size) - rest * rest, eps);
    rstd[r] = inverse;
#pragma omp simd
    for (int64_t j = 0; j < size; ++j) hat[j] = ((from[j] - mean) - rest) * inverse;
    const int64_t first = map.first(r);
    if (map.run == 1) {
      const T* weight = w ? w + first : ones;
      const T* bias = b ? b + first : zeros;
#pragma omp simd
      for (int64_t j = 0; j < size; ++j) to[j] = weight[j] * hat[j] + bias[j];
      continue;
    }
    for (int64_t c = 0; c < map.channels; ++c) {
      const T weight = w ? w[first + c] : T(1), bias = b ? b[first + c] : T(0);
#pragma omp simd
      for (int64_t j = c * map.run; j < (c + 1) * map.run; ++j) to[j] = weight * hat[j] + bias;
    }
  }
}

template <class E, class T>
inline __attribute__((always_inline)) E get(const T* p) {
  if constexpr (std::is_same_v<E, T>) {
    return *p;
  } else {
    return load(p);
  }
}

template <class T>
inline __attribute__((always_inline)) void put(T* p, T value) {
  *p = value;
}

template <class T>
inline __attribute__((always_inline)) void put(T* p, Vec<T> value) {
  store(p, value);
}

// The sum of a vector's elements, by halves.
template <class T, class E, size_t... kHalf>
inline __attribute__((always_inline)) T elements_sum(E v, std::index_sequence<kHalf...>) {
  if constexpr (sizeof...(kHalf) == 1) {
    return v[0] + v[1];
  } else {
    return elements_sum<T>(__builtin_shufflevector(v, v, kHalf...) + __builtin_shufflevector(v, v, (kHalf + sizeof...(kHalf))...),
                           std::make_index_sequence<sizeof...(kHalf) / 2>());
  }
}

template <class T>
inline __attribute__((always_inline)) T lanes_sum(Vec<T> v) {
  return elements_sum<T>(v, std::make_index_sequence<kLanes<T> / 2>());
}

enum class Write { plain, scaled, added };

template <Write kWrite, class E, class T>
inline __attribute__((always_inline)) void write(E value, const T* scale, int64_t j, T* out) {
  if constexpr (kWrite == Write::scaled) value *= get<E>(scale + j);
  if constexpr (kWrite == Write::added) value += get<E>(out + j);
  put(out + j, value);
}

// An array for every right-hand side.
template <class T>
struct Rows {
  const T* first = nullptr;
  int64_t stride = 0;
};

// One row of B right-hand sides, `stride` apart, which share x̂ and the weights. kRun: a channel has many elements, its weight is a number.
template <int B, bool kRun, class T>
struct RowBlock {
  int64_t channels, run, stride;
  bool centre;
  T rstd;
  const T *w, *x_hat, *in, *scale;
  T* out;
  T mean[B], correlation[B];

  // mean(z) and mean(x̂ z) of every right-hand side, z = w ∘ in, or `in` itself
  template <bool kWeights>
  void sum() {
    const int64_t size = channels * run, segment = kRun && kWeights ? run : size;
    T plain[B] = {}, weighted[B] = {};
    for (int64_t c = 0; c * segment < size; ++c) {
      const int64_t end = (c + 1) * segment;
      for (int64_t begin = c * segment; begin < end; begin += kBlock) {
        add_sums<kWeights>(begin, std::min(end, begin + kBlock), kWeights && kRun ? w[c] : T(1), plain, weighted);
      }
    }
    for (int b = 0; b < B; ++b) {
      mean[b] = centre ? plain[b] / T(size) : T(0);
      correlation[b] = weighted[b] / T(size);
    }
  }

  template <bool kWeights>
  void add_sums(int64_t begin, int64_t end, T weight, T* plain, T* weighted) const {
    constexpr int64_t kStep = kLanes<T>;
    // copies: stores through `T*` could otherwise change the members
    const T *const weights = w, *const hats = x_hat, *const first = in;
    const int64_t apart = stride;
    Vec<T> p[B], q[B];
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) p[b] = q[b] = Vec<T>{};
    int64_t j = begin;
    for (; j + kStep <= end; j += kStep) {
      const Vec<T> hat = load(hats + j);
      const Vec<T> own = kWeights && !kRun ? load(weights + j) : Vec<T>{} + weight;
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) {
        Vec<T> z = load(first + b * apart + j);
        if constexpr (kWeights) z *= own;
        p[b] += z;
        q[b] += z * hat;
      }
    }
    for (int b = 0; b < B; ++b) {
      T tail = 0, tail_weighted = 0;
      for (int64_t i = j; i < end; ++i) {
        const T z = (kWeights && !kRun ? weights[i] : weight) * first[b * apart + i];
        tail += z;
        tail_weighted += z * hats[i];
      }
      plain[b] += tail;
      weighted[b] += tail_weighted;
    }
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      plain[b] += lanes_sum<T>(p[b]);
      weighted[b] += lanes_sum<T>(q[b]);
    }
  }

  // out = (w ∂x̂ in + x̂ t_w + t_b) ∘ scale
  template <bool kParameters, Write kWrite>
  void write_tangents(Rows<T> t_w, Rows<T> t_b) const {
    write_all<true, kParameters, kWrite>(t_w, t_b);
  }

  // out = ∂x̂ᵀ (w ∘ in)
  template <Write kWrite>
  void write_cotangents() const {
    write_all<false, false, kWrite>({}, {});
  }

  // One right-hand side after another: rows of several of them often lie a multiple of 4096 bytes apart, where a load waits for the other's store.
  template <bool kTangent, bool kParameters, Write kWrite>
  void write_all(Rows<T> t_w, Rows<T> t_b) const {
    for (int b = 0; b < B; ++b) {
      const T* own_w = t_w.first + b * t_w.stride;
      const T* own_b = t_b.first + b * t_b.stride;
      for (int64_t c = 0; c < (kRun ? channels : 1); ++c) {
        const int64_t begin = kRun ? c * run : 0, end = kRun ? begin + run : channels;
        const int64_t rest = write_elements<kTangent, kParameters, kWrite, Vec<T>>(b, begin, end, c, own_w, own_b);
        write_elements<kTangent, kParameters, kWrite, T>(b, rest, end, c, own_w, own_b);
      }
    }
  }

  // In steps of E, a vector or a scalar; where it stopped.
  template <bool kTangent, bool kParameters, Write kWrite, class E>
  int64_t write_elements(int b, int64_t begin, int64_t end, int64_t c, const T* t_w, const T* t_b) const {
    constexpr int64_t kStep = sizeof(E) / sizeof(T);
    const T *const weights = w, *const hats = x_hat, *const from = in + b * stride, *const factor = scale;
    T* const to = out + b * stride;
    const E zero{}, inverse = zero + rstd, m = zero + mean[b], k = zero + correlation[b];
    const E weight = zero + (kRun ? weights[c] : T(1)), tangent = zero + (kRun && kParameters ? t_w[c] : T(0)),
            shift = zero + (kRun && kParameters ? t_b[c] : T(0));
    int64_t j = begin;
    for (; j + kStep <= end; j += kStep) {
      const E hat = get<E>(hats + j), x = get<E>(from + j);
      const E own = kRun ? weight : get<E>(weights + j);
      E value = kTangent ? own * standardised_tangent<E>(x, hat, inverse, m, k) : standardised_tangent<E>(own * x, hat, inverse, m, k);
      if constexpr (kParameters) value += hat * (kRun ? tangent : get<E>(t_w + j)) + (kRun ? shift : get<E>(t_b + j));
      write<kWrite>(value, factor, j, to);
    }
    return j;
  }
};

// body(row block, v) for every row and every block of 4 right-hand sides, then of 1.
template <bool kRun, class T, class Body>
void for_row_blocks(const Context& ctx, const ChannelMap& map, int64_t V, int64_t rows, bool centre, const T* x_hat, const T* rstd, const T* w,
                    const T* in, const T* scale, T* out, const Body& body) {
  const int64_t size = map.size(), stride = rows * size;
  const int threads = threads_for(ctx, V * stride);
  const T* ones = constant<1, T>(map.channels);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t first = r % map.groups * map.channels, at = r * size;
    const T* weight = w ? w + first : ones;
    const auto run = [&](auto block, int64_t v) {
      block = {map.channels,          map.run, stride, centre, rstd[r], weight, x_hat + at, in + v * stride + at, scale ? scale + at : nullptr,
               out + v * stride + at, {},      {}};
      body(block, v, first);
    };
    int64_t v = 0;
    for (; v + 4 <= V; v += 4) run(RowBlock<4, kRun, T>{}, v);
    for (; v < V; ++v) run(RowBlock<1, kRun, T>{}, v);
  }
}

template <bool kRun, class T>
void layer_norm_jvp_rows(const Context& ctx, const ChannelMap& map, int64_t V, int64_t rows, bool centre, const T* x_hat, const T* rstd, const T* w,
                         const T* t_x, const ChannelTangents<T>& t_theta, const T* scale, T* t_y) {
  const T* zeros = constant<0, T>(map.channels);
  for_row_blocks<kRun>(ctx, map, V, rows, centre, x_hat, rstd, w, t_x, scale, t_y, [&](auto& block, int64_t v, int64_t first) {
    block.template sum<false>();
    if (!t_theta.w && !t_theta.b) {
      if (scale) return block.template write_tangents<false, Write::scaled>({}, {});
      return block.template write_tangents<false, Write::plain>({}, {});
    }
    const auto rows_of = [&](const T* t) { return t ? Rows<T>{t + v * t_theta.stride + first, t_theta.stride} : Rows<T>{zeros, 0}; };
    if (scale) return block.template write_tangents<true, Write::scaled>(rows_of(t_theta.w), rows_of(t_theta.b));
    block.template write_tangents<true, Write::plain>(rows_of(t_theta.w), rows_of(t_theta.b));
  });
}

template <class T>
void layer_norm_jvp(const Context& ctx, const ChannelMap& map, int64_t V, int64_t rows, bool centre, const T* x_hat, const T* rstd, const T* w,
                    const T* t_x, const ChannelTangents<T>& t_theta, const T* scale, T* t_y) {
  map.run == 1 ? layer_norm_jvp_rows<false>(ctx, map, V, rows, centre, x_hat, rstd, w, t_x, t_theta, scale, t_y)
               : layer_norm_jvp_rows<true>(ctx, map, V, rows, centre, x_hat, rstd, w, t_x, t_theta, scale, t_y);
}

template <bool kRun, class T>
void layer_norm_vjp_rows(const Context& ctx, const ChannelMap& map, int64_t V, int64_t rows, bool centre, const T* x_hat, const T* rstd, const T* w,
                         const T* g_y, const T* scale, T* g_x, bool accumulate) {
  for_row_blocks<kRun>(ctx, map, V, rows, centre, x_hat, rstd, w, g_y, scale, g_x, [&](auto& block, int64_t, int64_t) {
    block.template sum<true>();
    if (accumulate) return block.template write_cotangents<Write::added>();
    if (scale) return block.template write_cotangents<Write::scaled>();
    block.template write_cotangents<Write::plain>();
  });
}

template <class T>
void layer_norm_vjp(const Context& ctx, const ChannelMap& map, int64_t V, int64_t rows, bool centre, const T* x_hat, const T* rstd, const T* w,
                    const T* g_y, const T* scale, T* g_x, bool accumulate) {
  map.run == 1 ? layer_norm_vjp_rows<false>(ctx, map, V, rows, centre, x_hat, rstd, w, g_y, scale, g_x, accumulate)
               : layer_norm_vjp_rows<true>(ctx, map, V, rows, centre, x_hat, rstd, w, g_y, scale, g_x, accumulate);
}

// out = w ∘ in along a row, `w` [channels] of the row's group.
template <class T>
void weigh(const ChannelMap& map, const T* w, const T* in, T* out) {
  if (map.run == 1) {
#pragma omp simd
    for (int64_t j = 0; j < map.channels; ++j) out[j] = w[j] * in[j];
    return;
  }
  for (int64_t c = 0; c < map.channels; ++c) {
#pragma omp simd
    for (int64_t j = c * map.run; j < (c + 1) * map.run; ++j) out[j] = w[c] * in[j];
  }
}

template <class T>
void layer_norm_second_order(const Context& ctx, const ChannelMap& map, int64_t V, int64_t rows, bool centre, const T* x_hat, const T* rstd,
                             const T* w, const T* g_y, const T* t_x, const T* t_x_hat, const ChannelTangents<T>& t_theta, T* g_x) {
  const int64_t size = map.size();
  const int threads = threads_for(ctx, 4 * V * rows * size);
  const auto means = [size, centre](const Sums<T>& sums) { return Sums<T>{centre ? sums.plain / T(size) : T(0), sums.weighted / T(size)}; };
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; ++r) {
    static thread_local std::vector<T> weighted, moved;  // ĝ, t_ĝ
    weighted.resize(size);
    moved.resize(size);
    const T* hat = x_hat + r * size;
    const T* g = g_y + r * size;
    const int64_t first = map.first(r);
    weigh(map, w ? w + first : constant<1, T>(map.channels), g, weighted.data());
    const Sums<T> g_mean = means(row_sums<false, T>(size, nullptr, weighted.data(), hat));
    for (int64_t v = 0; v < V; ++v) {
      const T* t = t_x + (v * rows + r) * size;
      const T* t_hat = t_x_hat + (v * rows + r) * size;
      T* to = g_x + (v * rows + r) * size;
      weigh(map, t_theta.w ? t_theta.w + v * t_theta.stride + first : constant<0, T>(map.channels), g, moved.data());
      const Sums<T> moved_mean = means(row_sums<false, T>(size, nullptr, moved.data(), hat));
      const T stretch = row_sums<false, T>(size, nullptr, t, hat).weighted / T(size), inverse = rstd[r];
      const T turn = row_sums<false, T>(size, nullptr, t_hat, weighted.data()).weighted / T(size);
#pragma omp simd
      for (int64_t j = 0; j < size; ++j) {
        const T own = weighted[j] - g_mean.plain - hat[j] * g_mean.weighted;  // g_x / rstd
        const T other = moved[j] - moved_mean.plain - hat[j] * (moved_mean.weighted + turn) - t_hat[j] * g_mean.weighted;
        to[j] += inverse * (other - inverse * stretch * own);
      }
    }
  }
}

template <class T>
void batch_norm_pack(const Context&, int64_t channels, T eps, const T* variance, int64_t num, const T* w, int64_t w_batch, T* packed) {
  for (int64_t c = 0; c < channels; ++c) {
    packed[c] = inverse_deviation(variance[c], eps);
    for (int64_t k = 0; k < num; ++k) packed[(k + 1) * channels + c] = w ? w[k * w_batch + c] * packed[c] : packed[c];
  }
}

template <class T>
void batch_norm(const Context& ctx, const ChannelMap& map, int64_t rows, const T* x, const T* mean, const T* rstd, const T* w, const T* b, T* y,
                T* x_hat) {
  const int64_t size = map.size(), run = map.run;
  const int threads = threads_for(ctx, rows * size);
  const T *ones = constant<1, T>(map.channels), *zeros = constant<0, T>(map.channels);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = x + r * size;
    T* to = y + r * size;
    T* hat = x_hat ? x_hat + r * size : nullptr;
    const T *weights = w ? w + map.first(r) : ones, *bias = b ? b + map.first(r) : zeros;
    if (run == 1) {
#pragma omp simd
      for (int64_t j = 0; j < size; ++j) to[j] = (from[j] - mean[j]) * (rstd[j] * weights[j]) + bias[j];
      if (hat) {
#pragma omp simd
        for (int64_t j = 0; j < size; ++j) hat[j] = (from[j] - mean[j]) * rstd[j];
      }
      continue;
    }
    for (int64_t c = 0; c < map.channels; ++c) {
      const T m = mean[c], inverse = rstd[c], factor = inverse * weights[c], shift = bias[c];
#pragma omp simd
      for (int64_t j = c * run; j < (c + 1) * run; ++j) to[j] = (from[j] - m) * factor + shift;
      if (hat) {
#pragma omp simd
        for (int64_t j = c * run; j < (c + 1) * run; ++j) hat[j] = (from[j] - m) * inverse;
      }
    }
  }
}

// kTangent: t is there; kParameters: 0 none, 1 the bias alone, 2 the weight, and perhaps the bias.
template <bool kTangent, int kParameters, Write kWrite, class T>
void channel_affine_rows(const Context& ctx, const ChannelMap& map, int64_t V, int64_t rows, const T* a, const T* t, const T* x_hat,
                         const ChannelTangents<T>& t_theta, const T* scale, T* out) {
  const int64_t size = map.size(), run = map.run;
  const int threads = threads_for(ctx, V * rows * size);
  const T *ones = constant<1, T>(map.channels), *zeros = constant<0, T>(map.channels);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t first = map.first(r);
    const T* hat = kParameters == 2 ? x_hat + r * size : nullptr;
    const T* factor = kWrite == Write::scaled ? scale + r * size : nullptr;
    for (int64_t v = 0; v < V; ++v) {
      const T* from = kTangent ? t + (v * rows + r) * size : nullptr;
      T* to = out + (v * rows + r) * size;
      const T* t_w = kParameters == 2 ? t_theta.w + v * t_theta.stride + first : nullptr;
      const T* t_b = kParameters > 0 && t_theta.b ? t_theta.b + v * t_theta.stride + first : nullptr;
      if (run == 1) {
        const T* weight = a ? a + first : ones;
        const T* shift = t_b ? t_b : zeros;
#pragma omp simd
        for (int64_t j = 0; j < size; ++j) {
          T value = 0;
          if constexpr (kTangent) value = weight[j] * from[j];
          if constexpr (kParameters == 2) value += hat[j] * t_w[j];
          if constexpr (kParameters > 0) value += shift[j];
          write<kWrite>(value, factor, j, to);
        }
        continue;
      }
      for (int64_t c = 0; c < map.channels; ++c) {
        const T weight = a ? a[first + c] : T(1), tangent = kParameters == 2 ? t_w[c] : T(0), shift = t_b ? t_b[c] : T(0);
#pragma omp simd
        for (int64_t j = c * run; j < (c + 1) * run; ++j) {
          T value = shift;
          if constexpr (kTangent) value += weight * from[j];
          if constexpr (kParameters == 2) value += hat[j] * tangent;
          write<kWrite>(value, factor, j, to);
        }
      }
    }
  }
}

template <bool kTangent, int kParameters, class T>
void channel_affine_scaled(const Context& ctx, const ChannelMap& map, int64_t V, int64_t rows, const T* a, const T* t, const T* x_hat,
                           const ChannelTangents<T>& t_theta, const T* scale, T* out) {
  if (scale) return channel_affine_rows<kTangent, kParameters, Write::scaled>(ctx, map, V, rows, a, t, x_hat, t_theta, scale, out);
  channel_affine_rows<kTangent, kParameters, Write::plain>(ctx, map, V, rows, a, t, x_hat, t_theta, scale, out);
}

template <class T>
void channel_affine(const Context& ctx, const ChannelMap& map, int64_t V, int64_t rows, const T* a, const T* t, const T* x_hat,
                    const ChannelTangents<T>& t_theta, const T* scale, T* out, bool accumulate) {
  if (accumulate) return channel_affine_rows<true, 0, Write::added>(ctx, map, V, rows, a, t, x_hat, t_theta, scale, out);
  const int parameters = t_theta.w ? 2 : t_theta.b ? 1 : 0;
  if (t == nullptr) {
    if (parameters == 2) return channel_affine_scaled<false, 2>(ctx, map, V, rows, a, t, x_hat, t_theta, scale, out);
    return channel_affine_scaled<false, 1>(ctx, map, V, rows, a, t, x_hat, t_theta, scale, out);
  }
  if (parameters == 2) return channel_affine_scaled<true, 2>(ctx, map, V, rows, a, t, x_hat, t_theta, scale, out);
  if (parameters == 1) return channel_affine_scaled<true, 1>(ctx, map, V, rows, a, t, x_hat, t_theta, scale, out);
  channel_affine_scaled<true, 0>(ctx, map, V, rows, a, t, x_hat, t_theta, scale, out);
}

constexpr int64_t kStrip = 64;      // channels whose sums stay in registers
constexpr int64_t kRowBlock = 256;  // rows summed before they are added to a total

// Sums over `count` rows, `step` apart, of `width` <= kStrip columns: g ∘ x̂ into `w` and g into `b`.
template <bool kWeights, class T>
void strip_sums(int64_t count, int64_t step, int64_t width, const T* g, const T* x_hat, T* w, T* b) {
  for (int64_t begin = 0; begin < count; begin += kRowBlock) {
    T weighted[kStrip] = {}, plain[kStrip] = {};
    for (int64_t r = begin; r < std::min(count, begin + kRowBlock); ++r) {
      const T* from = g + r * step;
      const T* hat = kWeights ? x_hat + r * step : nullptr;
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) {
        plain[j] += from[j];
        if constexpr (kWeights) weighted[j] += from[j] * hat[j];
      }
    }
    for (int64_t j = 0; j < width; ++j) {
      b[j] += plain[j];
      w[j] += weighted[j];
    }
  }
}

template <class T>
void channel_gradient(const Context& ctx, const ChannelMap& map, int64_t V, int64_t num, int64_t rows, const T* g_y, const T* x_hat,
                      const ChannelGradients<T>& out) {
  const int64_t size = map.size(), run = map.run, per_group = rows / map.groups;
  const int64_t step = map.groups * size;  // between rows of one group
  const int64_t width = run == 1 ? kStrip : 1, strips = (map.channels + width - 1) / width;
  const int threads = threads_for(ctx, V * num * rows * size);
#pragma omp parallel for collapse(3) schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t vo = 0; vo < V * num; ++vo) {
    for (int64_t group = 0; group < map.groups; ++group) {
      for (int64_t strip = 0; strip < strips; ++strip) {
        const int64_t v = vo / num, o = vo % num, c = strip * width, count = std::min(width, map.channels - c);
        const T* g = g_y + vo * rows * size + group * size + c * run;
        const T* hat = out.w ? x_hat + o * rows * size + group * size + c * run : nullptr;
        T weighted[kStrip] = {}, plain[kStrip] = {};
        if (run == 1) {
          out.w ? strip_sums<true>(per_group, step, count, g, hat, weighted, plain)
                : strip_sums<false>(per_group, step, count, g, hat, weighted, plain);
        } else {
          for (int64_t r = 0; r < per_group; ++r) {
            // without a weight the second sum is not used
            const Sums<T> sums = row_sums<false>(run, static_cast<const T*>(nullptr), g + r * step, hat ? hat + r * step : g + r * step);
            plain[0] += sums.plain;
            weighted[0] += sums.weighted;
          }
        }
        const int64_t at = v * out.v_stride + o * out.o_stride + group * map.channels + c;
        for (int64_t j = 0; j < count; ++j) {
          if (out.w) out.w[at + j] = (out.accumulate ? out.w[at + j] : T(0)) + weighted[j];
          if (out.b) out.b[at + j] = (out.accumulate ? out.b[at + j] : T(0)) + plain[j];
        }
      }
    }
  }
}

INFL_REGISTER_CPU(layer_norm_stub, layer_norm)
INFL_REGISTER_CPU(layer_norm_jvp_stub, layer_norm_jvp)
INFL_REGISTER_CPU(layer_norm_vjp_stub, layer_norm_vjp)
INFL_REGISTER_CPU(layer_norm_second_order_stub, layer_norm_second_order)
INFL_REGISTER_CPU(batch_norm_pack_stub, batch_norm_pack)
INFL_REGISTER_CPU(batch_norm_stub, batch_norm)
INFL_REGISTER_CPU(channel_affine_stub, channel_affine)
INFL_REGISTER_CPU(channel_gradient_stub, channel_gradient)

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
