// gemm: batched matrix product with two terms and an epilogue,
//
//   C[v] = (beta * C[v] + A1[v] B1[v] + A2[v] B2[v] + 1 bias[v]ᵀ) ∘ scale
//
// The second term makes `t_x Wᵀ + x Vᵀ` (the tangent of a linear layer) one product; the epilogue takes the bias tangent and the
// activation's derivative with it, so neither costs a pass over memory.
//
// Shapes: A [V, M, K], B [V, K, N], C [V, M, N] with row stride ldc, bias [V, N], scale [M, N] (shared by all v). A batch stride of 0 shares
// an operand between right-hand sides. A is read in place through two strides. B is given packed (gemm_pack) or packed on the fly.
// Accumulates in T, in runs of 512 along K. Deterministic for any number of threads: each element of C is summed by one thread in a fixed order.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace infl {

template <class T>
struct GemmTerm {
  int64_t K = 0;         // 0: the term is absent
  const T* a = nullptr;  // element (v, m, k) at a[v * a_batch + m * a_row + k * a_col]
  int64_t a_batch = 0, a_row = 0, a_col = 1;
  const T* b = nullptr;  // element (v, k, n) at b[v * b_batch + k * b_row + n * b_col]; unused when packed
  int64_t b_batch = 0, b_row = 0, b_col = 1;
  const T* packed = nullptr;  // gemm_pack's output for each v, b_packed_batch apart
  int64_t packed_batch = 0;
};

template <class T>
struct Gemm {
  int64_t V = 1, M = 0, N = 0;
  GemmTerm<T> terms[2];
  T* c = nullptr;
  int64_t c_batch = 0, ldc = 0;
  bool accumulate = false;  // beta = 1
  const T* bias = nullptr;  // [V, N], bias_batch apart, or absent
  int64_t bias_batch = 0;
  const T* scale = nullptr;  // [M, N], row stride scale_ld, or absent
  int64_t scale_ld = 0;
};

// Number of elements gemm_pack writes for one [K, N] matrix: N rounded up to a panel of two vectors.
template <class T>
int64_t gemm_packed_size(int64_t K, int64_t N) {
  const int64_t panel = 2 * vector_bytes(active_isa()) / static_cast<int64_t>(sizeof(T));
  return K * ((N + panel - 1) / panel * panel);
}

// Pack num matrices [K, N] (element (k, n) at b[k * b_row + n * b_col], b_batch apart) into panels, packed_size apart.
template <class T>
inline KernelStub<void(const Context&, int64_t num, int64_t K, int64_t N, const T* b, int64_t b_batch, int64_t b_row, int64_t b_col, T* packed)>
    gemm_pack_stub{"gemm_pack"};

template <class T>
inline KernelStub<void(const Context&, const Gemm<T>&)> gemm_stub{"gemm"};

}  // namespace infl
