// Lines of the input are added up first (contiguous), then neighbours within the sum of lines.
#include "kernels/resize.h"

#include "kernels/cpu/parallel.h"

namespace infl {
namespace INFL_ISA {
namespace {

template <class T>
T* line_of(int64_t size) {
  static thread_local std::vector<T> line;
  if (static_cast<int64_t>(line.size()) < size) line.resize(size);
  return line.data();
}

template <class T>
void resize_plane(const ResizeAxis<T>* axes, const T* x, T* line, T* y, bool accumulate) {
  const ResizeAxis<T>&depth = axes[0], &height = axes[1], &width = axes[2];
  const T* of_planes = depth.weight;
  for (int64_t d = 0; d < depth.out; of_planes += depth.end[d] - depth.begin[d], ++d) {
    const T* of_lines = height.weight;
    for (int64_t h = 0; h < height.out; of_lines += height.end[h] - height.begin[h], ++h) {
      for (int64_t k = 0; k < width.in; ++k) line[k] = T(0);
      for (int64_t i = depth.begin[d]; i < depth.end[d]; ++i) {
        for (int64_t j = height.begin[h]; j < height.end[h]; ++j) {
          const T weight = of_planes[i - depth.begin[d]] * of_lines[j - height.begin[h]];
          const T* row = x + (i * height.in + j) * width.in;
#pragma omp simd
          for (int64_t k = 0; k < width.in; ++k) line[k] += weight * row[k];
        }
      }
      const T* weight = width.weight;
      for (int64_t c = 0; c < width.out; ++c) {
        T sum = accumulate ? *y : T(0);
        for (int64_t k = width.begin[c]; k < width.end[c]; ++k) sum += *weight++ * line[k];
        *y++ = sum;
      }
    }
  }
}

template <class T>
void resize(const Context& ctx, const ResizeAxis<T>* axes, int64_t planes, const T* x, T* y, bool accumulate) {
  const int64_t in = axes[0].in * axes[1].in * axes[2].in, out = axes[0].out * axes[1].out * axes[2].out;
  parallel_for(threads_for(ctx, 4 * planes * std::max(in, out)), planes,
               [&](int64_t p) { resize_plane(axes, x + p * in, line_of<T>(axes[2].in), y + p * out, accumulate); });
}

INFL_REGISTER_CPU(resize_stub, resize)

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
