// A strided map is walked as runs along its last axis, under an odometer over the others. Where the last axis is strided and another one is
// contiguous (a transposition), the two are walked together in square blocks, so that every cache line fetched is used up.
#include "kernels/movement.h"

#include "kernels/cpu/parallel.h"
#include "kernels/cpu/transpose.h"

namespace infl {
namespace INFL_ISA {
namespace {

constexpr int64_t kBlock = 16;  // side of the blocks of a transposition: a cache line of floats

struct Walk {
  int rank = 0;  // of the odometer
  int64_t shape[StridedMap::kMaxRank], x_stride[StridedMap::kMaxRank], y_stride[StridedMap::kMaxRank];
  int64_t inner = 1, inner_stride = 1;  // the run: y contiguous, x by inner_stride
  int64_t cross = 1, cross_y = 0;       // the axis along which x is contiguous, where that is another one
  bool is_transposition = false;

  explicit Walk(const StridedMap& map) {
    if (map.rank == 0) return;
    const int last = map.rank - 1;
    inner = map.shape[last];
    inner_stride = map.stride[last];
    int partner = -1;
    if (inner_stride > 1) {
      for (int k = 0; k < last; ++k) {
        if (map.stride[k] == 1) partner = k;
      }
    }
    int64_t y_step = inner;
    for (int k = last - 1; k >= 0; --k) {
      if (k == partner) {
        is_transposition = true;
        cross = map.shape[k];
        cross_y = y_step;
      } else {
        shape[rank] = map.shape[k];
        x_stride[rank] = map.stride[k];
        y_stride[rank++] = y_step;
      }
      y_step *= map.shape[k];
    }
  }

