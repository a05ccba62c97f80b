// A thread an output coordinate, for a share of the planes: its three bands are found once and the planes' inputs read from the caches, where
// neighbouring coordinates find the same ones. Operations of an output: twice the product of its bands' widths (4 inputs for a bilinear one), so the
// bytes of x and y decide unless an axis shrinks by much. Where the weights of a coordinate begin is summed by a launch of its own.
#include "kernels/resize.h"

#include "kernels/cuda/launch.h"

namespace infl {
namespace cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
struct Axes {
  ResizeAxis<T> axis[3];
  int64_t* first[3];  // [out]: the coordinate's first weight
};

// first[o] = Σ_{o' < o} (end[o'] − begin[o']): a warp an axis, 32 coordinates a step.
template <class T>
__global__ void first_weights_kernel(Axes<T> axes) {
  const ResizeAxis<T>& axis = axes.axis[blockIdx.x];
  int64_t before = 0;
  for (int64_t o0 = 0; o0 < axis.out; o0 += kWarp) {
    const int64_t o = o0 + threadIdx.x;
    const int64_t width = o < axis.out ? axis.end[o] - axis.begin[o] : 0;
    int64_t sum = width;
    for (unsigned step = 1; step < kWarp; step *= 2) {
      const int64_t other = __shfl_up_sync(0xffffffffu, sum, step);
      if (threadIdx.x >= step) sum += other;
    }
    if (o < axis.out) axes.first[blockIdx.x][o] = before + sum - width;
    before += __shfl_sync(0xffffffffu, sum, kWarp - 1);
  }
}

// The inputs begin <= k < end of an output coordinate, and their weights.
template <class T>
struct Band {
  int64_t begin, end;
  const T* weight;
};

template <class T>
__device__ Band<T> band(const Axes<T>& axes, int a, int64_t o) {
  const ResizeAxis<T>& axis = axes.axis[a];
  return {axis.begin[o], axis.end[o], axis.weight + axes.first[a][o]};
}

template <class T>
__global__ void __launch_bounds__(kThreads) resize_kernel(Axes<T> axes, int64_t planes, const T* x, T* y, bool accumulate) {
  const int64_t rows = axes.axis[1].in, cols = axes.axis[2].in, in = axes.axis[0].in * rows * cols;
  const int64_t out_rows = axes.axis[1].out, out_cols = axes.axis[2].out, out = axes.axis[0].out * out_rows * out_cols;
  for (int64_t e = int64_t{blockIdx.x} * kThreads + threadIdx.x; e < out; e += int64_t{gridDim.x} * kThreads) {
    const Band<T> depth = band(axes, 0, e / out_cols / out_rows), height = band(axes, 1, e / out_cols % out_rows),
                  width = band(axes, 2, e % out_cols);
    for (int64_t p = blockIdx.y; p < planes; p += gridDim.y) {
      T sum = accumulate ? y[p * out + e] : T(0);
      for (int64_t i = depth.begin; i < depth.end; ++i) {
        for (int64_t j = height.begin; j < height.end; ++j) {
          const T* line = x + p * in + (i * rows + j) * cols;
          T of_line = 0;
          for (int64_t k = width.begin; k < width.end; ++k) of_line += width.weight[k - width.begin] * line[k];
          sum += depth.weight[i - depth.begin] * height.weight[j - height.begin] * of_line;
        }
      }
      y[p * out + e] = sum;
    }
  }
}

template <class T>
void resize(const Context& ctx, const ResizeAxis<T>* axes, int64_t planes, const T* x, T* y, bool accumulate) {
  if (planes == 0) return;
  Axes<T> all{{axes[0], axes[1], axes[2]}, {}};
  Buffer<int64_t> first(ctx, axes[0].out + axes[1].out + axes[2].out);
  all.first[0] = first.data();
  for (int a = 1; a < 3; ++a) all.first[a] = all.first[a - 1] + axes[a - 1].out;
  launch(ctx, "resize", &first_weights_kernel<T>, dim3(3), dim3(kWarp), 0, all);
  const dim3 across = blocks_for(axes[0].out * axes[1].out * axes[2].out, kThreads);
  const auto shares = static_cast<unsigned>(std::clamp<int64_t>(ceil_div(kMaxBlocks, across.x), 1, std::min(planes, kMaxGridY)));
  launch(ctx, "resize", &resize_kernel<T>, dim3(across.x, shares), dim3(kThreads), 0, all, planes, x, y, accumulate);
}

INFL_REGISTER_CUDA(resize_stub, resize)

}  // namespace
}  // namespace cuda
}  // namespace infl
