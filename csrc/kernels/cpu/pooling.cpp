// Maxima are found once and moved afterwards by index. Averages go axis by axis: lines of the input are added up first (contiguous), then the
// windows within the sum of lines; a window that is the whole plane is one sum.
#include "kernels/pooling.h"

#include <algorithm>
#include <vector>

#include "kernels/cpu/parallel.h"
#include "kernels/cpu/tiles.h"

namespace infl {
namespace INFL_ISA {
namespace {

// Windows along the last axis, as lanes of a vector can hold them.
struct Columns {
  explicit Columns(const Windows& w) : begin(w.begin[2], w.begin[2] + w.out[2]), end(w.end[2], w.end[2] + w.out[2]) {
    const auto step = static_cast<int32_t>(w.dilation[2]);
    for (size_t c = 0; c < begin.size(); ++c) longest = std::max(longest, (end[c] - begin[c] + step - 1) / step);
    tiled = step == 1 && static_cast<int64_t>(longest * begin.size()) == w.in[2];
    for (int32_t c = 0; c < w.out[2]; ++c) tiled = tiled && begin[c] == c * longest && end[c] == (c + 1) * longest;
  }
  std::vector<int32_t> begin, end;
  int32_t longest = 0;
  bool tiled;  // windows of equal length cover a line, one beside the other
};

// The larger of a candidate and the best so far. Selections, no branches: which element is the largest cannot be predicted. Of equal elements the
// first in the plane is chosen, of NaN the last, as a walk through the window would.
// V: a number or a vector of them.
template <class V>
inline __attribute__((always_inline)) void take_larger(V value, V at, V& best, V& best_at) {
  const auto earlier = at < best_at, is_nan = value != value, replaces_nan = (best == best) | (at > best_at);
  const auto better = (value > best) | ((value == best) & earlier) | (is_nan & replaces_nan);
  best = better ? value : best;
  best_at = better ? at : best_at;
}

// Tiles of L neighbours each.
template <int L, class T>
void max_of_tiles(int64_t count, const T* line, const T* place, T* y, T* index) {
#pragma omp simd
  for (int64_t c = 0; c < count; ++c) {
    T best = line[L * c], best_at = place[L * c];
    for (int n = 1; n < L; ++n) take_larger(line[L * c + n], place[L * c + n], best, best_at);
    y[c] = best;
    index[c] = best_at;
  }
}

// Pairs of neighbours: vectors of the left ones against vectors of the right ones. Reads two vectors from the last pair on.
template <class T>
void max_of_pairs(int64_t count, const T* line, const T* place, T* y, T* index) {
  constexpr int64_t L = kLanes<T>;
  decltype(Vec<T>{} < Vec<T>{}) even, odd;
  for (int lane = 0; lane < L; ++lane) {
    even[lane] = 2 * lane;
    odd[lane] = 2 * lane + 1;
  }
  for (int64_t c = 0; c < count; c += L) {
    const Vec<T> values[2] = {load(line + 2 * c), load(line + 2 * c + L)}, places[2] = {load(place + 2 * c), load(place + 2 * c + L)};
    Vec<T> best = __builtin_shuffle(values[0], values[1], even), best_at = __builtin_shuffle(places[0], places[1], even);
    take_larger<Vec<T>>(__builtin_shuffle(values[0], values[1], odd), __builtin_shuffle(places[0], places[1], odd), best, best_at);
    if (c + L <= count) {
      store(y + c, best);
      store(index + c, best_at);
    } else {
      store_lanes(y + c, best, count - c);
      store_lanes(index + c, best_at, count - c);
    }
  }
}

// The maximum of each column over the lines of a window first, into line and place [lines of the output, width] and two vectors more; then over the
// window's columns.
template <class T>
void max_pool_plane(const Windows& w, const Columns& columns, const T* x, T* y, T* index, T* line, T* place) {
  constexpr int64_t L = kLanes<T>;
  const int64_t width = w.in[2], C = w.out[2], lines = w.out[0] * w.out[1];
  Vec<T> count;
  for (int lane = 0; lane < L; ++lane) count[lane] = static_cast<T>(lane);
  for (int64_t l = 0, d = 0, h = 0; l < lines; ++l) {
    for (int64_t next = 0; next < width; next += L) {
      const int64_t k = std::max<int64_t>(0, std::min(next, width - L));  // the last vector may overlap the one before it
      const auto read = [&](int64_t at) { return width < L ? load_lanes(x + at, width) : load(x + at); };
      const int64_t begin = (w.begin[0][d] * w.in[1] + w.begin[1][h]) * width + k;
      Vec<T> best = read(begin), best_at = count + static_cast<T>(begin);
      for (int64_t i = w.begin[0][d]; i < w.end[0][d]; i += w.dilation[0]) {
        for (int64_t j = w.begin[1][h]; j < w.end[1][h]; j += w.dilation[1]) {
          const int64_t at = (i * w.in[1] + j) * width + k;
          const Vec<T> row = read(at);
          const auto better = (row > best) | (row != row);
          best = better ? row : best;
          best_at = better ? count + static_cast<T>(at) : best_at;
        }
      }
      store(line + l * width + k, best);
      store(place + l * width + k, best_at);
    }
    if (++h == w.out[1]) {
      h = 0;
      ++d;
    }
  }
  if (columns.tiled && columns.longest == 2) return max_of_pairs(lines * C, line, place, y, index);
  if (columns.tiled && columns.longest == 3) return max_of_tiles<3>(lines * C, line, place, y, index);
  const auto step = static_cast<int32_t>(w.dilation[2]);
  const int32_t *begin = columns.begin.data(), *end = columns.end.data();
  for (int64_t l = 0; l < lines; ++l, line += width, place += width, y += C, index += C) {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
      y[c] = line[begin[c]];
      index[c] = place[begin[c]];
    }
    for (int32_t n = 1; n < columns.longest; ++n) {
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) {
        const int32_t k = begin[c] + n * step < end[c] ? begin[c] + n * step : begin[c];  // past the end: the first once more
        take_larger(line[k], place[k], y[c], index[c]);
      }
    }
  }
}

template <class T>
T* line_buffer(int64_t size) {
  static thread_local std::vector<T> buffer;
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

template <class T>
void max_pool(const Context& ctx, const Windows& w, int64_t planes, const T* x, T* y, T* index) {
  const int64_t in = w.in_plane(), out = w.out_plane(), size = w.out[0] * w.out[1] * w.in[2] + 2 * kLanes<T>;
  const Columns columns(w);
  parallel_for(threads_for(ctx, planes * in), planes, [&](int64_t p) {
    T* lines = line_buffer<T>(2 * size);
    max_pool_plane(w, columns, x + p * in, y + p * out, index + p * out, lines, lines + size);
  });
}

// Indices as numbers of T are exact: a plane has fewer than 2^24 elements (checked where the node is made).
template <class T>
void plane_gather(const Context& ctx, int64_t V, int64_t planes, int64_t in_plane, int64_t out_plane, const T* index, const T* in, T* out) {
  const int threads = threads_for(ctx, V * planes * out_plane);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t p = 0; p < planes; ++p) {
    const T* at = index + p * out_plane;
    for (int64_t v = 0; v < V; ++v) {
      const T* from = in + (v * planes + p) * in_plane;
      T* to = out + (v * planes + p) * out_plane;
      for (int64_t o = 0; o < out_plane; ++o) to[o] = from[static_cast<int32_t>(at[o])];
    }
  }
}

template <class T>
void plane_scatter(const Context& ctx, int64_t V, int64_t planes, int64_t in_plane, int64_t out_plane, const T* index, const T* in, T* out,
                   bool accumulate) {
  const int threads = threads_for(ctx, V * planes * out_plane);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t p = 0; p < planes; ++p) {
    const T* at = index + p * in_plane;
    for (int64_t v = 0; v < V; ++v) {
      const T* from = in + (v * planes + p) * in_plane;
      T* to = out + (v * planes + p) * out_plane;
      if (!accumulate) std::memset(to, 0, out_plane * sizeof(T));
      for (int64_t o = 0; o < in_plane; ++o) to[static_cast<int32_t>(at[o])] += from[o];
    }
  }
}

