// Forward: a thread an output, or a warp where windows are large. Maxima are moved by index; where several outputs share an input, they are added in
// the order of outputs, in rounds that integers decide. Averages transposed: a thread an input, over the outputs whose windows have it; it reads the
// few y it needs from L1 and writes once.
#include "kernels/pooling.h"

#include <climits>

#include "kernels/cuda/row_reduction.h"
#include "kernels/cuda/vector.h"

namespace infl {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kLargeWindow = 32;  // inputs of a plane an output: from here on a warp a window

// body(place) for the inputs of output o that are lane's, in order; one lane has all.
template <int kLanes, class Body>
__device__ void each_of_window(const Windows& w, const int64_t (&o)[3], int lane, const Body& body) {
  const int64_t rows = (w.end[1][o[1]] - w.begin[1][o[1]] + w.dilation[1] - 1) / w.dilation[1];
  const int64_t cols = (w.end[2][o[2]] - w.begin[2][o[2]] + w.dilation[2] - 1) / w.dilation[2];
  for (int64_t i = w.begin[0][o[0]]; i < w.end[0][o[0]]; i += w.dilation[0]) {
    const int64_t corner = (i * w.in[1] + w.begin[1][o[1]]) * w.in[2] + w.begin[2][o[2]];
    if constexpr (kLanes == 1) {
      for (int64_t j = 0; j < rows; ++j) {
        for (int64_t k = 0; k < cols; ++k) body(corner + j * w.dilation[1] * w.in[2] + k * w.dilation[2]);
      }
    } else {
      for (uint32_t e = lane; e < static_cast<uint32_t>(rows * cols); e += kLanes) {
        const uint32_t j = e / static_cast<uint32_t>(cols), k = e - j * static_cast<uint32_t>(cols);
        body(corner + j * w.dilation[1] * w.in[2] + k * w.dilation[2]);
      }
    }
  }
}

__device__ inline void coordinates(const Windows& w, int64_t o, int64_t (&at)[3]) {
  at[2] = o % w.out[2];
  at[1] = o / w.out[2] % w.out[1];
  at[0] = o / w.out[2] / w.out[1];
}

template <class T>
struct Best {
  T value;
  int64_t place;

  // The first of equals; NaN is larger than any number, and of several the last is taken.
  __device__ void take(T other, int64_t other_place) {
    const bool is_nan = value != value, other_is_nan = other != other;
    const bool better = other_is_nan ? !is_nan || other_place > place : !is_nan && (other > value || (other == value && other_place < place));
    value = better ? other : value;
    place = better ? other_place : place;
  }
};

template <class T>
struct TakeBest {
  Best<T>& best;
  const T* x;
  __device__ void operator()(int64_t place) const { best.take(x[place], place); }
};

template <int kLanes, class T>
__global__ void __launch_bounds__(kThreads, 4) max_pool_kernel(Windows w, int64_t planes, const T* x, T* y, T* index) {
  const int64_t outputs = w.out_plane(), step = int64_t{gridDim.x} * (kThreads / kLanes);
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  for (int64_t e = int64_t{blockIdx.x} * (kThreads / kLanes) + threadIdx.x / kLanes; e < planes * outputs; e += step) {
    const int64_t p = e / outputs;
    int64_t o[3];
    coordinates(w, e - p * outputs, o);
    const T* plane = x + p * w.in_plane();
    const int64_t corner = (w.begin[0][o[0]] * w.in[1] + w.begin[1][o[1]]) * w.in[2] + w.begin[2][o[2]];
    Best<T> best{plane[corner], corner};
    each_of_window<kLanes>(w, o, lane, TakeBest<T>{best, plane});
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      const Best<T> other = row_reduction::shuffle_xor(best, distance);
      best.take(other.value, other.place);
    }
    if (lane == 0) {
      y[e] = best.value;
      index[e] = static_cast<T>(best.place);
    }
  }
}

// kernel<1> or kernel<32> on `outputs` outputs.
template <class One, class Many, class... Arguments>
void launch_windows(const Context& ctx, const char* who, const Windows& w, int64_t planes, One one, Many many, Arguments... arguments) {
  const int64_t outputs = planes * w.out_plane();
  if (outputs == 0) return;
  if (w.in_plane() >= kLargeWindow * w.out_plane()) {
    launch(ctx, who, many, blocks_for(outputs, kThreads / kWarp), dim3(kThreads), 0, w, planes, arguments...);
  } else {
    launch(ctx, who, one, blocks_for(outputs, kThreads), dim3(kThreads), 0, w, planes, arguments...);
  }
}

