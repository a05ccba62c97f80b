// The axes V, n and batch are first taken apart: those along which C does not move are summed, neighbours that every operand walks as one axis become
// one, a summed axis that continues K is part of K, and an axis that continues the rows (columns) of A (B) and C while the other factor is shared is
// part of M (N). What is left are few products of large matrices where operands lie well, and these are the vendor's, one call for the longest axis.
//
// The rest, operands without a unit stride, very small matrices or many axes, runs here: tiles of 64 by 64 (32 multiplications for every element
// loaded) in registers or, as the precision says, on tensor cores (mma.h); or for small matrices a warp or a thread for each element of C, which
// reads what it multiplies from the caches. Each element of C is one sum in a fixed order. Panels have K on the slow axis, so a factor that is
// contiguous along K is turned on its way, at two to four stores a bank.
#include "kernels/batched_matmul.h"

#include <vector>

#include "kernels/cuda/leading.h"
#include "kernels/cuda/mma.h"
#include "kernels/cuda/tile.h"

namespace infl {
namespace cuda {
namespace {

constexpr int kMaxAxes = kMaxBatchAxes + 2;

// An axis of all operands, with their strides.
struct Axis {
  int64_t length, a[2], b[2], c;
};

struct Axes {
  int count = 0;
  int64_t size = 1;
  Axis axis[kMaxAxes];

