// One row at a time, for all right-hand sides while its x̂ is in the first-level cache: a pass for the row's two sums, a pass that writes.
// A channel's elements lie in runs: of one element (layer norm: weights are vectors along the row) or many (images: weights are numbers).
#include "kernels/normalisation.h"

#include "kernels/cpu/simd.h"
#include "math/normalisation.h"

namespace infl {
namespace INFL_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements below which one thread does it alone
constexpr int64_t kBlock = 1024;   // terms summed before they are added to a total: bounds the rounding error

inline int threads_for(const Context& ctx, int64_t elements) { return elements < kGrain ? 1 : ctx.num_threads; }

// `count` copies of a value that stand for an absent array.
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
    const int64_t first = r % map.groups * map.channels;
    if (map.run == 1) {
      const T* weight = w ? w + first : constant<1, T>(size);
      const T* bias = b ? b + first : constant<0, T>(size);
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

// Of one row and right-hand side: out = (w rstd (t − mean − x̂ correlation) + x̂ t_w + t_b) ∘ scale for elements that share or have their own weights.
template <class T>
struct RowTangent {
  int64_t size;
  T rstd, mean, correlation;
  const T *t, *x_hat, *scale;
  T* out;

  template <bool kParameters, bool kScale>
  void by_element(const T* w, const T* t_w, const T* t_b) const {
#pragma omp simd
    for (int64_t j = 0; j < size; ++j) {
      T value = w[j] * standardised_tangent(t[j], x_hat[j], rstd, mean, correlation);
      if constexpr (kParameters) value += x_hat[j] * t_w[j] + t_b[j];
      if constexpr (kScale) value *= scale[j];
      out[j] = value;
    }
  }
  template <bool kScale>
  void by_run(int64_t begin, int64_t end, T w, T t_w, T t_b) const {
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) {
      T value = w * standardised_tangent(t[j], x_hat[j], rstd, mean, correlation) + x_hat[j] * t_w + t_b;
      if constexpr (kScale) value *= scale[j];
      out[j] = value;
    }
  }
};

template <class T>
void layer_norm_jvp(const Context& ctx, const ChannelMap& map, int64_t V, int64_t rows, bool centre, const T* x_hat, const T* rstd, const T* w,
                    const T* t_x, const ChannelTangents<T>& t_theta, const T* scale, T* t_y) {
  const int64_t size = map.size();
  const int threads = threads_for(ctx, V * rows * size);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t first = r % map.groups * map.channels;
    const T* hat = x_hat + r * size;
    for (int64_t v = 0; v < V; ++v) {
      const T* t = t_x + (v * rows + r) * size;
      const Sums<T> sums = row_sums<false>(size, static_cast<const T*>(nullptr), t, hat);
      const RowTangent<T> row{size, rstd[r], centre ? sums.plain / T(size) : T(0), sums.weighted / T(size),
                              t,    hat,     scale ? scale + r * size : nullptr,   t_y + (v * rows + r) * size};
      const T* t_w = t_theta.w ? t_theta.w + v * t_theta.stride + first : nullptr;
      const T* t_b = t_theta.b ? t_theta.b + v * t_theta.stride + first : nullptr;
      if (map.run == 1) {
        const T* weight = w ? w + first : constant<1, T>(size);
        if (t_w || t_b) {
          if (!t_w) t_w = constant<0, T>(size);
          if (!t_b) t_b = constant<0, T>(size);
          scale ? row.template by_element<true, true>(weight, t_w, t_b) : row.template by_element<true, false>(weight, t_w, t_b);
        } else {
          scale ? row.template by_element<false, true>(weight, t_w, t_b) : row.template by_element<false, false>(weight, t_w, t_b);
        }
        continue;
      }
      for (int64_t c = 0; c < map.channels; ++c) {
        const T weight = w ? w[first + c] : T(1), tangent = t_w ? t_w[c] : T(0), shift = t_b ? t_b[c] : T(0);
        const int64_t begin = c * map.run, end = begin + map.run;
        scale ? row.template by_run<true>(begin, end, weight, tangent, shift) : row.template by_run<false>(begin, end, weight, tangent, shift);
      }
    }
  }
}

enum class Write { plain, scaled, added };

template <Write kWrite, class T>
inline void write(T value, const T* scale, int64_t j, T* out) {
  if constexpr (kWrite == Write::plain) out[j] = value;
  if constexpr (kWrite == Write::scaled) out[j] = value * scale[j];
  if constexpr (kWrite == Write::added) out[j] += value;
}

