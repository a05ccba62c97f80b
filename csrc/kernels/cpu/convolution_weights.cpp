// The gradient by the kernel is a table of dot products along positions, tiles of 4 channels of y by 6 pairs (channel, tap) of x (or, of a layer with
// 5 or 6 channels, all of them by 4): neither operand is transposed. x is read from its padded copy (convolution_geometry.h), y in lines that are
// filled up with zeros to whole vectors. Where lines of positions would leave lanes empty, lanes run along channels of y instead
// (convolution_weights_channels.h).
#include "kernels/convolution_weights.h"

#include "kernels/cpu/convolution_geometry.h"
#include "kernels/cpu/convolution_picks.h"
#include "kernels/cpu/convolution_weights_channels.h"
#include "kernels/cpu/winograd.h"

namespace infl {
namespace INFL_ISA {
namespace {

constexpr int kDotRows = INFL_VECTOR_BYTES == 64 ? 4 : 2;  // channels of y in a tile of dot products
constexpr int kDotCols = INFL_VECTOR_BYTES == 64 ? 6 : 4;  // pairs (channel, tap) of x
constexpr int kTallRows = INFL_VECTOR_BYTES == 64 ? 6 : 2, kTallCols = 4;
constexpr int64_t kSumsBytes = 32 << 10;    // sums of each lane that stay in the cache from one chunk of examples to the next
constexpr int64_t kChunkBytes = 256 << 10;  // copies of the examples whose dot products are taken together
constexpr int64_t kChunkPositions = 2048;

template <class T>
struct DotJob {
  int64_t examples, planes, lines, vectors;
  const T* x;
  int64_t x_example, x_plane, x_line;
  const int64_t* offsets;  // per column
  const T* y;
  int64_t y_channel, y_example, y_plane, y_line;
  T* out;  // sums, or with `by_lane` a vector of sums for each
  int64_t out_row;
  bool by_lane;
};

template <class T>
T lane_sum(Vec<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
#pragma GCC unroll 4
  for (int half = kLanes<T> / 2; half >= 1; half /= 2) {
#pragma omp simd
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

template <class T, int R, int C>
__attribute__((noinline)) void dot_fn(const DotJob<T>& job) {
  Vec<T> acc[R][C];
  clear(acc);
  const int64_t y_channel = job.y_channel, length = job.vectors * kLanes<T>;
  for (int64_t n = 0; n < job.examples; ++n) {
    for (int64_t d = 0; d < job.planes; ++d) {
      for (int64_t h = 0; h < job.lines; ++h) {
        const T* y = job.y + n * job.y_example + d * job.y_plane + h * job.y_line;
        const T* base = job.x + n * job.x_example + d * job.x_plane + h * job.x_line;
        const T* x[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) x[c] = base + job.offsets[c];
        for (int64_t i = 0; i < length; i += kLanes<T>) {
          Vec<T> rows[R];
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) rows[r] = load(y + r * y_channel + i);
#pragma GCC unroll 8
          for (int c = 0; c < C; ++c) {
            const Vec<T> value = load(x[c] + i);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) acc[r][c] += rows[r] * value;
          }
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      T* out = job.out + (r * job.out_row + c) * (job.by_lane ? kLanes<T> : 1);
      if (job.by_lane) {
        store(out, load(out) + acc[r][c]);
      } else {
        *out += lane_sum<T>(acc[r][c]);
      }
    }
}

template <class T>
using DotFn = void (*)(const DotJob<T>&);

template <class T, int R, int most>
DotFn<T> dot_for(int64_t cols) {
  return of_size<most>(cols, []<int C>(Size<C>) { return &dot_fn<T, R, C>; });
}

template <class T>
DotFn<T> dot_for(int64_t rows, int64_t cols) {
#if INFL_VECTOR_BYTES == 64
  if (rows == 6) return dot_for<T, 6, kTallCols>(cols);
  if (rows == 5) return dot_for<T, 5, kTallCols>(cols);
  if (rows == 4) return dot_for<T, 4, kDotCols>(cols);
  if (rows == 3) return dot_for<T, 3, kDotCols>(cols);
#endif
  return rows == 2 ? dot_for<T, 2, kDotCols>(cols) : dot_for<T, 1, kDotCols>(cols);
}

// Where lane-padded lines of y lie; in place if y's own lines are whole vectors.
template <class T>
struct Lines {
  Lines(const Geometry<T>& geometry, const int64_t* count) {
    const bool whole = count[2] % kLanes<T> == 0;
    flat = geometry.flat_vectors(count) + (whole ? 1 : 0) <= geometry.line_vectors(count);
    in_place = !flat && whole;
    lines = flat ? 1 : count[1];
    const int64_t length = flat ? (count[1] - 1) * geometry.line + count[2] : count[2];
    vectors = ceil_div(length, kLanes<T>);
    pitch = vectors * kLanes<T>;
    plane = lines * pitch;
    channel = count[0] * plane;
    if (!in_place) channel = (ceil_div(channel * static_cast<int64_t>(sizeof(T)), 64) | 1) * 64 / static_cast<int64_t>(sizeof(T));
  }

  void fill(const Geometry<T>& geometry, const int64_t* count, int64_t channels, const T* y, T* out) const {
    const int64_t line_step = flat ? geometry.line : pitch;
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t d = 0; d < count[0]; ++d) {
        T* to = out + c * channel + d * plane;
        for (int64_t h = 0; h < count[1]; ++h) {
          T* line = to + h * line_step;
          T* next = h + 1 < count[1] ? line + line_step : to + plane;
          for (int64_t w = 0; w < count[2]; ++w) line[w] = y[w];
          for (T* rest = line + count[2]; rest < next; ++rest) *rest = T(0);
          y += count[2];
        }
      }
    }
  }

  bool flat, in_place;
  int64_t lines, vectors, pitch, plane, channel;
};

template <class T>
void convolution_weights(const Context& ctx, const Convolution& conv, int64_t V, int64_t n, const T* x, int64_t x_batch, int64_t prepared, const T* y,
                         int64_t y_batch, int64_t images, T* out, int64_t out_batch, int64_t out_example) {
  if (takes_winograd(conv)) {
    return winograd_weights(ctx, conv, V, n, x, x_batch, prepared, y, y_batch, images, out, out_batch, out_example);
  }
  const Geometry<T> geometry(conv, false);
  const Phase& phase = geometry.phases[0];
  const Lines<T> lines(geometry, phase.count);
  if (weights_by_channels<T>(conv, phase.count[0] * lines.lines * lines.vectors)) {
    return channel_weights(ctx, geometry, V, n, x, x_batch, prepared, y, y_batch, images, out, out_batch, out_example);
  }
  const int64_t rows = conv.y_channels / conv.groups, inner = conv.x_channels / conv.groups, taps = conv.taps(), cols = inner * taps;
  const int64_t x_width = conv.x_channels * conv.x_plane(), y_width = conv.y_channels * conv.y_plane();
  const bool tall = rows > kDotRows && rows <= kTallRows;
  const int64_t row_tiles = ceil_div(rows, tall ? kTallRows : kDotRows), row_tile = ceil_div(rows, row_tiles);
  const int64_t col_tiles = ceil_div(cols, tall ? kTallCols : kDotCols), col_tile = ceil_div(cols, col_tiles);
  std::vector<int64_t> offsets(cols);
  for (int64_t c = 0; c < inner; ++c) {
    for (int64_t t = 0; t < taps; ++t) offsets[c * taps + geometry.indices[t]] = c * geometry.channel + geometry.offsets[t];
  }
  // Examples whose sums are taken together: enough positions to make the sums over lanes cheap, few enough to stay in the cache; in the first-level
  // cache if there are so few sums that lanes need to be summed only once.
  const int64_t example_bytes = (geometry.padded + conv.y_channels * lines.channel) * static_cast<int64_t>(sizeof(T));
  const int64_t sums_size = conv.weight_size() * kLanes<T>;
  const bool by_lane = images > 1 && sums_size * static_cast<int64_t>(sizeof(T)) <= kSumsBytes;
  int64_t chunk = std::min((by_lane ? kTurnedBytes : kChunkBytes) / example_bytes, ceil_div(kChunkPositions, phase.count[0] * lines.plane));
  const double flops = 2.0 * V * n * conv.weight_size() * conv.y_plane();
  const int threads = flops < 5e5 ? 1 : ctx.num_threads;
  if (threads > 1) chunk = std::max<int64_t>(chunk, threads);
  chunk = std::clamp<int64_t>(chunk, 1, images);
  T* padded = prepared ? nullptr : scratch<T>(chunk * geometry.padded + kLanes<T>, 0);
  const int64_t x_example = prepared ? prepared : geometry.padded;
  T* copies = lines.in_place ? nullptr : scratch<T>(chunk * conv.y_channels * lines.channel, 1);
  const int64_t y_example = lines.in_place ? y_width : conv.y_channels * lines.channel;
  T* sums = by_lane ? scratch<T>(V * sums_size, 2) : nullptr;  // [V][y channels][cols][lanes]
  if (!prepared) geometry.fill_end(padded + chunk * geometry.padded);
#pragma omp parallel num_threads(threads) if (threads > 1)
  for (int64_t block = 0; block < n; block += images) {
    if (by_lane) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < V * sums_size; ++i) sums[i] = T(0);
    }
    for (int64_t i0 = block; i0 < block + images; i0 += chunk) {
      const int64_t count = std::min(chunk, block + images - i0);
      for (int64_t v = 0; v < V; ++v) {
        if (!prepared && (v == 0 || x_batch != 0)) {
#pragma omp for schedule(static)
          for (int64_t i = 0; i < count; ++i) geometry.fill(x + v * x_batch + (i0 + i) * x_width, padded + i * geometry.padded);
        }
        if (!lines.in_place && (v == 0 || y_batch != 0)) {
#pragma omp for schedule(static)
          for (int64_t i = 0; i < count; ++i) {
            lines.fill(geometry, phase.count, conv.y_channels, y + v * y_batch + (i0 + i) * y_width, copies + i * y_example);
          }
        }
        const T* y_begin = lines.in_place ? y + v * y_batch + i0 * y_width : copies;
        T* target = out + v * out_batch + block / images * out_example;
#pragma omp for schedule(static)
        for (int64_t item = 0; item < conv.groups * row_tiles * col_tiles; ++item) {
          const int64_t g = item / (row_tiles * col_tiles), r = item / col_tiles % row_tiles * row_tile, c = item % col_tiles * col_tile;
          const int64_t height = std::min(row_tile, rows - r), width = std::min(col_tile, cols - c);
          if (height <= 0 || width <= 0) continue;
          DotJob<T> job{};
          job.examples = count;
          job.planes = phase.count[0];
          job.lines = lines.lines;
          job.vectors = lines.vectors;
          job.x = (prepared ? x + i0 * x_example : padded) + g * inner * geometry.channel;
          job.x_example = x_example;
          job.x_plane = geometry.plane;
          job.x_line = geometry.line;
          job.y = y_begin + (g * rows + r) * lines.channel;
          job.y_channel = lines.channel;
          job.y_example = y_example;
          job.y_plane = lines.plane;
          job.y_line = lines.pitch;
          job.out_row = cols;
          job.offsets = offsets.data() + c;
          job.by_lane = by_lane;
          const int64_t at = (g * rows + r) * cols + c;
          job.out = by_lane ? sums + v * sums_size + at * kLanes<T> : target + at;
          dot_for<T>(height, width)(job);
        }
      }
    }
    if (by_lane) {
      const int64_t size = conv.weight_size();
#pragma omp for schedule(static)
      for (int64_t i = 0; i < V * size; ++i) {
        out[i / size * out_batch + block / images * out_example + i % size] += lane_sum<T>(load(sums + i * kLanes<T>));
      }
    }
  }
}

template <class T>
void channel_sum(const Context& ctx, int64_t V, int64_t n, int64_t channels, int64_t plane, const T* y, int64_t images, T* out, int64_t out_batch,
                 int64_t out_example) {
  parallel_for(threads_for(ctx, V * n * channels * plane), V * channels, [&](int64_t item) {
    const int64_t v = item / channels, c = item % channels;
    for (int64_t block = 0; block < n; block += images) {
      T total = 0;
      for (int64_t i = block; i < block + images; ++i) {
        const T* from = y + ((v * n + i) * channels + c) * plane;
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t l = 0; l < plane; ++l) sum += from[l];
        total += sum;
      }
      out[v * out_batch + block / images * out_example + c] += total;
    }
  });
}

template <class T>
void convolution_columns(const Context& ctx, const Convolution& conv, int64_t n, const T* x, int64_t prepared, T* columns) {
  if (prepared && takes_winograd(conv)) return winograd_columns(ctx, conv, n, x, prepared, columns);
  const Geometry<T> geometry(conv, false);
  const int64_t taps = conv.taps(), cols = conv.x_channels * taps, plane = conv.y_plane();
  const int64_t* count = geometry.phases[0].count;
  const int threads = threads_for(ctx, n * plane * cols);
  parallel_for(threads, n, [&](int64_t i) {
    const T* padded = x + i * prepared;
    if (!prepared) {
      T* copy = scratch<T>(geometry.padded + kLanes<T>, 0);
      geometry.fill(x + i * conv.x_channels * conv.x_plane(), copy);
      padded = copy;
    }
    T* to = columns + i * plane * cols;
    for (int64_t d = 0; d < count[0]; ++d) {
      for (int64_t h = 0; h < count[1]; ++h) {
        for (int64_t w = 0; w < count[2]; ++w) {
          const T* from = padded + d * geometry.plane + h * geometry.line + w;
          for (int64_t c = 0; c < conv.x_channels; ++c) {
            for (int64_t t = 0; t < taps; ++t) to[c * taps + geometry.indices[t]] = from[c * geometry.channel + geometry.offsets[t]];
          }
          to += cols;
        }
      }
    }
  });
}

INFL_REGISTER_CPU(convolution_weights_stub, convolution_weights)
INFL_REGISTER_CPU(pick_weights_stub, pick_weights)
INFL_REGISTER_CPU(channel_sum_stub, channel_sum)
INFL_REGISTER_CPU(convolution_columns_stub, convolution_columns)

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
