// Where a convolution's taps read, for all directions. Along an axis, output number q of a phase lies at first + step·q and its tap j reads the input
// at
//
//   spacing · q + base + shift · j,      tap j being number k_first + k_step · j of the kernel
//
// Downwards there is one phase, with all taps. Upwards, outputs of equal residue modulo the stride are a phase and have the taps that reach them:
// each phase is a convolution of spacing 1, and no operation is spent on the zeros between inputs.
#pragma once

#include <numeric>

#include "kernels/convolution.h"
#include "kernels/cuda/launch.h"

namespace infl::cuda {

struct PhaseAxis {
  int outputs, taps, spacing, base, shift, step, first, k_first, k_step;
};

struct ConvolutionAxis {
  int in_size, out_size, kernel, stride, dilation, padding, phases, k_step;

  __device__ PhaseAxis down() const { return {out_size, kernel, stride, -padding, dilation, 1, 0, 0, 1}; }

  __device__ PhaseAxis up(int phase) const {
    int k = 0;
    while (k < k_step && (phase + padding - k * dilation) % stride != 0) ++k;
    const int taps = k < k_step && k < kernel ? (kernel - 1 - k) / k_step + 1 : 0;
    return {(out_size - phase + stride - 1) / stride,
            taps,
            1,
            (phase + padding - k * dilation) / stride,
            -(k_step * dilation / stride),
            stride,
            phase,
            k,
            k_step};
  }
};

struct ConvolutionShape {
  bool up = false;
  int groups = 1, rows = 1, inner = 1, taps = 1;  // channels of a group of the output and of the input
  int in_plane = 1, out_plane = 1;
  int64_t in_image = 1, out_image = 1;  // elements
  ConvolutionAxis axes[3];

  ConvolutionShape(const Convolution& c, bool up_) : up(up_) {
    constexpr int64_t kMost = int64_t{1} << 31;
    const int64_t x_image = c.x_channels * c.x_plane(), y_image = c.y_channels * c.y_plane();
    if (x_image >= kMost || y_image >= kMost || c.weight_size() >= kMost) {
      throw std::invalid_argument("convolution: expected images and kernels of fewer than 2^31 elements, got " + std::to_string(x_image) + ", " +
                                  std::to_string(y_image) + " and " + std::to_string(c.weight_size()) + ".");
    }
    groups = static_cast<int>(c.groups);
    rows = static_cast<int>((up ? c.x_channels : c.y_channels) / c.groups);
    inner = static_cast<int>((up ? c.y_channels : c.x_channels) / c.groups);
    taps = static_cast<int>(c.taps());
    in_plane = static_cast<int>(up ? c.y_plane() : c.x_plane());
    out_plane = static_cast<int>(up ? c.x_plane() : c.y_plane());
    in_image = up ? y_image : x_image;
    out_image = up ? x_image : y_image;
    for (int a = 0; a < 3; ++a) {
      ConvolutionAxis& axis = axes[a];
      axis.in_size = static_cast<int>(up ? c.y_size[a] : c.x_size[a]);
      axis.out_size = static_cast<int>(up ? c.x_size[a] : c.y_size[a]);
      axis.kernel = static_cast<int>(c.kernel[a]);
      axis.stride = static_cast<int>(c.stride[a]);
      axis.dilation = static_cast<int>(c.dilation[a]);
      axis.padding = static_cast<int>(c.padding[a]);
      axis.phases = up ? std::min(axis.stride, axis.out_size) : 1;
      axis.k_step = axis.stride / std::gcd(axis.stride, axis.dilation);
    }
  }

  int64_t phases() const { return int64_t{axes[0].phases} * axes[1].phases * axes[2].phases; }
  // Of the largest phase, which is the first.
  int64_t outputs() const {
    int64_t count = 1;
    for (const ConvolutionAxis& axis : axes) count *= (axis.out_size + axis.phases - 1) / axis.phases;
    return count;
  }
  __device__ PhaseAxis axis(int a, int phase) const {
    if (!up) return axes[a].down();
    if (a == 0) return axes[0].up(phase / axes[2].phases / axes[1].phases);
    return a == 1 ? axes[1].up(phase / axes[2].phases % axes[1].phases) : axes[2].up(phase % axes[2].phases);
  }
};

// Three coordinates of a number that counts with the last axis fastest.
struct Place3 {
  int d, h, w;
};

__device__ inline Place3 place_of(int number, int height, int width) {
  const int line = number / width;
  return {line / height, line % height, number % width};
}

__device__ inline int outputs_of(const PhaseAxis* axes) { return axes[0].outputs * axes[1].outputs * axes[2].outputs; }

// Where in the output's plane an output of a phase lies.
__device__ inline int pixel_of(const ConvolutionShape& shape, const PhaseAxis* axes, const Place3& at) {
  const int d = at.d * axes[0].step + axes[0].first, h = at.h * axes[1].step + axes[1].first, w = at.w * axes[2].step + axes[2].first;
  return (d * shape.axes[1].out_size + h) * shape.axes[2].out_size + w;
}

// An output of a phase, by its number among those of all images: its image, its place in the phase, and where the first tap would read. A number
// beyond is not inside and stands for the first output.
struct PhaseOutput {
  bool inside;
  int64_t image;
  Place3 at, start;

  __device__ PhaseOutput(int64_t number, int64_t images, const PhaseAxis* axes) {
    const int count = outputs_of(axes);
    inside = number < images * count;
    image = inside ? number / count : 0;
    at = place_of(inside ? static_cast<int>(number - image * count) : 0, axes[1].outputs, axes[2].outputs);
    start = {at.d * axes[0].spacing + axes[0].base, at.h * axes[1].spacing + axes[1].base, at.w * axes[2].spacing + axes[2].base};
  }
};

}  // namespace infl::cuda
