// The gradient by the kernel with channels of y in the lanes: an outer product of the channels of y at a position with the taps of x there, summed
// over positions in registers, in tiles of up to 28 taps (AVX-512). y is turned to [position, channel] first, x is broadcast from its padded copy.
// Lanes are full whatever the length of a line, and no sums over lanes remain.
#pragma once

#include "kernels/convolution_lanes.h"
#include "kernels/cpu/convolution_geometry.h"
#include "kernels/cpu/transpose.h"

namespace infl {
namespace INFL_ISA {
namespace {

constexpr int kLongestRun = 7;              // neighbouring taps
constexpr int kMostRuns = 8;                // of a tile: a pointer each
constexpr int64_t kTurnedBytes = 24 << 10;  // x and y of the examples handled together: stay in the first-level cache
constexpr int64_t kRunPositions = 512;      // summed in registers before they are added up

// Whether this takes fewer cycles than dot products along `vectors` vectors of positions.
template <class T>
bool weights_by_channels(const Convolution& conv, int64_t vectors) {
  if (conv.groups != 1) return false;
  const int64_t cols = conv.x_channels * conv.taps();
  return 10 * ceil_div(conv.y_channels, kLanes<T>) * conv.y_plane() * (cols + kTurn) < 9 * conv.y_channels * cols * vectors;
}

// Taps of one channel of x that read neighbouring elements.
struct TapRun {
  int64_t offset, length;
  int64_t cols[kLongestRun];  // where the taps' sums belong
};

template <class T>
std::vector<TapRun> tap_runs(const Geometry<T>& geometry) {
  const int64_t taps = geometry.phases[0].num_taps;
  std::vector<std::pair<int64_t, int64_t>> order;  // offset, number in the kernel
  for (int64_t t = 0; t < taps; ++t) order.emplace_back(geometry.offsets[t], geometry.indices[t]);
  std::sort(order.begin(), order.end());
  std::vector<TapRun> runs;
  for (int64_t begin = 0, end; begin < taps; begin = end) {
    for (end = begin + 1; end < taps && order[end].first == order[end - 1].first + 1;) ++end;
    const int64_t pieces = ceil_div(end - begin, kLongestRun);
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t first = begin + i * (end - begin) / pieces, last = begin + (i + 1) * (end - begin) / pieces;
      for (int64_t c = 0; c < geometry.in_channels; ++c) {
        TapRun run{c * geometry.channel + order[first].first, last - first, {}};
        for (int64_t t = first; t < last; ++t) run.cols[t - first] = c * taps + order[t].second;
        runs.push_back(run);
      }
    }
  }
  std::stable_sort(runs.begin(), runs.end(), [](const TapRun& a, const TapRun& b) { return a.length < b.length; });
  return runs;
}

template <class T>
struct TapJob {
  int64_t examples, planes, lines, count;
  const T* x;
  int64_t x_example, x_plane, x_line;
  const T* y;  // [example][position][lane]
  int64_t y_example;
  const TapRun* runs;
  T* sums;  // [column][lane]
};

template <class T, int W, int J>
__attribute__((noinline)) void tap_tile(const TapJob<T>& job) {
  Vec<T> acc[J][W];
  clear(acc);
  for (int64_t n = 0; n < job.examples; ++n) {
    const T* y = job.y + n * job.y_example;
    for (int64_t d = 0; d < job.planes; ++d) {
      for (int64_t h = 0; h < job.lines; ++h) {
        const T* base = job.x + n * job.x_example + d * job.x_plane + h * job.x_line;
        const T* x[J];
#pragma GCC unroll 8
        for (int j = 0; j < J; ++j) x[j] = base + job.runs[j].offset;
        for (int64_t i = 0; i < job.count; ++i) {
          const Vec<T> lanes = load(y);
          y += kLanes<T>;
#pragma GCC unroll 8
          for (int j = 0; j < J; ++j) {
#pragma GCC unroll 7
            for (int w = 0; w < W; ++w) {
              const T value = x[j][i + w];
              acc[j][w] += lanes * value;
            }
          }
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 7
    for (int w = 0; w < W; ++w) {
      T* sum = job.sums + job.runs[j].cols[w] * kLanes<T>;
      store(sum, load(sum) + acc[j][w]);
    }
}

template <class T>
using TapFn = void (*)(const TapJob<T>&);

// Runs of a tile: as many as fill the registers.
template <int W>
inline constexpr int kTileRuns = std::clamp((INFL_VECTOR_BYTES == 64 ? 28 : 12) / W, 1, kMostRuns);

// The tile for the first of `runs` runs of a length: its function, and how many it takes.
template <class T>
TapFn<T> tap_tile_for(int64_t length, int64_t runs, int64_t& taken) {
  taken = std::min<int64_t>(runs, of_size<kLongestRun>(length, []<int W>(Size<W>) { return kTileRuns<W>; }));
  const auto of_length = of_size<kLongestRun>(length, []<int W>(Size<W>) {
    return +[](int64_t num) { return of_size<kTileRuns<W>>(num, []<int J>(Size<J>) { return &tap_tile<T, W, J>; }); };
  });
  return of_length(taken);
}

// out[position, lane] of a vector of channels (fewer: zeros) of y [channels, plane], `row` between positions.
template <class T>
void turn_channels(int64_t channels, int64_t plane, const T* y, T* out, int64_t row = kLanes<T>) {
  constexpr int L = kLanes<T>;
  for (int64_t p = 0; p < plane; p += L) {
    const int64_t count = std::min<int64_t>(L, plane - p);
    Vec<T> square[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) square[i] = i >= channels ? Vec<T>{} : count == L ? load(y + i * plane + p) : load_lanes(y + i * plane + p, count);
    transpose_square<T>(square);
    T* to = out + p * row;  // up to a square beyond the last position
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) store(to + i * row, square[i]);
  }
}

// to[lane, column] += sums[column, lane]
template <class T>
void add_turned(int64_t channels, int64_t cols, const T* sums, T* to) {
  constexpr int L = kLanes<T>;
  for (int64_t c = 0; c < cols; c += L) {
    const int64_t count = std::min<int64_t>(L, cols - c);
    Vec<T> square[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) square[i] = load(sums + (c + i) * L);
    transpose_square<T>(square);
    T turned[L][L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) store(turned[i], square[i]);
    for (int64_t i = 0; i < channels; ++i) {
      T* line = to + i * cols + c;
      const Vec<T> value = load(turned[i]);
      if (count == L) {
        store(line, load(line) + value);
      } else {
        store_lanes(line, load_lanes(line, count) + value, count);
      }
    }
  }
}

// Arguments as convolution_weights's.
template <class T>
void channel_weights(const Context& ctx, const Geometry<T>& geometry, int64_t V, int64_t n, const T* x, int64_t x_batch, int64_t prepared, const T* y,
                     int64_t y_batch, int64_t images, T* out, int64_t out_batch, int64_t out_example) {
  constexpr int L = kLanes<T>;
  const Convolution& conv = geometry.conv;
  const int64_t* count = geometry.phases[0].count;
  const int64_t cols = conv.x_channels * conv.taps(), blocks = ceil_div(conv.y_channels, L), plane = conv.y_plane();
  const int64_t x_width = conv.x_channels * conv.x_plane(), y_width = conv.y_channels * plane;
  const int64_t y_block = ceil_div(plane, L) * L * L, y_example = blocks * y_block;
  const int64_t sums_block = ceil_div(cols, L) * L * L;
  // What a tile sums at once: some images, or some lines of one.
  const bool whole = plane <= kRunPositions;
  const int64_t step = whole ? kRunPositions / plane : 1, planes = whole ? count[0] : 1;
  const int64_t lines = whole ? count[1] : std::clamp<int64_t>(kRunPositions / count[2], 1, count[1]);
  const std::vector<TapRun> runs = tap_runs(geometry);
  struct Tile {
    TapFn<T> fn;
    const TapRun* runs;
  };
  std::vector<Tile> tiles;
  for (size_t r = 0; r < runs.size();) {
    size_t same = r;
    while (same < runs.size() && runs[same].length == runs[r].length) ++same;
    int64_t taken = 0;
    const TapFn<T> fn = tap_tile_for<T>(runs[r].length, static_cast<int64_t>(same - r), taken);
    tiles.push_back({fn, runs.data() + r});
    r += taken;
  }
  const double flops = 2.0 * V * n * conv.weight_size() * plane;
  const int threads = flops < 5e5 ? 1 : ctx.num_threads;
  int64_t chunk = kTurnedBytes / ((geometry.padded + y_example) * static_cast<int64_t>(sizeof(T)));
  if (threads > 1) chunk = std::max<int64_t>(chunk, threads);
  chunk = std::clamp<int64_t>(chunk, 1, images);
  T* padded = prepared ? nullptr : scratch<T>(chunk * geometry.padded + L, 0);
  const int64_t x_example = prepared ? prepared : geometry.padded;
  T* turned = scratch<T>(chunk * y_example, 1);
  T* sums = scratch<T>(blocks * sums_block, 2);
  if (!prepared) geometry.fill_end(padded + chunk * geometry.padded);
#pragma omp parallel num_threads(threads) if (threads > 1)
  for (int64_t block = 0; block < n; block += images) {
    for (int64_t v = 0; v < V; ++v) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < blocks * sums_block; ++i) sums[i] = T(0);
      for (int64_t i0 = block; i0 < block + images; i0 += chunk) {
        const int64_t examples = std::min(chunk, block + images - i0);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < examples; ++i) {
          if (!prepared) geometry.fill(x + v * x_batch + (i0 + i) * x_width, padded + i * geometry.padded);
          const T* from = y + v * y_batch + (i0 + i) * y_width;
          for (int64_t b = 0; b < blocks; ++b) {
            turn_channels<T>(std::min<int64_t>(L, conv.y_channels - b * L), plane, from + b * L * plane, turned + i * y_example + b * y_block);
          }
        }
#pragma omp for schedule(static)
        for (int64_t item = 0; item < blocks * static_cast<int64_t>(tiles.size()); ++item) {
          const int64_t b = item / static_cast<int64_t>(tiles.size());
          const Tile& tile = tiles[item % tiles.size()];
          for (int64_t i = 0; i < examples; i += step) {
            for (int64_t d = 0; d < count[0]; d += planes) {
              for (int64_t h = 0; h < count[1]; h += lines) {
                TapJob<T> job{};
                job.examples = std::min(step, examples - i);
                job.planes = planes;
                job.lines = std::min(lines, count[1] - h);
                job.count = count[2];
                job.x = (prepared ? x + i0 * x_example : padded) + i * x_example + d * geometry.plane + h * geometry.line;
                job.x_example = x_example;
                job.x_plane = geometry.plane;
                job.x_line = geometry.line;
                job.y = turned + i * y_example + b * y_block + (d * count[1] + h) * count[2] * L;
                job.y_example = y_example;
                job.runs = tile.runs;
                job.sums = sums + b * sums_block;
                tile.fn(job);
              }
            }
          }
        }
      }
#pragma omp for schedule(static)
      for (int64_t b = 0; b < blocks; ++b) {
        add_turned<T>(std::min<int64_t>(L, conv.y_channels - b * L), cols, sums + b * sums_block,
                      out + v * out_batch + block / images * out_example + b * L * cols);
      }
    }
  }
}

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
