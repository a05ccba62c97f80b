// convolution: the bilinear map between images x [CX, SX] and y [CY, SY] (three spatial axes; leading ones are 1 for fewer) and a kernel
// w [CY, CX / groups, taps], in each of its three directions:
//
//   down     y[o, q]  = Σ_{c, k} w[o, c, k] x[c, q stride + k dilation − padding]       a convolution; x is zero outside
//   up       x[c, ·]  = the transpose of `down` applied to y                            a transposed convolution
//   weights  w[o, c, k] = Σ_q y[o, q] x[c, q stride + k dilation − padding]             the gradient by the kernel
//
// `padding` is that of the low side; the sizes imply the high side.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "kernels/convolution_lanes.h"
#include "kernels/convolution_shape.h"
#include "kernels/winograd.h"

namespace infl {

// Rows of a packed block of weights: at most as many as the register tile has, blocks of nearly equal height.
struct RowBlocks {
  int64_t count, height;
};

inline RowBlocks convolution_row_blocks(int64_t rows) {
  const int64_t most = vector_bytes(active_isa()) == 64 ? 12 : 6;
  const int64_t count = (rows + most - 1) / most;
  return {count, (rows + count - 1) / count};
}

// Number of elements convolution_pack writes for one kernel.
inline int64_t convolution_packed_size(const Convolution& c, bool up) {
  const int64_t rows = (up ? c.x_channels : c.y_channels) / c.groups, inner = (up ? c.y_channels : c.x_channels) / c.groups;
  if (takes_winograd(c)) return kWinogradElements * inner * winograd_channels(rows);
  const ConvolutionLanes lanes = convolution_lanes(c, up);
  if (lanes != ConvolutionLanes::positions) return channels_packed_size(c, up, lanes);
  const RowBlocks blocks = convolution_row_blocks(rows);
  return c.groups * blocks.count * blocks.height * inner * c.taps();
}

// x as the kernels of `down` and `weights` read it, images `size` elements apart: on the CPU the zero-padded copy that they make of any other input,
// on a device x itself, for which there is room. What is multiplied again and again, the input that a tape keeps, is prepared once.
template <class T>
inline KernelStub<void(const Context&, const Convolution&, int64_t* size)> convolution_prepared_size_stub{"convolution_prepared_size"};

template <class T>
inline KernelStub<void(const Context&, const Convolution&, int64_t n, const T* x, int64_t size, T* prepared)> convolution_prepare_stub{
    "convolution_prepare"};

template <class T>
struct ConvolutionTerm {
  const T* in = nullptr;  // [V or 1, n, channels, plane]; null: the term is absent
  int64_t in_batch = 0;   // 0: shared by all right-hand sides
  int64_t prepared = 0;   // elements between prepared images, which are shared, and `down`; 0: as they are
  const T* packed = nullptr;
  int64_t packed_batch = 0;
};

// out[v] = (beta out[v] + terms[0] + terms[1] + bias[v] per channel) ∘ scale
template <class T>
struct ConvolutionProduct {
  bool up = false;
  int64_t V = 1, n = 0;
  ConvolutionTerm<T> terms[2];
  const T* bias = nullptr;  // [V, channels of out], bias_batch apart, or absent
  int64_t bias_batch = 0;
  const T* scale = nullptr;  // [n, channels, plane] of out, or absent
  bool scales_each = false;  // it is [V, n, channels, plane]
  T* out = nullptr;          // [V, n, channels, plane]
  bool accumulate = false;   // beta = 1
  // On the CPU, of an input of which a max pool took some elements (convolution_picks.h): in is [.., n, channels, picked], and times `factor` (or 1)
  // what is at the `places` [n, channels, picked] of planes that are zero elsewhere. Strides are 1.
  int64_t picked = 0;
  const T *places = nullptr, *factor = nullptr;
};

// Pack num kernels, w_batch apart, for the direction `up` or down; convolution_packed_size apart.
template <class T>
inline KernelStub<void(const Context&, const Convolution&, bool up, int64_t num, const T* w, int64_t w_batch, T* packed)> convolution_pack_stub{
    "convolution_pack"};

template <class T>
inline KernelStub<void(const Context&, const Convolution&, const ConvolutionProduct<T>&)> convolution_product_stub{"convolution_product"};

// out[v, i / images, c] += Σ_l y[v, i, c, l]; out[v] rows out_batch apart, blocks of `images` examples out_example apart.
template <class T>
inline KernelStub<void(const Context&, int64_t V, int64_t n, int64_t channels, int64_t plane, const T* y, int64_t images, T* out, int64_t out_batch,
                       int64_t out_example)>
    channel_sum_stub{"channel_sum"};

// columns [n, positions, CX · taps] of x, positions = y_plane; groups must be 1. The factor of per-example gradients with few positions.
template <class T>
inline KernelStub<void(const Context&, const Convolution&, int64_t n, const T* x, int64_t prepared, T* columns)> convolution_columns_stub{
    "convolution_columns"};

}  // namespace infl
