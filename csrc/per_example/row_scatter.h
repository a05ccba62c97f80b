// Per-example gradients of a table of which each example uses few rows (embeddings): G[v, n] = Σ_t e(index[n, t]) col[v, n, t]ᵀ.
//
// Kept as the rows that are not zero: one entry for each pair (row, example), in order of rows, with its positions summed. Norms, sums of squares
// and inner products then cost what the entries hold; the table is never formed.
#pragma once

#include <cstdint>

#include "common/buffer.h"
#include "common/context.h"
#include "kernels/embedding.h"
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
  SparseRows<T> view() const;

  int64_t V_, N_, cols_, entries_;
  Buffer<T> row_;
  Buffer<int64_t> example_, of_example_;  // the latter as inverse_of_index leaves it: where an example's entries begin, then the entries
  Buffer<T> value_;
};

extern template class RowScatter<float>;
extern template class RowScatter<double>;

}  // namespace infl
