// Maxima are found once and moved afterwards by index. Averages go axis by axis: lines of the input are added up first (contiguous), then the
// windows within the sum of lines; a window that is the whole plane is one sum.
#include "kernels/pooling.h"

#include "kernels/cpu/parallel.h"

namespace infl {
namespace INFL_ISA {
namespace {

template <class T>
void max_pool_plane(const Windows& w, const T* x, T* y, T* index) {
  for (int64_t d = 0; d < w.out[0]; ++d) {
    for (int64_t h = 0; h < w.out[1]; ++h) {
      for (int64_t c = 0; c < w.out[2]; ++c) {
        int64_t best = (w.begin[0][d] * w.in[1] + w.begin[1][h]) * w.in[2] + w.begin[2][c];
        T value = x[best];
        for (int64_t i = w.begin[0][d]; i < w.end[0][d]; i += w.dilation[0]) {
          for (int64_t j = w.begin[1][h]; j < w.end[1][h]; j += w.dilation[1]) {
            const T* line = x + (i * w.in[1] + j) * w.in[2];
            for (int64_t k = w.begin[2][c]; k < w.end[2][c]; k += w.dilation[2]) {
              const bool better = line[k] > value || line[k] != line[k];
              value = better ? line[k] : value;
              best = better ? line + k - x : best;
            }
          }
        }
        *y++ = value;
        *index++ = static_cast<T>(best);
      }
    }
  }
}

template <class T>
void max_pool(const Context& ctx, const Windows& w, int64_t planes, const T* x, T* y, T* index) {
  const int64_t in = w.in_plane(), out = w.out_plane();
  const int threads = threads_for(ctx, planes * in);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t p = 0; p < planes; ++p) max_pool_plane(w, x + p * in, y + p * out, index + p * out);
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
T* line_buffer(int64_t size) {
  static thread_local std::vector<T> buffer;
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
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
