// Gradients of many positions, Σ_t row[n, t] col[n, t]ᵀ, formed by parts: some examples, some rows. One matrix product an example.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "common/scratch.h"
#include "kernels/gemm.h"
#include "kernels/per_example.h"
#include "per_example/factor.h"

namespace infl {

template <class T>
class OuterProducts {
 public:
  // `factor` is no scatter, and its sides stand at the first of N examples of one right-hand side.
  OuterProducts(const Context& ctx, int64_t N, const Factor<T>& factor)
      : f_(factor),
        packed_size_(factor.is_dense() ? 0 : gemm_packed_size<T>(factor.positions, factor.cols)),
        packed_(std::make_shared<Scratch<T>>(ctx, N * packed_size_)) {
    if (f_.is_dense()) return;
    gemm_pack_stub<T>(ctx, N, f_.positions, f_.cols, f_.col, f_.positions * f_.cols, f_.cols, 1, packed_->data());
  }
  // Of another right-hand side, with the columns that `other` has packed.
  OuterProducts(const Factor<T>& factor, const OuterProducts& other) : f_(factor), packed_size_(other.packed_size_), packed_(other.packed_) {}

  // Rows of which the part of `together` examples stays in a second-level cache.
  int64_t rows_of_part(int64_t together) const {
    constexpr int64_t kBytes = 512 << 10, kFewest = 4;
    if (f_.is_dense()) return f_.rows;
    const int64_t fitting = kBytes / (together * f_.cols * static_cast<int64_t>(sizeof(T)));
    return std::min(f_.rows, std::max(kFewest, fitting));
  }

  // out[i, r − first, c] = the gradient of example n0 + i, i < n; out examples `stride` apart.
  void form(const Context& ctx, int64_t n0, int64_t n, int64_t first, int64_t rows, T* out, int64_t stride) const {
    if (f_.is_dense())
      return outer_product_stub<T>(ctx, n, f_.positions, f_.rows, 1, f_.row + n0 * f_.positions * f_.rows, nullptr, out, stride, false, false);
    Gemm<T> g;
    g.V = n;
    g.M = rows;
    g.N = f_.cols;
    g.c = out;
    g.c_batch = stride;
    g.ldc = f_.cols;
    GemmTerm<T>& term = g.terms[0];
    term.K = f_.positions;
    term.a = f_.row + n0 * f_.positions * f_.rows + first;
    term.a_batch = f_.positions * f_.rows;
    term.a_row = 1;
    term.a_col = f_.rows;
    term.packed = packed_->data() + n0 * packed_size_;
    term.packed_batch = packed_size_;
    gemm_stub<T>(ctx, g);
  }

 private:
  Factor<T> f_;
  int64_t packed_size_;
  std::shared_ptr<Scratch<T>> packed_;
};

}  // namespace infl
