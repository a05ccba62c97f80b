// Everything is made of products of 64 by 64 blocks (queries by keys), whose scores live in registers and shared memory and nowhere else. A block of
// threads owns 64 queries and walks the keys (outputs, tangents, g_q), or owns 64 keys and walks the queries of all heads that read them (g_k, g_v),
// or owns a part of the mask and walks what was broadcast to it: every sum has one owner and one order. Blocks of keys that no query sees are left
// out.
//
// Where P is not kept, a first pass finds the maximum and the inverse sum of each row of scores, so that P of any block is one product and an
// exponential away. The derivative of softmax needs a sum along the row before anything can be multiplied with it:
//
//   jvp   t_o = Σ P ∘ t_S v + P t_v − d ∘ o,  d = rowsum(P ∘ t_S),  all three sums in one walk
//   vjp   rowsum(P ∘ g_P) = rowsum(g_o ∘ o), from outputs that are computed once for all right-hand sides
//
// Operations for each element of P and right-hand side: jvp 4 E + 4 F, g_q and g_k 2 E + 2 F, g_v 2 F. A block takes two right-hand sides together:
// they share P (2 E operations where it is computed, 4 bytes where it is read) and o (2 F); all others of them find q, k and v in the second-level
// cache.
#include "kernels/attention.h"

#include "kernels/cuda/attention_blocks.h"
#include "kernels/movement.h"

