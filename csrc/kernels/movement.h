// Kernels that move elements: strided views, blocks of rows, index maps. All work on `rows` rows (examples times right-hand sides) that share one
// map, so the map is read once per row and never computed per element. Deterministic: a row is written by one thread, in a fixed order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/dispatch.h"

namespace infl {

// i = (i_0, ..., i_{rank−1}) -> offset + Σ_k i_k stride_k, for i in row-major order over `shape`. Collapsed: no axis of length one, and no two
// neighbours that one axis could replace; so a contiguous run is always the last axis.
struct StridedMap {
  static constexpr int kMaxRank = 16;
  int rank = 0;
  int64_t offset = 0, size = 1;  // size: elements of `shape`
  int64_t shape[kMaxRank] = {}, stride[kMaxRank] = {};
  bool injective = true;  // no element is given twice (maps that interleave without meeting count as not injective)

  StridedMap() = default;
  StridedMap(int64_t first, const std::vector<int64_t>& full_shape, const std::vector<int64_t>& strides) : offset(first) {
    for (size_t k = 0; k < full_shape.size(); ++k) {
      size *= full_shape[k];
      if (full_shape[k] == 1) continue;
      if (rank > 0 && stride[rank - 1] == strides[k] * full_shape[k]) {
        shape[rank - 1] *= full_shape[k];
        stride[rank - 1] = strides[k];
      } else if (rank < kMaxRank) {
        shape[rank] = full_shape[k];
        stride[rank++] = strides[k];
      } else {
        throw std::invalid_argument("StridedMap: expected at most " + std::to_string(kMaxRank) + " axes that cannot be joined, got more.");
      }
    }
    // With axes in order of their strides, each must step over all that the finer ones reach.
    std::vector<std::pair<int64_t, int64_t>> axes;
    for (int k = 0; k < rank; ++k) axes.emplace_back(stride[k] < 0 ? -stride[k] : stride[k], shape[k]);
    std::sort(axes.begin(), axes.end());
    int64_t reach = 0;
    for (const auto& [step, length] : axes) {
      injective = injective && step > reach;
      reach += step * (length - 1);
    }
  }

  // The map reads elements 0, 1, ..., size − 1 in order.
  bool is_identity() const { return offset == 0 && (rank == 0 || (rank == 1 && stride[0] == 1)); }
  // Are all indices in [0, width)?
  bool fits(int64_t width) const {
    int64_t low = offset, high = offset;
    for (int k = 0; k < rank; ++k) (stride[k] < 0 ? low : high) += (shape[k] - 1) * stride[k];
    return size == 0 || (low >= 0 && high < width);
  }
};

// y[r, i] = x[r, map(i)], i in row-major order; rows x_ld and y_ld apart.
template <class T>
inline KernelStub<void(const Context&, int64_t rows, const StridedMap& map, const T* x, int64_t x_ld, T* y, int64_t y_ld)> strided_gather_stub{
    "strided_gather"};

// The transpose: x[r, map(i)] += y[r, i] (with `accumulate`), or x[r, 0:width] = 0 first. Elements of y that meet in one of x are added in order.
template <class T>
inline KernelStub<void(const Context&, int64_t rows, const StridedMap& map, const T* y, int64_t y_ld, T* x, int64_t x_ld, int64_t width,
                       bool accumulate)>
    strided_scatter_stub{"strided_scatter"};

// y[r, 0:width] = x[r, 0:width], or += with accumulate; x null: zeros. Rows x_ld and y_ld apart.
template <class T>
inline KernelStub<void(const Context&, int64_t rows, int64_t width, const T* x, int64_t x_ld, T* y, int64_t y_ld, bool accumulate)> copy_rows_stub{
    "copy_rows"};

template <class T>
void copy(const Context& ctx, int64_t size, const T* x, T* y) {
  copy_rows_stub<T>(ctx, 1, size, x, 0, y, 0, false);
}

template <class T>
void fill_zero(const Context& ctx, int64_t size, T* y) {
  copy_rows_stub<T>(ctx, 1, size, nullptr, 0, y, 0, false);
}

// y[r, j] = x[r, index[j]], or `fill` where index[j] < 0; r < rows, j < size.
template <class T>
inline KernelStub<void(const Context&, int64_t rows, int64_t size, const int64_t* index, T fill, const T* x, int64_t x_ld, T* y, int64_t y_ld)>
    index_gather_stub{"index_gather"};

// The transpose, given the index map's inverse: x[r, i] = Σ_k y[r, sources[k]], k from begin[i] to begin[i + 1], in order; or += with accumulate.
template <class T>
inline KernelStub<void(const Context&, int64_t rows, int64_t width, const int64_t* begin, const int64_t* sources, const T* y, int64_t y_ld, T* x,
                       int64_t x_ld, bool accumulate)>
    index_scatter_stub{"index_scatter"};

// begin [width + 1], then sources, of an index map into [0, width); negative indices are nowhere.
inline std::vector<int64_t> inverse_of_index(const std::vector<int64_t>& index, int64_t width) {
  std::vector<int64_t> inverse(width + 1, 0);
  for (int64_t i : index) {
    if (i >= 0) ++inverse[i + 1];
  }
  for (int64_t i = 0; i < width; ++i) inverse[i + 1] += inverse[i];
  const int64_t used = inverse[width];
  std::vector<int64_t> next(inverse.begin(), inverse.end() - 1);
  inverse.resize(width + 1 + used);
  for (size_t j = 0; j < index.size(); ++j) {
    if (index[j] >= 0) inverse[width + 1 + next[index[j]]++] = static_cast<int64_t>(j);
  }
  return inverse;
}

// Selection along an axis by indices that differ between examples and come as numbers of T:
//   y[v, n, o, j, i] = x[v, n, o, k, i],  k = index[n, o·index_outer + j·index_count + i·index_inner]  (k < 0 counts from the end),
// o < outer, j < count, i < inner, k < length.
struct AxisSelection {
  int64_t outer = 1, length = 1, count = 1, inner = 1;
  int64_t index_outer = 0, index_count = 1, index_inner = 0;
  int64_t index_width = 1;  // indices of one example
};

// Throws std::out_of_range where an index is not a whole number in [-bound, bound), or, with from_end = false, in [0, bound).
template <class T>
inline KernelStub<void(const Context&, int64_t size, const T* index, int64_t bound, bool from_end, const char* who)> check_indices_stub{
    "check_indices"};

template <class T>
inline KernelStub<void(const Context&, int64_t V, int64_t n, const AxisSelection&, const T* index, const T* x, T* y)> select_axis_stub{"select_axis"};

// The transpose; g_x is zeroed first without `accumulate`.
template <class T>
inline KernelStub<void(const Context&, int64_t V, int64_t n, const AxisSelection&, const T* index, const T* g_y, T* g_x, bool accumulate)>
    select_axis_transposed_stub{"select_axis_transposed"};

}  // namespace infl