template <Write kWrite, class T>
void layer_norm_vjp_rows(const Context& ctx, const ChannelMap& map, int64_t V, int64_t rows, bool centre, const T* x_hat, const T* rstd, const T* w,
                         const T* g_y, const T* scale, T* g_x) {
  const int64_t size = map.size(), run = map.run;
  const int threads = threads_for(ctx, V * rows * size);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t first = r % map.groups * map.channels;
    const T* hat = x_hat + r * size;
    const T* factor = scale ? scale + r * size : nullptr;
    const T inverse = rstd[r];
    for (int64_t v = 0; v < V; ++v) {
      const T* g = g_y + (v * rows + r) * size;
      T* out = g_x + (v * rows + r) * size;
      if (run == 1) {
        const T* weight = w ? w + first : constant<1, T>(size);
        const Sums<T> sums = row_sums<true>(size, weight, g, hat);
        const T mean = centre ? sums.plain / T(size) : T(0), correlation = sums.weighted / T(size);
#pragma omp simd
        for (int64_t j = 0; j < size; ++j) {
          write<kWrite>(standardised_tangent(weight[j] * g[j], hat[j], inverse, mean, correlation), factor, j, out);
        }
        continue;
      }
      Sums<T> sums;
      for (int64_t c = 0; c < map.channels; ++c) {
        const Sums<T> part = row_sums<false>(run, static_cast<const T*>(nullptr), g + c * run, hat + c * run);
        const T weight = w ? w[first + c] : T(1);
        sums.plain += weight * part.plain;
        sums.weighted += weight * part.weighted;
      }
      const T mean = centre ? sums.plain / T(size) : T(0), correlation = sums.weighted / T(size);
      for (int64_t c = 0; c < map.channels; ++c) {
        const T weight = w ? w[first + c] : T(1);
#pragma omp simd
        for (int64_t j = c * run; j < (c + 1) * run; ++j) {
          write<kWrite>(standardised_tangent(weight * g[j], hat[j], inverse, mean, correlation), factor, j, out);
        }
      }
    }
  }
}

template <class T>
void layer_norm_vjp(const Context& ctx, const ChannelMap& map, int64_t V, int64_t rows, bool centre, const T* x_hat, const T* rstd, const T* w,
                    const T* g_y, const T* scale, T* g_x, bool accumulate) {
  if (accumulate) return layer_norm_vjp_rows<Write::added>(ctx, map, V, rows, centre, x_hat, rstd, w, g_y, scale, g_x);
  if (scale) return layer_norm_vjp_rows<Write::scaled>(ctx, map, V, rows, centre, x_hat, rstd, w, g_y, scale, g_x);
  layer_norm_vjp_rows<Write::plain>(ctx, map, V, rows, centre, x_hat, rstd, w, g_y, scale, g_x);
}

template <class T>
void batch_norm_pack(const Context&, int64_t channels, T eps, const T* variance, const T* w, T* packed) {
  for (int64_t c = 0; c < channels; ++c) {
    packed[c] = inverse_deviation(variance[c], eps);
    packed[channels + c] = w ? w[c] * packed[c] : packed[c];
  }
}

template <class T>
void batch_norm(const Context& ctx, const ChannelMap& map, int64_t rows, const T* x, const T* mean, const T* rstd, const T* a, const T* b, T* y,
                T* x_hat) {
  const int64_t size = map.size(), run = map.run;
  const int threads = threads_for(ctx, rows * size);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = x + r * size;
    T* to = y + r * size;
    T* hat = x_hat ? x_hat + r * size : nullptr;
    if (run == 1) {
      const T* bias = b ? b : constant<0, T>(size);
#pragma omp simd
      for (int64_t j = 0; j < size; ++j) to[j] = (from[j] - mean[j]) * a[j] + bias[j];
      if (hat) {
#pragma omp simd
        for (int64_t j = 0; j < size; ++j) hat[j] = (from[j] - mean[j]) * rstd[j];
      }
      continue;
    }
    for (int64_t c = 0; c < map.channels; ++c) {
      const T m = mean[c], factor = a[c], shift = b ? b[c] : T(0), inverse = rstd[c];
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
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t first = r % map.groups * map.channels;
    const T* hat = kParameters == 2 ? x_hat + r * size : nullptr;
    const T* factor = kWrite == Write::scaled ? scale + r * size : nullptr;
    for (int64_t v = 0; v < V; ++v) {
      const T* from = kTangent ? t + (v * rows + r) * size : nullptr;
      T* to = out + (v * rows + r) * size;
      const T* t_w = kParameters == 2 ? t_theta.w + v * t_theta.stride + first : nullptr;
      const T* t_b = kParameters > 0 && t_theta.b ? t_theta.b + v * t_theta.stride + first : nullptr;
      if (run == 1) {
        const T* weight = a ? a + first : constant<1, T>(size);
        const T* shift = t_b ? t_b : constant<0, T>(size);
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
INFL_REGISTER_CPU(batch_norm_pack_stub, batch_norm_pack)
INFL_REGISTER_CPU(batch_norm_stub, batch_norm)
INFL_REGISTER_CPU(channel_affine_stub, channel_affine)
INFL_REGISTER_CPU(channel_gradient_stub, channel_gradient)

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
