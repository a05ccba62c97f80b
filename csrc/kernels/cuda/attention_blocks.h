// What the attention kernels are made of: scores that are masked, and blocks of P, of its tangents and of its cotangents.
#pragma once

#include <limits>

#include "kernels/attention.h"
#include "kernels/cuda/attention_products.h"
#include "math/exp.h"

namespace infl::cuda {
namespace {

constexpr int kShared = 2;  // right-hand sides of a block of threads

// The score of a hidden key.
template <class T>
constexpr T kHidden = -std::numeric_limits<T>::infinity();

// Up to 64 rows from row `first` of one head.
template <class T>
__device__ Rows<T> rows_of(const T* data, const HeadStrides& at, int64_t example, int64_t head, int64_t first, int64_t all) {
  return {data + example * at.example + head * at.head + first * at.row, at.row, all - first};
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
template <bool kKeysFirst, class Tile, class T>
__device__ void probabilities(const Attention<T>& a, const Scores& b, const RowSum<T>* sums, Tile& p, T* shared) {
  p.clear();
  if (a.p == nullptr) {
    const Rows<T> q = queries(a, a.q, b.n, b), k = keys(a, a.k, b.n, b);
    multiply_rows_exactly(p, kKeysFirst ? k : q, kKeysFirst ? q : k, a.E, shared);
  }
  const int64_t line = (b.n * a.heads + b.head) * a.L;
  INFL_UNROLL(4)
  for (int i = 0; i < Tile::kTileRows; ++i) {
    INFL_UNROLL(4)
    for (int j = 0; j < Tile::kTileCols; ++j) {
      const int64_t query = b.l0 + (kKeysFirst ? Tile::col(j) : Tile::row(i)), key = b.s0 + (kKeysFirst ? Tile::row(i) : Tile::col(j));
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
template <bool kKeysFirst, class Tile, class T>
__device__ void score_tangents(const Attention<T>& a, const AttentionTangents<T>& t, const Scores& b, int64_t v, Tile& s, T* shared) {
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
  for (int i = 0; i < Tile::kTileRows; ++i) {
    INFL_UNROLL(4)
    for (int j = 0; j < Tile::kTileCols; ++j) {
      const int64_t query = b.l0 + (kKeysFirst ? Tile::col(j) : Tile::row(i)), key = b.s0 + (kKeysFirst ? Tile::row(i) : Tile::col(j));
      s.sum[i][j] *= a.scale;
      if (mask && sees(a, query, key)) s.sum[i][j] += mask[query * a.mask_at.row + key * a.mask_at.col];
    }
  }
}

// c = g_P − rowsum(P ∘ g_P) = g_o vᵀ − dots, for one right-hand side, which kExact says belongs to the point; g_S without the scale is P ∘ c.
template <bool kKeysFirst, bool kExact, class Tile, class T>
__device__ void centred_cotangents(const Attention<T>& a, const Scores& b, int64_t v, const T* g_o, const T* dots, Tile& g, T* shared) {
  const Rows<T> from = outputs(a, g_o, v * a.n + b.n, b), to = values(a, a.v, b.n, b);
  g.clear();
  if constexpr (kExact) {
    multiply_rows_exactly(g, kKeysFirst ? to : from, kKeysFirst ? from : to, a.F, shared);
  } else {
    multiply_rows(g, kKeysFirst ? to : from, kKeysFirst ? from : to, a.F, shared);
  }
  const T* line = dots + ((v * a.n + b.n) * a.heads + b.head) * a.L;
  INFL_UNROLL(4)
  for (int i = 0; i < Tile::kTileRows; ++i) {
    INFL_UNROLL(4)
    for (int j = 0; j < Tile::kTileCols; ++j) {
      const int64_t query = b.l0 + (kKeysFirst ? Tile::col(j) : Tile::row(i));
      g.sum[i][j] = query < a.L ? g.sum[i][j] - line[query] : T(0);
    }
  }
}

// tile ← tile ∘ p
template <class Tile>
__device__ void weigh(Tile& tile, const Tile& p) {
  INFL_UNROLL(4)
  for (int i = 0; i < Tile::kTileRows; ++i) {
    INFL_UNROLL(4)
    for (int j = 0; j < Tile::kTileCols; ++j) tile.sum[i][j] *= p.sum[i][j];
  }
}

// ---- Launching -------------------------------------------------------------------------------------------------------------------------------

template <class T>
int64_t blocks_of(const Attention<T>& a, int64_t heads, int64_t rows, int64_t width) {
  return a.n * heads * ceil_div(rows, kBlock) * ceil_div(width, kBlock);
}

template <class Tile, class T, class... Parameters, class... Arguments>
void start(const Context& ctx, const char* who, void (*kernel)(Parameters...), int64_t blocks, int tiles, const Attention<T>& a,
           Arguments... arguments) {
  launch(ctx, who, kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), shared_bytes<Tile>(tiles), a, arguments...);
}

}  // namespace
}  // namespace infl::cuda
