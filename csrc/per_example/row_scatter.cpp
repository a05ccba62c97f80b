#include "per_example/row_scatter.h"

#include <algorithm>

#include "kernels/embedding.h"
#include "kernels/per_example.h"

namespace infl {

template <class T>
RowScatter<T>::RowScatter(const Context& ctx, int64_t V, int64_t N, const Factor<T>& f) : V_(V), N_(N), cols_(f.cols) {
  std::vector<std::pair<int64_t, int64_t>> uses;  // (row, position); positions run over examples first, so this also sorts by example
  for (int64_t p = 0; p < N * f.positions; ++p) {
    const int64_t row = static_cast<int64_t>(f.index[p]);
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
  value_.resize(V_ * num_entries() * cols_);
  row_merge_stub<T>(ctx, V_, num_entries(), cols_, begin.data(), positions.data(), f.col, N_ * f.positions, value_.data());
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
  Buffer<T> norms(V_ * entries);
  square_norm_stub<T>(ctx, V_ * entries, cols_, value_.data(), cols_, norms.data(), false);
  for (int64_t v = 0; v < V_; ++v) {
    for (int64_t e = 0; e < entries; ++e) out[v * N_ + example_[e]] += norms.data()[v * entries + e];
  }
}

template <class T>
void RowScatter<T>::add_square_sum(const Context& ctx, T* out) const {
  for (int64_t begin = 0, end; begin < num_entries(); begin = end) {
    end = end_of_row(begin);
    for (int64_t v = 0; v < V_; ++v) {
      square_accumulate_stub<T>(ctx, end - begin, cols_, value_.data() + (v * num_entries() + begin) * cols_, out + row_[begin] * cols_, true);
    }
  }
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
                          other.value_.data() + (w * other.num_entries() + j) * cols_, example_.data() + i, other.example_.data() + j,
                          out + w * other.N_, N_ * ld, ld);
    }
    i = i_end;
    j = j_end;
  }
}

template class RowScatter<float>;
template class RowScatter<double>;

}  // namespace infl
