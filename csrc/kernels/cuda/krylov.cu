// A step of conjugate gradients beside its product: four launches for all right-hand sides (direction, inner products, update, judge), one more with
// a preconditioner, and no synchronisation. Traffic an element: direction 3 accesses, inner products 2, update 6; 11 of sizeof(T) bytes in all.
//
// A column's sums are made in two steps: by block over its stretch, then over the blocks' parts, in the same fixed order by everyone who needs the
// total: that is every block of the next kernel, which costs it 8 bytes a part against the kMinStretch elements or more that it moves. So a kernel
// only reads what the one before has written, and the scalars of a column are written by its first block, where no other block reads them.
//
// Where P is no multiple of four (two in float64) columns lie differently within 16 bytes, and a thread takes an element at a time: the same lines of
// memory, with a quarter (half) of the bytes in flight. Vectors between the edges of each column would have more, but then a column's sums would
// depend on which one it is.
#include "kernels/krylov.h"

#include <limits>

#include "kernels/cuda/vector.h"

namespace infl {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMinStretch = 4096;  // elements worth a block
constexpr int64_t kMaxParts = 512;     // of one column

inline int64_t parts_of(int64_t P) { return std::clamp<int64_t>(ceil_div(P, kMinStretch), 1, kMaxParts); }

// In every thread of the block, in a fixed order.
__device__ inline double block_sum(double value) {
  __shared__ double of_warp[kThreads / kWarp];
  value = warp_sum(value);
  __syncthreads();  // what an earlier call left there has been read
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) sum += of_warp[w];
  return sum;
}

__device__ inline double total(const double* parts, int64_t num_parts) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < num_parts; i += kThreads) sum += parts[i];
  return block_sum(sum);
}

// Columns along y (strided over, there can be more than a grid has), parts of a column along x; a thread takes every 256-th vector of W elements of
// its block's stretch, so all threads of a block go through the same columns.
template <class T, int W>
struct Stretch {
  int64_t begin, end;
  __device__ explicit Stretch(int64_t P) {
    const int64_t vectors = P / W, share = (vectors + gridDim.x - 1) / gridDim.x;
    const int64_t first = share * blockIdx.x, last = first + share < vectors ? first + share : vectors;
    begin = (first + threadIdx.x) * W;
    end = last * W;
  }
};

// Products of one vector in T, the rest in double: a conversion and an addition in double for 16 bytes.
template <class T, int W>
__device__ inline double multiply(const Vector<T, W>& a, const Vector<T, W>& b) {
  T sum = 0;
  for (int k = 0; k < W; ++k) sum += a.v[k] * b.v[k];
  return static_cast<double>(sum);
}

// parts[0, v, part] = aᵀb; with `squares`, parts[1, v, part] = aᵀa.
template <class T, int W>
__global__ void dots_kernel(int64_t V, int64_t P, const T* a, const T* b, bool squares, const CgColumn* columns, double* parts) {
  const Stretch<T, W> stretch(P);
  for (int64_t v = blockIdx.y; v < V; v += gridDim.y) {
    if (!columns[v].is_running()) continue;
    double product = 0, square = 0;
    for (int64_t i = stretch.begin; i < stretch.end; i += kThreads * W) {
      const auto x = load<W>(a + v * P + i), y = load<W>(b + v * P + i);
      product += multiply(x, y);
      if (squares) square += multiply(x, x);
    }
    product = block_sum(product);
    if (squares) square = block_sum(square);
    if (threadIdx.x == 0) {
      parts[v * gridDim.x + blockIdx.x] = product;
      if (squares) parts[(V + v) * gridDim.x + blockIdx.x] = square;
    }
  }
}

template <class T, int W>
__global__ void direction_kernel(int64_t V, int64_t P, const T* r, const T* z, T* p, const double* parts, CgColumn* columns) {
  const Stretch<T, W> stretch(P);
  const T* from = z ? z : r;
  for (int64_t v = blockIdx.y; v < V; v += gridDim.y) {
    if (!columns[v].is_running()) continue;
    const double rz_next = z ? total(parts + v * gridDim.x, gridDim.x) : columns[v].rr;
    const T beta = static_cast<T>(cg_beta(columns[v], rz_next));
    if (blockIdx.x == 0 && threadIdx.x == 0) columns[v].rz_next = rz_next;
    for (int64_t i = stretch.begin; i < stretch.end; i += kThreads * W) {
      const auto x = load<W>(from + v * P + i);
      auto y = load<W>(p + v * P + i);
      for (int k = 0; k < W; ++k) y.v[k] = x.v[k] + beta * y.v[k];
      store<W>(p + v * P + i, y);
    }
  }
}

