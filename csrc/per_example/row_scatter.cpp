#include "per_example/row_scatter.h"

#include <algorithm>

#include "common/interruption.h"
#include "common/scratch.h"
#include "kernels/movement.h"
#include "kernels/per_example.h"

namespace infl {

template <class T>
RowScatter<T>::RowScatter(const Context& ctx, int64_t V, int64_t N, const Factor<T>& f) : V_(V), N_(N), cols_(f.cols) {
  const std::vector<T> index = download(ctx, f.index, N * f.positions);
  std::vector<std::pair<int64_t, int64_t>> uses;  // (row, position); positions run over examples first, so this also sorts by example
  for (int64_t p = 0; p < N * f.positions; ++p) {
    const int64_t row = static_cast<int64_t>(index[p]);
    if (row != f.skip) uses.emplace_back(row, p);
  }
  std::sort(uses.begin(), uses.end());
  std::vector<T> rows;
  std::vector<int64_t> examples, first, positions;
  for (const auto& [row, p] : uses) {
    const int64_t example = p / f.positions;
    if (rows.empty() || rows.back() != static_cast<T>(row) || examples.back() != example) {
      first.push_back(static_cast<int64_t>(positions.size()));
      rows.push_back(static_cast<T>(row));
      examples.push_back(example);
    }
    positions.push_back(p);
  }
  first.push_back(static_cast<int64_t>(positions.size()));
  entries_ = static_cast<int64_t>(rows.size());
  row_ = upload(ctx, rows);
  example_ = upload(ctx, examples);
  of_example_ = upload(ctx, inverse_of_index(examples, N_));
  value_.resize(ctx, V_ * entries_ * cols_);
  const Buffer<int64_t> first_on_device = upload(ctx, first), positions_on_device = upload(ctx, positions);
  row_merge_stub<T>(ctx, V_, entries_, cols_, first_on_device.data(), positions_on_device.data(), f.col, N_ * f.positions, value_.data());
}

template <class T>
SparseRows<T> RowScatter<T>::view() const {
  return {V_, N_, entries_, row_.data(), example_.data(), of_example_.data(), of_example_.data() + N_ + 1, value_.data()};
}

template <class T>
void RowScatter<T>::add_square_norms(const Context& ctx, T* out) const {
  Scratch<T> norms(ctx, V_ * entries_);
  square_norm_stub<T>(ctx, V_ * entries_, cols_, value_.data(), cols_, norms.data(), false);
  index_scatter_stub<T>(ctx, V_, N_, of_example_.data(), of_example_.data() + N_ + 1, norms.data(), entries_, out, N_, true);
}

template <class T>
void RowScatter<T>::add_square_sum(const Context& ctx, T* out) const {
  Scratch<T> squares(ctx, entries_ * cols_);
  square_accumulate_stub<T>(ctx, V_, entries_ * cols_, value_.data(), squares.data(), false);
  row_scatter_stub<T>(ctx, 1, entries_, cols_, row_.data(), 0, -1, squares.data(), out, 0);
}

template <class T>
void RowScatter<T>::add_gram(const Context& ctx, const RowScatter& other, T* out) const {
  interruption_point();
  sparse_gram_stub<T>(ctx, cols_, view(), other.view(), out);
}

template class RowScatter<float>;
template class RowScatter<double>;

}  // namespace infl