  // visit(x offset, y offset) for every run (or plane of a transposition); the axis with the smallest step in y moves fastest.
  template <class Visit>
  void each(const Visit& visit) const {
    int64_t at[StridedMap::kMaxRank] = {};
    int64_t x = 0, y = 0;
    for (;;) {
      visit(x, y);
      int k = 0;
      for (; k < rank; ++k) {
        x += x_stride[k];
        y += y_stride[k];
        if (++at[k] < shape[k]) break;
        x -= shape[k] * x_stride[k];
        y -= shape[k] * y_stride[k];
        at[k] = 0;
      }
      if (k == rank) return;
    }
  }
};

enum class Put { read, assign, add };  // y = x(map), x(map) = y, x(map) += y

template <Put put, class T>
inline void move(std::conditional_t<put == Put::read, const T, T>& x, std::conditional_t<put == Put::read, T, const T>& y) {
  if constexpr (put == Put::read) {
    y = x;
  } else if constexpr (put == Put::assign) {
    x = y;
  } else {
    x += y;
  }
}

// y[i][j] = x[j][i] for a block, in registers.
template <class T>
inline void transpose_block(const T* x, int64_t x_stride, T* y, int64_t y_stride) {
  constexpr int L = kLanes<T>;
  static_assert(kBlock % L == 0);
  Vec<T> square[L];
  for (int64_t i = 0; i < kBlock; i += L) {
    for (int64_t j = 0; j < kBlock; j += L) {
#pragma GCC unroll 16
      for (int r = 0; r < L; ++r) square[r] = load(x + (j + r) * x_stride + i);
      transpose_square<T>(square);
#pragma GCC unroll 16
      for (int r = 0; r < L; ++r) store(y + (i + r) * y_stride + j, square[r]);
    }
  }
}

template <Put put, class T, class X, class Y>
void walk_row(const Walk& w, X* x, Y* y) {
  if (w.is_transposition) {
    w.each([&](int64_t x_at, int64_t y_at) {
      for (int64_t i0 = 0; i0 < w.cross; i0 += kBlock) {
        const int64_t i1 = std::min(w.cross, i0 + kBlock);
        for (int64_t j0 = 0; j0 < w.inner; j0 += kBlock) {
          const int64_t j1 = std::min(w.inner, j0 + kBlock);
          if constexpr (put == Put::read) {
            if (i1 - i0 == kBlock && j1 - j0 == kBlock) {
              transpose_block<T>(x + x_at + i0 + j0 * w.inner_stride, w.inner_stride, y + y_at + i0 * w.cross_y + j0, w.cross_y);
              continue;
            }
          }
          for (int64_t i = i0; i < i1; ++i) {
            X* from = x + x_at + i;
            Y* to = y + y_at + i * w.cross_y;
            for (int64_t j = j0; j < j1; ++j) move<put, T>(from[j * w.inner_stride], to[j]);
          }
        }
      }
    });
  } else if (w.inner_stride == 1) {
    w.each([&](int64_t x_at, int64_t y_at) {
      X* from = x + x_at;
      Y* to = y + y_at;
#pragma omp simd
      for (int64_t j = 0; j < w.inner; ++j) move<put, T>(from[j], to[j]);
    });
  } else if (w.inner_stride == 0) {
    w.each([&](int64_t x_at, int64_t y_at) {
      Y* to = y + y_at;
      if constexpr (put == Put::read) {
        const T value = x[x_at];
        for (int64_t j = 0; j < w.inner; ++j) to[j] = value;
      } else {
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < w.inner; ++j) sum += to[j];
        x[x_at] += sum;
      }
    });
  } else {
    w.each([&](int64_t x_at, int64_t y_at) {
      X* from = x + x_at;
      Y* to = y + y_at;
      for (int64_t j = 0; j < w.inner; ++j) move<put, T>(from[j * w.inner_stride], to[j]);
    });
  }
}

template <class T>
void strided_gather(const Context& ctx, int64_t rows, const StridedMap& map, const T* x, int64_t x_ld, T* y, int64_t y_ld) {
  const int64_t size = map.size;
  if (size == 0) return;
  const Walk walk(map);
  const int threads = threads_for(ctx, rows * size);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; ++r) walk_row<Put::read, T>(walk, x + r * x_ld + map.offset, y + r * y_ld);
}

template <class T>
void strided_scatter(const Context& ctx, int64_t rows, const StridedMap& map, const T* y, int64_t y_ld, T* x, int64_t x_ld, int64_t width,
                     bool accumulate) {
  const int64_t size = map.size;
  const Walk walk(map);
  const bool injective = map.injective, covers = injective && size == width;
  const int threads = threads_for(ctx, rows * width);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; ++r) {
    T* to = x + r * x_ld;
    const T* from = y + r * y_ld;
    if (!accumulate && !covers) std::memset(to, 0, width * sizeof(T));
    if (size == 0) continue;
    if (!accumulate && injective) {
      walk_row<Put::assign, T>(walk, to + map.offset, from);
    } else {
      walk_row<Put::add, T>(walk, to + map.offset, from);
    }
  }
}

template <class T>
void copy_rows(const Context& ctx, int64_t rows, int64_t width, const T* x, int64_t x_ld, T* y, int64_t y_ld, bool accumulate) {
  if (accumulate && x == nullptr) return;
  parallel_for(threads_for(ctx, rows * width), rows, [&](int64_t r) {
    const T* from = x + r * x_ld;
    T* to = y + r * y_ld;
    if (x == nullptr) {
      for (int64_t j = 0; j < width; ++j) to[j] = T(0);
    } else if (accumulate) {
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) to[j] += from[j];
    } else {
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) to[j] = from[j];
    }
  });
}

template <class T>
void index_gather(const Context& ctx, int64_t rows, int64_t size, const int64_t* index, T fill, const T* x, int64_t x_ld, T* y, int64_t y_ld) {
  const int threads = threads_for(ctx, rows * size);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = x + r * x_ld;
    T* to = y + r * y_ld;
    for (int64_t j = 0; j < size; ++j) to[j] = index[j] < 0 ? fill : from[index[j]];
  }
}

