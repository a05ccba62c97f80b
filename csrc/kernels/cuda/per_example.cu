// Bandwidth-bound but for outer_product over many positions, which is a batched matrix product. outer_product over few positions writes
// N·rows·cols elements once, 16 bytes a thread and step, and reads next to nothing: a thread keeps its columns' numbers and goes down the rows.
#include "kernels/per_example.h"

#include <climits>

#include "kernels/cuda/row_reduction.h"
#include "kernels/cuda/vector.h"

namespace infl {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kFewPositions = 8;       // more: 2·positions operations an element written are work for the matrix product
constexpr int64_t kVectorsOfBlock = 4096;  // 64 KB written by a block

// Block b writes rows b % row_blocks · rows_of_block, ... of example b / row_blocks.
template <int W, bool kOnePosition, class T>
__global__ void __launch_bounds__(kThreads) outer_product_kernel(int positions, int rows, int cols, int row_blocks, int rows_of_block, const T* row,
                                                                 const T* col, T* out, int64_t out_stride, bool accumulate) {
  const int n = blockIdx.x / row_blocks, first = (blockIdx.x - n * row_blocks) * rows_of_block;
  const int end = first + rows_of_block < rows ? first + rows_of_block : rows;
  row += int64_t{n} * positions * rows;
  col += int64_t{n} * positions * cols;
  out += n * out_stride;
  for (int c = threadIdx.x * W; c < cols; c += blockDim.x * W) {
    Vector<T, W> kept{};
    if constexpr (kOnePosition) kept = load<W>(col + c);
    for (int r = first + threadIdx.y; r < end; r += blockDim.y) {
      T* to = out + int64_t{r} * cols + c;
      Vector<T, W> sum{};
      if (accumulate) sum = load<W>(to);
      if constexpr (kOnePosition) {
        for (int k = 0; k < W; ++k) sum.v[k] += row[r] * kept.v[k];
      } else {
        const T *a = row + r, *b = col + c;
        for (int t = 0; t < positions; ++t, a += rows, b += cols) {
          const auto from = load<W>(b);
          for (int k = 0; k < W; ++k) sum.v[k] += *a * from.v[k];
        }
      }
      store<W>(to, sum);
    }
  }
}

// Sums along a line, of the elements or of their squares.
template <bool kSquares, class T>
struct SumLine {
  int64_t step;
  const T* x;
  T* out;
  bool accumulate;
  __device__ T load(int64_t s) const { return x[s * step]; }
  __device__ void add(Sum<T>& sum, T value, int64_t) const { sum.value += kSquares ? value * value : value; }
  __device__ void merge(Sum<T>& sum, const Sum<T>& other) const { sum.value += other.value; }
  __device__ void store(int64_t, T, const Sum<T>&) const {}
  __device__ void finish(const Sum<T>& sum) const { *out = accumulate ? *out + sum.value : sum.value; }
};

// Line (i, j) starts at x[i · x_stride + j] and goes to out[i · out_stride + j].
template <bool kSquares, class T>
struct Sums {
  using State = Sum<T>;
  using Item = T;
  static constexpr bool kStores = false;
  int64_t step;
  const T* x;
  int64_t x_stride;
  T* out;
  int64_t out_stride;
  bool accumulate;
  __device__ SumLine<kSquares, T> at(int64_t i, int64_t j) const { return {step, x + i * x_stride + j, out + i * out_stride + j, accumulate}; }
};

template <class T>
void outer_product(const Context& ctx, int64_t N, int64_t positions, int64_t rows, int64_t cols, const T* row, const T* col, T* out,
                   int64_t out_stride, bool accumulate, bool /*stream*/) {
  if (N == 0 || rows == 0 || cols == 0) return;
  if (col == nullptr) {
    const Sums<false, T> sums{rows, row, positions * rows, out, out_stride, accumulate};
    return reduce_columns(ctx, "outer_product", N, positions, rows, sums);
  }
  if (positions > kFewPositions) {
    MatrixProduct<T> p{.batch = N, .M = rows, .N = cols, .K = positions, .a = row, .b = col, .c = out};
    p.a_transposed = true;
    p.lda = rows;
    p.ldb = p.ldc = cols;
    p.a_batch = positions * rows;
    p.b_batch = positions * cols;
    p.c_batch = out_stride;
    p.accumulate = accumulate;
    return ctx.runtime->multiply(p, ctx.precision, ctx.stream);
  }
  if (rows > INT_MAX / 2 || cols > INT_MAX / 2) {
    throw std::invalid_argument("outer_product: expected sides of fewer than 2^30 elements, got " + std::to_string(rows) + " x " +
                                std::to_string(cols) + ".");
  }
  const int64_t W = kVectorWidth<T>;
  const bool vectorised = cols % W == 0 && out_stride % W == 0 && is_aligned({col, out});
  const int64_t vectors = vectorised ? cols / W : cols;
  const int64_t x = std::min<int64_t>(kThreads, row_reduction::power_of_two_below(2 * vectors - 1)), y = kThreads / x;
  const int64_t rows_of_block = std::clamp<int64_t>(kVectorsOfBlock / vectors, y, std::max(rows, y)), row_blocks = ceil_div(rows, rows_of_block);
  const auto run = [&](auto kernel) {
    launch(ctx, "outer_product", kernel, row_reduction::grid(N * row_blocks, "outer_product"),
           dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)), 0, positions, rows, cols, row_blocks, rows_of_block, row, col, out, out_stride,
           accumulate);
  };
  if (positions == 1) {
    vectorised ? run(&outer_product_kernel<kVectorWidth<T>, true, T>) : run(&outer_product_kernel<1, true, T>);
  } else {
    vectorised ? run(&outer_product_kernel<kVectorWidth<T>, false, T>) : run(&outer_product_kernel<1, false, T>);
  }
}

