// winograd: how convolutions with 3 × 3 kernels of stride 1 are computed on the CPU (convolution.h), and which.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/convolution_shape.h"

namespace infl {

// Winograd's minimal filtering F(4 × 4, 3 × 3) (Lavin and Gray 2016, https://arxiv.org/abs/1509.09308): a tile of 4 × 4 outputs takes 36
// multiplications per pair of channels instead of 144, after a transform of each channel of its input and before one of each channel of its output.
inline constexpr int64_t kWinogradOutputs = 4, kWinogradInputs = 6;  // edges of a tile
inline constexpr int64_t kWinogradElements = kWinogradInputs * kWinogradInputs;
inline constexpr int64_t kWinogradBlock = 16;  // channels lie in blocks of as many as the widest vector has lanes

inline int64_t winograd_channels(int64_t channels) { return (channels + kWinogradBlock - 1) / kWinogradBlock * kWinogradBlock; }

inline int64_t winograd_tiles(const int64_t* size) {
  return ((size[1] + kWinogradOutputs - 1) / kWinogradOutputs) * ((size[2] + kWinogradOutputs - 1) / kWinogradOutputs);
}

// Whether the CPU takes Winograd's algorithm, in all three directions: by the shape, from counted operations.
inline bool takes_winograd(const Convolution& c) {
  // Of one channel and tile: 144 multiply-adds to transform an input, 36 loads and stores, and its share of turning channels innermost. An output
  // takes about as long.
  constexpr int64_t kTransform = 250;
  constexpr int64_t kMostWeights = 256 * 256;  // transformed weights (9 MB in float32) stay in the third-level cache
  if (c.direct || c.groups != 1 || c.kernel[0] != 1 || c.x_size[0] != 1 || c.y_size[0] != 1 || c.x_channels * c.y_channels > kMostWeights)
    return false;
  for (int a = 1; a < 3; ++a) {
    const int64_t high = c.y_size[a] - c.x_size[a] + 2 - c.padding[a];
    if (c.kernel[a] != 3 || c.stride[a] != 1 || c.dilation[a] != 1 || c.padding[a] < 0 || c.padding[a] > 2 || high < 0 || high > 2) return false;
  }
  const int64_t x_blocks = winograd_channels(c.x_channels), y_blocks = winograd_channels(c.y_channels);
  const int64_t products = kWinogradElements * std::max(c.x_channels * y_blocks, x_blocks * c.y_channels);
  const int64_t tiles = winograd_tiles(c.x_size) + winograd_tiles(c.y_size);
  return tiles * (products + kTransform * (x_blocks + y_blocks)) < 2 * 9 * c.x_channels * c.y_channels * std::min(c.x_plane(), c.y_plane());
}

}  // namespace infl