// Where a plane has 2^31 elements or more, a window could too.
void check_plane(const Windows& w) {
  if (w.in_plane() > INT_MAX || w.out_plane() > INT_MAX)
    throw std::invalid_argument("pooling: expected planes of fewer than 2^31 elements, got " + std::to_string(std::max(w.in_plane(), w.out_plane())) +
                                ".");
}

template <class T>
void max_pool(const Context& ctx, const Windows& w, int64_t planes, const T* x, T* y, T* index) {
  check_plane(w);
  launch_windows(ctx, "max_pool", w, planes, &max_pool_kernel<1, T>, &max_pool_kernel<kWarp, T>, x, y, index);
}

// Elements i of [planes, out_plane] and all right-hand sides of each.
template <class T>
struct PlaneGather {
  int64_t V, planes, in_plane, out_plane;
  const T *index, *in;
  T* out;
  template <int W>
  __device__ void run(int64_t i) const {
    const int64_t from = i / out_plane * in_plane + static_cast<int64_t>(index[i]);
    write_sides<1>(V, out + i, planes * out_plane, [&](int64_t v) { return load<1>(in + v * planes * in_plane + from); });
  }
};

template <class T>
void plane_gather(const Context& ctx, int64_t V, int64_t planes, int64_t in_plane, int64_t out_plane, const T* index, const T* in, T* out) {
  for_each<T>(ctx, "plane_gather", planes * out_plane, false, PlaneGather<T>{V, planes, in_plane, out_plane, index, in, out});
}

// A block a plane. In each round the lowest input element that waits for a place is added to it: `next` is that element, `last` the one before.
template <class T>
__global__ void __launch_bounds__(kThreads) plane_scatter_kernel(int64_t V, int64_t planes, int in_plane, int out_plane, const T* index, const T* in,
                                                                 T* out, bool accumulate, int* in_memory) {
  INFL_DYNAMIC_SHARED(int, in_shared);
  __shared__ int waiting;
  const int64_t p = blockIdx.x;
  int* next = in_memory ? in_memory + (blockIdx.y * planes + p) * 2 * out_plane : in_shared;
  int* last = next + out_plane;
  for (int i = threadIdx.x; i < out_plane; i += kThreads) {
    next[i] = INT_MAX;
    last[i] = -1;
    if (accumulate) continue;
    for (int64_t v = blockIdx.y; v < V; v += gridDim.y) out[(v * planes + p) * out_plane + i] = T(0);
  }
  const T* at = index + p * in_plane;
  for (;;) {
    __syncthreads();
    if (threadIdx.x == 0) waiting = 0;
    __syncthreads();
    for (int o = threadIdx.x; o < in_plane; o += kThreads) {
      const int place = static_cast<int>(at[o]);
      if (o > last[place]) {
        atomicMin(&next[place], o);
        waiting = 1;
      }
    }
    __syncthreads();
    if (waiting == 0) return;
    for (int o = threadIdx.x; o < in_plane; o += kThreads) {
      const int place = static_cast<int>(at[o]);
      if (next[place] != o) continue;
      last[place] = o;
      for (int64_t v = blockIdx.y; v < V; v += gridDim.y) out[(v * planes + p) * out_plane + place] += in[(v * planes + p) * in_plane + o];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < out_plane; i += kThreads) next[i] = INT_MAX;
  }
}

template <class T>
void plane_scatter(const Context& ctx, int64_t V, int64_t planes, int64_t in_plane, int64_t out_plane, const T* index, const T* in, T* out,
                   bool accumulate) {
  if (V == 0 || planes == 0 || out_plane == 0) return;
  constexpr int64_t kSharedBytes = 96 << 10;  // two blocks an SM
  const int64_t bytes = 2 * out_plane * static_cast<int64_t>(sizeof(int));
  const int64_t y = std::clamp<int64_t>(kMaxBlocks / planes, 1, std::min(V, kMaxGridY));
  Buffer<int> in_memory;
  if (bytes > kSharedBytes) in_memory.resize(ctx, y * planes * 2 * out_plane);
  launch(ctx, "plane_scatter", &plane_scatter_kernel<T>, dim3(row_reduction::grid(planes, "plane_scatter").x, static_cast<unsigned>(y)),
         dim3(kThreads), bytes > kSharedBytes ? 0 : bytes, V, planes, in_plane, out_plane, index, in, out, accumulate, in_memory.data());
}

template <class T>
struct AddUp {
  T& sum;
  const T* x;
  __device__ void operator()(int64_t place) const { sum += x[place]; }
};

template <class T>
__device__ T share(const Windows& w, T factor, int64_t d, int64_t h, int64_t c) {
  return factor / (static_cast<T>(w.count[0][d] * w.count[1][h]) * static_cast<T>(w.count[2][c]));
}

