// One pass over memory each: the time is bytes over bandwidth. A thread moves 16 bytes a step, at odd sizes and offsets too, but for what lies before
// and behind; where V > 1 right-hand sides of an odd size lie differently, an element of four of them. Column sums split the rows between the threads
// of a block.
#include "kernels/elementwise.h"

#include "kernels/cuda/vector.h"

namespace infl {
namespace cuda {
namespace {

// One function of x for all elements: W at a time from `first` on if first >= 0, else, and where no W are left, one. A vector's elements go round
// through its first register, so that the code of all kinds exists once; the kind is the same for all threads, so the branch costs one jump.
template <class T, class Function>
__global__ void function_kernel(int64_t first, int64_t size, Function f) {
  constexpr int W = kVectorWidth<T>;
  const int64_t step = int64_t{gridDim.x} * blockDim.x, before = first < 0 ? size : first, vectors = (size - before) / W;
  const int64_t items = size - vectors * (W - 1);
  for (int64_t item = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; item < items; item += step) {
    const bool whole = item < vectors;
    const int64_t rest = item - vectors, i = whole ? before + item * W : rest < before ? rest : rest + vectors * W;
    Vector<T, W> x{}, y{}, derivative{};
    if (whole) {
      x = load<W>(f.x + i);
    } else {
      x.v[0] = f.x[i];
    }
    for (int k = 0; k < (whole ? W : 1); ++k) {
      const ValueAndDerivative<T> r = f(x.v[0]);
      INFL_UNROLL(4)
      for (int w = 1; w < W; ++w) {
        x.v[w - 1] = x.v[w];
        y.v[w - 1] = y.v[w];
        derivative.v[w - 1] = derivative.v[w];
      }
      y.v[W - 1] = r.value;
      derivative.v[W - 1] = r.derivative;
    }
    if (whole) {
      store<W>(f.y + i, y);
      if (f.derivative) store<W>(f.derivative + i, derivative);
    } else {
      f.y[i] = y.v[W - 1];
      if (f.derivative) f.derivative[i] = derivative.v[W - 1];
    }
  }
}

template <class T, class Function>
void apply(const Context& ctx, const char* who, int64_t size, const Function& f) {
  constexpr int kThreads = 256;
  if (size == 0) return;
  const int64_t first = std::min(first_aligned<T>({f.x, f.y, f.derivative}), size);
  launch(ctx, who, &function_kernel<T, Function>, blocks_for(first < 0 ? size : ceil_div(size, kVectorWidth<T>), kThreads), dim3(kThreads), 0, first,
         size, f);
}

// Value and derivative of the function of a kind, or with kSecond its second derivative as the value.
template <class T, bool kSecond>
struct ElementwiseFunction {
  Activation kind;
  T a, b;
  const T* x;
  T *y, *derivative;
  template <Activation kKind>
  __device__ ValueAndDerivative<T> of_kind(T value) const {
    if constexpr (kSecond) {
      return {infl::second_derivative<kKind>(value, a, b), T(0)};
    } else {
      return infl::activation<kKind>(value, a, b);
    }
  }
  __device__ ValueAndDerivative<T> operator()(T value) const {
#define INFL_CASE(name)  \
  case Activation::name: \
    return of_kind<Activation::name>(value);
    switch (kind) { INFL_FOR_EACH_ACTIVATION(INFL_CASE) }
#undef INFL_CASE
    return {};
  }
};

template <class T>
void activation(const Context& ctx, Activation kind, T a, T b, int64_t size, const T* x, T* y, T* derivative) {
  apply<T>(ctx, "activation", size, ElementwiseFunction<T, false>{kind, a, b, x, y, derivative});
}

template <class T>
void second_derivative(const Context& ctx, Activation kind, T a, T b, int64_t size, const T* x, T* out) {
  apply<T>(ctx, "second_derivative", size, ElementwiseFunction<T, true>{kind, a, b, x, out, nullptr});
}

// d and g are read once for all right-hand sides.
template <class T>
struct AddScaled {
  int64_t V, size;
  const T *d, *g, *in;
  T* out;
  template <int W>
  __device__ void run(int64_t i) const {
    auto factor = load<W>(d + i);
    const auto cotangent = load<W>(g + i);
    for (int k = 0; k < W; ++k) factor.v[k] *= cotangent.v[k];
    write_sides<W>(V, out + i, size, [&](int64_t v) {
      const auto x = load<W>(in + v * size + i);
      auto sum = load<W>(out + v * size + i);
      for (int k = 0; k < W; ++k) sum.v[k] += factor.v[k] * x.v[k];
      return sum;
    });
  }
};

template <class T>
void add_scaled(const Context& ctx, int64_t V, int64_t size, const T* d, const T* g, const T* in, T* out) {
  for_each_flat<T>(ctx, "add_scaled", V, size, {d, g, in, out}, AddScaled<T>{V, size, d, g, in, out});
}

// d is read once for all right-hand sides.
template <class T>
struct Scale {
  int64_t V, size;
  const T *d, *in;
  T* out;
  bool accumulate;
  template <int W>
  __device__ void run(int64_t i) const {
    const auto factor = load<W>(d + i);
    write_sides<W>(V, out + i, size, [&](int64_t v) {
      auto x = load<W>(in + v * size + i);
      if (accumulate) {
        const auto before = load<W>(out + v * size + i);
        for (int k = 0; k < W; ++k) x.v[k] = before.v[k] + factor.v[k] * x.v[k];
      } else {
        for (int k = 0; k < W; ++k) x.v[k] *= factor.v[k];
      }
      return x;
    });
  }
};

template <class T>
void scale(const Context& ctx, int64_t V, int64_t size, const T* d, const T* in, T* out, bool accumulate) {
  for_each_flat<T>(ctx, "scale", V, size, {d, in, out}, Scale<T>{V, size, d, in, out, accumulate});
}

template <class T>
struct Combine {
  T a, b;
  const T *x1, *x2;
  T* out;
  bool accumulate;
  template <int W>
  __device__ void run(int64_t i) const {
    auto r = load<W>(x1 + i);
    for (int k = 0; k < W; ++k) r.v[k] *= a;
    if (x2) {
      const auto second = load<W>(x2 + i);
      for (int k = 0; k < W; ++k) r.v[k] += b * second.v[k];
    }
    if (accumulate) {
      const auto before = load<W>(out + i);
      for (int k = 0; k < W; ++k) r.v[k] += before.v[k];
    }
    store<W>(out + i, r);
  }
};

template <class T>
void combine(const Context& ctx, int64_t size, T a, const T* x1, T b, const T* x2, T* out, bool accumulate) {
  for_each_flat<T>(ctx, "combine", 1, size, {x1, x2, out}, Combine<T>{a, b, x1, x2, out, accumulate});
}

template <class T>
struct Affine {
  int64_t width;
  T a, b;
  const T *scale, *shift, *x;
  T* out;
  bool accumulate;
  template <int W>
  __device__ void run(int64_t i) const {
    const int64_t j = i % width;
    auto r = load<W>(x + i);
    for (int k = 0; k < W; ++k) r.v[k] = (scale ? a * scale[j + k] : a) * r.v[k] + b + (shift ? shift[j + k] : T(0));
    if (accumulate) {
      const auto before = load<W>(out + i);
      for (int k = 0; k < W; ++k) r.v[k] += before.v[k];
    }
    store<W>(out + i, r);
  }
};

template <class T>
void affine(const Context& ctx, int64_t rows, int64_t width, T a, const T* scale, T b, const T* shift, const T* x, T* out, bool accumulate) {
  const bool vectorised = width % kVectorWidth<T> == 0 && is_aligned({x, out});
  for_each<T>(ctx, "affine", rows * width, vectorised, Affine<T>{width, a, b, scale, shift, x, out, accumulate});
}

// A block takes 32 columns of one right-hand side; its warps take rows in turn and are added up in order. Rows of more than one block are summed
// into `partial` [blocks of rows, V, width] first, so that a tall array fills the GPU and the result does not depend on which block is first.
constexpr int kColumns = 32, kRowsInFlight = 8, kRowsOfBlock = 1024;

template <class T>
__global__ void column_sum_kernel(int64_t rows, int64_t width, int64_t rows_of_block, const T* x, T* out, int64_t out_batch, int64_t out_block,
                                  bool accumulate) {
  __shared__ T partial[kRowsInFlight][kColumns + 1];
  const int64_t j = int64_t{blockIdx.x} * kColumns + threadIdx.x, v = blockIdx.y;
  const int64_t begin = int64_t{blockIdx.z} * rows_of_block;
  const int64_t end = begin + rows_of_block < rows ? begin + rows_of_block : rows;
  T sum = 0;
  if (j < width) {
    for (int64_t r = begin + threadIdx.y; r < end; r += kRowsInFlight) sum += x[(v * rows + r) * width + j];
  }
  partial[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && j < width) {
    for (int k = 1; k < kRowsInFlight; ++k) sum += partial[k][threadIdx.x];
    T& to = out[blockIdx.z * out_block + v * out_batch + j];
    to = accumulate ? to + sum : sum;
  }
}

template <class T>
__global__ void row_accumulate_kernel(int64_t num, int64_t size, const T* x, int64_t x_stride, T* out) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t p = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; p < size; p += step) {
    T sum = out[p];
    for (int64_t s = 0; s < num; ++s) sum += x[s * x_stride + p];
    out[p] = sum;
  }
}

template <class T>
void row_accumulate(const Context& ctx, int64_t num, int64_t size, const T* x, int64_t x_stride, T* out) {
  if (size == 0 || num == 0) return;
  constexpr int kThreads = 256;
  launch(ctx, "row_accumulate", &row_accumulate_kernel<T>, blocks_for(size, kThreads), dim3(kThreads), 0, num, size, x, x_stride, out);
}

template <class T>
void column_sum(const Context& ctx, int64_t V, int64_t rows, int64_t width, const T* x, T* out, int64_t out_batch) {
  if (V == 0 || rows == 0 || width == 0) return;
  const dim3 threads(kColumns, kRowsInFlight);
  const auto columns = static_cast<unsigned>(ceil_div(width, kColumns));
  const auto run = [&](int64_t first, int64_t count, int64_t num_rows, const T* from, T* to, int64_t to_batch, int64_t blocks, int64_t to_block,
                       bool accumulate) {
    launch(ctx, "column_sum", &column_sum_kernel<T>, dim3(columns, static_cast<unsigned>(count), static_cast<unsigned>(blocks)), threads, 0, num_rows,
           width, ceil_div(num_rows, blocks), from + first * num_rows * width, to + first * to_batch, to_batch, to_block, accumulate);
  };
  for (int64_t first = 0; first < V; first += kMaxGridY) {
    const int64_t count = std::min<int64_t>(kMaxGridY, V - first);
    const int64_t blocks = std::clamp<int64_t>(kMaxBlocks / (columns * count), 1, ceil_div(rows, kRowsOfBlock));
    if (blocks == 1) {
      run(first, count, rows, x, out, out_batch, 1, 0, true);
      continue;
    }
    // [count, blocks, width]: the sums of the blocks are the rows of a second, short sum
    Buffer<T> partial(ctx, count * blocks * width);
    run(0, count, rows, x + first * rows * width, partial.data(), blocks * width, blocks, width, false);
    run(0, count, blocks, partial.data(), out + first * out_batch, out_batch, 1, 0, true);
  }
}

INFL_REGISTER_CUDA(activation_stub, activation)
INFL_REGISTER_CUDA(second_derivative_stub, second_derivative)
INFL_REGISTER_CUDA(add_scaled_stub, add_scaled)
INFL_REGISTER_CUDA(scale_stub, scale)
INFL_REGISTER_CUDA(combine_stub, combine)
INFL_REGISTER_CUDA(affine_stub, affine)
INFL_REGISTER_CUDA(column_sum_stub, column_sum)
INFL_REGISTER_CUDA(row_accumulate_stub, row_accumulate)

}  // namespace
}  // namespace cuda
}  // namespace infl
