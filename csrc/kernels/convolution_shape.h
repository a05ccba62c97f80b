// The sizes of a convolution (convolution.h).
#pragma once

#include <cstdint>

namespace infl {

struct Convolution {
  int64_t groups = 1, x_channels = 0, y_channels = 0;
  int64_t x_size[3] = {1, 1, 1}, y_size[3] = {1, 1, 1};
  int64_t kernel[3] = {1, 1, 1}, stride[3] = {1, 1, 1}, dilation[3] = {1, 1, 1}, padding[3] = {0, 0, 0};
  bool direct = false;  // sums as in the formula, whatever the shape

  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t x_plane() const { return x_size[0] * x_size[1] * x_size[2]; }
  int64_t y_plane() const { return y_size[0] * y_size[1] * y_size[2]; }
  int64_t weight_size() const { return y_channels * (x_channels / groups) * taps(); }
};

}  // namespace infl