  void add(const Axis& next) {
    axis[count++] = next;
    size *= next.length;
  }
  void remove(int k) {
    size /= axis[k].length;
    for (--count; k < count; ++k) axis[k] = axis[k + 1];
  }
};

struct Offsets {
  int64_t a[2] = {0, 0}, b[2] = {0, 0}, c = 0;
};

__host__ __device__ inline Offsets offsets_of(const Axes& axes, int64_t entry) {
  Offsets at;
  for (int k = axes.count - 1; k >= 0; --k) {
    const Axis& axis = axes.axis[k];
    const int64_t i = entry % axis.length;
    entry /= axis.length;
    for (int t = 0; t < 2; ++t) {
      at.a[t] += i * axis.a[t];
      at.b[t] += i * axis.b[t];
    }
    at.c += i * axis.c;
  }
  return at;
}

template <class T>
struct Factors {
  const T *a = nullptr, *b = nullptr;
  int64_t a_row = 0, a_col = 1, b_row = 0, b_col = 1;
};

// c[entry] (+)= Σ_summed Σ_terms a b
template <class T>
struct Problem {
  int64_t M = 0, K = 0, N = 0;
  int terms = 0;
  Factors<T> term[2];
  T* c = nullptr;
  int64_t c_row = 0, c_col = 1;
  Axes kept, summed;
  bool accumulate = false;
};

template <class T>
__device__ void write(const Problem<T>& p, int64_t entry, int64_t row, int64_t col, T value) {
  T& to = p.c[entry + row * p.c_row + col * p.c_col];
  to = p.accumulate ? to + value : value;
}

// ---- Tiles -----------------------------------------------------------------------------------------------------------------------------------

constexpr int kStep = 16;

// Elements between rows of panels beyond those of the tile.
template <class Tile>
constexpr int kPad = Tile::kColumnPad;
template <class T, int kRows, int kCols, int kTileRows, int kTileCols>
constexpr int kPad<RegisterTile<T, kRows, kCols, kTileRows, kTileCols>> = kVectorWidth<T>;

template <class Tile, class T = typename Tile::Value>
__global__ void __launch_bounds__(Tile::kThreads) tile_kernel(const Problem<T> p) {
  constexpr int kRows = Tile::kRows, kCols = Tile::kCols, kThreads = Tile::kThreads, kPad = cuda::kPad<Tile>;
  constexpr int kLeft = kRows * kStep / kThreads, kRight = kCols * kStep / kThreads;
  alignas(16) __shared__ typename Tile::Element left[kStep][kRows + kPad];
  alignas(16) __shared__ typename Tile::Element right[kStep][kCols + kPad];
  const int64_t row_tiles = (p.M + kRows - 1) / kRows, col_tiles = (p.N + kCols - 1) / kCols;
  const int64_t col0 = blockIdx.x % col_tiles * kCols, row0 = blockIdx.x / col_tiles % row_tiles * kRows;
  const Offsets entry = offsets_of(p.kept, blockIdx.x / col_tiles / row_tiles);
  const int thread = static_cast<int>(threadIdx.x);

  // The next step's elements travel while the last one's are multiplied. Neighbouring threads read along the axis of unit stride.
  T next_left[kLeft], next_right[kRight];
  const auto fetch = [&](int t, const Offsets& shift, int64_t k0) {
    const Factors<T>& term = p.term[t];
    const T *a = term.a + entry.a[t] + shift.a[t], *b = term.b + entry.b[t] + shift.b[t];
    const bool a_along_rows = term.a_row == 1, b_along_cols = term.b_col == 1;
    INFL_UNROLL(4)
    for (int i = 0; i < kLeft; ++i) {
      const int at = thread + i * kThreads;
      const int64_t k = k0 + (a_along_rows ? at / kRows : at % kStep), row = row0 + (a_along_rows ? at % kRows : at / kStep);
      next_left[i] = k < p.K && row < p.M ? a[row * term.a_row + k * term.a_col] : T(0);
    }
    INFL_UNROLL(4)
    for (int i = 0; i < kRight; ++i) {
      const int at = thread + i * kThreads;
      const int64_t k = k0 + (b_along_cols ? at / kCols : at % kStep), col = col0 + (b_along_cols ? at % kCols : at / kStep);
      next_right[i] = k < p.K && col < p.N ? b[k * term.b_row + col * term.b_col] : T(0);
    }
  };
  const auto keep = [&](int t) {
    const bool a_along_rows = p.term[t].a_row == 1, b_along_cols = p.term[t].b_col == 1;
    INFL_UNROLL(4)
    for (int i = 0; i < kLeft; ++i) {
      const int at = thread + i * kThreads;
      left[a_along_rows ? at / kRows : at % kStep][a_along_rows ? at % kRows : at / kStep] = Tile::element(next_left[i]);
    }
    INFL_UNROLL(4)
    for (int i = 0; i < kRight; ++i) {
      const int at = thread + i * kThreads;
      right[b_along_cols ? at / kCols : at % kStep][b_along_cols ? at % kCols : at / kStep] = Tile::element(next_right[i]);
    }
  };

  Tile tile;
  tile.clear();
  for (int t = 0; t < p.terms; ++t) {
    for (int64_t s = 0; s < p.summed.size; ++s) {
      const Offsets shift = offsets_of(p.summed, s);
      fetch(t, shift, 0);
      for (int64_t k0 = 0; k0 < p.K; k0 += kStep) {
        __syncthreads();
        keep(t);
        __syncthreads();
        if (k0 + kStep < p.K) fetch(t, shift, k0 + kStep);
        tile.template add<kStep>(left[0], kRows + kPad, right[0], kCols + kPad);
      }
    }
  }
  INFL_UNROLL(4)
  for (int i = 0; i < Tile::kTileRows; ++i) {
    INFL_UNROLL(4)
    for (int j = 0; j < Tile::kTileCols; ++j) {
      const int64_t row = row0 + Tile::row(i), col = col0 + Tile::col(j);
      if (row < p.M && col < p.N) write(p, entry.c, row, col, tile.sum[i][j]);
    }
  }
}

constexpr int kTile = 64, kThreads = 256;

template <class Tile>
auto kernel_of() {
  static_assert(Tile::kThreads == kThreads);
  return &tile_kernel<Tile>;
}

template <class T>
auto tile_kernel_for(const Context& ctx) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return kernel_of<MmaTile<Float64, kTile, kTile, 2, 4>>();
  } else {
    if (ctx.precision == Precision::tf32) return kernel_of<MmaTile<Tf32, kTile, kTile, 2, 4>>();
    if (ctx.precision == Precision::bfloat16) return kernel_of<MmaTile<Bfloat16, kTile, kTile, 2, 4>>();
    return kernel_of<RegisterTile<T, kTile, kTile, 4, 4>>();
  }
}

// ---- Small matrices --------------------------------------------------------------------------------------------------------------------------

// kTeam threads, one or a warp, take an element of C.
template <class T, int kTeam>
__global__ void __launch_bounds__(kThreads) element_kernel(const Problem<T> p) {
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kTeam;
  if (i >= p.kept.size * p.M * p.N) return;
  const int lane = static_cast<int>(threadIdx.x) % kTeam;
  const int64_t col = i % p.N, row = i / p.N % p.M;
  const Offsets entry = offsets_of(p.kept, i / p.N / p.M);
  T sum = 0;
  for (int t = 0; t < p.terms; ++t) {
    const Factors<T>& term = p.term[t];
    for (int64_t s = 0; s < p.summed.size; ++s) {
      const Offsets shift = offsets_of(p.summed, s);
      const T *a = term.a + entry.a[t] + shift.a[t] + row * term.a_row, *b = term.b + entry.b[t] + shift.b[t] + col * term.b_col;
      for (int64_t k = lane; k < p.K; k += kTeam) sum += a[k * term.a_col] * b[k * term.b_row];
    }
  }
  if constexpr (kTeam > 1) sum = warp_sum(sum);
  if (lane == 0) write(p, entry.c, row, col, sum);
}

// ---- Taking axes apart -----------------------------------------------------------------------------------------------------------------------

// Whether stepping along `outer` is stepping `length` times along `inner`, for every operand.
bool continues(const Axis& outer, const Axis& inner) {
  bool result = outer.c == inner.c * inner.length;
  for (int t = 0; t < 2; ++t) result = result && outer.a[t] == inner.a[t] * inner.length && outer.b[t] == inner.b[t] * inner.length;
  return result;
}

void merge_neighbours(Axes& axes) {
  for (int k = axes.count - 2; k >= 0; --k) {
    if (!continues(axes.axis[k], axes.axis[k + 1])) continue;
    Axis merged = axes.axis[k + 1];
    merged.length *= axes.axis[k].length;
    axes.remove(k + 1);
    axes.size = axes.size / axes.axis[k].length * merged.length;
    axes.axis[k] = merged;
  }
}

template <class T>
Problem<T> problem_of(const BatchedMatmul<T>& given) {
  Problem<T> p;
  p.M = given.M;
  p.K = given.K;
  p.N = given.N;
  p.c = given.c.data;
  p.c_row = given.c.row_stride;
  p.c_col = given.c.col_stride;
  p.accumulate = given.accumulate;
  int source[2] = {0, 0};
  for (int t = 0; t < 2; ++t) {
    if (given.a[t].data == nullptr) continue;
    source[p.terms] = t;
    p.term[p.terms++] = {given.a[t].data,       given.b[t].data,       given.a[t].row_stride,
                         given.a[t].col_stride, given.b[t].row_stride, given.b[t].col_stride};
  }
  const bool turned = p.c_col != 1 && p.N > 1;  // Cᵀ = Bᵀ Aᵀ
  if (turned) {
    std::swap(p.M, p.N);
    std::swap(p.c_row, p.c_col);
    for (Factors<T>& term : p.term) term = {term.b, term.a, term.b_col, term.b_row, term.a_col, term.a_row};
  }
  const auto add = [&](int64_t length, auto stride) {
    if (length == 1) return;
    Axis axis{length, {0, 0}, {0, 0}, stride(given.c)};
    for (int t = 0; t < p.terms; ++t) {
      axis.a[t] = turned ? stride(given.b[source[t]]) : stride(given.a[source[t]]);
      axis.b[t] = turned ? stride(given.a[source[t]]) : stride(given.b[source[t]]);
    }
    (axis.c != 0 ? p.kept : p.summed).add(axis);
  };
  add(given.V, [](const auto& m) { return m.v_stride; });
  add(given.n, [](const auto& m) { return m.n_stride; });
  for (int k = 0; k < given.num_axes; ++k) add(given.batch[k], [k](const auto& m) { return m.batch_strides[k]; });
  merge_neighbours(p.kept);
  merge_neighbours(p.summed);
  return p;
}

// Whether an axis continues another of a matrix, `length` steps of `stride`; one of a single step is continued by any.
bool extends(int64_t axis, int64_t length, int64_t stride) { return length == 1 || axis == length * stride; }

// Gives axes to M and N where the operands let it.
template <class T>
void absorb_kept(Problem<T>& p) {
  for (int k = p.kept.count - 1; k >= 0; --k) {
    const Axis axis = p.kept.axis[k];
    bool rows = extends(axis.c, p.M, p.c_row), cols = extends(axis.c, p.N, p.c_col);
    for (int t = 0; t < p.terms; ++t) {
      rows = rows && axis.b[t] == 0 && extends(axis.a[t], p.M, p.term[t].a_row);
      cols = cols && axis.a[t] == 0 && extends(axis.b[t], p.N, p.term[t].b_col);
    }
    if (!rows && !cols) continue;
    if ((rows ? p.M : p.N) == 1) {
      (rows ? p.c_row : p.c_col) = axis.c;
      for (int t = 0; t < p.terms; ++t) (rows ? p.term[t].a_row : p.term[t].b_col) = rows ? axis.a[t] : axis.b[t];
    }
    (rows ? p.M : p.N) *= axis.length;
    p.kept.remove(k);
  }
}

// And to K, then to M and N.
template <class T>
void absorb(Problem<T>& p) {
  for (int k = p.summed.count - 1; k >= 0; --k) {  // from the innermost, so that the order of the sum stays
    const Axis axis = p.summed.axis[k];
    for (int t = 0; t < p.terms; ++t) {
      if (!extends(axis.a[t], p.K, p.term[t].a_col) || !extends(axis.b[t], p.K, p.term[t].b_row)) return absorb_kept(p);
    }
    for (int t = 0; t < p.terms && p.K == 1; ++t) {
      p.term[t].a_col = axis.a[t];
      p.term[t].b_row = axis.b[t];
    }
    p.K *= axis.length;
    p.summed.remove(k);
  }
  absorb_kept(p);
}

// One call for each entry of the axes but the longest; false where these would be many, or the library does not take the operands.
template <class T>
bool multiply(const Context& ctx, const Problem<T>& given) {
  constexpr int64_t kMostCalls = 16, kLeastSide = 16;
  Problem<T> p = given;
  const Leading c = leading(p.M, p.N, p.c_row, p.c_col);
  if (std::min({p.M, p.N, p.K}) < kLeastSide || p.terms == 0 || !c.possible || c.transposed) return false;
  Leading a[2], b[2];
  for (int t = 0; t < p.terms; ++t) {
    a[t] = leading(p.M, p.K, p.term[t].a_row, p.term[t].a_col);
    b[t] = leading(p.K, p.N, p.term[t].b_row, p.term[t].b_col);
    if (!a[t].possible || !b[t].possible) return false;
  }
  Axis batch{1, {0, 0}, {0, 0}, 0};
  int longest = -1;
  for (int k = 0; k < p.kept.count; ++k) {
    if (p.kept.axis[k].length > batch.length) batch = p.kept.axis[longest = k];
  }
  if (longest >= 0) p.kept.remove(longest);
  if (p.kept.size * p.summed.size * p.terms > kMostCalls) return false;
  for (int64_t e = 0; e < p.kept.size; ++e) {
    const Offsets entry = offsets_of(p.kept, e);
    bool accumulate = p.accumulate;
    for (int t = 0; t < p.terms; ++t) {
      for (int64_t s = 0; s < p.summed.size; ++s) {
        const Offsets shift = offsets_of(p.summed, s);
        MatrixProduct<T> m{.batch = batch.length, .M = p.M, .N = p.N, .K = p.K};
        m.a = p.term[t].a + entry.a[t] + shift.a[t];
        m.b = p.term[t].b + entry.b[t] + shift.b[t];
        m.c = p.c + entry.c;
        m.a_transposed = a[t].transposed;
        m.b_transposed = b[t].transposed;
        m.lda = a[t].ld;
        m.ldb = b[t].ld;
        m.ldc = c.ld;
        m.a_batch = batch.a[t];
        m.b_batch = batch.b[t];
        m.c_batch = batch.c;
        m.accumulate = accumulate;
        ctx.runtime->multiply(m, ctx.precision, ctx.stream);
        accumulate = true;
      }
    }
  }
  return true;
}

template <class T>
void batched_matmul(const Context& ctx, const BatchedMatmul<T>& given) {
  if (given.V == 0 || given.n == 0) return;
  Problem<T> p = problem_of(given);
  absorb(p);
  if (multiply(ctx, p)) return;
  constexpr int64_t kSmall = 32 * 32, kLongSum = 64;
  const auto start = [&](void (*kernel)(Problem<T>), int64_t blocks) {
    launch(ctx, "batched_matmul", kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, p);
  };
  const int64_t elements = p.kept.size * p.M * p.N;
  if (p.M * p.N >= kSmall) return start(tile_kernel_for<T>(ctx), p.kept.size * ceil_div(p.M, kTile) * ceil_div(p.N, kTile));
  if (p.K >= kLongSum) return start(&element_kernel<T, kWarp>, ceil_div(elements, kThreads / kWarp));
  start(&element_kernel<T, 1>, ceil_div(elements, kThreads));
}

INFL_REGISTER_CUDA(batched_matmul_stub, batched_matmul)

}  // namespace
}  // namespace cuda
}  // namespace infl