// parts: of pᵀq and ‖p‖² on entry; residuals[v, part]: of ‖r‖².
template <class T, int W>
__global__ void update_kernel(int64_t V, int64_t P, CgLimits limits, const T* p, const T* q, T* x, T* r, const double* parts, CgColumn* columns,
                              double* residuals) {
  const Stretch<T, W> stretch(P);
  for (int64_t v = blockIdx.y; v < V; v += gridDim.y) {
    if (!columns[v].is_running()) continue;
    const double curvature = total(parts + v * gridDim.x, gridDim.x), squares = total(parts + (V + v) * gridDim.x, gridDim.x);
    const T alpha = static_cast<T>(cg_alpha(columns[v], limits, curvature, squares));
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      columns[v].curvature = curvature;
      columns[v].squares = squares;
    }
    double sum = 0;
    for (int64_t i = stretch.begin; i < stretch.end; i += kThreads * W) {
      const auto direction = load<W>(p + v * P + i), image = load<W>(q + v * P + i);
      auto solution = load<W>(x + v * P + i), residual = load<W>(r + v * P + i);
      for (int k = 0; k < W; ++k) {
        solution.v[k] += alpha * direction.v[k];
        residual.v[k] -= alpha * image.v[k];
      }
      sum += multiply(residual, residual);
      store<W>(x + v * P + i, solution);
      store<W>(r + v * P + i, residual);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) residuals[v * gridDim.x + blockIdx.x] = sum;
  }
}

// A block a column.
__global__ void judge_kernel(int64_t V, int64_t num_parts, CgLimits limits, const double* residuals, CgColumn* columns) {
  for (int64_t v = blockIdx.x; v < V; v += gridDim.x) {
    const bool is_running = columns[v].is_running();
    const double rr = total(residuals + v * num_parts, is_running ? num_parts : 0);
    if (is_running && threadIdx.x == 0) cg_judge(columns[v], limits, rr);
  }
}

inline dim3 grid(int64_t V, int64_t P) { return dim3(static_cast<unsigned>(parts_of(P)), static_cast<unsigned>(std::min(V, kMaxGridY))); }

template <class T, int W>
void direction(const Context& ctx, int64_t V, int64_t P, const T* r, const T* z, T* p, CgColumn* columns) {
  Buffer<double> parts(ctx, z ? V * parts_of(P) : 0);
  if (z) launch(ctx, "cg_direction", &dots_kernel<T, W>, grid(V, P), dim3(kThreads), 0, V, P, r, z, false, columns, parts.data());
  launch(ctx, "cg_direction", &direction_kernel<T, W>, grid(V, P), dim3(kThreads), 0, V, P, r, z, p, parts.data(), columns);
}

template <class T>
void cg_direction(const Context& ctx, int64_t V, int64_t P, const T* r, const T* z, T* p, CgColumn* columns) {
  if (V == 0 || P == 0) return;
  constexpr int W = kVectorWidth<T>;
  const bool vectorised = P % W == 0 && is_aligned({r, z, p});
  (vectorised ? &direction<T, W> : &direction<T, 1>)(ctx, V, P, r, z, p, columns);
}

template <class T, int W>
void step(const Context& ctx, int64_t V, int64_t P, CgLimits limits, const T* p, const T* q, T* x, T* r, CgColumn* columns) {
  const int64_t num_parts = parts_of(P);
  Buffer<double> parts(ctx, 3 * V * num_parts);
  double* residuals = parts.data() + 2 * V * num_parts;
  launch(ctx, "cg_step", &dots_kernel<T, W>, grid(V, P), dim3(kThreads), 0, V, P, p, q, true, columns, parts.data());
  launch(ctx, "cg_step", &update_kernel<T, W>, grid(V, P), dim3(kThreads), 0, V, P, limits, p, q, x, r, parts.data(), columns, residuals);
  launch(ctx, "cg_step", &judge_kernel, dim3(static_cast<unsigned>(std::min(V, kMaxBlocks))), dim3(kThreads), 0, V, num_parts, limits, residuals,
         columns);
}

template <class T>
void cg_step(const Context& ctx, int64_t V, int64_t P, double lower, const T* p, const T* q, T* x, T* r, CgColumn* columns) {
  if (V == 0 || P == 0) return;
  constexpr int W = kVectorWidth<T>;
  const bool vectorised = P % W == 0 && is_aligned({p, q, x, r});
  const CgLimits limits{std::numeric_limits<T>::epsilon(), lower};
  (vectorised ? &step<T, W> : &step<T, 1>)(ctx, V, P, limits, p, q, x, r, columns);
}

INFL_REGISTER_CUDA(cg_direction_stub, cg_direction)
INFL_REGISTER_CUDA(cg_step_stub, cg_step)

}  // namespace
}  // namespace cuda
}  // namespace infl
