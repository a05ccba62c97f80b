#include "per_example/dots.h"

#include <algorithm>
#include <stdexcept>

#include "common/scratch.h"
#include "kernels/gemm.h"
#include "per_example/outer_products.h"

namespace infl {

namespace {

constexpr int64_t kTogether = 4;         // examples that share the loads of a vector (gemm: few columns)
constexpr int64_t kRunBytes = 64 << 10;  // of a vector, before the next examples

// out[w, i] += Σ_k u[w, k] a[i, k]
template <class T>
void multiply(const Context& ctx, int64_t N, int64_t W, int64_t K, const T* a, int64_t a_stride, const T* u, int64_t u_stride, T* out, int64_t ldo) {
  const int64_t run = kRunBytes / static_cast<int64_t>(sizeof(T));
  const auto product = [&](int64_t n0, int64_t groups, int64_t together) {
    for (int64_t k = 0; k < K; k += run) {
      Gemm<T> g;
      g.V = groups;
      g.M = W;
      g.N = together;
      g.c = out + n0;
      g.c_batch = together;
      g.ldc = ldo;
      g.accumulate = true;
      GemmTerm<T>& term = g.terms[0];
      term.K = std::min(run, K - k);
      term.a = u + k;
      term.a_row = u_stride;
      term.b = a + n0 * a_stride + k;
      term.b_batch = together * a_stride;
      term.b_row = 1;
      term.b_col = a_stride;
      gemm_stub<T>(ctx, g);
    }
  };
  const int64_t whole = N / kTogether * kTogether;
  if (whole > 0) product(0, N / kTogether, kTogether);
  if (whole < N) product(whole, 1, N - whole);
}

}  // namespace

template <class T>
void add_dots(const Context& ctx, const Factor<T>& f, int64_t N, int64_t W, const T* u, int64_t stride, T* out, int64_t ldo) {
  if (f.is_scatter()) throw std::logic_error("add_dots: expected a dense factor or outer products, got rows picked by index.");
  if (f.positions == 1 && f.is_dense()) return multiply(ctx, N, W, f.rows, f.row, f.rows, u, stride, out, ldo);
  const OuterProducts<T> products(ctx, N, f);
  const int64_t together = std::min(N, 2 * kTogether * ctx.num_threads), rows = products.rows_of_part(together);
  Scratch<T> formed(ctx, together * rows * f.cols);
  for (int64_t r = 0; r < f.rows; r += rows) {
    const int64_t count = std::min(rows, f.rows - r), size = count * f.cols;
    for (int64_t n0 = 0; n0 < N; n0 += together) {
      const int64_t n = std::min(together, N - n0);
      products.form(ctx, n0, n, r, count, formed.data(), size);
      multiply(ctx, n, W, size, formed.data(), size, u + r * f.cols, stride, out + n0, ldo);
    }
  }
}

template void add_dots<float>(const Context&, const Factor<float>&, int64_t, int64_t, const float*, int64_t, float*, int64_t);
template void add_dots<double>(const Context&, const Factor<double>&, int64_t, int64_t, const double*, int64_t, double*, int64_t);

}  // namespace infl
