// A thread an element of the side that is written, so neighbouring threads write neighbouring addresses; maps are walked by division, 32 bits wide.
// Where elements meet, one thread adds them up in order: no atomics, results repeat.
#include "kernels/movement.h"

#include <numeric>

#include "kernels/cuda/vector.h"

namespace infl {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// Threads over the elements of a row, blocks of the second grid axis over rows.
dim3 row_blocks(int64_t rows, int64_t width) {
  const int64_t across = std::clamp<int64_t>(ceil_div(width, kThreads), 1, kMaxBlocks);
  return {static_cast<unsigned>(across), static_cast<unsigned>(std::clamp<int64_t>(rows, 1, kMaxGridY)), 1};
}

// Some axes of a map.
struct Axes {
  int rank = 0;
  uint32_t size = 1;
  uint32_t shape[StridedMap::kMaxRank];
  int64_t x_stride[StridedMap::kMaxRank], y_stride[StridedMap::kMaxRank];

  void add(int64_t length, int64_t x_step, int64_t y_step) {
    shape[rank] = static_cast<uint32_t>(length);
    x_stride[rank] = x_step;
    y_stride[rank++] = y_step;
    size *= static_cast<uint32_t>(length);
  }
  // Offsets of the i-th element, the last axis running fastest.
  __host__ __device__ void locate(uint32_t i, int64_t& x, int64_t& y) const {
    for (int k = rank - 1; k >= 0; --k) {
      const uint32_t rest = i / shape[k], at = i - rest * shape[k];
      x += at * x_stride[k];
      y += at * y_stride[k];
      i = rest;
    }
  }
};

void check_size(int64_t size) {
  if (size >= int64_t{1} << 31)
    throw std::invalid_argument("movement: expected an example of fewer than 2^31 elements, got " + std::to_string(size) + ".");
}

template <class T>
__global__ void strided_gather_kernel(int64_t rows, Axes axes, const T* x, int64_t x_ld, T* y, int64_t y_ld) {
  for (int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < axes.size; i += gridDim.x * blockDim.x) {
      int64_t from = 0, to = 0;
      axes.locate(i, from, to);
      y[r * y_ld + to] = x[r * x_ld + from];
    }
  }
}

template <class T>
void strided_gather(const Context& ctx, int64_t rows, const StridedMap& map, const T* x, int64_t x_ld, T* y, int64_t y_ld) {
  if (map.size == 0 || rows == 0) return;
  check_size(map.size);
  Axes axes;
  int64_t y_step = map.size;
  for (int k = 0; k < map.rank; ++k) {
    y_step /= map.shape[k];
    axes.add(map.shape[k], map.stride[k], y_step);
  }
  launch(ctx, "strided_gather", &strided_gather_kernel<T>, row_blocks(rows, map.size), dim3(kThreads), 0, rows, axes, x + map.offset, x_ld, y, y_ld);
}

template <class T>
__global__ void strided_scatter_kernel(int64_t rows, Axes targets, Axes summed, const T* y, int64_t y_ld, T* x, int64_t x_ld, bool accumulate) {
  for (int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < targets.size; i += gridDim.x * blockDim.x) {
      int64_t to = r * x_ld, from = r * y_ld;
      targets.locate(i, to, from);
      T sum = 0;
      for (uint32_t s = 0; s < summed.size; ++s) {
        int64_t at = from, unmoved = 0;
        summed.locate(s, unmoved, at);
        sum += y[at];
      }
      x[to] = accumulate ? x[to] + sum : sum;
    }
  }
}

// The map's axes in three parts: `targets`, along which no element is met twice; `summed`, which do not move it (expansions); and `overlapping`
// (windows), whose combinations are launched one after the other, so that no two threads ever write one element.
struct Parts {
  Axes targets, summed, overlapping;
};

Parts split(const StridedMap& map) {
  Parts parts;
  int64_t y_step[StridedMap::kMaxRank];
  int64_t step = map.size;
  for (int k = 0; k < map.rank; ++k) y_step[k] = step /= map.shape[k];
  std::vector<int> by_length(map.rank);
  std::iota(by_length.begin(), by_length.end(), 0);
  std::stable_sort(by_length.begin(), by_length.end(), [&](int a, int b) { return map.shape[a] > map.shape[b]; });
  std::vector<bool> is_target(map.rank, false);
  const auto is_injective = [&] {
    std::vector<std::pair<int64_t, int64_t>> chosen;
    for (int k = 0; k < map.rank; ++k) {
      if (is_target[k]) chosen.emplace_back(std::abs(map.stride[k]), map.shape[k]);
    }
    std::sort(chosen.begin(), chosen.end());
    int64_t reach = 0;
    for (const auto& [stride, length] : chosen) {
      if (stride <= reach) return false;
      reach += stride * (length - 1);
    }
    return true;
  };
  for (int k : by_length) {
    is_target[k] = map.stride[k] != 0;
    if (is_target[k] && !is_injective()) is_target[k] = false;
  }
  for (int k = 0; k < map.rank; ++k) {
    Axes& part = is_target[k] ? parts.targets : map.stride[k] == 0 ? parts.summed : parts.overlapping;
    part.add(map.shape[k], map.stride[k], y_step[k]);
  }
  return parts;
}

