// Everything is made of products of 64 by 64 blocks (queries by keys), whose scores live in registers and shared memory and nowhere else. A block of
// threads owns 64 queries and walks the keys (outputs, tangents, g_q), or owns 64 keys and walks the queries of all heads that read them (g_k, g_v),
// or owns a part of the mask and walks what was broadcast to it: every sum has one owner and one order. Blocks of keys that no query sees are left
// out.
//
// Where P is not kept, a first pass finds the maximum and the inverse sum of each row of scores, so that P of any block is one product and an
// exponential away. The derivative of softmax needs a sum along the row before anything can be multiplied with it:
//
//   jvp   t_o = Σ P ∘ (t_S − r) v + P t_v − d ∘ o,  d = rowsum(P ∘ (t_S − r)),  all three sums in one walk
//   vjp   rowsum(P ∘ g_P) = rowsum(g_o ∘ o), from outputs that are computed once for all right-hand sides
//
// What all tangents of a row have in common is no tangent of P. d ∘ o would take it off again, but only after P ∘ t_S was rounded as a factor; so it
// is taken off first, as r, the mean under P over the first block of keys.
//
// Operations for each element of P and right-hand side: jvp 4 E + 4 F, g_q and g_k 2 E + 2 F, g_v 2 F. A block takes two right-hand sides together:
// they share P (2 E operations where it is computed, 4 bytes where it is read) and o (2 F); all others of them find q, k and v in the second-level
// cache. The products run in registers or on tensor cores, as the precision says (attention_products.h), and all else in float32 or float64: only
// factors of products are rounded, and of those not q and k where they give P, nor P and v where they give the o of the sums of rows, which takes
// three times the operations of a product that rounds. With two right-hand sides a thread keeps five tiles of 16 sums in tangents and four in
// cotangents, which leaves room for one block of eight warps on a processor. Where a bound says so, one block is all that is asked for: left to
// itself the compiler makes some of these kernels fit twice, at 128 registers, and spills.
#include "kernels/attention.h"

#include "kernels/cuda/attention_cotangents.h"
#include "kernels/cuda/attention_rows.h"
#include "kernels/movement.h"

