// Which matrices the vendor's product takes where they lie.
#pragma once

#include <algorithm>
#include <cstdint>

namespace infl::cuda {

// Rows or columns contiguous and `ld` apart, which keeps them from overlapping: a row that is broadcast (stride 0) is none of these.
struct Leading {
  bool possible, transposed;
  int64_t ld;
};

inline Leading leading(int64_t rows, int64_t cols, int64_t row, int64_t col) {
  if ((col == 1 || cols == 1) && (row >= cols || rows == 1)) return {true, false, std::max(row, cols)};
  if ((row == 1 || rows == 1) && (col >= rows || cols == 1)) return {true, true, std::max(col, rows)};
  return {false, false, 0};
}

}  // namespace infl::cuda