template <class T>
void index_scatter(const Context& ctx, int64_t rows, int64_t width, const int64_t* begin, const int64_t* sources, const T* y, int64_t y_ld, T* x,
                   int64_t x_ld, bool accumulate) {
  const int threads = threads_for(ctx, rows * width);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = y + r * y_ld;
    T* to = x + r * x_ld;
    for (int64_t i = 0; i < width; ++i) {
      T sum = accumulate ? to[i] : T(0);
      for (int64_t k = begin[i]; k < begin[i + 1]; ++k) sum += from[sources[k]];
      to[i] = sum;
    }
  }
}

template <class T>
void check_indices(const Context&, int64_t size, const T* index, int64_t bound, bool from_end, const char* who) {
  const T low = from_end ? -static_cast<T>(bound) : T(0), high = static_cast<T>(bound);
  for (int64_t i = 0; i < size; ++i) {
    // Written so that NaN fails too.
    if (!(index[i] >= low && index[i] < high && std::floor(index[i]) == index[i])) {
      throw std::out_of_range(std::string(who) + ": expected whole indices in [" + std::to_string(from_end ? -bound : 0) + ", " +
                              std::to_string(bound) + "), got " + std::to_string(index[i]) + "; correct the data.");
    }
  }
}

// visit(offset of x's run, offset of y's run) for each (v, n, o, j); the run is `inner` long and shares one index where index_inner = 0.
template <bool transposed, class T>
void select_axis_row(const AxisSelection& s, const T* index, std::conditional_t<transposed, T, const T>* x,
                     std::conditional_t<transposed, const T, T>* y) {
  for (int64_t o = 0; o < s.outer; ++o) {
    for (int64_t j = 0; j < s.count; ++j) {
      const T* at = index + o * s.index_outer + j * s.index_count;
      auto* whole = x + o * s.length * s.inner;
      auto* part = y + (o * s.count + j) * s.inner;
      if (s.index_inner == 0) {
        const int64_t k = static_cast<int64_t>(*at);
        auto* run = whole + (k < 0 ? k + s.length : k) * s.inner;
#pragma omp simd
        for (int64_t i = 0; i < s.inner; ++i) {
          if constexpr (transposed) {
            run[i] += part[i];
          } else {
            part[i] = run[i];
          }
        }
      } else {
        for (int64_t i = 0; i < s.inner; ++i) {
          const int64_t k = static_cast<int64_t>(at[i * s.index_inner]);
          auto& element = whole[(k < 0 ? k + s.length : k) * s.inner + i];
          if constexpr (transposed) {
            element += part[i];
          } else {
            part[i] = element;
          }
        }
      }
    }
  }
}

template <class T>
void select_axis(const Context& ctx, int64_t V, int64_t n, const AxisSelection& s, const T* index, const T* x, T* y) {
  const int64_t x_width = s.outer * s.length * s.inner, y_width = s.outer * s.count * s.inner;
  const int threads = threads_for(ctx, V * n * y_width);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < V * n; ++r) select_axis_row<false, T>(s, index + r % n * s.index_width, x + r * x_width, y + r * y_width);
}

template <class T>
void select_axis_transposed(const Context& ctx, int64_t V, int64_t n, const AxisSelection& s, const T* index, const T* g_y, T* g_x, bool accumulate) {
  const int64_t x_width = s.outer * s.length * s.inner, y_width = s.outer * s.count * s.inner;
  const int threads = threads_for(ctx, V * n * x_width);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < V * n; ++r) {
    if (!accumulate) std::memset(g_x + r * x_width, 0, x_width * sizeof(T));
    select_axis_row<true, T>(s, index + r % n * s.index_width, g_x + r * x_width, g_y + r * y_width);
  }
}

INFL_REGISTER_CPU(strided_gather_stub, strided_gather)
INFL_REGISTER_CPU(strided_scatter_stub, strided_scatter)
INFL_REGISTER_CPU(copy_rows_stub, copy_rows)
INFL_REGISTER_CPU(index_gather_stub, index_gather)
INFL_REGISTER_CPU(index_scatter_stub, index_scatter)
INFL_REGISTER_CPU(check_indices_stub, check_indices)
INFL_REGISTER_CPU(select_axis_stub, select_axis)
INFL_REGISTER_CPU(select_axis_transposed_stub, select_axis_transposed)

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
