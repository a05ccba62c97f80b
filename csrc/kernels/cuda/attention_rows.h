// What attention needs of each row before a block can be worked on: the softmax's maximum and sum, and rowsum(P ∘ g_P) = rowsum(g_o ∘ o).
#pragma once

#include "kernels/cuda/attention_blocks.h"

namespace infl::cuda {
namespace {

// Maximum and sum of exponentials so far, of what a thread or several have met.
template <class T>
struct Running {
  T maximum = kHidden<T>, sum = 0;

  __device__ void add(T other_maximum, T other_sum) {
    if (other_maximum > maximum) {
      sum *= factor(maximum, other_maximum);
      maximum = other_maximum;
    }
    sum += other_sum * factor(other_maximum, maximum);
  }
  // exp(from − to); 1 between two that are hidden, whose sums are 0, or NaN if a score is.
  __device__ static T factor(T from, T to) { return from == to ? T(1) : infl::exp_nonpositive(from - to); }
};

template <class Tile, class T = typename Tile::Value>
__global__ void __launch_bounds__(kThreads, 2) row_sums_kernel(const Attention<T> a, RowSum<T>* sums) {
  INFL_DYNAMIC_SHARED(T, shared);
  Grid grid;
  Scores b{};
  b.l0 = grid.next((a.L + kBlock - 1) / kBlock) * kBlock;
  b.head = grid.next(a.heads);
  b.n = grid.rest;
  Running<T> running[Tile::kTileCols];
  for (; b.s0 < end_of_keys(a, b.l0); b.s0 += kBlock) {
    Tile s;
    s.clear();
    multiply_rows(s, keys(a, a.k, b.n, b), queries(a, a.q, b.n, b), a.E, shared);
    INFL_UNROLL(4)
    for (int j = 0; j < Tile::kTileCols; ++j) {
      const int64_t query = b.l0 + Tile::col(j);
      INFL_UNROLL(4)
      for (int i = 0; i < Tile::kTileRows; ++i) {
        const int64_t key = b.s0 + Tile::row(i);
        if (!sees(a, query, key)) continue;
        const T score = masked(a, b, query, key, s.sum[i][j]);
        const bool hidden = score == kHidden<T>, not_a_number = score != score;
        if (not_a_number) {
          running[j].sum = score;
        } else if (!hidden) {
          running[j].add(score, T(1));
        }
      }
    }
  }
  // [threads that share a query][query]
  T *maxima = shared, *parts = shared + Tile::kDown * kBlock;
  static_assert(2 * Tile::kDown * kBlock * sizeof(T) <= shared_bytes<Tile>(0));
  __syncthreads();
  INFL_UNROLL(4)
  for (int j = 0; j < Tile::kTileCols; ++j) {
    const int at = Tile::down() * kBlock + Tile::col(j);
    maxima[at] = running[j].maximum;
    parts[at] = running[j].sum;
  }
  __syncthreads();
  const int64_t query = b.l0 + threadIdx.x;
  if (threadIdx.x >= kBlock || query >= a.L) return;
  Running<T> all;
  for (int k = 0; k < Tile::kDown; ++k) all.add(maxima[k * kBlock + threadIdx.x], parts[k * kBlock + threadIdx.x]);
  sums[(b.n * a.heads + b.head) * a.L + query] = {all.maximum, all.sum == T(0) ? T(0) : T(1) / all.sum};
}

// o = P v, at `o_at`, v as products of `Factors` see it; P itself to `kept` if that is given.
template <class Tile, class Factors, class T = typename Tile::Value>
__global__ void __launch_bounds__(kThreads) outputs_kernel(const Attention<T> a, const RowSum<T>* sums, T* kept, HeadStrides o_at, T* o) {
  INFL_DYNAMIC_SHARED(T, shared);
  auto* tile = tile_at<Tile>(shared, 0);
  Grid grid;
  Scores b{};
  const int64_t f0 = grid.next((a.F + kBlock - 1) / kBlock) * kBlock;
  b.l0 = grid.next((a.L + kBlock - 1) / kBlock) * kBlock;
  b.head = grid.next(a.heads);
  b.n = grid.rest;
  Tile out;
  out.clear();
  for (; b.s0 < (kept ? a.S : end_of_keys(a, b.l0)); b.s0 += kBlock) {
    Tile p;
    probabilities<true>(a, b, sums, p, shared);
    put(p, tile);
    multiply_tile(out, tile, RoundedRows<Factors, T>{values(a, a.v, b.n, b)}, f0, a.F, shared);
    if (kept == nullptr || f0 != 0) continue;
    INFL_UNROLL(4)
    for (int j = 0; j < Tile::kTileCols; ++j) {
      INFL_UNROLL(4)
      for (int i = 0; i < Tile::kTileRows; ++i) {
        const int64_t query = b.l0 + Tile::col(j), key = b.s0 + Tile::row(i);
        if (query < a.L && key < a.S) kept[((b.n * a.heads + b.head) * a.L + query) * a.S + key] = p.sum[i][j];
      }
    }
  }
  INFL_UNROLL(4)
  for (int i = 0; i < Tile::kTileRows; ++i) {
    INFL_UNROLL(4)
    for (int j = 0; j < Tile::kTileCols; ++j) {
      const int64_t query = b.l0 + Tile::row(i), f = f0 + Tile::col(j);
      if (query < a.L && f < a.F) o[b.n * o_at.example + b.head * o_at.head + query * o_at.row + f] = out.sum[i][j];
    }
  }
}

// dots[v, n, head, l] = g_o · o for v < V, g_o as products of `Factors` see it, o [n, heads, L, F]: a warp a row.
template <class Factors, class T>
__global__ void __launch_bounds__(kThreads) dots_kernel(const Attention<T> a, int64_t V, const T* g_o, const T* o, T* dots) {
  const int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp, rows = a.n * a.heads * a.L;
  if (row >= V * rows) return;
  const int64_t l = row % a.L, head = row / a.L % a.heads, e = row / a.L / a.heads;
  const T *from = g_o + e * a.o_at.example + head * a.o_at.head + l * a.o_at.row, *out = o + row % rows * a.F;
  T sum = 0;
  for (int64_t f = threadIdx.x % kWarp; f < a.F; f += kWarp) sum += rounded<Factors>(Vector<T, 1>{{from[f]}}).v[0] * out[f];
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) dots[row] = sum;
}

// Of every row of scores, where P is to be computed.
template <class Tile, class T>
Buffer<RowSum<T>> row_sums(const Context& ctx, const Attention<T>& a) {
  Buffer<RowSum<T>> sums(ctx, a.n * a.heads * a.L);
  start<Exact<Tile>>(ctx, "attention_row_sums", &row_sums_kernel<Exact<Tile>>, blocks_of(a, a.heads, a.L, 1), 0, a, sums.data());
  return sums;
}

// rowsum(P ∘ g_P) of `V` cotangents as Σ (P v) g_o, with outputs that are computed once for all. P belongs to the point; g_o and v are taken as g_P
// is made of them, by products of `Factors`: where P is nearly 1, g_P − rowsum(P ∘ g_P) is what is left of two equal numbers.
template <class Tile, class Factors, class T>
Buffer<T> row_dots(const Context& ctx, const Attention<T>& a, int64_t V, const T* g_o, const RowSum<T>* sums) {
  constexpr const char* kWho = "attention_row_dots";
  const int64_t rows = a.n * a.heads * a.L;
  Buffer<T> o(ctx, rows * a.F), dots(ctx, V * rows);
  const HeadStrides o_at{a.heads * a.L * a.F, a.L * a.F, a.F};
  start<Exact<Tile>>(ctx, kWho, &outputs_kernel<Exact<Tile>, Factors>, blocks_of(a, a.heads, a.L, a.F), 1, a, sums, static_cast<T*>(nullptr), o_at,
                     o.data());
  launch(ctx, kWho, &dots_kernel<Factors, T>, dim3(static_cast<unsigned>(ceil_div(V * rows, kThreads / kWarp))), dim3(kThreads), 0, a, V, g_o,
         o.data(), dots.data());
  return dots;
}

}  // namespace
}  // namespace infl::cuda