template <class T>
void copy_rows(const Context& ctx, int64_t rows, int64_t width, const T* x, int64_t x_ld, T* y, int64_t y_ld, bool accumulate);

template <class T>
void strided_scatter(const Context& ctx, int64_t rows, const StridedMap& map, const T* y, int64_t y_ld, T* x, int64_t x_ld, int64_t width,
                     bool accumulate) {
  if (rows == 0) return;
  const Parts parts = split(map);
  const bool assigns = !accumulate && parts.overlapping.rank == 0;
  if (!accumulate && (map.size == 0 || !assigns || parts.targets.size != width)) {
    copy_rows<T>(ctx, rows, width, nullptr, 0, x, x_ld, false);
  }
  if (map.size == 0) return;
  check_size(std::max(map.size, width));
  for (uint32_t o = 0; o < parts.overlapping.size; ++o) {
    int64_t to = map.offset, from = 0;
    parts.overlapping.locate(o, to, from);
    launch(ctx, "strided_scatter", &strided_scatter_kernel<T>, row_blocks(rows, parts.targets.size), dim3(kThreads), 0, rows, parts.targets,
           parts.summed, y + from, y_ld, x + to, x_ld, !assigns);
  }
}

template <class T>
struct CopyRows {
  int64_t width, x_ld, y_ld;
  const T* x;
  T* y;
  bool accumulate;
  template <int W>
  __device__ void run(int64_t i) const {
    const int64_t r = i / width, j = i - r * width;
    Vector<T, W> value{};
    if (x) value = load<W>(x + r * x_ld + j);
    T* to = y + r * y_ld + j;
    if (accumulate) {
      const auto before = load<W>(to);
      for (int k = 0; k < W; ++k) value.v[k] += before.v[k];
    }
    store<W>(to, value);
  }
};

template <class T>
void copy_rows(const Context& ctx, int64_t rows, int64_t width, const T* x, int64_t x_ld, T* y, int64_t y_ld, bool accumulate) {
  if (accumulate && x == nullptr) return;
  const int64_t W = kVectorWidth<T>;
  const CopyRows<T> copy{width, x_ld, y_ld, x, y, accumulate};
  if (rows == 1) return for_each_flat<T>(ctx, "copy_rows", 1, width, {x, y}, copy);
  for_each<T>(ctx, "copy_rows", rows * width, width % W == 0 && x_ld % W == 0 && y_ld % W == 0 && is_aligned({x, y}), copy);
}

template <class T>
__global__ void index_gather_kernel(int64_t rows, int64_t size, const int64_t* index, T fill, const T* x, int64_t x_ld, T* y, int64_t y_ld) {
  for (int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    for (int64_t j = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; j < size; j += int64_t{gridDim.x} * blockDim.x) {
      y[r * y_ld + j] = index[j] < 0 ? fill : x[r * x_ld + index[j]];
    }
  }
}

template <class T>
void index_gather(const Context& ctx, int64_t rows, int64_t size, const int64_t* index, T fill, const T* x, int64_t x_ld, T* y, int64_t y_ld) {
  if (rows == 0 || size == 0) return;
  launch(ctx, "index_gather", &index_gather_kernel<T>, row_blocks(rows, size), dim3(kThreads), 0, rows, size, index, fill, x, x_ld, y, y_ld);
}

template <class T>
__global__ void index_scatter_kernel(int64_t rows, int64_t width, const int64_t* begin, const int64_t* sources, const T* y, int64_t y_ld, T* x,
                                     int64_t x_ld, bool accumulate) {
  for (int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < width; i += int64_t{gridDim.x} * blockDim.x) {
      T sum = accumulate ? x[r * x_ld + i] : T(0);
      for (int64_t k = begin[i]; k < begin[i + 1]; ++k) sum += y[r * y_ld + sources[k]];
      x[r * x_ld + i] = sum;
    }
  }
}

template <class T>
void index_scatter(const Context& ctx, int64_t rows, int64_t width, const int64_t* begin, const int64_t* sources, const T* y, int64_t y_ld, T* x,
                   int64_t x_ld, bool accumulate) {
  if (rows == 0 || width == 0) return;
  launch(ctx, "index_scatter", &index_scatter_kernel<T>, row_blocks(rows, width), dim3(kThreads), 0, rows, width, begin, sources, y, y_ld, x, x_ld,
         accumulate);
}