namespace infl {
namespace cuda {
namespace {

// ---- Outputs and tangents --------------------------------------------------------------------------------------------------------------------

// means[query]: the mean of s under p over the keys of a block, 0 where p has no weight there, so that hidden keys leave no trace in it.
template <class Tile, class T = typename Tile::Value>
__device__ void block_means(const Tile& p, const Tile& s, T* shared, T* means) {
  static_assert(2 * Tile::kDown * kBlock * sizeof(T) <= shared_bytes<Tile>(0));
  T *weights = shared, *moments = shared + Tile::kDown * kBlock;
  __syncthreads();  // the panels have been read
  INFL_UNROLL(4)
  for (int j = 0; j < Tile::kTileCols; ++j) {
    T weight = 0, moment = 0;
    INFL_UNROLL(4)
    for (int i = 0; i < Tile::kTileRows; ++i) {
      weight += p.sum[i][j];
      moment += p.sum[i][j] * s.sum[i][j];
    }
    const int at = Tile::down() * kBlock + Tile::col(j);
    weights[at] = weight;
    moments[at] = moment;
  }
  __syncthreads();
  if (threadIdx.x < kBlock) {
    T weight = 0, moment = 0;
    for (int k = 0; k < Tile::kDown; ++k) {
      weight += weights[k * kBlock + threadIdx.x];
      moment += moments[k * kBlock + threadIdx.x];
    }
    means[threadIdx.x] = weight > T(0) ? moment / weight : T(0);
  }
  __syncthreads();
}

template <class Tile, int kSides, class T = typename Tile::Value>
__global__ void __launch_bounds__(kThreads, 1) tangents_kernel(const Attention<T> a, const AttentionTangents<T> t, const RowSum<T>* sums, T* t_o) {
  INFL_DYNAMIC_SHARED(T, shared);
  auto *p_tile = tile_at<Tile>(shared, 0), *t_tile = tile_at<Tile>(shared, 1);
  Grid grid;
  Scores b{};
  const int64_t v0 = grid.next((a.V + kSides - 1) / kSides) * kSides, f0 = grid.next((a.F + kBlock - 1) / kBlock) * kBlock;
  b.l0 = grid.next((a.L + kBlock - 1) / kBlock) * kBlock;
  b.head = grid.next(a.heads);
  b.n = grid.rest;
  const bool moves = scores_move(t);
  Tile o, out[kSides];
  __shared__ T reference[kSides][kBlock];
  T dot[kSides][Tile::kTileCols] = {};
  o.clear();
  INFL_UNROLL(2)
  for (int side = 0; side < kSides; ++side) out[side].clear();
  for (; b.s0 < end_of_keys(a, b.l0); b.s0 += kBlock) {
    Tile p;
    probabilities<true>(a, b, sums, p, shared);
    put(p, p_tile);
    if (moves) multiply_tile(o, p_tile, values(a, a.v, b.n, b), f0, a.F, shared);
    INFL_UNROLL(2)
    for (int side = 0; side < kSides; ++side) {
      const int64_t v = v0 + side, e = v * a.n + b.n;
      if (v >= a.V) continue;
      if (moves) {
        Tile s;
        score_tangents<true>(a, t, b, v, s, shared);
        if (b.s0 == 0) block_means(p, s, shared, reference[side]);
        INFL_UNROLL(4)
        for (int j = 0; j < Tile::kTileCols; ++j) {
          const T r = reference[side][Tile::col(j)];
          INFL_UNROLL(4)
          for (int i = 0; i < Tile::kTileRows; ++i) {
            s.sum[i][j] = (s.sum[i][j] - r) * p.sum[i][j];
            dot[side][j] += s.sum[i][j];
          }
        }
        put(s, t_tile);
        multiply_tile(out[side], t_tile, values(a, a.v, b.n, b), f0, a.F, shared);
      }
      if (t.v) multiply_tile(out[side], p_tile, values(a, t.v, e, b), f0, a.F, shared);
    }
  }
  // d: the threads that share a query add up what each has met of it.
  static_assert(Tile::kDown * kBlock * sizeof(T) <= shared_bytes<Tile>(0));
  INFL_UNROLL(2)
  for (int side = 0; side < kSides; ++side) {
    const int64_t v = v0 + side;
    __syncthreads();
    INFL_UNROLL(4)
    for (int j = 0; j < Tile::kTileCols; ++j) shared[Tile::down() * kBlock + Tile::col(j)] = dot[side][j];
    __syncthreads();
    if (v >= a.V) continue;
    INFL_UNROLL(4)
    for (int i = 0; i < Tile::kTileRows; ++i) {
      T d = 0;
      for (int k = 0; k < Tile::kDown; ++k) d += shared[k * kBlock + Tile::row(i)];
      const int64_t query = b.l0 + Tile::row(i);
      INFL_UNROLL(4)
      for (int j = 0; j < Tile::kTileCols; ++j) {
        const int64_t f = f0 + Tile::col(j);
        if (query >= a.L || f >= a.F) continue;
        t_o[(v * a.n + b.n) * a.o_at.example + b.head * a.o_at.head + query * a.o_at.row + f] = out[side].sum[i][j] - d * o.sum[i][j];
      }
    }
  }
}

// ---- Cotangents ------------------------------------------------------------------------------------------------------------------------------

// Blocks of threads on a processor that are asked for: two where the sums are in registers and 128 of them hold all, one, or (0) the compiler's
// choice.
template <class Tile, Wanted kWanted, int kSides>
constexpr int kCotangentBlocks = 1;
template <class T, Wanted kWanted, int kSides>
constexpr int kCotangentBlocks<PlainTile<T>, kWanted, kSides> = kSides == 1                ? 0
                                                                : kWanted == Wanted::value ? 2
                                                                                           : 1;

template <class Tile, Wanted kWanted, int kSides, class T = typename Tile::Value>
__global__ void __launch_bounds__(kThreads, kCotangentBlocks<Tile, kWanted, kSides>)
    cotangents_kernel(const Attention<T> a, const T* g_o, const RowSum<T>* sums, const T* dots, T* to, bool accumulate) {
  INFL_DYNAMIC_SHARED(T, shared);
  constexpr bool kKeysFirst = kWanted == Wanted::query;
  auto* tile = tile_at<Tile>(shared, 0);
  const Part<T, kWanted> part(a, kSides);
  Tile sum[kSides];
  INFL_UNROLL(2)
  for (int side = 0; side < kSides; ++side) sum[side].clear();
  walk<kWanted>(a, part.n, part.head, part.row0, [&](const Scores& b) {
    Tile p;
    probabilities<kKeysFirst>(a, b, sums, p, shared);
    if (kWanted == Wanted::value) put(p, tile);
    INFL_UNROLL(2)
    for (int side = 0; side < kSides; ++side) {
      const int64_t v = part.v0 + side;
      if (v >= a.V) continue;
      if constexpr (kWanted == Wanted::value) {
        multiply_tile(sum[side], tile, outputs(a, g_o, v * a.n + b.n, b), part.col0, part.width, shared);
      } else {
        Tile g;
        centred_cotangents<kKeysFirst, false>(a, b, v, g_o, dots, g, shared);
        weigh(g, p);
        put(g, tile);
        multiply_tile(sum[side], tile, kKeysFirst ? keys(a, a.k, b.n, b) : queries(a, a.q, b.n, b), part.col0, part.width, shared);
      }
    }
  });
  INFL_UNROLL(2)
  for (int side = 0; side < kSides; ++side) {
    if (part.v0 + side < a.V) part.write(a, part.v0 + side, sum[side], to, accumulate);
  }
}

// g_S without the scale, as the mask's cotangent sums it up.
template <class T>
struct ScoreCotangents {
  const T* g_o;
  const RowSum<T>* sums;
  const T* dots;
  template <class Tile>
  __device__ void operator()(const Attention<T>& a, const Scores& b, int64_t v, Tile& g, T* shared) const {
    Tile p;
    probabilities<false>(a, b, sums, p, shared);
    centred_cotangents<false, false>(a, b, v, g_o, dots, g, shared);
    weigh(g, p);
  }
};

// ---- Launching -------------------------------------------------------------------------------------------------------------------------------

template <class T>
void attention_forward(const Context& ctx, const Attention<T>& given, T* o) {
  if (given.n == 0) return;
  Attention<T> a = given;
  a.p = nullptr;  // to be computed
  with_tile<T>(ctx, [&]<class Tile>() {
    const Buffer<RowSum<T>> sums = row_sums<Tile>(ctx, a);
    start<Tile>(ctx, "attention_forward", &outputs_kernel<Tile, Tile>, blocks_of(a, a.heads, a.L, a.F), 1, a, sums.data(), given.p, a.o_at, o);
  });
}

template <class T>
void attention_jvp(const Context& ctx, const Attention<T>& a, const AttentionTangents<T>& t, T* t_o) {
  if (a.n == 0 || a.V == 0) return;
  constexpr const char* kWho = "attention_jvp";
  with_tile<T>(ctx, [&]<class Tile>() {
    const Buffer<RowSum<T>> sums = a.p ? Buffer<RowSum<T>>() : row_sums<Tile>(ctx, a);
    const int64_t blocks = blocks_of(a, a.heads, a.L, a.F);
    if (a.V == 1) return start<Tile>(ctx, kWho, &tangents_kernel<Tile, 1>, blocks, 2, a, t, sums.data(), t_o);
    start<Tile>(ctx, kWho, &tangents_kernel<Tile, kShared>, blocks * ceil_div(a.V, kShared), 2, a, t, sums.data(), t_o);
  });
}

template <class Tile, Wanted kWanted, class T>
void cotangents(const Context& ctx, const Attention<T>& a, const T* g_o, const RowSum<T>* sums, const T* dots, T* to, bool accumulate) {
  if (to == nullptr) return;
  const int64_t width = kWanted == Wanted::value ? a.F : a.E, rows = kWanted == Wanted::query ? a.L : a.S;
  const int64_t blocks = blocks_of(a, kWanted == Wanted::query ? a.heads : a.key_heads, rows, width);
  constexpr const char* kWho = "attention_vjp";
  if (a.V == 1) return start<Tile>(ctx, kWho, &cotangents_kernel<Tile, kWanted, 1>, blocks, 1, a, g_o, sums, dots, to, accumulate);
  start<Tile>(ctx, kWho, &cotangents_kernel<Tile, kWanted, kShared>, blocks * ceil_div(a.V, kShared), 1, a, g_o, sums, dots, to, accumulate);
}

template <class T>
void attention_vjp(const Context& ctx, const Attention<T>& a, const T* g_o, const AttentionCotangents<T>& g) {
  if (a.n == 0 || a.V == 0) return;
  with_tile<T>(ctx, [&]<class Tile>() {
    const Buffer<RowSum<T>> sums = a.p ? Buffer<RowSum<T>>() : row_sums<Tile>(ctx, a);
    cotangents<Tile, Wanted::value>(ctx, a, g_o, sums.data(), static_cast<const T*>(nullptr), g.v, g.accumulate);
    if (g.q == nullptr && g.k == nullptr && g.mask == nullptr) return;
    const Buffer<T> dots = row_dots<Tile, Tile>(ctx, a, a.V, g_o, sums.data());
    cotangents<Tile, Wanted::query>(ctx, a, g_o, sums.data(), dots.data(), g.q, g.accumulate);
    cotangents<Tile, Wanted::key>(ctx, a, g_o, sums.data(), dots.data(), g.k, g.accumulate);
    if (g.mask && !g.accumulate) {
      copy_rows_stub<T>(ctx, a.V, g.mask_example ? a.n * g.mask_example : g.mask_size, nullptr, 0, g.mask, g.mask_stride, false);
    }
    add_to_mask<Tile>(ctx, "attention_vjp", a, ScoreCotangents<T>{g_o, sums.data(), dots.data()}, g);
  });
}

INFL_REGISTER_CUDA(attention_forward_stub, attention_forward)
INFL_REGISTER_CUDA(attention_jvp_stub, attention_jvp)
INFL_REGISTER_CUDA(attention_vjp_stub, attention_vjp)

}  // namespace
}  // namespace cuda
}  // namespace infl