inline bool is_whole_plane(const Windows& w) {
  bool whole = true;
  for (int a = 0; a < 3; ++a) whole = whole && w.out[a] == 1 && w.begin[a][0] == 0 && w.end[a][0] == w.in[a] && w.dilation[a] == 1;
  return whole;
}

template <class T>
void window_mean(const Context& ctx, const Windows& w, int64_t planes, T factor, const T* x, T* y) {
  const int64_t in = w.in_plane(), out = w.out_plane(), width = w.in[2];
  const bool whole = is_whole_plane(w);
  const int threads = threads_for(ctx, planes * in);
  parallel_for(threads, planes, [&](int64_t p) {
    const T* from = x + p * in;
    T* to = y + p * out;
    if (whole) {
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < in; ++i) sum += from[i];
      *to = sum * (factor / static_cast<T>(w.count[0][0] * w.count[1][0] * w.count[2][0]));
      return;
    }
    T* line = line_buffer<T>(width);
    for (int64_t d = 0; d < w.out[0]; ++d) {
      for (int64_t h = 0; h < w.out[1]; ++h) {
        for (int64_t k = 0; k < width; ++k) line[k] = T(0);
        for (int64_t i = w.begin[0][d]; i < w.end[0][d]; ++i) {
          for (int64_t j = w.begin[1][h]; j < w.end[1][h]; ++j) {
            const T* row = from + (i * w.in[1] + j) * width;
#pragma omp simd
            for (int64_t k = 0; k < width; ++k) line[k] += row[k];
          }
        }
        const T lines = static_cast<T>(w.count[0][d] * w.count[1][h]);
        for (int64_t c = 0; c < w.out[2]; ++c) {
          T sum = 0;
          for (int64_t k = w.begin[2][c]; k < w.end[2][c]; ++k) sum += line[k];
          *to++ = sum * factor / (lines * static_cast<T>(w.count[2][c]));
        }
      }
    }
  });
}

