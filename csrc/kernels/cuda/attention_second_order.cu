// kernels/attention.h has the formulas, attention.cu how blocks of scores are walked. What is summed along a row before anything can be multiplied
// with it needs no scores that are kept: rowsum(P ∘ w) = rowsum(P ∘ (t_S ∘ c + g_o t_vᵀ)), since rowsum(P ∘ c) = 0, is found together with
// rowsum(P ∘ t_S) in one walk before the others.
//
// Operations for each element of P and right-hand side, a block of threads taking one: the walk for the sums 4 E + 4 F, S_q and S_k 8 E + 4 F each,
// S_v 4 E + 2 F, the mask 4 E + 4 F; and 2 E in each where P is computed. What belongs to the point, P and c, has factors that are not rounded: three
// times their operations at a reduced precision.
#include "kernels/attention.h"

#include "kernels/cuda/attention_cotangents.h"
#include "kernels/cuda/attention_rows.h"

namespace infl {
namespace cuda {
namespace {

// Of a row of scores and a right-hand side: rowsum(P ∘ t_S) and rowsum(P ∘ (t_S ∘ c + g_o t_vᵀ)).
template <class T>
struct RowMoments {
  T tangent, product;
};

template <class T>
struct SecondOrder {
  AttentionTangents<T> t;
  const T* g_o;  // [n, …]
  const RowSum<T>* sums;
  const T* dots;           // [n, heads, L]
  RowMoments<T>* moments;  // [V, n, heads, L]

  __device__ RowMoments<T>* line(const Attention<T>& a, const Scores& b, int64_t v) const {
    return moments + ((v * a.n + b.n) * a.heads + b.head) * a.L;
  }

  // w += g_o t_vᵀ
  template <bool kKeysFirst, class Tile>
  __device__ void add_value_tangents(const Attention<T>& a, const Scores& b, int64_t v, Tile& w, T* shared) const {
    if (t.v == nullptr) return;
    const Rows<T> from = outputs(a, g_o, b.n, b), to = values(a, t.v, v * a.n + b.n, b);
    multiply_rows(w, kKeysFirst ? to : from, kKeysFirst ? from : to, a.F, shared);
  }

  // u = t_S − rowsum(P ∘ t_S)
  template <bool kKeysFirst, class Tile>
  __device__ void centred_tangents(const Attention<T>& a, const Scores& b, int64_t v, Tile& u, T* shared) const {
    score_tangents<kKeysFirst>(a, t, b, v, u, shared);
    subtract<kKeysFirst>(a, b, v, &RowMoments<T>::tangent, u);
  }

  // h = P ∘ (w − rowsum(P ∘ w)),  w = u ∘ c + g_o t_vᵀ
  template <bool kKeysFirst, class Tile>
  __device__ void scores(const Attention<T>& a, const Scores& b, int64_t v, const Tile& p, const Tile& c, Tile& h, T* shared) const {
    h.clear();
    if (scores_move(t)) {
      centred_tangents<kKeysFirst>(a, b, v, h, shared);
      weigh(h, c);
    }
    add_value_tangents<kKeysFirst>(a, b, v, h, shared);
    subtract<kKeysFirst>(a, b, v, &RowMoments<T>::product, h);
    weigh(h, p);
  }

  template <bool kKeysFirst, class Tile>
  __device__ void subtract(const Attention<T>& a, const Scores& b, int64_t v, T RowMoments<T>::* moment, Tile& tile) const {
    const RowMoments<T>* of_row = line(a, b, v);
    INFL_UNROLL(4)
    for (int i = 0; i < Tile::kTileRows; ++i) {
      INFL_UNROLL(4)
      for (int j = 0; j < Tile::kTileCols; ++j) {
        const int64_t query = b.l0 + (kKeysFirst ? Tile::col(j) : Tile::row(i));
        if (query < a.L) tile.sum[i][j] -= of_row[query].*moment;
      }
    }
  }