template <int kLanes, class T>
__global__ void __launch_bounds__(kThreads) window_mean_kernel(Windows w, int64_t planes, T factor, const T* x, T* y) {
  const int64_t outputs = w.out_plane(), step = int64_t{gridDim.x} * (kThreads / kLanes);
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  for (int64_t e = int64_t{blockIdx.x} * (kThreads / kLanes) + threadIdx.x / kLanes; e < planes * outputs; e += step) {
    const int64_t p = e / outputs;
    int64_t o[3];
    coordinates(w, e - p * outputs, o);
    T sum = 0;
    each_of_window<kLanes>(w, o, lane, AddUp<T>{sum, x + p * w.in_plane()});
    if constexpr (kLanes == kWarp) sum = warp_sum(sum);
    if (lane == 0) y[e] = sum * share(w, factor, o[0], o[1], o[2]);
  }
}

template <class T>
void window_mean(const Context& ctx, const Windows& w, int64_t planes, T factor, const T* x, T* y) {
  check_plane(w);
  launch_windows(ctx, "window_mean", w, planes, &window_mean_kernel<1, T>, &window_mean_kernel<kWarp, T>, factor, x, y);
}

// For every input coordinate of every axis the first and the last output whose window has it (first > last: none).
__global__ void reach_kernel(Windows w, int* reach) {
  const int64_t coordinates = w.in[0] + w.in[1] + w.in[2], step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t e = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; e < coordinates; e += step) {
    const int a = e < w.in[0] ? 0 : e < w.in[0] + w.in[1] ? 1 : 2;
    const int64_t i = e - (a > 0 ? w.in[0] : 0) - (a > 1 ? w.in[1] : 0);
    int first = INT_MAX, last = -1;
    for (int64_t o = 0; o < w.out[a]; ++o) {
      if (w.begin[a][o] > i || i >= w.end[a][o]) continue;
      first = first == INT_MAX ? static_cast<int>(o) : first;
      last = static_cast<int>(o);
    }
    reach[2 * e] = first;
    reach[2 * e + 1] = last;
  }
}

// Elements of [planes, in_plane].
template <class T>
struct WindowSpread {
  Windows w;
  T factor;
  const int* reach;
  const T* y;
  T* x;
  bool accumulate;

  __device__ bool has(int axis, int64_t o, int64_t i) const { return w.begin[axis][o] <= i && i < w.end[axis][o]; }

  template <int W>
  __device__ void run(int64_t e) const {
    const int64_t p = e / w.in_plane();
    const auto rest = static_cast<uint32_t>(e - p * w.in_plane());
    const auto width = static_cast<uint32_t>(w.in[2]), height = static_cast<uint32_t>(w.in[1]);
    const uint32_t row = rest / width, k = rest - row * width, i = row / height, j = row - i * height;
    const int *of_i = reach + 2 * i, *of_j = reach + 2 * (w.in[0] + j), *of_k = reach + 2 * (w.in[0] + w.in[1] + k);
    const T* from = y + p * w.out_plane();
    T sum = 0;
    for (int d = of_i[0]; d <= of_i[1]; ++d) {
      if (!has(0, d, i)) continue;
      for (int h = of_j[0]; h <= of_j[1]; ++h) {
        if (!has(1, h, j)) continue;
        for (int c = of_k[0]; c <= of_k[1]; ++c) {
          if (has(2, c, k)) sum += from[(d * w.out[1] + h) * w.out[2] + c] * share(w, factor, d, h, c);
        }
      }
    }
    x[e] = accumulate ? x[e] + sum : sum;
  }
};

template <class T>
void window_spread(const Context& ctx, const Windows& w, int64_t planes, T factor, const T* y, T* x, bool accumulate) {
  check_plane(w);
  if (planes == 0) return;
  const int64_t coordinates = w.in[0] + w.in[1] + w.in[2];
  Buffer<int> reach(ctx, 2 * coordinates);
  launch(ctx, "window_spread", &reach_kernel, blocks_for(coordinates, kThreads), dim3(kThreads), 0, w, reach.data());
  for_each<T>(ctx, "window_spread", planes * w.in_plane(), false, WindowSpread<T>{w, factor, reach.data(), y, x, accumulate});
}

INFL_REGISTER_CUDA(max_pool_stub, max_pool)
INFL_REGISTER_CUDA(plane_gather_stub, plane_gather)
INFL_REGISTER_CUDA(plane_scatter_stub, plane_scatter)
INFL_REGISTER_CUDA(window_mean_stub, window_mean)
INFL_REGISTER_CUDA(window_spread_stub, window_spread)

}  // namespace
}  // namespace cuda
}  // namespace infl
