// convolution_lanes: what the lanes of a vector are in a convolution's products on the CPU (convolution.h), where they are not Winograd's.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/context.h"
#include "kernels/convolution_shape.h"

namespace infl {

//   positions  neighbouring outputs of one channel; a register tile has several channels
//   channels   channels of the output at one position; a register tile has several positions
//   columns    `up`: pairs (column of the kernel, channel of the output) at one position of the input, whose products are added up, shifted, along
//   lines:
//              no multiplication with the zeros around a line, and lanes that few channels would leave empty are used
enum class ConvolutionLanes { positions, channels, columns };

inline constexpr int64_t kChannelBlock = 16;  // channels (or pairs) that a block of packed weights has
inline constexpr int64_t kTurn = 8;           // cycles to turn a vector of channels at one position into or out of lines of positions

inline int64_t channel_blocks(int64_t channels) { return (channels + kChannelBlock - 1) / kChannelBlock; }

// Pairs (output line, row of the kernel) whose input line exists.
inline int64_t convolution_line_pairs(const Convolution& c, bool up) {
  const int64_t in = up ? c.y_size[1] : c.x_size[1], out = up ? c.x_size[1] : c.y_size[1], s = c.stride[1];
  int64_t pairs = 0;
  for (int64_t k = 0; k < c.kernel[1]; ++k) {
    const int64_t e = up ? c.padding[1] - k * c.dilation[1] : k * c.dilation[1] - c.padding[1];  // input line = s · output line + e
    const int64_t first = e < 0 ? (-e + s - 1) / s : 0, last = in - 1 - e < 0 ? -1 : (in - 1 - e) / s;
    pairs += std::max<int64_t>(0, std::min(last, out - 1) - first + 1);
  }
  return pairs;
}

// By the shape, from counted cycles of one image: multiplications of a vector, and what it takes to turn or to add up results.
inline ConvolutionLanes convolution_lanes(const Convolution& c, bool up) {
  if (c.groups != 1 || (up && (c.stride[0] != 1 || c.stride[1] != 1 || c.stride[2] != 1))) return ConvolutionLanes::positions;
  const int64_t lanes = vector_bytes(active_isa()) / 4;
  const int64_t *out = up ? c.x_size : c.y_size, *in = up ? c.y_size : c.x_size;
  const int64_t rows = up ? c.x_channels : c.y_channels, inner = up ? c.y_channels : c.x_channels;
  const auto vectors = [lanes](int64_t n) { return (n + lanes - 1) / lanes; };
  const int64_t stride = up ? 1 : c.stride[2], line = out[2] + ((c.kernel[2] - 1) * c.dilation[2] + stride - 1) / stride;
  const int64_t pairs = c.kernel[0] == 1 ? convolution_line_pairs(c, up) : out[1] * c.kernel[0] * c.kernel[1];  // of a plane
  const int64_t positions = rows * inner * c.taps() * out[0] * std::min(out[1] * vectors(out[2]), vectors((out[1] - 1) * line + out[2]));
  const int64_t turned = out[0] * out[1] * out[2] * kTurn;
  constexpr int64_t kShortest = 4;  // tiles of fewer positions wait for their sums
  const int64_t channels = out[2] < kShortest ? positions : vectors(rows) * (out[0] * pairs * out[2] * c.kernel[2] * inner + turned);
  int64_t columns = positions;
  if (up && c.kernel[2] > 1 && rows <= kChannelBlock && in[2] >= kShortest) {
    const int64_t added = 2 * c.kernel[2] * out[0] * out[1] * out[2] * vectors(kChannelBlock);
    columns = vectors(c.kernel[2] * rows) * (out[0] * in[2] * (pairs * inner + 2 * out[1])) + added + vectors(rows) * turned;
  }
  if (10 * std::min(channels, columns) > 9 * positions) return ConvolutionLanes::positions;  // whose tiles take fewer instructions
  return columns < channels ? ConvolutionLanes::columns : ConvolutionLanes::channels;
}

// Elements of one kernel packed for lanes other than positions.
inline int64_t channels_packed_size(const Convolution& c, bool up, ConvolutionLanes lanes) {
  const int64_t rows = up ? c.x_channels : c.y_channels, inner = up ? c.y_channels : c.x_channels;
  const int64_t columns = lanes == ConvolutionLanes::columns ? c.kernel[2] : 1;
  return channel_blocks(rows * columns) * kChannelBlock * inner * (c.taps() / columns);
}

}  // namespace infl