  // h, as the mask's cotangent sums it up.
  template <class Tile>
  __device__ void operator()(const Attention<T>& a, const Scores& b, int64_t v, Tile& h, T* shared) const {
    Tile p, c;
    probabilities<false>(a, b, sums, p, shared);
    centred_cotangents<false, true>(a, b, 0, g_o, dots, c, shared);
    scores<false>(a, b, v, p, c, h, shared);
  }
};

template <class Tile, class T = typename Tile::Value>
__global__ void __launch_bounds__(kThreads, 1) moments_kernel(const Attention<T> a, const SecondOrder<T> s) {
  INFL_DYNAMIC_SHARED(T, shared);
  Grid grid;
  Scores b{};
  const int64_t v = grid.next(a.V);
  b.l0 = grid.next((a.L + kBlock - 1) / kBlock) * kBlock;
  b.head = grid.next(a.heads);
  b.n = grid.rest;
  T tangent[Tile::kTileCols] = {}, product[Tile::kTileCols] = {};
  for (; b.s0 < end_of_keys(a, b.l0); b.s0 += kBlock) {
    Tile p, w;
    probabilities<true>(a, b, s.sums, p, shared);
    w.clear();
    if (scores_move(s.t)) {
      Tile c;
      centred_cotangents<true, true>(a, b, 0, s.g_o, s.dots, c, shared);
      score_tangents<true>(a, s.t, b, v, w, shared);
      INFL_UNROLL(4)
      for (int j = 0; j < Tile::kTileCols; ++j) {
        INFL_UNROLL(4)
        for (int i = 0; i < Tile::kTileRows; ++i) tangent[j] += p.sum[i][j] * w.sum[i][j];
      }
      weigh(w, c);
    }
    s.template add_value_tangents<true>(a, b, v, w, shared);
    INFL_UNROLL(4)
    for (int j = 0; j < Tile::kTileCols; ++j) {
      INFL_UNROLL(4)
      for (int i = 0; i < Tile::kTileRows; ++i) product[j] += p.sum[i][j] * w.sum[i][j];
    }
  }
  // [threads that share a query][query]
  T *tangents = shared, *products = shared + Tile::kDown * kBlock;
  static_assert(2 * Tile::kDown * kBlock * sizeof(T) <= shared_bytes<Tile>(0));
  __syncthreads();
  INFL_UNROLL(4)
  for (int j = 0; j < Tile::kTileCols; ++j) {
    const int at = Tile::down() * kBlock + Tile::col(j);
    tangents[at] = tangent[j];
    products[at] = product[j];
  }
  __syncthreads();
  const int64_t query = b.l0 + threadIdx.x;
  if (threadIdx.x >= kBlock || query >= a.L) return;
  RowMoments<T> all{};
  for (int k = 0; k < Tile::kDown; ++k) {
    all.tangent += tangents[k * kBlock + threadIdx.x];
    all.product += products[k * kBlock + threadIdx.x];
  }
  s.line(a, b, v)[query] = all;
}

template <class Tile, Wanted kWanted, class T = typename Tile::Value>
__global__ void __launch_bounds__(kThreads, 1) second_order_kernel(const Attention<T> a, const SecondOrder<T> s, T* to) {
  INFL_DYNAMIC_SHARED(T, shared);
  constexpr bool kKeysFirst = kWanted == Wanted::query;
  auto* tile = tile_at<Tile>(shared, 0);
  const Part<T, kWanted> part(a, 1);
  const int64_t v = part.v0;
  Tile sum;
  sum.clear();
  walk<kWanted>(a, part.n, part.head, part.row0, [&](const Scores& b) {
    Tile p, h;
    probabilities<kKeysFirst>(a, b, s.sums, p, shared);
    if constexpr (kWanted == Wanted::value) {
      s.template centred_tangents<kKeysFirst>(a, b, v, h, shared);
      weigh(h, p);
      put(h, tile);
      multiply_tile(sum, tile, outputs(a, s.g_o, b.n, b), part.col0, part.width, shared);
    } else {
      Tile c;
      centred_cotangents<kKeysFirst, true>(a, b, 0, s.g_o, s.dots, c, shared);
      s.template scores<kKeysFirst>(a, b, v, p, c, h, shared);
      put(h, tile);
      multiply_tile(sum, tile, kKeysFirst ? keys(a, a.k, b.n, b) : queries(a, a.q, b.n, b), part.col0, part.width, shared);
      const T* moved = kKeysFirst ? s.t.k : s.t.q;
      if (moved == nullptr) return;
      weigh(c, p);
      put(c, tile);
      const int64_t e = v * a.n + b.n;
      multiply_tile(sum, tile, kKeysFirst ? keys(a, moved, e, b) : queries(a, moved, e, b), part.col0, part.width, shared);
    }
  });
  part.write(a, v, sum, to, true);
}

template <class Tile, Wanted kWanted, class T>
void add_second_order(const Context& ctx, const Attention<T>& a, const SecondOrder<T>& s, T* to) {
  if (to == nullptr) return;
  const int64_t width = kWanted == Wanted::value ? a.F : a.E, rows = kWanted == Wanted::query ? a.L : a.S;
  const int64_t blocks = a.V * blocks_of(a, kWanted == Wanted::query ? a.heads : a.key_heads, rows, width);
  start<Tile>(ctx, "attention_second_order", &second_order_kernel<Tile, kWanted>, blocks, 1, a, s, to);
}

template <class T>
void attention_second_order(const Context& ctx, const Attention<T>& a, const T* g_o, const AttentionTangents<T>& t, const AttentionCotangents<T>& g) {
  constexpr const char* kWho = "attention_second_order";
  if (a.n == 0 || a.V == 0) return;
  with_tile<T>(ctx, [&]<class Tile>() {
    const Buffer<RowSum<T>> sums = a.p ? Buffer<RowSum<T>>() : row_sums<Tile>(ctx, a);
    const Buffer<T> dots = row_dots<Tile, Exact<Tile>>(ctx, a, 1, g_o, sums.data());
    Buffer<RowMoments<T>> moments(ctx, a.V * a.n * a.heads * a.L);
    const SecondOrder<T> s{t, g_o, sums.data(), dots.data(), moments.data()};
    start<Tile>(ctx, kWho, &moments_kernel<Tile>, a.V * blocks_of(a, a.heads, a.L, 1), 0, a, s);
    add_second_order<Tile, Wanted::query>(ctx, a, s, g.q);
    add_second_order<Tile, Wanted::key>(ctx, a, s, g.k);
    if (scores_move(t)) add_second_order<Tile, Wanted::value>(ctx, a, s, g.v);
    add_to_mask<Tile>(ctx, kWho, a, s, g);
  });
}

INFL_REGISTER_CUDA(attention_second_order_stub, attention_second_order)

}  // namespace
}  // namespace cuda
}  // namespace infl
