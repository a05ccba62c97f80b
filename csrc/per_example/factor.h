// A factor: one node's contribution to the gradient of each example with respect to one parameter, not multiplied out.
//
//   outer   G[v, n] = Σ_t row[v, n, t] col[v, n, t]ᵀ,   a [rows, cols] matrix, row-major in the parameter
//   dense   G[v, n] = Σ_t row[v, n, t],                 a vector of `rows` (biases); cols = 1, col absent
//   scatter G[v, n] = Σ_t e(index[n, t]) col[v, n, t]ᵀ, a [rows, cols] matrix of which few rows are not zero (embeddings); row absent
//
// `row` or `col` carries the V axis (the cotangent side), the other is shared by all right-hand sides (the activation side).
#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "common/arena.h"
#include "kernels/movement.h"

namespace infl {

template <class T>
struct Factor {
  int slot = -1;
  int64_t positions = 1;  // t runs over these
  int64_t rows = 0, cols = 1;
  const T* row = nullptr;    // [V or 1, N, positions, rows]
  const T* col = nullptr;    // [V or 1, N, positions, cols], null for dense
  const T* index = nullptr;  // scatter: [N, positions], whole numbers below rows
  int64_t skip = -1;         // the index that adds nothing
  bool row_has_v = true;
  bool col_has_v = false;

  bool is_dense() const { return col == nullptr; }
  bool is_scatter() const { return index != nullptr; }
};

// What a gradient that sums over positions should be: the sum, or the two sides of its outer products.
enum class FactorForm {
  cheapest,      // to be formed once
  for_products,  // to be multiplied, by parts if it is large
  outer          // its two sides are what is wanted
};

// Where rules put their factors, and get memory for those that are not lying about already.
template <class T>
class FactorSink {
 public:
  FactorSink(const Context& ctx, Arena<T>& storage, FactorForm form) : ctx_(ctx), storage_(storage), form_(form) {}

  FactorForm form() const { return form_; }

  // What lies in [begin, begin + size) will be overwritten: factors that point there get a copy, one for all of them.
  void passing(const T* begin, int64_t size) {
    begin_ = begin;
    size_ = size;
    copy_ = nullptr;
  }
  void add(Factor<T> factor) {
    factor.row = lasting(factor.row);
    factor.col = lasting(factor.col);
    factors_.push_back(factor);
  }
  T* allocate(int64_t size) { return storage_.allocate(size); }
  std::vector<Factor<T>> take() { return std::move(factors_); }

 private:
  const T* lasting(const T* p) {
    const std::less<const T*> before;
    if (p == nullptr || before(p, begin_) || !before(p, begin_ + size_)) return p;
    if (copy_ == nullptr) {
      T* copy = allocate(size_);
      copy_rows_stub<T>(ctx_, 1, size_, begin_, 0, copy, 0, false);
      copy_ = copy;
    }
    return copy_ + (p - begin_);
  }

  const Context& ctx_;
  const T* begin_ = nullptr;
  int64_t size_ = 0;
  const T* copy_ = nullptr;
  Arena<T>& storage_;
  std::vector<Factor<T>> factors_;
  FactorForm form_;
};

}  // namespace infl
