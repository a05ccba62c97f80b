// What the attention kernels are made of: products of 64 rows by 64 rows and of 64 by 64 scores by 64 columns, scores that are masked, and blocks of
// P, of its tangents and of its cotangents.
#pragma once

#include <limits>

#include "kernels/attention.h"
#include "kernels/cuda/tile.h"
#include "math/exp.h"

namespace infl::cuda {
namespace {

constexpr int kBlock = 64, kStep = 16, kThreads = 256, kShared = 2;  // kShared: right-hand sides of a block of threads
constexpr int kEach = kBlock * kStep / kThreads;

template <class T>
using Tile = RegisterTile<T, kBlock, kBlock, 4, 4>;
template <class T>
constexpr int kPitch = kBlock + kVectorWidth<T>;  // of panels and tiles in shared memory

// The score of a hidden key.
template <class T>
constexpr T kHidden = -std::numeric_limits<T>::infinity();

static_assert(Tile<float>::kThreads == kThreads && Tile<double>::kThreads == kThreads);

// Elements of shared memory: two panels for what is multiplied next, and some tiles of scores.
template <class T>
size_t shared_bytes(int tiles) {
  return static_cast<size_t>(2 * kStep + tiles * kBlock) * kPitch<T> * sizeof(T);
}

template <class T>
__device__ T* tile_at(T* shared, int tile) {
  return shared + (2 * kStep + tile * kBlock) * kPitch<T>;
}

// Rows of a matrix, `step` apart, their features contiguous; beyond `count` they are zeros.
template <class T>
struct Rows {
  const T* data;
  int64_t step;
  int64_t count;
};

// Up to 64 rows from row `first` of one head.
template <class T>
__device__ Rows<T> rows_of(const T* data, const HeadStrides& at, int64_t example, int64_t head, int64_t first, int64_t all) {
  return {data + example * at.example + head * at.head + first * at.row, at.row, all - first};
}

// sum[i][j] += left_i · right_j over K features.
template <class T>
__device__ void multiply_rows(Tile<T>& sum, const Rows<T>& left, const Rows<T>& right, int64_t K, T* shared) {
  T *a = shared, *b = shared + kStep * kPitch<T>;
  T next_a[kEach], next_b[kEach];
  const int k = static_cast<int>(threadIdx.x) % kStep, row = static_cast<int>(threadIdx.x) / kStep;
  const auto fetch = [&](int64_t k0) {
    INFL_UNROLL(4)
    for (int i = 0; i < kEach; ++i) {
      const int64_t r = row + i * (kThreads / kStep);
      next_a[i] = r < left.count && k0 + k < K ? left.data[r * left.step + k0 + k] : T(0);
      next_b[i] = r < right.count && k0 + k < K ? right.data[r * right.step + k0 + k] : T(0);
    }
  };
  fetch(0);
  for (int64_t k0 = 0; k0 < K; k0 += kStep) {
    __syncthreads();
    INFL_UNROLL(4)
    for (int i = 0; i < kEach; ++i) {
      a[k * kPitch<T> + row + i * (kThreads / kStep)] = next_a[i];
      b[k * kPitch<T> + row + i * (kThreads / kStep)] = next_b[i];
    }
    __syncthreads();
    if (k0 + kStep < K) fetch(k0 + kStep);
    sum.template add<kStep>(a, kPitch<T>, b, kPitch<T>);
  }
}

// sum[i][j] += Σ_k tile[k][i] right_k[col0 + j]
template <class T>
__device__ void multiply_tile(Tile<T>& sum, const T* tile, const Rows<T>& right, int64_t col0, int64_t cols, T* shared) {
  T next[kEach];
  const int col = static_cast<int>(threadIdx.x) % kBlock, line = static_cast<int>(threadIdx.x) / kBlock;
  const auto fetch = [&](int k0) {
    INFL_UNROLL(4)
    for (int i = 0; i < kEach; ++i) {
      const int64_t k = k0 + line + i * (kThreads / kBlock);
      next[i] = k < right.count && col0 + col < cols ? right.data[k * right.step + col0 + col] : T(0);
    }
  };
  const int count = right.count < kBlock ? static_cast<int>(right.count) : kBlock;
  fetch(0);
  for (int k0 = 0; k0 < count; k0 += kStep) {
    __syncthreads();
    INFL_UNROLL(4)
    for (int i = 0; i < kEach; ++i) shared[(line + i * (kThreads / kBlock)) * kPitch<T> + col] = next[i];
    __syncthreads();
    if (k0 + kStep < count) fetch(k0 + kStep);
    sum.template add<kStep>(tile + k0 * kPitch<T>, kPitch<T>, shared, kPitch<T>);
  }
}

// The tile's rows to shared memory, once nobody reads what was there. Whoever reads them waits for the panel that it multiplies them with.
template <class T>
__device__ void put(const Tile<T>& tile, T* to) {
  constexpr int W = Tile<T>::kWidth;
  __syncthreads();
  INFL_UNROLL(4)
  for (int i = 0; i < Tile<T>::kTileRows; ++i) {
    INFL_UNROLL(4)
    for (int j = 0; j < Tile<T>::kTileCols; j += W) {
      Vector<T, W> value;
      INFL_UNROLL(4)
      for (int k = 0; k < W; ++k) value.v[k] = tile.sum[i][j + k];
      store<W>(to + Tile<T>::row(i) * kPitch<T> + Tile<T>::col(j), value);
    }
  }
}

// A block of scores.
struct Scores {
  int64_t n, head, l0, s0;
};

template <class T>
__device__ int64_t key_head_of(const Attention<T>& a, int64_t head) {
  return head / (a.heads / a.key_heads);
}

template <class T>
__device__ Rows<T> queries(const Attention<T>& a, const T* q, int64_t example, const Scores& b) {
  return rows_of(q, a.q_at, example, b.head, b.l0, a.L);
}
template <class T>
__device__ Rows<T> outputs(const Attention<T>& a, const T* o, int64_t example, const Scores& b) {
  return rows_of(o, a.o_at, example, b.head, b.l0, a.L);
}
template <class T>
__device__ Rows<T> keys(const Attention<T>& a, const T* k, int64_t example, const Scores& b) {
  return rows_of(k, a.k_at, example, key_head_of(a, b.head), b.s0, a.S);
}
template <class T>
__device__ Rows<T> values(const Attention<T>& a, const T* v, int64_t example, const Scores& b) {
  return rows_of(v, a.v_at, example, key_head_of(a, b.head), b.s0, a.S);
}

// End of the keys that queries l0, ..., l0 + 63 see.
template <class T>
__device__ int64_t end_of_keys(const Attention<T>& a, int64_t l0) {
  return a.causal && l0 + kBlock < a.S ? l0 + kBlock : a.S;
}

template <class T>
__device__ bool sees(const Attention<T>& a, int64_t query, int64_t key) {
  return query < a.L && key < a.S && (!a.causal || key <= query);
}

// The score of a query and a key that it sees; −∞ hides.
template <class T>
__device__ T masked(const Attention<T>& a, const Scores& b, int64_t query, int64_t key, T product) {
  const T score = product * a.scale;
  if (a.mask == nullptr) return score;
  const T mask = a.mask[b.n * a.mask_at.example + a.mask_at.offsets[b.head] + query * a.mask_at.row + key * a.mask_at.col];
  if (!a.mask_is_boolean) return score + mask;
  return mask != T(0) ? score : kHidden<T>;
}

// Of a row of scores: its maximum, and the inverse of Σ exp(s − maximum), 0 where every key is hidden.
template <class T>
struct RowSum {
  T maximum, inverse;
};

// P of a block, keys along the tile's rows (kKeysFirst) or along its columns. `sums` [n, heads, L] where P is not kept.
template <bool kKeysFirst, class T>
__device__ void probabilities(const Attention<T>& a, const Scores& b, const RowSum<T>* sums, Tile<T>& p, T* shared) {
  p.clear();
  if (a.p == nullptr) {
    const Rows<T> q = queries(a, a.q, b.n, b), k = keys(a, a.k, b.n, b);
    multiply_rows(p, kKeysFirst ? k : q, kKeysFirst ? q : k, a.E, shared);
  }
  const int64_t line = (b.n * a.heads + b.head) * a.L;
  INFL_UNROLL(4)
  for (int i = 0; i < Tile<T>::kTileRows; ++i) {
    INFL_UNROLL(4)
    for (int j = 0; j < Tile<T>::kTileCols; ++j) {
      const int64_t query = b.l0 + (kKeysFirst ? Tile<T>::col(j) : Tile<T>::row(i)), key = b.s0 + (kKeysFirst ? Tile<T>::row(i) : Tile<T>::col(j));
      T& value = p.sum[i][j];
      if (!sees(a, query, key)) {
        value = T(0);
      } else if (a.p) {
        value = a.p[(line + query) * a.S + key];
      } else {
        const RowSum<T> sum = sums[line + query];
        value = sum.inverse == T(0) ? T(0) : infl::exp_nonpositive(masked(a, b, query, key, value) - sum.maximum) * sum.inverse;
      }
    }
  }
}

// What a block of threads owns: numbers from the grid, the first changing fastest.
struct Grid {
  int64_t rest = blockIdx.x;
  __device__ int64_t next(int64_t count) {
    const int64_t at = rest % count;
    rest /= count;
    return at;
  }
};

template <class T>
__host__ __device__ bool scores_move(const AttentionTangents<T>& t) {
  return t.q || t.k || t.mask;
}

// t_S of a block for right-hand side v; anything where a query does not see a key.
template <bool kKeysFirst, class T>
__device__ void score_tangents(const Attention<T>& a, const AttentionTangents<T>& t, const Scores& b, int64_t v, Tile<T>& s, T* shared) {
  const int64_t e = v * a.n + b.n;
  s.clear();
  if (t.q) {
    const Rows<T> q = queries(a, t.q, e, b), k = keys(a, a.k, b.n, b);
    multiply_rows(s, kKeysFirst ? k : q, kKeysFirst ? q : k, a.E, shared);
  }
  if (t.k) {
    const Rows<T> q = queries(a, a.q, b.n, b), k = keys(a, t.k, e, b);
    multiply_rows(s, kKeysFirst ? k : q, kKeysFirst ? q : k, a.E, shared);
  }
  const T* mask = t.mask ? t.mask + v * t.mask_stride + b.n * a.mask_at.example + a.mask_at.offsets[b.head] : nullptr;
  INFL_UNROLL(4)
  for (int i = 0; i < Tile<T>::kTileRows; ++i) {
    INFL_UNROLL(4)
    for (int j = 0; j < Tile<T>::kTileCols; ++j) {
      const int64_t query = b.l0 + (kKeysFirst ? Tile<T>::col(j) : Tile<T>::row(i)), key = b.s0 + (kKeysFirst ? Tile<T>::row(i) : Tile<T>::col(j));
      s.sum[i][j] *= a.scale;
      if (mask && sees(a, query, key)) s.sum[i][j] += mask[query * a.mask_at.row + key * a.mask_at.col];
    }
  }
}

// c = g_P − rowsum(P ∘ g_P) = g_o vᵀ − dots, for one right-hand side; g_S without the scale is P ∘ c.
template <bool kKeysFirst, class T>
__device__ void centred_cotangents(const Attention<T>& a, const Scores& b, int64_t v, const T* g_o, const T* dots, Tile<T>& g, T* shared) {
  const Rows<T> from = outputs(a, g_o, v * a.n + b.n, b), to = values(a, a.v, b.n, b);
  g.clear();
  multiply_rows(g, kKeysFirst ? to : from, kKeysFirst ? from : to, a.F, shared);
  const T* line = dots + ((v * a.n + b.n) * a.heads + b.head) * a.L;
  INFL_UNROLL(4)
  for (int i = 0; i < Tile<T>::kTileRows; ++i) {
    INFL_UNROLL(4)
    for (int j = 0; j < Tile<T>::kTileCols; ++j) {
      const int64_t query = b.l0 + (kKeysFirst ? Tile<T>::col(j) : Tile<T>::row(i));
      g.sum[i][j] = query < a.L ? g.sum[i][j] - line[query] : T(0);
    }
  }
}

// tile ← tile ∘ p
template <class T>
__device__ void weigh(Tile<T>& tile, const Tile<T>& p) {
  INFL_UNROLL(4)
  for (int i = 0; i < Tile<T>::kTileRows; ++i) {
    INFL_UNROLL(4)
    for (int j = 0; j < Tile<T>::kTileCols; ++j) tile.sum[i][j] *= p.sum[i][j];
  }
}

// ---- Launching -------------------------------------------------------------------------------------------------------------------------------

template <class T>
int64_t blocks_of(const Attention<T>& a, int64_t heads, int64_t rows, int64_t width) {
  return a.n * heads * ceil_div(rows, kBlock) * ceil_div(width, kBlock);
}

template <class T, class... Parameters, class... Arguments>
void start(const Context& ctx, const char* who, void (*kernel)(Parameters...), int64_t blocks, int tiles, const Attention<T>& a,
           Arguments... arguments) {
  launch(ctx, who, kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), shared_bytes<T>(tiles), a, arguments...);
}

}  // namespace
}  // namespace infl::cuda