namespace infl {
namespace cuda {
namespace {

// ---- Rows of scores --------------------------------------------------------------------------------------------------------------------------

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

template <class T>
__global__ void __launch_bounds__(kThreads) row_sums_kernel(const Attention<T> a, RowSum<T>* sums) {
  INFL_DYNAMIC_SHARED(T, shared);
  Grid grid;
  Scores b{};
  b.l0 = grid.next((a.L + kBlock - 1) / kBlock) * kBlock;
  b.head = grid.next(a.heads);
  b.n = grid.rest;
  Running<T> running[Tile<T>::kTileCols];
  for (; b.s0 < end_of_keys(a, b.l0); b.s0 += kBlock) {
    Tile<T> s;
    s.clear();
    multiply_rows(s, keys(a, a.k, b.n, b), queries(a, a.q, b.n, b), a.E, shared);
    INFL_UNROLL(4)
    for (int j = 0; j < Tile<T>::kTileCols; ++j) {
      const int64_t query = b.l0 + Tile<T>::col(j);
      INFL_UNROLL(4)
      for (int i = 0; i < Tile<T>::kTileRows; ++i) {
        const int64_t key = b.s0 + Tile<T>::row(i);
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
  constexpr int kSharing = kThreads / Tile<T>::kAcross;
  T *maxima = shared, *parts = tile_at(shared, 0);
  __syncthreads();
  INFL_UNROLL(4)
  for (int j = 0; j < Tile<T>::kTileCols; ++j) {
    const int at = static_cast<int>(threadIdx.x) / Tile<T>::kAcross * kBlock + Tile<T>::col(j);
    maxima[at] = running[j].maximum;
    parts[at] = running[j].sum;
  }
  __syncthreads();
  const int64_t query = b.l0 + threadIdx.x;
  if (threadIdx.x >= kBlock || query >= a.L) return;
  Running<T> all;
  for (int k = 0; k < kSharing; ++k) all.add(maxima[k * kBlock + threadIdx.x], parts[k * kBlock + threadIdx.x]);
  sums[(b.n * a.heads + b.head) * a.L + query] = {all.maximum, all.sum == T(0) ? T(0) : T(1) / all.sum};
}

// ---- Outputs and tangents --------------------------------------------------------------------------------------------------------------------

// o = P v, at `o_at`; P itself to `kept` if that is given.
template <class T>
__global__ void __launch_bounds__(kThreads) outputs_kernel(const Attention<T> a, const RowSum<T>* sums, T* kept, HeadStrides o_at, T* o) {
  INFL_DYNAMIC_SHARED(T, shared);
  T* tile = tile_at(shared, 0);
  Grid grid;
  Scores b{};
  const int64_t f0 = grid.next((a.F + kBlock - 1) / kBlock) * kBlock;
  b.l0 = grid.next((a.L + kBlock - 1) / kBlock) * kBlock;
  b.head = grid.next(a.heads);
  b.n = grid.rest;
  Tile<T> out;
  out.clear();
  for (; b.s0 < (kept ? a.S : end_of_keys(a, b.l0)); b.s0 += kBlock) {
    Tile<T> p;
    probabilities<true>(a, b, sums, p, shared);
    put(p, tile);
    multiply_tile(out, tile, values(a, a.v, b.n, b), f0, a.F, shared);
    if (kept == nullptr || f0 != 0) continue;
    for (int at = static_cast<int>(threadIdx.x); at < kBlock * kBlock; at += kThreads) {
      const int64_t query = b.l0 + at / kBlock, key = b.s0 + at % kBlock;
      if (query < a.L && key < a.S) kept[((b.n * a.heads + b.head) * a.L + query) * a.S + key] = tile[at % kBlock * kPitch<T> + at / kBlock];
    }
  }
  INFL_UNROLL(4)
  for (int i = 0; i < Tile<T>::kTileRows; ++i) {
    INFL_UNROLL(4)
    for (int j = 0; j < Tile<T>::kTileCols; ++j) {
      const int64_t query = b.l0 + Tile<T>::row(i), f = f0 + Tile<T>::col(j);
      if (query < a.L && f < a.F) o[b.n * o_at.example + b.head * o_at.head + query * o_at.row + f] = out.sum[i][j];
    }
  }
}

template <class T, int kSides>
__global__ void __launch_bounds__(kThreads) tangents_kernel(const Attention<T> a, const AttentionTangents<T> t, const RowSum<T>* sums, T* t_o) {
  INFL_DYNAMIC_SHARED(T, shared);
  T *p_tile = tile_at(shared, 0), *t_tile = tile_at(shared, 1);
  Grid grid;
  Scores b{};
  const int64_t v0 = grid.next((a.V + kSides - 1) / kSides) * kSides, f0 = grid.next((a.F + kBlock - 1) / kBlock) * kBlock;
  b.l0 = grid.next((a.L + kBlock - 1) / kBlock) * kBlock;
  b.head = grid.next(a.heads);
  b.n = grid.rest;
  const bool scores_move = t.q || t.k || t.mask;
  Tile<T> o, out[kSides];
  T dot[kSides][Tile<T>::kTileCols] = {};
  o.clear();
  INFL_UNROLL(2)
  for (int side = 0; side < kSides; ++side) out[side].clear();
  for (; b.s0 < end_of_keys(a, b.l0); b.s0 += kBlock) {
    Tile<T> s;
    probabilities<true>(a, b, sums, s, shared);
    put(s, p_tile);
    if (scores_move) multiply_tile(o, p_tile, values(a, a.v, b.n, b), f0, a.F, shared);
    INFL_UNROLL(2)
    for (int side = 0; side < kSides; ++side) {
      const int64_t v = v0 + side, e = v * a.n + b.n;
      if (v >= a.V) continue;
      if (scores_move) {
        s.clear();
        if (t.q) multiply_rows(s, keys(a, a.k, b.n, b), queries(a, t.q, e, b), a.E, shared);
        if (t.k) multiply_rows(s, keys(a, t.k, e, b), queries(a, a.q, b.n, b), a.E, shared);
        const T* mask = t.mask ? t.mask + v * t.mask_stride + b.n * a.mask_at.example + a.mask_at.offsets[b.head] : nullptr;
        INFL_UNROLL(4)
        for (int j = 0; j < Tile<T>::kTileCols; ++j) {
          const int64_t query = b.l0 + Tile<T>::col(j);
          INFL_UNROLL(4)
          for (int i = 0; i < Tile<T>::kTileRows; ++i) {
            const int64_t key = b.s0 + Tile<T>::row(i);
            T value = a.scale * s.sum[i][j];
            if (mask && sees(a, query, key)) value += mask[query * a.mask_at.row + key * a.mask_at.col];
            value *= p_tile[Tile<T>::row(i) * kPitch<T> + Tile<T>::col(j)];  // written by this thread
            s.sum[i][j] = value;
            dot[side][j] += value;
          }
        }
        put(s, t_tile);
        multiply_tile(out[side], t_tile, values(a, a.v, b.n, b), f0, a.F, shared);
      }
      if (t.v) multiply_tile(out[side], p_tile, values(a, t.v, e, b), f0, a.F, shared);
    }
  }
  // d: the threads that share a query add up what each has met of it.
  constexpr int kSharing = kThreads / Tile<T>::kAcross;
  INFL_UNROLL(2)
  for (int side = 0; side < kSides; ++side) {
    const int64_t v = v0 + side;
    __syncthreads();
    INFL_UNROLL(4)
    for (int j = 0; j < Tile<T>::kTileCols; ++j) t_tile[threadIdx.x / Tile<T>::kAcross * kBlock + Tile<T>::col(j)] = dot[side][j];
    __syncthreads();
    if (v >= a.V) continue;
    INFL_UNROLL(4)
    for (int i = 0; i < Tile<T>::kTileRows; ++i) {
      T d = 0;
      for (int k = 0; k < kSharing; ++k) d += t_tile[k * kBlock + Tile<T>::row(i)];
      const int64_t query = b.l0 + Tile<T>::row(i);
      INFL_UNROLL(4)
      for (int j = 0; j < Tile<T>::kTileCols; ++j) {
        const int64_t f = f0 + Tile<T>::col(j);
        if (query >= a.L || f >= a.F) continue;
        t_o[(v * a.n + b.n) * a.o_at.example + b.head * a.o_at.head + query * a.o_at.row + f] = out[side].sum[i][j] - d * o.sum[i][j];
      }
    }
  }
}

// ---- Cotangents ------------------------------------------------------------------------------------------------------------------------------

// dots[v, n, head, l] = g_o · o, o [n, heads, L, F]: a warp a row.
template <class T>
__global__ void __launch_bounds__(kThreads) dots_kernel(const Attention<T> a, const T* g_o, const T* o, T* dots) {
  const int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp, rows = a.n * a.heads * a.L;
  if (row >= a.V * rows) return;
  const int64_t l = row % a.L, head = row / a.L % a.heads, e = row / a.L / a.heads;
  const T *from = g_o + e * a.o_at.example + head * a.o_at.head + l * a.o_at.row, *out = o + row % rows * a.F;
  T sum = 0;
  for (int64_t f = threadIdx.x % kWarp; f < a.F; f += kWarp) sum += from[f] * out[f];
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) dots[row] = sum;
}

// g_S without the scale, for one right-hand side: P ∘ (g_o vᵀ − dots).
template <bool kKeysFirst, class T>
__device__ void score_cotangents(const Attention<T>& a, const Scores& b, int64_t v, const T* g_o, const T* dots, const Tile<T>& p, Tile<T>& g,
                                 T* shared) {
  const Rows<T> from = outputs(a, g_o, v * a.n + b.n, b), to = values(a, a.v, b.n, b);
  g.clear();
  multiply_rows(g, kKeysFirst ? to : from, kKeysFirst ? from : to, a.F, shared);
  const T* line = dots + ((v * a.n + b.n) * a.heads + b.head) * a.L;
  INFL_UNROLL(4)
  for (int i = 0; i < Tile<T>::kTileRows; ++i) {
    INFL_UNROLL(4)
    for (int j = 0; j < Tile<T>::kTileCols; ++j) {
      const int64_t query = b.l0 + (kKeysFirst ? Tile<T>::col(j) : Tile<T>::row(i));
      g.sum[i][j] = query < a.L ? p.sum[i][j] * (g.sum[i][j] - line[query]) : T(0);
    }
  }
}

enum class Wanted { query, key, value };

// Part of a cotangent: 64 rows of a head by 64 features.
template <class T, Wanted kWanted, int kSides>
__global__ void __launch_bounds__(kThreads)
    cotangents_kernel(const Attention<T> a, const T* g_o, const RowSum<T>* sums, const T* dots, T* to, bool accumulate) {
  INFL_DYNAMIC_SHARED(T, shared);
  constexpr bool kKeysFirst = kWanted == Wanted::query;
  T* tile = tile_at(shared, 0);
  const int64_t width = kWanted == Wanted::value ? a.F : a.E, count = kWanted == Wanted::query ? a.L : a.S;
  const HeadStrides at = kWanted == Wanted::query ? a.q_at : kWanted == Wanted::key ? a.k_at : a.v_at;
  Grid grid;
  const int64_t v0 = grid.next((a.V + kSides - 1) / kSides) * kSides, col0 = grid.next((width + kBlock - 1) / kBlock) * kBlock;
  const int64_t row0 = grid.next((count + kBlock - 1) / kBlock) * kBlock, head = grid.next(kKeysFirst ? a.heads : a.key_heads);
  Tile<T> sum[kSides];
  INFL_UNROLL(2)
  for (int side = 0; side < kSides; ++side) sum[side].clear();
  const auto add = [&](const Scores& b) {
    Tile<T> p;
    probabilities<kKeysFirst>(a, b, sums, p, shared);
    if (kWanted == Wanted::value) put(p, tile);
    INFL_UNROLL(2)
    for (int side = 0; side < kSides; ++side) {
      const int64_t v = v0 + side;
      if (v >= a.V) continue;
      if constexpr (kWanted == Wanted::value) {
        multiply_tile(sum[side], tile, outputs(a, g_o, v * a.n + b.n, b), col0, width, shared);
      } else {
        Tile<T> g;
        score_cotangents<kKeysFirst>(a, b, v, g_o, dots, p, g, shared);
        put(g, tile);
        multiply_tile(sum[side], tile, kKeysFirst ? keys(a, a.k, b.n, b) : queries(a, a.q, b.n, b), col0, width, shared);
      }
    }
  };
  Scores b{};
  b.n = grid.rest;
  if constexpr (kKeysFirst) {
    b.head = head;
    b.l0 = row0;
    for (; b.s0 < end_of_keys(a, b.l0); b.s0 += kBlock) add(b);
  } else {
    const int64_t group = a.heads / a.key_heads;
    b.s0 = row0;
    for (b.head = head * group; b.head < (head + 1) * group; ++b.head) {
      for (b.l0 = a.causal ? row0 : 0; b.l0 < a.L; b.l0 += kBlock) add(b);
    }
  }
  const T factor = kWanted == Wanted::value ? T(1) : a.scale;
  INFL_UNROLL(2)
  for (int side = 0; side < kSides; ++side) {
    const int64_t v = v0 + side;
    if (v >= a.V) continue;
    INFL_UNROLL(4)
    for (int i = 0; i < Tile<T>::kTileRows; ++i) {
      INFL_UNROLL(4)
      for (int j = 0; j < Tile<T>::kTileCols; ++j) {
        const int64_t row = row0 + Tile<T>::row(i), col = col0 + Tile<T>::col(j);
        if (row >= count || col >= width) continue;
        T& out = to[(v * a.n + b.n) * at.example + head * at.head + row * at.row + col];
        out = factor * sum[side].sum[i][j] + (accumulate ? out : T(0));
      }
    }
  }
}

// Adds to the mask's elements of a head and a block of queries and keys; where the mask has no such axis, of all heads of the same offset, of all
// queries, keys or examples, one after the other.
template <class T>
__global__ void __launch_bounds__(kThreads)
    mask_kernel(const Attention<T> a, const T* g_o, const RowSum<T>* sums, const T* dots, const AttentionCotangents<T> g) {
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
  Tile<T> sum;
  sum.clear();
  Scores b{};
  for (b.n = n_begin; b.n < n_end; ++b.n) {
    for (b.head = first; b.head < a.heads; ++b.head) {
      if (offsets[b.head] != offsets[first]) continue;
      for (b.l0 = l_begin; b.l0 < l_end; b.l0 += kBlock) {
        for (b.s0 = s_begin; b.s0 < s_end && b.s0 < end_of_keys(a, b.l0); b.s0 += kBlock) {
          Tile<T> p, own;
          probabilities<false>(a, b, sums, p, shared);
          score_cotangents<false>(a, b, v, g_o, dots, p, own, shared);
          INFL_UNROLL(4)
          for (int i = 0; i < Tile<T>::kTileRows; ++i) {
            INFL_UNROLL(4)
            for (int j = 0; j < Tile<T>::kTileCols; ++j) sum.sum[i][j] += own.sum[i][j];
          }
        }
      }
    }
  }
  T* tile = tile_at(shared, 0);
  put(sum, tile);
  __syncthreads();
  T* to = g.mask + v * g.mask_stride + (has_examples ? n_begin * g.mask_example : 0) + offsets[first];
  const int rows = has_rows ? 1 : kBlock, cols = has_cols ? 1 : kBlock;  // of the tile that meet in one element
  for (int at = static_cast<int>(threadIdx.x); at < kBlock * kBlock / rows / cols; at += kThreads) {
    const int across = kBlock / cols, row = at / across * rows, col = at % across * cols;
    if (has_rows && l_begin + row >= a.L) continue;
    if (has_cols && s_begin + col >= a.S) continue;
    T total = 0;
    for (int i = row; i < row + rows; ++i) {
      for (int j = col; j < col + cols; ++j) total += tile[i * kPitch<T> + j];
    }
    to[(l_begin + row) * a.mask_at.row + (s_begin + col) * a.mask_at.col] += total;
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

// Of every row of scores, where P is to be computed.
template <class T>
Buffer<RowSum<T>> row_sums(const Context& ctx, const Attention<T>& a) {
  Buffer<RowSum<T>> sums(ctx, a.n * a.heads * a.L);
  start(ctx, "attention_row_sums", &row_sums_kernel<T>, blocks_of(a, a.heads, a.L, 1), 1, a, sums.data());
  return sums;
}

template <class T>
void attention_forward(const Context& ctx, const Attention<T>& given, T* o) {
  if (given.n == 0) return;
  Attention<T> a = given;
  a.p = nullptr;  // to be computed
  const Buffer<RowSum<T>> sums = row_sums(ctx, a);
  start(ctx, "attention_forward", &outputs_kernel<T>, blocks_of(a, a.heads, a.L, a.F), 1, a, sums.data(), given.p, a.o_at, o);
}

template <class T>
void attention_jvp(const Context& ctx, const Attention<T>& a, const AttentionTangents<T>& t, T* t_o) {
  if (a.n == 0 || a.V == 0) return;
  const Buffer<RowSum<T>> sums = a.p ? Buffer<RowSum<T>>() : row_sums(ctx, a);
  const int64_t blocks = blocks_of(a, a.heads, a.L, a.F);
  if (a.V == 1) return start(ctx, "attention_jvp", &tangents_kernel<T, 1>, blocks, 2, a, t, sums.data(), t_o);
  start(ctx, "attention_jvp", &tangents_kernel<T, kShared>, blocks * ceil_div(a.V, kShared), 2, a, t, sums.data(), t_o);
}

template <class T, Wanted kWanted>
void cotangents(const Context& ctx, const Attention<T>& a, const T* g_o, const RowSum<T>* sums, const T* dots, T* to, bool accumulate) {
  if (to == nullptr) return;
  const int64_t width = kWanted == Wanted::value ? a.F : a.E, rows = kWanted == Wanted::query ? a.L : a.S;
  const int64_t blocks = blocks_of(a, kWanted == Wanted::query ? a.heads : a.key_heads, rows, width);
  if (a.V == 1) return start(ctx, "attention_vjp", &cotangents_kernel<T, kWanted, 1>, blocks, 1, a, g_o, sums, dots, to, accumulate);
  start(ctx, "attention_vjp", &cotangents_kernel<T, kWanted, kShared>, blocks * ceil_div(a.V, kShared), 1, a, g_o, sums, dots, to, accumulate);
}

template <class T>
void attention_vjp(const Context& ctx, const Attention<T>& a, const T* g_o, const AttentionCotangents<T>& g) {
  if (a.n == 0 || a.V == 0) return;
  const Buffer<RowSum<T>> sums = a.p ? Buffer<RowSum<T>>() : row_sums(ctx, a);
  cotangents<T, Wanted::value>(ctx, a, g_o, sums.data(), nullptr, g.v, g.accumulate);
  if (g.q == nullptr && g.k == nullptr && g.mask == nullptr) return;
  const int64_t rows = a.n * a.heads * a.L;
  Buffer<T> o(ctx, rows * a.F), dots(ctx, a.V * rows);
  const HeadStrides o_at{a.heads * a.L * a.F, a.L * a.F, a.F};
  start(ctx, "attention_vjp", &outputs_kernel<T>, blocks_of(a, a.heads, a.L, a.F), 1, a, sums.data(), static_cast<T*>(nullptr), o_at, o.data());
  launch(ctx, "attention_vjp", &dots_kernel<T>, dim3(static_cast<unsigned>(ceil_div(a.V * rows, kThreads / kWarp))), dim3(kThreads), 0, a, g_o,
         o.data(), dots.data());
  cotangents<T, Wanted::query>(ctx, a, g_o, sums.data(), dots.data(), g.q, g.accumulate);
  cotangents<T, Wanted::key>(ctx, a, g_o, sums.data(), dots.data(), g.k, g.accumulate);
  if (g.mask == nullptr) return;
  if (!g.accumulate) copy_rows_stub<T>(ctx, a.V, g.mask_example ? a.n * g.mask_example : g.mask_size, nullptr, 0, g.mask, g.mask_stride, false);
  const int64_t blocks =
      a.V * (a.mask_at.col ? ceil_div(a.S, kBlock) : 1) * (a.mask_at.row ? ceil_div(a.L, kBlock) : 1) * a.heads * (g.mask_example ? a.n : 1);
  start(ctx, "attention_vjp", &mask_kernel<T>, blocks, 1, a, g_o, sums.data(), dots.data(), g);
}

INFL_REGISTER_CUDA(attention_forward_stub, attention_forward)
INFL_REGISTER_CUDA(attention_jvp_stub, attention_jvp)
INFL_REGISTER_CUDA(attention_vjp_stub, attention_vjp)

}  // namespace
}  // namespace cuda
}  // namespace infl
