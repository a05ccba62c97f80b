#include "per_example/row_scatter.h"

#include <algorithm>

#include "common/scratch.h"
#include "kernels/embedding.h"
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
  std::vector<int64_t> begin, positions;
  for (const auto& [row, p] : uses) {
    const int64_t example = p / f.positions;
    if (row_.empty() || row_.back() != row || example_.back() != example) {
      begin.push_back(static_cast<int64_t>(positions.size()));
      row_.push_back(row);
      example_.push_back(example);
    }
    positions.push_back(p);
  }
  begin.push_back(static_cast<int64_t>(positions.size()));
  example_on_device_ = upload(ctx, example_);
  value_.resize(ctx, V_ * num_entries() * cols_);
  const Buffer<int64_t> begin_on_device = upload(ctx, begin), positions_on_device = upload(ctx, positions);
  row_merge_stub<T>(ctx, V_, num_entries(), cols_, begin_on_device.data(), positions_on_device.data(), f.col, N_ * f.positions, value_.data());
}

template <class T>
int64_t RowScatter<T>::end_of_row(int64_t entry) const {
  int64_t end = entry;
  while (end < num_entries() && row_[end] == row_[entry]) ++end;
  return end;
}

template <class T>
void RowScatter<T>::add_square_norms(const Context& ctx, T* out) const {
  const int64_t entries = num_entries();
  Scratch<T> norms(ctx, V_ * entries);
  square_norm_stub<T>(ctx, V_ * entries, cols_, value_.data(), cols_, norms.data(), false);
  const Buffer<int64_t> of_example = upload(ctx, inverse_of_index(example_, N_));
  index_scatter_stub<T>(ctx, V_, N_, of_example.data(), of_example.data() + N_ + 1, norms.data(), entries, out, N_, true);
}

template <class T>
void RowScatter<T>::add_square_sum(const Context& ctx, T* out) const {
  const int64_t entries = num_entries();
  Scratch<T> squares(ctx, entries * cols_);
  square_accumulate_stub<T>(ctx, V_, entries * cols_, value_.data(), squares.data(), false);
  const Buffer<T> row = upload(ctx, std::vector<T>(row_.begin(), row_.end()));
  row_scatter_stub<T>(ctx, 1, entries, cols_, row.data(), 0, -1, squares.data(), out, 0);
}

template <class T>
void RowScatter<T>::add_gram(const Context& ctx, const RowScatter& other, T* out) const {
  const int64_t ld = other.V_ * other.N_;
  int64_t i = 0, j = 0;
  while (i < num_entries() && j < other.num_entries()) {
    if (row_[i] != other.row_[j]) {
      (row_[i] < other.row_[j] ? i : j) += 1;
      continue;
    }
    const int64_t i_end = end_of_row(i), j_end = other.end_of_row(j);
    for (int64_t w = 0; w < other.V_; ++w) {
      sparse_gram_stub<T>(ctx, V_, i_end - i, j_end - j, cols_, value_.data() + i * cols_, num_entries() * cols_,
                          other.value_.data() + (w * other.num_entries() + j) * cols_, example_on_device_.data() + i,
                          other.example_on_device_.data() + j, out + w * other.N_, N_ * ld, ld);
    }
    i = i_end;
    j = j_end;
  }
}

template class RowScatter<float>;
template class RowScatter<double>;

}  // namespace infl
