// Per-example gradients of a table of which each example uses few rows (embeddings): G[v, n] = Σ_t e(index[n, t]) col[v, n, t]ᵀ.
//
// Kept as the rows that are not zero: one entry for each pair (row, example), in order of rows, with its positions summed. Norms, sums of squares
// and inner products then cost what the entries hold; the table is never formed.
#pragma once

#include <cstdint>
#include <vector>

#include "common/buffer.h"
#include "common/context.h"
#include "per_example/factor.h"

namespace infl {

template <class T>
class RowScatter {
 public:
  // `factor` has an index.
  RowScatter(const Context& ctx, int64_t V, int64_t N, const Factor<T>& factor);

  void add_square_norms(const Context& ctx, T* out) const;                   // [V, N]
  void add_square_sum(const Context& ctx, T* out) const;                     // [rows, cols]
  void add_gram(const Context& ctx, const RowScatter& other, T* out) const;  // [V N, V' N']

 private:
  int64_t num_entries() const { return static_cast<int64_t>(example_.size()); }
  // First entry after those of the same row as `entry`.
  int64_t end_of_row(int64_t entry) const;

  int64_t V_, N_, cols_;
  std::vector<int64_t> row_, example_;  // per entry
  Buffer<int64_t> example_on_device_;
  Buffer<T> value_;  // [V, entries, cols]
};

extern template class RowScatter<float>;
extern template class RowScatter<double>;

}  // namespace infl
