#include "per_example/factors.h"

#include <algorithm>
#include <set>

#include "common/interruption.h"
#include "common/scratch.h"
#include "kernels/elementwise.h"
#include "kernels/embedding.h"
#include "kernels/gemm.h"
#include "kernels/movement.h"
#include "kernels/per_example.h"
#include "kernels/reduction.h"
#include "per_example/row_scatter.h"

namespace infl {

namespace {

constexpr int64_t kBlockBytes = 32 << 20;  // of what is formed at a time: gradients where they must be, inner products

// Of N rows of `width` elements, those that are formed at a time.
template <class T>
int64_t largest_block(int64_t N, int64_t width) {
  return std::clamp<int64_t>(kBlockBytes / (width * static_cast<int64_t>(sizeof(T))), 1, std::max<int64_t>(1, N));
}

// Whether two factors of one parameter have the same two sides. Plans of different shapes may differ in that: one forms the gradients that the other
// leaves as outer products.
template <class T>
bool alike(const Factor<T>& f, const Factor<T>& g) {
  return f.is_dense() == g.is_dense() && f.rows == g.rows && f.cols == g.cols && f.row_has_v == g.row_has_v;
}

// a [M, K] b [N, K]ᵀ
template <class T>
Gemm<T> transposed_product(int64_t M, int64_t N, int64_t K, const T* a, const T* b) {
  Gemm<T> g;
  g.M = M;
  g.N = N;
  g.terms[0].K = K;
  g.terms[0].a = a;
  g.terms[0].a_row = K;
  g.terms[0].b = b;
  g.terms[0].b_row = 1;
  g.terms[0].b_col = K;
  return g;
}

// out [M, N] = a [M, K] b [N, K]ᵀ
template <class T>
void multiply_transposed(const Context& ctx, int64_t M, int64_t N, int64_t K, const T* a, const T* b, T* out) {
  Gemm<T> g = transposed_product<T>(M, N, K, a, b);
  g.c = out;
  g.ldc = N;
  gemm_stub<T>(ctx, g);
}

}  // namespace

template <class T>
FactorSet<T>::FactorSet(int64_t V, int64_t N, int64_t num_parameters, const std::vector<Slot>& slots, const std::vector<Factor<T>>& factors)
    : V_(V), N_(N), num_parameters_(num_parameters), slots_(slots) {
  for (const Factor<T>& factor : factors) {
    const Slot::Region& region = slots_[factor.slot].region;
    if (region.size == 0 || factor.positions == 0) continue;  // no elements, or zero: it adds nothing
    Group& group = groups_[region.begin];
    group.size = region.size;
    group.whole = group.whole && slots_[factor.slot].size == region.size;
    group.factors.push_back(factor);
  }
}

template <class T>
void FactorSet<T>::form(const Context& ctx, const Group& group, int64_t v, int64_t n0, int64_t n, T* out, int64_t stride, bool stream) const {
  interruption_point();
  bool accumulate = false;
  for (const Factor<T>& f : group.factors) {
    if (!accumulate && (f.is_scatter() || slots_[f.slot].size != group.size)) {
      copy_rows_stub<T>(ctx, n, group.size, nullptr, 0, out, stride, false);
      accumulate = true;
    }
    if (f.is_scatter()) {
      row_scatter_stub<T>(ctx, n, f.positions, f.cols, f.index + n0 * f.positions, f.positions, f.skip, f.col + (v * N_ + n0) * f.positions * f.cols,
                          out + place(f), stride);
      continue;
    }
    const T* row = f.row + ((f.row_has_v ? v * N_ : 0) + n0) * f.positions * f.rows;
    const T* col = f.is_dense() ? nullptr : f.col + ((f.col_has_v ? v * N_ : 0) + n0) * f.positions * f.cols;
    outer_product_stub<T>(ctx, n, f.positions, f.rows, f.cols, row, col, out + place(f), stride, accumulate, stream);
    accumulate = true;
  }
}

template <class T>
void FactorSet<T>::materialise(const Context& ctx, T* out, int64_t stride, int64_t v_stride, bool stream) const {
  // Parameters that do not influence the output have zero gradients: clear the gaps between the regions that do.
  int64_t at = 0;
  const auto clear_up_to = [&](int64_t end) {
    for (int64_t v = 0; v < V_ && end > at; ++v) copy_rows_stub<T>(ctx, N_, end - at, nullptr, 0, out + v * v_stride + at, stride, false);
  };
  for (const auto& [begin, group] : groups_) {
    clear_up_to(begin);
    at = begin + group.size;
  }
  clear_up_to(num_parameters_);
  for (const auto& [begin, group] : groups_) {
    for (int64_t v = 0; v < V_; ++v) form(ctx, group, v, 0, N_, out + v * v_stride + begin, stride, stream);
  }
}

template <class T>
void FactorSet<T>::square_norms(const Context& ctx, T* out) const {
  fill_zero<T>(ctx, V_ * N_, out);
  for (const auto& [begin, group] : groups_) add_square_norms(ctx, group, out);
}

template <class T>
void FactorSet<T>::square_norms(const Context& ctx, int64_t region, T* out) const {
  fill_zero<T>(ctx, V_ * N_, out);
  const auto found = groups_.find(region);
  if (found != groups_.end()) add_square_norms(ctx, found->second, out);
}

template <class T>
std::vector<Factor<T>> FactorSet<T>::outer_products() const {
  std::vector<Factor<T>> found;
  for (const auto& [begin, group] : groups_) {
    const auto is_whole = [&, size = group.size](const Factor<T>& f) { return !f.is_dense() && !f.is_scatter() && slots_[f.slot].size == size; };
    if (std::all_of(group.factors.begin(), group.factors.end(), is_whole)) found.insert(found.end(), group.factors.begin(), group.factors.end());
  }
  return found;
}

template <class T>
void FactorSet<T>::add_square_norms(const Context& ctx, const Group& group, T* out) const {
  if (group.is_simple()) {
    // ‖row colᵀ‖² = ‖row‖² ‖col‖²
    const Factor<T>& f = group.factors[0];
    const bool row_first = f.row_has_v;
    const T* mine = row_first ? f.row : f.col;
    Scratch<T> norms(ctx, V_ * N_);
    square_norm_stub<T>(ctx, V_ * N_, row_first ? f.rows : f.cols, mine, row_first ? f.rows : f.cols, norms.data(), false);
    if (f.is_dense()) {
      combine_stub<T>(ctx, V_ * N_, T(1), norms.data(), T(0), nullptr, out, true);
    } else {
      Scratch<T> shared(ctx, N_);
      const int64_t width = row_first ? f.cols : f.rows;
      square_norm_stub<T>(ctx, N_, width, row_first ? f.col : f.row, width, shared.data(), false);
      multiply_accumulate_stub<T>(ctx, V_ * N_, norms.data(), shared.data(), N_, out);
    }
    return;
  }
  if (group.is_scatter()) {
    RowScatter<T>(ctx, V_, N_, group.factors[0]).add_square_norms(ctx, out);
    return;
  }
  const int64_t size = group.size;
  const int64_t block = largest_block<T>(N_, size);
  Scratch<T> formed(ctx, block * size);
  for (int64_t v = 0; v < V_; ++v) {
    for (int64_t n0 = 0; n0 < N_; n0 += block) {
      const int64_t n = std::min(block, N_ - n0);
      form(ctx, group, v, n0, n, formed.data(), size);
      square_norm_stub<T>(ctx, n, size, formed.data(), size, out + v * N_ + n0, true);
    }
  }
}

template <class T>
void FactorSet<T>::add_square_sum(const Context& ctx, T* out) const {
  for (const auto& [begin, group] : groups_) {
    const int64_t size = group.size;
    T* to = out + begin;
    const Factor<T>& f = group.factors[0];
    if (group.is_scatter()) {
      RowScatter<T>(ctx, V_, N_, f).add_square_sum(ctx, to);
      continue;
    }
    if (group.is_simple() && f.is_dense()) {
      square_accumulate_stub<T>(ctx, V_ * N_, f.rows, f.row, to, true);
      continue;
    }
    if (group.is_simple()) {
      // Σ_{v,n} (row_r col_c)² = Σ_n (Σ_v row²) col²: one product of squares
      const int64_t mine = f.row_has_v ? f.rows : f.cols, shared = f.row_has_v ? f.cols : f.rows;
      Scratch<T> a(ctx, N_ * mine), b(ctx, N_ * shared);
      square_accumulate_stub<T>(ctx, V_, N_ * mine, f.row_has_v ? f.row : f.col, a.data(), false);
      square_accumulate_stub<T>(ctx, 1, N_ * shared, f.row_has_v ? f.col : f.row, b.data(), false);
      Gemm<T> g;
      g.M = f.rows;
      g.N = f.cols;
      g.c = to;
      g.ldc = f.cols;
      g.accumulate = true;
      g.terms[0].K = N_;
      g.terms[0].a = f.row_has_v ? a.data() : b.data();
      g.terms[0].a_row = 1;
      g.terms[0].a_col = f.rows;
      g.terms[0].b = f.row_has_v ? b.data() : a.data();
      g.terms[0].b_row = f.cols;
      g.terms[0].b_col = 1;
      gemm_stub<T>(ctx, g);
      continue;
    }
    const int64_t block = largest_block<T>(N_, size);
    Scratch<T> formed(ctx, block * size);
    for (int64_t v = 0; v < V_; ++v) {
      for (int64_t n0 = 0; n0 < N_; n0 += block) {
        const int64_t n = std::min(block, N_ - n0);
        form(ctx, group, v, n0, n, formed.data(), size);
        square_accumulate_stub<T>(ctx, n, size, formed.data(), to, true);
      }
    }
  }
}

template <class T>
std::map<int64_t, int64_t> FactorSet<T>::dense_partners(const FactorSet& other) const {
  const auto vectors = [](const FactorSet& set, int64_t region) -> const T* {
    const auto found = set.groups_.find(region);
    if (found == set.groups_.end() || !found->second.is_simple()) return nullptr;
    const Factor<T>& f = found->second.factors[0];
    return f.row_has_v ? f.row : f.col;
  };
  const auto factor = [](const FactorSet& set, int64_t region) -> const Factor<T>& { return set.groups_.at(region).factors[0]; };
  std::map<int64_t, int64_t> partners;
  for (const auto& [dense, group] : groups_) {
    if (!vectors(*this, dense) || !vectors(other, dense) || !group.factors[0].is_dense()) continue;
    if (!alike(group.factors[0], factor(other, dense))) continue;
    for (const auto& [outer, unused] : groups_) {
      const bool same = vectors(*this, outer) == vectors(*this, dense) && vectors(other, outer) == vectors(other, dense);
      if (!same || factor(*this, outer).is_dense() || partners.count(outer) > 0) continue;
      if (!alike(factor(*this, outer), factor(other, outer))) continue;
      partners[outer] = dense;
      break;
    }
  }
  return partners;
}

template <class T>
void FactorSet<T>::gram(const Context& ctx, const FactorSet& other, T* out) const {
  const int64_t products = V_ * N_ * other.V_ * other.N_;
  if (products == 0) return;
  fill_zero<T>(ctx, products, out);
  const std::map<int64_t, int64_t> partners = dense_partners(other);
  std::set<int64_t> included;
  for (const auto& [outer, dense] : partners) included.insert(dense);
  for (const auto& [begin, group] : groups_) {
    if (included.count(begin) > 0) continue;
    const int64_t end = begin + group.size;
    // Theirs that share elements with it: the same one, unless plans of different shapes read other parts of a parameter.
    auto it = other.groups_.upper_bound(begin);
    if (it != other.groups_.begin()) --it;
    for (; it != other.groups_.end() && it->first < end; ++it) {
      const auto& [other_begin, theirs] = *it;
      const int64_t from = std::max(begin, other_begin), to = std::min(end, other_begin + theirs.size);
      if (from >= to) continue;
      if (begin != other_begin || group.size != theirs.size) {
        add_formed_gram(ctx, group, from - begin, other, theirs, from - other_begin, to - from, out);
      } else if (group.is_simple() && theirs.is_simple() && alike(group.factors[0], theirs.factors[0])) {
        add_simple_gram(ctx, group.factors[0], other, theirs.factors[0], partners.count(begin) > 0, out);
      } else {
        add_gram(ctx, group, other, theirs, out);
      }
    }
  }
  if (is_halved(ctx, other)) mirror(ctx, out);
}

template <class T>
int64_t FactorSet<T>::rows_of_half() const {
  return std::min(largest_block<T>(N_, V_ * N_), std::clamp<int64_t>((N_ + 3) / 4, 64, 256));
}

// What lies below the diagonal, from what lies above: in the diagonal blocks too, where pairs of positions are summed up in another order.
template <class T>
void FactorSet<T>::mirror(const Context& ctx, T* out) const {
  const int64_t cols = V_ * N_;
  for (int64_t v = 0; v < V_; ++v) {
    for (int64_t n0 = 0; n0 < N_; n0 += rows_of_half()) {
      const int64_t begin = v * N_ + n0, n = std::min(rows_of_half(), N_ - n0), end = begin + n;
      for (int64_t i = begin + 1; i < end; ++i) {
        for (int64_t j = begin; j < i; ++j) out[i * cols + j] = out[j * cols + i];
      }
      if (end == cols) continue;
      strided_gather_stub<T>(ctx, cols - end, StridedMap(0, {n}, {cols}), out + begin * cols + end, 1, out + end * cols + begin, cols);
    }
  }
}

// ⟨row colᵀ, row' col'ᵀ⟩ = (row·row')(col·col'): the side with the V axis gives [N, V'N'] for each v, the shared side [N, N'].
template <class T>
void FactorSet<T>::add_simple_gram(const Context& ctx, const Factor<T>& f, const FactorSet& other, const Factor<T>& g, bool ones, T* out) const {
  const bool upper = is_halved(ctx, other);
  const int64_t cols = other.V_ * other.N_, M = other.N_;
  const int64_t width = f.row_has_v ? f.rows : f.cols, shared = f.row_has_v ? f.cols : f.rows;
  const T *f_vector = f.row_has_v ? f.row : f.col, *f_common = f.row_has_v ? f.col : f.row;
  const T *g_vector = g.row_has_v ? g.row : g.col, *g_common = g.row_has_v ? g.col : g.row;
  const int64_t block = upper ? rows_of_half() : largest_block<T>(N_, cols);
  Scratch<T> inner(ctx, block * cols), common(ctx, f.is_dense() ? 0 : block * M);
  for (int64_t n0 = 0; n0 < N_; n0 += block) {
    const int64_t n = std::min(block, N_ - n0);
    const int64_t skipped = upper && V_ == 1 ? n0 : 0, common_cols = M - skipped;
    if (!f.is_dense()) {
      multiply_transposed<T>(ctx, n, common_cols, shared, f_common + n0 * shared, g_common + skipped * shared, common.data());
      if (ones) affine_stub<T>(ctx, 1, n * common_cols, T(1), nullptr, T(1), nullptr, common.data(), common.data(), false);
    }
    // Columns [begin, end), a part of one period of `common` or several whole ones.
    const auto add = [&](int64_t v, int64_t begin, int64_t end) {
      if (begin == end) return;
      interruption_point();
      const int64_t count = end - begin;
      multiply_transposed<T>(ctx, n, count, width, f_vector + (v * N_ + n0) * width, g_vector + begin * width, inner.data());
      T* to = out + (v * N_ + n0) * cols + begin;
      const T* weights = f.is_dense() ? nullptr : common.data() + begin % M - skipped;
      if (weights) {
        gram_accumulate_stub<T>(ctx, n, count, inner.data(), count, weights, std::min(count, M), common_cols, to, cols);
      } else {
        copy_rows_stub<T>(ctx, n, count, inner.data(), count, to, cols, true);
      }
    };
    for (int64_t v = 0; v < V_; ++v) {
      if (upper) {
        add(v, v * N_ + n0, (v + 1) * N_);
        add(v, (v + 1) * N_, cols);
      } else {
        add(v, 0, cols);
      }
    }
  }
}

// By counted multiplications.
template <class T>
bool FactorSet<T>::pairs_positions(const FactorSet& other, const Factor<T>& f, const Factor<T>& g) const {
  constexpr int64_t kPair = 8;  // what multiplying and adding up two inner products costs
  if (V_ > 1 || other.V_ > 1) return false;
  const bool same = this == &other;
  const int64_t products = N_ * other.N_ / (same ? 2 : 1);
  const int64_t formed = N_ * f.positions + (same ? 0 : other.N_ * g.positions);
  return products * f.positions * g.positions * (f.rows + f.cols + kPair) < f.rows * f.cols * (formed + products);
}

template <class T>
void FactorSet<T>::add_pair_gram(const Context& ctx, const Factor<T>& f, const FactorSet& other, const Factor<T>& g, T* out) const {
  constexpr int64_t kPairBytes = 4 << 20;
  const bool upper = is_halved(ctx, other);
  const int64_t M = other.N_, t = f.positions, s = g.positions;
  const int64_t most = std::max<int64_t>(1, kPairBytes / (t * M * s * static_cast<int64_t>(sizeof(T))));
  const int64_t half = upper ? rows_of_half() : N_;
  for (int64_t n0 = 0; n0 < N_;) {
    const int64_t begin = upper ? n0 / half * half : 0, cols = (M - begin) * s;
    interruption_point();
    const int64_t n = std::min({most, N_ - n0, n0 / half * half + half - n0});
    Scratch<T> rows(ctx, n * t * cols), columns(ctx, n * t * cols), sums(ctx, n * cols), added(ctx, n * (M - begin));
    multiply_transposed<T>(ctx, n * t, cols, f.rows, f.row + n0 * t * f.rows, g.row + begin * s * f.rows, rows.data());
    multiply_transposed<T>(ctx, n * t, cols, f.cols, f.col + n0 * t * f.cols, g.col + begin * s * f.cols, columns.data());
    fill_zero<T>(ctx, n * cols, sums.data());
    for (int64_t k = 0; k < t; ++k) {
      gram_accumulate_stub<T>(ctx, n, cols, rows.data() + k * cols, t * cols, columns.data() + k * cols, cols, t * cols, sums.data(), cols);
    }
    sum_axis_stub<T>(ctx, n * (M - begin), s, 1, T(1), sums.data(), added.data());
    copy_rows_stub<T>(ctx, n, M - begin, added.data(), M - begin, out + n0 * M + begin, M, true);
    n0 += n;
  }
}

template <class T>
std::vector<OuterProducts<T>> FactorSet<T>::outer_products(const Context& ctx, const Factor<T>& f) const {
  std::vector<OuterProducts<T>> each;
  each.reserve(V_);
  for (int64_t v = 0; v < V_; ++v) {
    Factor<T> of = f;
    if (f.row_has_v) of.row += v * N_ * f.positions * f.rows;
    if (f.col_has_v) of.col += v * N_ * f.positions * f.cols;
    if (v > 0 && !f.col_has_v) {
      each.emplace_back(of, each.front());
    } else {
      each.emplace_back(ctx, N_, of);
    }
  }
  return each;
}

// out [V N, size]
template <class T>
void FactorSet<T>::form_rows(const Context& ctx, const std::vector<OuterProducts<T>>& each, int64_t first, int64_t rows, int64_t size, T* out) const {
  for (int64_t v = 0; v < V_; ++v) each[v].form(ctx, 0, N_, first, rows, out + v * N_ * size, size);
}

// As many as stay in a cache, or four, which save passes over `out`, or one, of no more than a block or than the columns that are there already.
template <class T>
int64_t FactorSet<T>::rows_of_outer_gram(const FactorSet& other, const Factor<T>& f, const Factor<T>& g) const {
  constexpr int64_t kPartBytes = 4 << 20, kFewestRows = 4;
  const bool same = this == &other;
  const int64_t of_position = f.cols * static_cast<int64_t>(sizeof(T));
  const int64_t row = (V_ * N_ + (same ? 0 : other.V_ * other.N_)) * of_position;
  const int64_t columns = (N_ * f.positions + (same ? 0 : other.N_ * g.positions)) * of_position;
  if (row > std::max(kBlockBytes, columns)) return 0;
  const int64_t fewest = kFewestRows * row <= kBlockBytes ? kFewestRows : 1;
  return std::min(f.rows, std::max(fewest, kPartBytes / row));
}

template <class T>
void FactorSet<T>::add_outer_gram(const Context& ctx, const Factor<T>& f, const FactorSet& other, const Factor<T>& g, int64_t most, T* out) const {
  const bool same = this == &other, upper = is_halved(ctx, other);
  const int64_t cols = other.V_ * other.N_;
  const std::vector<OuterProducts<T>> mine = outer_products(ctx, f), theirs = same ? std::vector<OuterProducts<T>>{} : other.outer_products(ctx, g);
  Scratch<T> a(ctx, V_ * N_ * most * f.cols), b(ctx, same ? 0 : cols * most * f.cols);
  for (int64_t r = 0; r < f.rows; r += most) {
    const int64_t rows = std::min(most, f.rows - r), size = rows * f.cols;
    interruption_point();
    form_rows(ctx, mine, r, rows, size, a.data());
    if (!same) other.form_rows(ctx, theirs, r, rows, size, b.data());
    const T* with = same ? a.data() : b.data();
    for (int64_t v = 0; v < V_; ++v) {
      for (int64_t n0 = 0; n0 < N_; n0 += rows_of_half()) {
        interruption_point();
        const int64_t begin = v * N_ + n0, from = upper ? begin : 0;
        Gemm<T> p = transposed_product<T>(std::min(rows_of_half(), N_ - n0), cols - from, size, a.data() + begin * size, with + from * size);
        p.c = out + begin * cols + from;
        p.ldc = cols;
        p.accumulate = true;
        gemm_stub<T>(ctx, p);
      }
    }
  }
}

template <class T>
void FactorSet<T>::add_gram(const Context& ctx, const Group& mine, const FactorSet& other, const Group& theirs, T* out) const {
  const Factor<T>&f = mine.factors[0], &g = theirs.factors[0];
  if (mine.is_scatter() && theirs.is_scatter() && alike(f, g)) {
    RowScatter<T>(ctx, V_, N_, f).add_gram(ctx, RowScatter<T>(ctx, other.V_, other.N_, g), out);
    return;
  }
  if (mine.is_outer() && theirs.is_outer() && alike(f, g) && !ctx.on_device()) {
    if (pairs_positions(other, f, g)) return add_pair_gram(ctx, f, other, g, out);
    const int64_t rows = rows_of_outer_gram(other, f, g);
    if (rows > 0) return add_outer_gram(ctx, f, other, g, rows, out);
  }
  add_formed_gram(ctx, mine, 0, other, theirs, 0, mine.size, out);
}

template <class T>
void FactorSet<T>::add_formed_gram(const Context& ctx, const Group& mine, int64_t first, const FactorSet& other, const Group& theirs,
                                   int64_t other_first, int64_t count, T* out) const {
  const int64_t cols = other.V_ * other.N_;
  const int64_t block = largest_block<T>(N_, mine.size), other_block = largest_block<T>(other.N_, theirs.size);
  Scratch<T> a(ctx, block * mine.size), b(ctx, other_block * theirs.size);
  for (int64_t v = 0; v < V_; ++v) {
    for (int64_t n0 = 0; n0 < N_; n0 += block) {
      const int64_t n = std::min(block, N_ - n0);
      form(ctx, mine, v, n0, n, a.data(), mine.size);
      for (int64_t w = 0; w < other.V_; ++w) {
        for (int64_t m0 = 0; m0 < other.N_; m0 += other_block) {
          const int64_t m = std::min(other_block, other.N_ - m0);
          other.form(ctx, theirs, w, m0, m, b.data(), theirs.size);
          Gemm<T> p = transposed_product<T>(n, m, count, a.data() + first, b.data() + other_first);
          p.terms[0].a_row = mine.size;
          p.terms[0].b_col = theirs.size;
          p.c = out + (v * N_ + n0) * cols + w * other.N_ + m0;
          p.ldc = cols;
          p.accumulate = true;
          gemm_stub<T>(ctx, p);
        }
      }
    }
  }
}

template class FactorSet<float>;
template class FactorSet<double>;

}  // namespace infl
