// A loop of gemm calls, a call for all examples where they fold into one product. Threads take examples; where C is summed over examples, or the
// examples are one product, they take right-hand sides, or share each product.
#include "kernels/batched_matmul.h"

#include "kernels/cpu/parallel.h"
#include "kernels/gemm.h"

namespace infl {
namespace INFL_ISA {
namespace {

template <class T>
T* at(const MatrixView<T>& view, int64_t v, int64_t n, const int64_t* index, int num_axes) {
  int64_t offset = v * view.v_stride + n * view.n_stride;
  for (int axis = 0; axis < num_axes; ++axis) offset += index[axis] * view.batch_strides[axis];
  return view.data + offset;
}

// Right-hand sides [v0, v1) of example n: all batch entries.
template <class T>
void example(const Context& ctx, const BatchedMatmul<T>& p, int64_t v0, int64_t v1, int64_t n) {
  int64_t index[kMaxBatchAxes] = {};
  int64_t entries = 1;
  for (int axis = 0; axis < p.num_axes; ++axis) entries *= p.batch[axis];
  for (int64_t e = 0; e < entries; ++e) {
    bool first = p.c.n_stride != 0 || n == 0;  // to write this part of C
    for (int axis = 0; axis < p.num_axes; ++axis) first = first && (p.c.batch_strides[axis] != 0 || index[axis] == 0);
    Gemm<T> g;
    g.V = v1 - v0;
    g.M = p.M;
    g.N = p.N;
    g.c = at(p.c, v0, n, index, p.num_axes);
    g.c_batch = p.c.v_stride;
    g.ldc = p.c.row_stride;
    g.accumulate = p.accumulate || !first;
    for (int t = 0; t < 2; ++t) {
      if (p.a[t].data == nullptr) continue;
      GemmTerm<T>& term = g.terms[t];
      term.K = p.K;
      term.a = at(p.a[t], v0, n, index, p.num_axes);
      term.a_batch = p.a[t].v_stride;
      term.a_row = p.a[t].row_stride;
      term.a_col = p.a[t].col_stride;
      term.b = at(p.b[t], v0, n, index, p.num_axes);
      term.b_batch = p.b[t].v_stride;
      term.b_row = p.b[t].row_stride;
      term.b_col = p.b[t].col_stride;
    }
    gemm_stub<T>(ctx, g);
    for (int axis = p.num_axes - 1; axis >= 0; --axis) {
      if (++index[axis] < p.batch[axis]) break;
      index[axis] = 0;
    }
  }
}

// Examples that share B are rows of one product, and examples that C sums over are terms of one: matrices of one row (a vector times a weight an
// expert) would leave the register tiles empty.
template <class T>
void fold_examples(BatchedMatmul<T>& p) {
  if (p.n == 1) return;
  bool rows = p.c.n_stride != 0 && (p.M == 1 || p.c.n_stride == p.M * p.c.row_stride), terms = p.c.n_stride == 0;
  for (int t = 0; t < 2; ++t) {
    const auto &a = p.a[t], &b = p.b[t];
    if (a.data == nullptr) continue;
    rows = rows && a.n_stride != 0 && b.n_stride == 0 && (p.M == 1 || a.n_stride == p.M * a.row_stride) && (a.col_stride == 1 || p.K == 1);
    terms = terms && a.n_stride != 0 && b.n_stride != 0 && (p.K == 1 || (a.n_stride == p.K * a.col_stride && b.n_stride == p.K * b.row_stride)) &&
            (a.row_stride == 1 || p.M == 1) && (b.col_stride == 1 || p.N == 1);
  }
  if (!rows && !terms) return;
  for (int t = 0; t < 2; ++t) {
    if (rows && p.M == 1) p.a[t].row_stride = p.a[t].n_stride;
    if (terms && p.K == 1) {
      p.a[t].col_stride = p.a[t].n_stride;
      p.b[t].row_stride = p.b[t].n_stride;
    }
  }
  if (rows && p.M == 1) p.c.row_stride = p.c.n_stride;
  (rows ? p.M : p.K) *= p.n;
  p.n = 1;
}

template <class T>
void batched_matmul(const Context& ctx, const BatchedMatmul<T>& given) {
  BatchedMatmul<T> p = given;
  // A column of C for each example, from a matrix that all share: the same as a row.
  const bool column = p.N == 1 && p.M > 1 && p.c.row_stride == 1 && p.a[0].n_stride == 0 && p.a[1].n_stride == 0;
  if ((p.c.col_stride != 1 && p.N > 1) || column) {  // Cᵀ = Bᵀ Aᵀ
    std::swap(p.M, p.N);
    for (int t = 0; t < 2; ++t) {
      p.a[t] = given.b[t].transposed();
      p.b[t] = given.a[t].transposed();
      if (given.a[t].data == nullptr) p.a[t].data = nullptr;
    }
    p.c = given.c.transposed();
  }
  fold_examples(p);
  const int threads = p.V * p.n * p.M * p.N * p.K < 65536 ? 1 : ctx.num_threads;
  const Context alone{.num_threads = 1, .precision = ctx.precision};
  if (threads > 1 && p.c.n_stride != 0 && p.n >= threads) {
    parallel_for(threads, p.n, [&](int64_t n) { example(alone, p, 0, p.V, n); });
  } else if (threads > 1 && p.V >= threads) {
    parallel_for(threads, p.V, [&](int64_t v) {
      for (int64_t n = 0; n < p.n; ++n) example(alone, p, v, v + 1, n);
    });
  } else {
    for (int64_t n = 0; n < p.n; ++n) example(ctx, p, 0, p.V, n);
  }
}

INFL_REGISTER_CPU(batched_matmul_stub, batched_matmul)

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
