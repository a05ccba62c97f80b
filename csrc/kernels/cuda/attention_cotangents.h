// Who owns which part of a cotangent of attention, and the blocks of scores that he walks: 64 queries, 64 keys, or a part of the mask.
#pragma once

#include "kernels/cuda/attention_blocks.h"

namespace infl::cuda {
namespace {

enum class Wanted { query, key, value };

// Every block of scores that 64 rows of a cotangent are summed over.
template <Wanted kWanted, class T, class Body>
__device__ void walk(const Attention<T>& a, int64_t n, int64_t head, int64_t row0, const Body& body) {
  Scores b{};
  b.n = n;
  if constexpr (kWanted == Wanted::query) {
    b.head = head;
    b.l0 = row0;
    for (; b.s0 < end_of_keys(a, b.l0); b.s0 += kBlock) body(b);
  } else {
    const int64_t group = a.heads / a.key_heads;
    b.s0 = row0;
    for (b.head = head * group; b.head < (head + 1) * group; ++b.head) {
      for (b.l0 = a.causal ? row0 : 0; b.l0 < a.L; b.l0 += kBlock) body(b);
    }
  }
}

// Where a block of threads' part of a cotangent is: 64 rows of a head by 64 features.
template <class T, Wanted kWanted>
struct Part {
  int64_t width, count;
  HeadStrides at;
  int64_t v0, col0, row0, head, n;

  __device__ Part(const Attention<T>& a, int sides)
      : width(kWanted == Wanted::value ? a.F : a.E),
        count(kWanted == Wanted::query ? a.L : a.S),
        at(kWanted == Wanted::query ? a.q_at
           : kWanted == Wanted::key ? a.k_at
                                    : a.v_at) {
    Grid grid;
    v0 = grid.next((a.V + sides - 1) / sides) * sides;
    col0 = grid.next((width + kBlock - 1) / kBlock) * kBlock;
    row0 = grid.next((count + kBlock - 1) / kBlock) * kBlock;
    head = grid.next(kWanted == Wanted::query ? a.heads : a.key_heads);
    n = grid.rest;
  }

  template <class Tile>
  __device__ void write(const Attention<T>& a, int64_t v, const Tile& sum, T* to, bool accumulate) const {
    const T factor = kWanted == Wanted::value ? T(1) : a.scale;
    INFL_UNROLL(4)
    for (int i = 0; i < Tile::kTileRows; ++i) {
      INFL_UNROLL(4)
      for (int j = 0; j < Tile::kTileCols; ++j) {
        const int64_t row = row0 + Tile::row(i), col = col0 + Tile::col(j);
        if (row >= count || col >= width) continue;
        T& out = to[(v * a.n + n) * at.example + head * at.head + row * at.row + col];
        out = factor * sum.sum[i][j] + (accumulate ? out : T(0));
      }
    }
  }
};

// Adds to the mask's elements of a head and a block of queries and keys; where the mask has no such axis, of all heads of the same offset, of all
// queries, keys or examples, one after the other.
template <class Tile, class Source, class T = typename Tile::Value>
__global__ void __launch_bounds__(kThreads, 1) mask_kernel(const Attention<T> a, const Source source, const AttentionCotangents<T> g) {
  INFL_DYNAMIC_SHARED(T, shared);
  const bool has_rows = a.mask_at.row != 0, has_cols = a.mask_at.col != 0, has_examples = g.mask_example != 0;
  const int64_t* offsets = a.mask_at.offsets;
  Grid grid;
  const int64_t v = grid.next(a.V), s_begin = has_cols ? grid.next((a.S + kBlock - 1) / kBlock) * kBlock : 0;
  const int64_t l_begin = has_rows ? grid.next((a.L + kBlock - 1) / kBlock) * kBlock : 0, first = grid.next(a.heads), n_begin = grid.rest;
  const int64_t s_end = has_cols ? s_begin + 1 : a.S, l_end = has_rows ? l_begin + 1 : a.L, n_end = has_examples ? n_begin + 1 : a.n;
  for (int64_t head = 0; head < first; ++head) {
    if (offsets[head] == offsets[first]) return;  // an earlier block's
  }
  Tile sum;
  sum.clear();
  Scores b{};
  for (b.n = n_begin; b.n < n_end; ++b.n) {
    for (b.head = first; b.head < a.heads; ++b.head) {
      if (offsets[b.head] != offsets[first]) continue;
      for (b.l0 = l_begin; b.l0 < l_end; b.l0 += kBlock) {
        for (b.s0 = s_begin; b.s0 < s_end && b.s0 < end_of_keys(a, b.l0); b.s0 += kBlock) {
          Tile own;
          source(a, b, v, own, shared);
          INFL_UNROLL(4)
          for (int i = 0; i < Tile::kTileRows; ++i) {
            INFL_UNROLL(4)
            for (int j = 0; j < Tile::kTileCols; ++j) sum.sum[i][j] += own.sum[i][j];
          }
        }
      }
    }
  }
  constexpr int kPitch = kBlock + 1;
  static_assert(kBlock * kPitch * sizeof(T) <= shared_bytes<Tile>(1));
  __syncthreads();
  INFL_UNROLL(4)
  for (int i = 0; i < Tile::kTileRows; ++i) {
    INFL_UNROLL(4)
    for (int j = 0; j < Tile::kTileCols; ++j) shared[Tile::row(i) * kPitch + Tile::col(j)] = sum.sum[i][j];
  }
  __syncthreads();
  T* to = g.mask + v * g.mask_stride + (has_examples ? n_begin * g.mask_example : 0) + offsets[first];
  const int rows = has_rows ? 1 : kBlock, cols = has_cols ? 1 : kBlock;  // of the tile that meet in one element
  for (int at = static_cast<int>(threadIdx.x); at < kBlock * kBlock / rows / cols; at += kThreads) {
    const int across = kBlock / cols, row = at / across * rows, col = at % across * cols;
    if (has_rows && l_begin + row >= a.L) continue;
    if (has_cols && s_begin + col >= a.S) continue;
    T total = 0;
    for (int i = row; i < row + rows; ++i) {
      for (int j = col; j < col + cols; ++j) total += shared[i * kPitch + j];
    }
    to[(l_begin + row) * a.mask_at.row + (s_begin + col) * a.mask_at.col] += total;
  }
}

template <class Tile, class T, class Source>
void add_to_mask(const Context& ctx, const char* who, const Attention<T>& a, const Source& source, const AttentionCotangents<T>& g) {
  if (g.mask == nullptr) return;
  const int64_t blocks =
      a.V * (a.mask_at.col ? ceil_div(a.S, kBlock) : 1) * (a.mask_at.row ? ceil_div(a.L, kBlock) : 1) * a.heads * (g.mask_example ? a.n : 1);
  start<Tile>(ctx, who, &mask_kernel<Tile, Source, T>, blocks, 1, a, source, g);
}

}  // namespace
}  // namespace infl::cuda
