// The products are the vendor's (DeviceRuntime::multiply); here is what stands around them. Packing is a copy to row-major [K, N]: the layout that
// the library reads at full speed whichever way the parameter is stored. Right-hand sides that share B are rows of one product. The epilogue is one
// pass.
#include "kernels/gemm.h"

#include "kernels/cuda/leading.h"
#include "kernels/cuda/vector.h"

namespace infl {
namespace cuda {
namespace {

constexpr int kTile = 32, kTileRows = 8;

// out[v, i, j] = in[v * batch + i * row + j * col] through a tile of shared memory, so that both sides are read and written along their rows.
template <class T>
__global__ void pack_kernel(int64_t rows, int64_t cols, const T* in, int64_t batch, int64_t row, int64_t col, T* out, int64_t out_batch) {
  __shared__ T tile[kTile][kTile + 1];
  const int64_t i0 = int64_t{blockIdx.y} * kTile, j0 = int64_t{blockIdx.x} * kTile;
  in += blockIdx.z * batch;
  out += blockIdx.z * out_batch;
  const bool turned = row < col;  // the input runs along its rows
  for (int k = threadIdx.y; k < kTile; k += kTileRows) {
    const int64_t i = i0 + (turned ? threadIdx.x : k), j = j0 + (turned ? k : threadIdx.x);
    if (i < rows && j < cols) tile[i - i0][j - j0] = in[i * row + j * col];
  }
  __syncthreads();
  for (int k = threadIdx.y; k < kTile; k += kTileRows) {
    const int64_t i = i0 + k, j = j0 + threadIdx.x;
    if (i < rows && j < cols) out[i * cols + j] = tile[k][threadIdx.x];
  }
}

template <class T>
void pack(const Context& ctx, int64_t num, int64_t rows, int64_t cols, const T* in, int64_t batch, int64_t row, int64_t col, T* out,
          int64_t out_batch) {
  if (num == 0 || rows == 0 || cols == 0) return;
  const int64_t rows_at_a_time = kMaxGridY * kTile;
  for (int64_t v = 0; v < num; v += kMaxGridY) {
    for (int64_t i = 0; i < rows; i += rows_at_a_time) {
      const int64_t height = std::min(rows_at_a_time, rows - i);
      const dim3 blocks(static_cast<unsigned>(ceil_div(cols, kTile)), static_cast<unsigned>(ceil_div(height, kTile)),
                        static_cast<unsigned>(std::min(kMaxGridY, num - v)));
      launch(ctx, "gemm_pack", &pack_kernel<T>, blocks, dim3(kTile, kTileRows), 0, height, cols, in + v * batch + i * row, batch, row, col,
             out + v * out_batch + i * cols, out_batch);
    }
  }
}

template <class T>
void gemm_pack(const Context& ctx, int64_t num, int64_t K, int64_t N, const T* b, int64_t b_batch, int64_t b_row, int64_t b_col, T* packed) {
  pack(ctx, num, K, N, b, b_batch, b_row, b_col, packed, gemm_packed_size<T>(K, N));
}

// c[v, m, n] = (c[v, m, n] + bias[v, n]) scale[m, n]
template <class T>
struct Epilogue {
  int64_t M, N, c_batch, ldc, bias_batch, scale_ld;
  const T *bias, *scale;
  T* c;
  template <int W>
  __device__ void run(int64_t i) const {
    const int64_t n = i % N, m = i / N % M, v = i / N / M;
    T* p = c + v * c_batch + m * ldc + n;
    auto r = load<W>(p);
    if (bias) {
      for (int k = 0; k < W; ++k) r.v[k] += bias[v * bias_batch + n + k];
    }
    if (scale) {
      const auto s = load<W>(scale + m * scale_ld + n);
      for (int k = 0; k < W; ++k) r.v[k] *= s.v[k];
    }
    store<W>(p, r);
  }
};

template <class T>
struct FillMatrix {
  int64_t M, N, c_batch, ldc;
  T* c;
  template <int W>
  __device__ void run(int64_t i) const {
    for (int64_t k = i; k < i + W; ++k) c[k / N / M * c_batch + k / N % M * ldc + k % N] = T(0);
  }
};

// An operand as the library takes it: where it lies, else it is copied first. Tangents lie in vectors [P], so with P, or a parameter's place, no
// multiple of four (two of float64) their addresses are none of 16 bytes. cuBLAS asks that of arrays of pointers and of FP8 only; here it costs at
// most speed, against a copy that would be a read and a write of all tangents more.
template <class T>
struct Operand {
  const T* data;
  int64_t batch, ld;
  bool transposed;
};

template <class T>
Operand<T> operand(const Context& ctx, int64_t V, int64_t rows, int64_t cols, const T* data, int64_t batch, int64_t row, int64_t col,
                   Buffer<T>& copy) {
  const Leading as_it_lies = leading(rows, cols, row, col);
  if (as_it_lies.possible) return {data, batch, as_it_lies.ld, as_it_lies.transposed};
  const int64_t num = batch == 0 ? 1 : V;
  copy.resize(ctx, num * rows * cols);
  pack(ctx, num, rows, cols, data, batch, row, col, copy.data(), rows * cols);
  return {copy.data(), batch == 0 ? 0 : rows * cols, cols, false};
}

template <class T>
void gemm(const Context& ctx, const Gemm<T>& g) {
  if (g.V == 0 || g.M == 0 || g.N == 0) return;
  bool accumulate = g.accumulate;
  for (const GemmTerm<T>& term : g.terms) {
    if (term.K == 0) continue;
    Buffer<T> a_copy, b_copy;
    const Operand<T> a = operand(ctx, g.V, g.M, term.K, term.a, term.a_batch, term.a_row, term.a_col, a_copy);
    const Operand<T> b = term.packed ? Operand<T>{term.packed, term.packed_batch, g.N, false}
                                     : operand(ctx, g.V, term.K, g.N, term.b, term.b_batch, term.b_row, term.b_col, b_copy);
    MatrixProduct<T> p{.batch = g.V, .M = g.M, .N = g.N, .K = term.K, .a = a.data, .b = b.data, .c = g.c};
    p.a_transposed = a.transposed;
    p.b_transposed = b.transposed;
    p.lda = a.ld;
    p.ldb = b.ld;
    p.ldc = g.ldc;
    p.a_batch = a.batch;
    p.b_batch = b.batch;
    p.c_batch = g.c_batch;
    p.accumulate = accumulate;
    const bool rows_follow = !a.transposed && a.batch == g.M * a.ld && g.c_batch == g.M * g.ldc;
    if (g.V > 1 && b.batch == 0 && rows_follow) {
      p.batch = 1;
      p.M = g.V * g.M;
    }
    ctx.runtime->multiply(p, ctx.precision, ctx.stream);
    accumulate = true;
  }
  const int64_t size = g.V * g.M * g.N;
  if (!accumulate) for_each<T>(ctx, "gemm", size, false, FillMatrix<T>{g.M, g.N, g.c_batch, g.ldc, g.c});
  if (g.bias == nullptr && g.scale == nullptr) return;
  const bool vectorised = g.N % kVectorWidth<T> == 0 && g.ldc % kVectorWidth<T> == 0 && g.c_batch % kVectorWidth<T> == 0 &&
                          g.scale_ld % kVectorWidth<T> == 0 && is_aligned({g.c, g.scale});
  for_each<T>(ctx, "gemm", size, vectorised, Epilogue<T>{g.M, g.N, g.c_batch, g.ldc, g.bias_batch, g.scale_ld, g.bias, g.scale, g.c});
}

INFL_REGISTER_CUDA(gemm_pack_stub, gemm_pack)
INFL_REGISTER_CUDA(gemm_stub, gemm)

}  // namespace
}  // namespace cuda
}  // namespace infl