// bad[0] = 1 and bad[1] = the index, of any one that is out of bounds; written so that NaN is.
template <class T>
__global__ void check_indices_kernel(int64_t size, const T* index, T low, T high, T* bad) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += step) {
    const T value = index[i];
    if (!(value >= low && value < high && std::floor(value) == value)) {
      bad[1] = value;
      bad[0] = T(1);
    }
  }
}

template <class T>
void check_indices(const Context& ctx, int64_t size, const T* index, int64_t bound, bool from_end, const char* who) {
  if (size == 0) return;
  Buffer<T> bad(ctx, 2);
  copy_rows<T>(ctx, 1, 2, nullptr, 0, bad.data(), 0, false);
  launch(ctx, "check_indices", &check_indices_kernel<T>, blocks_for(size, kThreads), dim3(kThreads), 0, size, index,
         from_end ? -static_cast<T>(bound) : T(0), static_cast<T>(bound), bad.data());
  T found[2];
  ctx.runtime->download(found, bad.data(), sizeof(found), ctx.stream);
  if (found[0] == T(0)) return;
  throw std::out_of_range(std::string(who) + ": expected whole indices in [" + std::to_string(from_end ? -bound : 0) + ", " + std::to_string(bound) +
                          "), got " + std::to_string(found[1]) + "; correct the data.");
}

template <class T>
__device__ int64_t selected(const AxisSelection& s, const T* index, int64_t o, int64_t j, int64_t i) {
  const auto k = static_cast<int64_t>(index[o * s.index_outer + j * s.index_count + i * s.index_inner]);
  return k < 0 ? k + s.length : k;
}

template <class T>
__global__ void select_axis_kernel(int64_t rows, int64_t n, AxisSelection s, const T* index, const T* x, T* y) {
  const int64_t x_width = s.outer * s.length * s.inner, y_width = s.outer * s.count * s.inner;
  for (int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    for (int64_t e = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; e < y_width; e += int64_t{gridDim.x} * blockDim.x) {
      const int64_t i = e % s.inner, j = e / s.inner % s.count, o = e / s.inner / s.count;
      y[r * y_width + e] = x[r * x_width + (o * s.length + selected(s, index + r % n * s.index_width, o, j, i)) * s.inner + i];
    }
  }
}

template <class T>
void select_axis(const Context& ctx, int64_t V, int64_t n, const AxisSelection& s, const T* index, const T* x, T* y) {
  if (V * n == 0) return;
  launch(ctx, "select_axis", &select_axis_kernel<T>, row_blocks(V * n, s.outer * s.count * s.inner), dim3(kThreads), 0, V * n, n, s, index, x, y);
}

// A thread owns one line along the selected axis and goes through its indices in order.
template <class T>
__global__ void select_axis_transposed_kernel(int64_t rows, int64_t n, AxisSelection s, const T* index, const T* g_y, T* g_x, bool accumulate) {
  const int64_t lines = s.outer * s.inner;
  for (int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    for (int64_t e = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; e < lines; e += int64_t{gridDim.x} * blockDim.x) {
      const int64_t i = e % s.inner, o = e / s.inner;
      T* line = g_x + (r * s.outer + o) * s.length * s.inner + i;
      if (!accumulate) {
        for (int64_t k = 0; k < s.length; ++k) line[k * s.inner] = T(0);
      }
      for (int64_t j = 0; j < s.count; ++j) {
        line[selected(s, index + r % n * s.index_width, o, j, i) * s.inner] += g_y[((r * s.outer + o) * s.count + j) * s.inner + i];
      }
    }
  }
}

template <class T>
void select_axis_transposed(const Context& ctx, int64_t V, int64_t n, const AxisSelection& s, const T* index, const T* g_y, T* g_x, bool accumulate) {
  if (V * n == 0) return;
  launch(ctx, "select_axis_transposed", &select_axis_transposed_kernel<T>, row_blocks(V * n, s.outer * s.inner), dim3(kThreads), 0, V * n, n, s,
         index, g_y, g_x, accumulate);
}

INFL_REGISTER_CUDA(strided_gather_stub, strided_gather)
INFL_REGISTER_CUDA(strided_scatter_stub, strided_scatter)
INFL_REGISTER_CUDA(copy_rows_stub, copy_rows)
INFL_REGISTER_CUDA(index_gather_stub, index_gather)
INFL_REGISTER_CUDA(index_scatter_stub, index_scatter)
INFL_REGISTER_CUDA(check_indices_stub, check_indices)
INFL_REGISTER_CUDA(select_axis_stub, select_axis)
INFL_REGISTER_CUDA(select_axis_transposed_stub, select_axis_transposed)

}  // namespace
}  // namespace cuda
}  // namespace infl