template <class T>
void square_norm(const Context& ctx, int64_t N, int64_t width, const T* x, int64_t x_stride, T* out, bool accumulate) {
  reduce_rows(ctx, "square_norm", N, width, 1, Sums<true, T>{1, x, x_stride, out, 1, accumulate});
}

template <class T>
void square_accumulate(const Context& ctx, int64_t num, int64_t size, const T* x, T* out, bool accumulate) {
  reduce_columns(ctx, "square_accumulate", 1, num, size, Sums<true, T>{size, x, 0, out, 0, accumulate});
}

template <class T>
struct MultiplyAccumulate {
  const T *a, *b;
  int64_t period;
  T* out;
  template <int W>
  __device__ void run(int64_t i) const {
    const auto x = load<W>(a + i), y = load<W>(b + i % period);
    auto sum = load<W>(out + i);
    for (int k = 0; k < W; ++k) sum.v[k] += x.v[k] * y.v[k];
    store<W>(out + i, sum);
  }
};

template <class T>
void multiply_accumulate(const Context& ctx, int64_t size, const T* a, const T* b, int64_t period, T* out) {
  const bool vectorised = period % kVectorWidth<T> == 0 && is_aligned({a, b, out});
  for_each<T>(ctx, "multiply_accumulate", size, vectorised, MultiplyAccumulate<T>{a, b, period, out});
}

// Elements e of [rows, cols].
template <class T>
struct GramAccumulate {
  int64_t cols;
  const T* a;
  int64_t lda;
  const T* b;
  int64_t b_cols, ldb;
  T* out;
  int64_t ldo;
  template <int W>
  __device__ void run(int64_t e) const {
    const int64_t i = e / cols, j = e - i * cols;
    const auto x = load<W>(a + i * lda + j), y = load<W>(b + i * ldb + j % b_cols);
    auto sum = load<W>(out + i * ldo + j);
    for (int k = 0; k < W; ++k) sum.v[k] += x.v[k] * y.v[k];
    store<W>(out + i * ldo + j, sum);
  }
};

template <class T>
void gram_accumulate(const Context& ctx, int64_t rows, int64_t cols, const T* a, int64_t lda, const T* b, int64_t b_cols, int64_t ldb, T* out,
                     int64_t ldo) {
  bool vectorised = is_aligned({a, b, out});
  for (int64_t length : {cols, lda, b_cols, ldb, ldo}) vectorised = vectorised && length % kVectorWidth<T> == 0;
  for_each<T>(ctx, "gram_accumulate", rows * cols, vectorised, GramAccumulate<T>{cols, a, lda, b, b_cols, ldb, out, ldo});
}

INFL_REGISTER_CUDA(outer_product_stub, outer_product)
INFL_REGISTER_CUDA(square_norm_stub, square_norm)
INFL_REGISTER_CUDA(multiply_accumulate_stub, multiply_accumulate)
INFL_REGISTER_CUDA(square_accumulate_stub, square_accumulate)
INFL_REGISTER_CUDA(gram_accumulate_stub, gram_accumulate)

}  // namespace
}  // namespace cuda
}  // namespace infl
