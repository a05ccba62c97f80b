// Normalisation kernels. A row is what is normalised together (a group of an example), or for batch norm one [channels, run] array.
// Right-hand sides V first: arrays are [V, rows, size]. All deterministic; each element is written by one thread.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/macros.h"

namespace infl {

// Which channel an element belongs to: element e of row r is of channel (r % groups) * channels + e / run. Weights may be those of several sets, of
// `rows_of_set` rows each.
struct ChannelMap {
  int64_t groups = 1;
  int64_t channels = 1;  // per group
  int64_t run = 1;
  int64_t rows_of_set = 0;                    // 0: one set of weights
  int64_t set_stride = 0;                     // elements between the weights of neighbouring sets
  INFL_HD int64_t first(int64_t row) const {  // where the weights of a row start
    return (rows_of_set ? row / rows_of_set * set_stride : 0) + row % groups * channels;
  }
  int64_t size() const { return channels * run; }      // elements of a row
  int64_t total() const { return groups * channels; }  // channels altogether
};

// x̂ = (x − mean) rstd with mean and 1/std of each row (without `centre`: mean 0), y = w x̂ + b. w and b [channels], each may be absent.
// Two passes, the second corrects the mean: no digits of the variance are lost to a large mean.
template <class T>
inline KernelStub<void(const Context&, const ChannelMap&, int64_t rows, bool centre, T eps, const T* x, const T* w, const T* b, T* y, T* x_hat,
                       T* rstd)>
    layer_norm_stub{"layer_norm"};

// What the tangent of an affine map by channel adds: x̂ t_w + t_b, each [V, channels] with rows `stride` apart, each may be absent.
template <class T>
struct ChannelTangents {
  const T* w = nullptr;
  const T* b = nullptr;
  int64_t stride = 0;
};

// t_y = (w ∂x̂/∂x t_x + x̂ t_w + t_b) ∘ scale; w and scale [rows, size] may be absent.
template <class T>
inline KernelStub<void(const Context&, const ChannelMap&, int64_t V, int64_t rows, bool centre, const T* x_hat, const T* rstd, const T* w,
                       const T* t_x, const ChannelTangents<T>& t_theta, const T* scale, T* t_y)>
    layer_norm_jvp_stub{"layer_norm_jvp"};

// g_x = (∂x̂/∂x)ᵀ (w g_y) ∘ scale, or += with accumulate (then without scale).
template <class T>
inline KernelStub<void(const Context&, const ChannelMap&, int64_t V, int64_t rows, bool centre, const T* x_hat, const T* rstd, const T* w,
                       const T* g_y, const T* scale, T* g_x, bool accumulate)>
    layer_norm_vjp_stub{"layer_norm_vjp"};

// g_x += what layer_norm_vjp changes by along t_x and t_w at the cotangent g_y [rows, size]; t_x_hat [V, rows, size] is ∂x̂/∂x t_x:
//   −rstd m(x̂ ∘ t_x) g_x + rstd (t_ĝ − m(t_ĝ) − x̂ m(x̂ ∘ t_ĝ) − t_x̂ m(x̂ ∘ ĝ) − x̂ m(t_x̂ ∘ ĝ)),   ĝ = w ∘ g_y,  t_ĝ = t_w ∘ g_y,  m the mean over a row
template <class T>
inline KernelStub<void(const Context&, const ChannelMap&, int64_t V, int64_t rows, bool centre, const T* x_hat, const T* rstd, const T* w,
                       const T* g_y, const T* t_x, const T* t_x_hat, const ChannelTangents<T>& t_theta, T* g_x)>
    layer_norm_second_order_stub{"layer_norm_second_order"};

// packed [1 + num, channels]: rstd = 1 / sqrt(variance + eps), then w rstd for each of the weights w [num, channels], w_batch apart (absent: 1).
template <class T>
inline KernelStub<void(const Context&, int64_t channels, T eps, const T* variance, int64_t num, const T* w, int64_t w_batch, T* packed)>
    batch_norm_pack_stub{"batch_norm_pack"};

// x̂ = (x − mean) rstd by channel, written if wanted; y = w x̂ + b (each may be absent). Statistics are the same for all sets of weights.
template <class T>
inline KernelStub<void(const Context&, const ChannelMap&, int64_t rows, const T* x, const T* mean, const T* rstd, const T* w, const T* b, T* y,
                       T* x_hat)>
    batch_norm_stub{"batch_norm"};

// out = (a t + x̂ t_w + t_b) ∘ scale by channel, or += with accumulate (then without parameters and scale). t [V, rows, size], x̂ [rows, size],
// absent where nothing multiplies it; a absent: 1.
template <class T>
inline KernelStub<void(const Context&, const ChannelMap&, int64_t V, int64_t rows, const T* a, const T* t, const T* x_hat,
                       const ChannelTangents<T>& t_theta, const T* scale, T* out, bool accumulate)>
    channel_affine_stub{"channel_affine"};

// Gradients of an affine map by channel, rows summed in runs of `rows` (a multiple of the groups): for v < V and o < num
//   g_w[v, o, c] (+)= Σ over the elements of channel c of g_y x̂,   g_b[v, o, c] (+)= Σ g_y;   each may be absent.
template <class T>
struct ChannelGradients {
  T* w = nullptr;
  T* b = nullptr;
  int64_t v_stride = 0, o_stride = 0;
  bool accumulate = false;
};

template <class T>
inline KernelStub<void(const Context&, const ChannelMap&, int64_t V, int64_t num, int64_t rows, const T* g_y, const T* x_hat,
                       const ChannelGradients<T>& out)>
    channel_gradient_stub{"channel_gradient"};

}  // namespace infl