template <class T>
void window_spread(const Context& ctx, const Windows& w, int64_t planes, T factor, const T* y, T* x, bool accumulate) {
  const int64_t in = w.in_plane(), out = w.out_plane(), width = w.in[2];
  const bool whole = is_whole_plane(w);
  const int threads = threads_for(ctx, planes * in);
  parallel_for(threads, planes, [&](int64_t p) {
    const T* from = y + p * out;
    T* to = x + p * in;
    if (whole) {
      const T value = *from * (factor / static_cast<T>(w.count[0][0] * w.count[1][0] * w.count[2][0]));
      if (accumulate) {
        for (int64_t i = 0; i < in; ++i) to[i] += value;
      } else {
        for (int64_t i = 0; i < in; ++i) to[i] = value;
      }
      return;
    }
    if (!accumulate) std::memset(to, 0, in * sizeof(T));
    T* line = line_buffer<T>(width);
    for (int64_t d = 0; d < w.out[0]; ++d) {
      for (int64_t h = 0; h < w.out[1]; ++h) {
        for (int64_t k = 0; k < width; ++k) line[k] = T(0);
        const T lines = static_cast<T>(w.count[0][d] * w.count[1][h]);
        for (int64_t c = 0; c < w.out[2]; ++c) {
          const T value = *from++ * factor / (lines * static_cast<T>(w.count[2][c]));
          for (int64_t k = w.begin[2][c]; k < w.end[2][c]; ++k) line[k] += value;
        }
        for (int64_t i = w.begin[0][d]; i < w.end[0][d]; ++i) {
          for (int64_t j = w.begin[1][h]; j < w.end[1][h]; ++j) {
            T* row = to + (i * w.in[1] + j) * width;
#pragma omp simd
            for (int64_t k = 0; k < width; ++k) row[k] += line[k];
          }
        }
      }
    }
  });
}

INFL_REGISTER_CPU(max_pool_stub, max_pool)
INFL_REGISTER_CPU(plane_gather_stub, plane_gather)
INFL_REGISTER_CPU(plane_scatter_stub, plane_scatter)
INFL_REGISTER_CPU(window_mean_stub, window_mean)
INFL_REGISTER_CPU(window_spread_stub, window_spread)

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
