// convolution_picks: a convolution of which a max pool takes some elements, and their cotangent. Of windows of two by two only a quarter of the
// convolution's elements reach anything later, and which these are is known from the forward pass. Kernels of the CPU with vectors of 64 bytes.
//
//   product  out[o, q] = (Σ_{c, k} w[o, c, k] x[c, i(o, q) + k − padding] + b[o]) · scale[o, q]      i(o, q): the place that window q chose in plane
//   o weights  w[o, c, k] = Σ_q g[o, q] x[c, i(o, q) + k − padding]
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/convolution.h"
#include "kernels/pooling.h"

namespace infl {

inline constexpr int64_t kMostPickRows = 7, kPickWindowRows = 2;

// The lanes of a vector: some neighbouring windows of a line by some channels, `slot` of them (a power of two).
template <class T>
struct PickLanes {
  explicit PickLanes(int64_t channels)
      : lanes(vector_bytes(active_isa()) / static_cast<int64_t>(sizeof(T))), blocks((channels + lanes - 1) / lanes), slot(1) {
    while (slot < std::min(channels, lanes)) slot *= 2;
    windows = lanes / slot;
  }
  // The vectors of a line of windows: body(first window, number of windows, first column that the group of vectors reads, first of its group).
  template <class Body>
  void each_vector(const Windows& w, const Body& body) const {
    for (int64_t q = 0; q < w.out[2];) {
      const int64_t column = w.begin[2][q];
      for (bool first = true; q < w.out[2] && w.begin[2][q] >= column && w.end[2][q] - column <= lanes; first = false) {
        int64_t count = 1;
        while (count < windows && q + count < w.out[2] && w.begin[2][q + count] >= column && w.end[2][q + count] - column <= lanes) ++count;
        body(q, count, column, first);
        q += count;
      }
    }
  }
  int64_t line_vectors(const Windows& w) const {
    int64_t count = 0;
    each_vector(w, [&](int64_t, int64_t, int64_t, bool) { ++count; });
    return count;
  }
  int64_t lanes, blocks, slot, windows;
};

// Elements of the places as the kernels read them, of one example: [block of channels][line of windows][vector][lane].
template <class T>
int64_t pick_places_size(const Convolution& c, const Windows& w) {
  const PickLanes<T> lanes(c.y_channels);
  return lanes.blocks * w.out[1] * lanes.line_vectors(w) * lanes.lanes;
}

// Elements of one packed kernel: [block of channels][channel of x][column of the kernel][its row][lane].
inline int64_t pick_packed_size(const Convolution& c) { return channel_blocks(c.y_channels) * kChannelBlock * c.x_channels * c.taps(); }

// Whether that takes fewer cycles than all elements of the convolution, by counts: choosing lanes and multiplying by them takes 1.8 times as long as
// multiplying (9 / 5).
template <class T>
bool takes_picks(const Convolution& c, const Windows& w) {
  const int64_t vector = vector_bytes(active_isa());
  if (vector != 64 || takes_winograd(c) || c.groups != 1 || c.kernel[0] != 1 || c.x_size[0] != 1 || w.in[0] != 1 || w.out[0] != 1) return false;
  if (c.kernel[1] > kMostPickRows) return false;
  for (int a = 1; a < 3; ++a) {
    if (c.stride[a] != 1 || c.dilation[a] != 1 || c.padding[a] < 0 || c.padding[a] >= c.kernel[a] || w.in[a] != c.y_size[a] ||
        c.y_size[a] - c.x_size[a] > c.padding[a])
      return false;
  }
  const PickLanes<T> lanes(c.y_channels);
  for (int64_t h = 0; h < w.out[1]; ++h) {
    if (w.end[1][h] - w.begin[1][h] > kPickWindowRows || w.begin[1][h] + kPickWindowRows > w.in[1]) return false;
  }
  for (int64_t q = 0; q < w.out[2]; ++q) {
    if (w.end[2][q] - w.begin[2][q] > lanes.lanes) return false;
  }
  const int64_t terms = c.x_channels * c.taps();
  const int64_t picked = lanes.blocks * w.out[1] * lanes.line_vectors(w) * (9 * terms / 5 + kTurn);
  const int64_t whole =
      std::min(lanes.blocks * c.y_plane() * (terms + kTurn), c.y_channels * c.y_size[1] * ((c.y_size[2] + lanes.lanes - 1) / lanes.lanes) * terms);
  return 10 * picked < 9 * whole;
}

// places [n, pick_places_size] from index [n, y_channels, windows].
template <class T>
inline KernelStub<void(const Context&, const Convolution&, const Windows&, int64_t n, const T* index, T* places)> pick_places_stub{"pick_places"};

// num kernels, w_batch apart, pick_packed_size apart.
template <class T>
inline KernelStub<void(const Context&, const Convolution&, int64_t num, const T* w, int64_t w_batch, T* packed)> pick_pack_stub{"pick_pack"};

// `p` of the direction `down`, out [V, n, y_channels, windows], scale [n, y_channels, windows] or absent; kernels from pick_pack.
template <class T>
inline KernelStub<void(const Context&, const Convolution&, const Windows&, const T* places, const ConvolutionProduct<T>& p)> pick_product_stub{
    "pick_product"};

// out[v, i / images] += the kernel's gradient from x[v, i] (as convolution_weights has it) and g [V, n, y_channels, windows].
template <class T>
inline KernelStub<void(const Context&, const Convolution&, const Windows&, const T* places, int64_t V, int64_t n, const T* x, int64_t prepared,
                       const T* g, int64_t images, T* out, int64_t out_batch, int64_t out_example)>
    pick_weights_stub{"pick_weights"};

}  // namespace infl
