// The two products that attention is made of, of 64 rows by 64 rows and of 64 by 64 scores by 64 columns: in registers (float32 in full), or on
// tensor cores in the arithmetic of mma.h. Both bring what is multiplied next from global memory to registers while the last step is multiplied from
// shared memory; on tensor cores it is rounded there and goes to the other of two panels, 16 bytes at a time where rows are aligned.
//
// A step of 32 features of two times 64 rows of float32 is 16 KB for 64 · 64 · 32 multiplications, 8 for each byte that comes from the second-level
// cache, which bounds the products of rows: at 64 bytes a cycle and processor 512 multiplications, what sm_80 does in Tf32 and half of what it does
// in Bfloat16. Products of scores need half as much, since their left factor is in shared memory.
#pragma once

#include <type_traits>

#include "kernels/cuda/mma.h"
#include "kernels/cuda/tile.h"

namespace infl::cuda {
namespace {

constexpr int kBlock = 64, kThreads = 256;

template <class T>
using PlainTile = RegisterTile<T, kBlock, kBlock, 4, 4>;
template <class Kind>
using TensorTile = MmaTile<Kind, kBlock, kBlock, 2, 4>;

// Rows of a matrix, `step` apart, their features contiguous; beyond `count` they are zeros.
template <class T>
struct Rows {
  const T* data;
  int64_t step;
  int64_t count;

  __device__ bool aligned() const { return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(step) * sizeof(T)) % 16 == 0; }

  __device__ int count_in_block() const { return static_cast<int>(count < kBlock ? count : kBlock); }

  // Features k, k + 1, ... of a row, zeros from `end` on.
  template <int W>
  __device__ Vector<T, W> load(bool is_aligned, int64_t row, int64_t k, int64_t end) const {
    Vector<T, W> result;
    const T* from = data + row * step + k;
    if (is_aligned && row < count && k + W <= end) return cuda::load<W>(from);
    INFL_UNROLL(4)
    for (int i = 0; i < W; ++i) result.v[i] = row < count && k + i < end ? from[i] : T(0);
    return result;
  }
};

// How a tile's panels lie in shared memory, in elements: those of two steps where they are filled in turn.
template <class Tile>
struct Layout;

template <class T>
struct Layout<PlainTile<T>> {
  static constexpr int kStep = 16, kPitch = kBlock + kVectorWidth<T>, kPanels = 2 * kStep * kPitch;
};

template <class Kind>
struct Layout<TensorTile<Kind>> {
  static constexpr int kWidth = kVectorWidth<typename Kind::Value>, kStep = kWidth == 4 ? 32 : 8;  // float64 has no registers for more
  static constexpr int kPitch = kBlock + Kind::kColumnPad, kRowPitch = kStep + Kind::kRowPad;
  static constexpr int kRowPanel = kBlock * kRowPitch, kColumnPanel = kStep * kPitch;
  // They hold those of the tile that rounds nothing as well, whose elements are values: for Bfloat16 nearly twice its own.
  static constexpr int kPanels = 4 * kBlock * (kStep + 4) * (sizeof(typename Kind::Value) / sizeof(typename Kind::Element));
  static_assert(4 * kRowPanel <= kPanels && 2 * kColumnPanel <= kPanels);
};

// The tile that rounds no factors, its sums lying in the same registers.
template <class Tile>
struct ExactOf {
  using Type = Tile;
};
template <>
struct ExactOf<TensorTile<Tf32>> {
  using Type = TensorTile<Float32>;
};
template <>
struct ExactOf<TensorTile<Bfloat16>> {
  using Type = TensorTile<Float32>;
};
template <class Tile>
using Exact = typename ExactOf<Tile>::Type;

// Bytes of shared memory: the panels and some tiles of scores.
template <class Tile>
__host__ __device__ constexpr size_t shared_bytes(int tiles) {
  return static_cast<size_t>(Layout<Tile>::kPanels + tiles * kBlock * Layout<Tile>::kPitch) * sizeof(typename Tile::Element);
}

template <class Tile>
__device__ typename Tile::Element* tile_at(typename Tile::Value* shared, int tile) {
  return reinterpret_cast<typename Tile::Element*>(shared) + Layout<Tile>::kPanels + tile * kBlock * Layout<Tile>::kPitch;
}

// sum[i][j] += left_i · right_j over K features.
template <class T>
__device__ void multiply_rows(PlainTile<T>& sum, const Rows<T>& left, const Rows<T>& right, int64_t K, T* shared) {
  using L = Layout<PlainTile<T>>;
  constexpr int kEach = kBlock * L::kStep / kThreads;
  T *a = shared, *b = shared + L::kStep * L::kPitch;
  T next_a[kEach], next_b[kEach];
  const int k = static_cast<int>(threadIdx.x) % L::kStep, row = static_cast<int>(threadIdx.x) / L::kStep;
  // How many of the thread's elements exist, and where the first one is: 32-bit numbers and one address each, for want of registers.
  constexpr int kApart = kThreads / L::kStep;
  const int left_rows = left.count_in_block() - row, right_rows = right.count_in_block() - row;
  const T *from_a = left.data + row * left.step + k, *from_b = right.data + row * right.step + k;
  const auto fetch = [&](int64_t k0) {
    const bool exists = k0 + k < K;
    INFL_UNROLL(4)
    for (int i = 0; i < kEach; ++i) {
      next_a[i] = exists && i * kApart < left_rows ? from_a[k0 + i * kApart * left.step] : T(0);
      next_b[i] = exists && i * kApart < right_rows ? from_b[k0 + i * kApart * right.step] : T(0);
    }
  };
  fetch(0);
  for (int64_t k0 = 0; k0 < K; k0 += L::kStep) {
    __syncthreads();
    INFL_UNROLL(4)
    for (int i = 0; i < kEach; ++i) {
      a[k * L::kPitch + row + i * kApart] = next_a[i];
      b[k * L::kPitch + row + i * kApart] = next_b[i];
    }
    __syncthreads();
    if (k0 + L::kStep < K) fetch(k0 + L::kStep);
    sum.template add<L::kStep>(a, L::kPitch, b, L::kPitch);
  }
}

template <class Kind, class T>
__device__ void multiply_rows(TensorTile<Kind>& sum, const Rows<T>& left, const Rows<T>& right, int64_t K, T* shared) {
  using Tile = TensorTile<Kind>;
  using L = Layout<Tile>;
  constexpr int W = L::kWidth, kAcross = L::kStep / W, kLines = kThreads / kAcross, kEach = kBlock / kLines;
  auto* panels = reinterpret_cast<typename Kind::Element*>(shared);
  const bool left_aligned = left.aligned(), right_aligned = right.aligned();
  const int k = static_cast<int>(threadIdx.x) % kAcross * W, row = static_cast<int>(threadIdx.x) / kAcross;
  Vector<T, W> next_left[kEach], next_right[kEach];
  const auto fetch = [&](int64_t k0) {
    INFL_UNROLL(4)
    for (int i = 0; i < kEach; ++i) {
      next_left[i] = left.template load<W>(left_aligned, row + i * kLines, k0 + k, K);
      next_right[i] = right.template load<W>(right_aligned, row + i * kLines, k0 + k, K);
    }
  };
  const auto keep = [&](int half) {
    auto* to = panels + half * 2 * L::kRowPanel + row * L::kRowPitch + k;
    INFL_UNROLL(4)
    for (int i = 0; i < kEach; ++i) {
      store<W>(to + i * kLines * L::kRowPitch, Tile::elements(next_left[i]));
      store<W>(to + L::kRowPanel + i * kLines * L::kRowPitch, Tile::elements(next_right[i]));
    }
  };
  fetch(0);
  __syncthreads();
  keep(0);
  int half = 0;
  for (int64_t k0 = 0; k0 < K; k0 += L::kStep) {
    __syncthreads();
    const bool more = k0 + L::kStep < K;
    if (more) fetch(k0 + L::kStep);
    const auto* from = panels + half * 2 * L::kRowPanel;
    sum.template add_rows<L::kStep>(from, L::kRowPitch, from + L::kRowPanel, L::kRowPitch);
    half = 1 - half;
    if (more) keep(half);
  }
}

// What a product of this tile makes of its factors.
template <class Tile, int W, class T>
__device__ Vector<T, W> rounded(Vector<T, W> x) {
  INFL_UNROLL(4)
  for (int i = 0; i < W; ++i) {
    if constexpr (std::is_same_v<Tile, TensorTile<Tf32>>) x.v[i] = ptx::float_of(ptx::round_to_tf32(x.v[i]) & ~0x1fffu);
    if constexpr (std::is_same_v<Tile, TensorTile<Bfloat16>>) x.v[i] = ptx::float_of(uint32_t{ptx::round_to_bfloat16(x.v[i])} << 16);
  }
  return x;
}

template <class Tile, class T>
struct RoundedRows : Rows<T> {
  template <int W>
  __device__ Vector<T, W> load(bool is_aligned, int64_t row, int64_t k, int64_t end) const {
    return rounded<Tile>(Rows<T>::template load<W>(is_aligned, row, k, end));
  }
};

// multiply_rows with factors that are not rounded.
template <class Tile, class T>
__device__ void multiply_rows_exactly(Tile& sum, const Rows<T>& left, const Rows<T>& right, int64_t K, T* shared) {
  static_assert(Layout<Exact<Tile>>::kPanels * sizeof(typename Exact<Tile>::Element) <= shared_bytes<Tile>(0));
  if constexpr (std::is_same_v<Exact<Tile>, Tile>) {
    multiply_rows(sum, left, right, K, shared);
  } else {
    Exact<Tile> exact;
    exact.clear();
    multiply_rows(exact, left, right, K, shared);
    INFL_UNROLL(4)
    for (int i = 0; i < Tile::kTileRows; ++i) {
      INFL_UNROLL(4)
      for (int j = 0; j < Tile::kTileCols; ++j) sum.sum[i][j] += exact.sum[i][j];
    }
  }
}

// sum[i][j] += Σ_k tile[k][i] right_k[col0 + j]
template <class T>
__device__ void multiply_tile(PlainTile<T>& sum, const T* tile, const Rows<T>& right, int64_t col0, int64_t cols, T* shared) {
  using L = Layout<PlainTile<T>>;
  constexpr int kEach = kBlock * L::kStep / kThreads;
  T next[kEach];
  const int col = static_cast<int>(threadIdx.x) % kBlock, line = static_cast<int>(threadIdx.x) / kBlock;
  const auto fetch = [&](int k0) {
    INFL_UNROLL(4)
    for (int i = 0; i < kEach; ++i) {
      const int64_t k = k0 + line + i * (kThreads / kBlock);
      next[i] = k < right.count && col0 + col < cols ? right.data[k * right.step + col0 + col] : T(0);
    }
  };
  const int count = right.count_in_block();
  fetch(0);
  for (int k0 = 0; k0 < count; k0 += L::kStep) {
    __syncthreads();
    INFL_UNROLL(4)
    for (int i = 0; i < kEach; ++i) shared[(line + i * (kThreads / kBlock)) * L::kPitch + col] = next[i];
    __syncthreads();
    if (k0 + L::kStep < count) fetch(k0 + L::kStep);
    sum.template add<L::kStep>(tile + k0 * L::kPitch, L::kPitch, shared, L::kPitch);
  }
}

template <class Kind, class Right, class T>
__device__ void multiply_tile(TensorTile<Kind>& sum, const typename Kind::Element* tile, const Right& right, int64_t col0, int64_t cols, T* shared) {
  using Tile = TensorTile<Kind>;
  using L = Layout<Tile>;
  constexpr int W = L::kWidth, kAcross = kBlock / W, kLines = kThreads / kAcross, kEach = L::kStep / kLines;
  auto* panels = reinterpret_cast<typename Kind::Element*>(shared);
  const bool aligned = right.aligned();
  const int col = static_cast<int>(threadIdx.x) % kAcross * W, line = static_cast<int>(threadIdx.x) / kAcross;
  Vector<T, W> next[kEach];
  const auto fetch = [&](int k0) {
    INFL_UNROLL(4)
    for (int i = 0; i < kEach; ++i) next[i] = right.template load<W>(aligned, k0 + line + i * kLines, col0 + col, cols);
  };
  const auto keep = [&](int half) {
    INFL_UNROLL(4)
    for (int i = 0; i < kEach; ++i) {
      store<W>(panels + half * L::kColumnPanel + (line + i * kLines) * L::kPitch + col, Tile::elements(next[i]));
    }
  };
  const int count = right.count_in_block();
  fetch(0);
  __syncthreads();
  keep(0);
  int half = 0;
  for (int k0 = 0; k0 < count; k0 += L::kStep) {
    __syncthreads();
    const bool more = k0 + L::kStep < count;
    if (more) fetch(k0 + L::kStep);
    sum.template add<L::kStep>(tile + k0 * L::kPitch, L::kPitch, panels + half * L::kColumnPanel, L::kPitch);
    half = 1 - half;
    if (more) keep(half);
  }
}

// The tile's rows to shared memory as they are multiplied, once nobody reads what was there. Whoever reads them waits for the panel that he
// multiplies them with.
template <class Tile>
__device__ void put(const Tile& tile, typename Tile::Element* to) {
  constexpr int W = Tile::kWidth;
  __syncthreads();
  INFL_UNROLL(4)
  for (int i = 0; i < Tile::kTileRows; ++i) {
    INFL_UNROLL(4)
    for (int j = 0; j < Tile::kTileCols; j += W) {
      Vector<typename Tile::Value, W> value;
      INFL_UNROLL(4)
      for (int k = 0; k < W; ++k) value.v[k] = tile.sum[i][j + k];
      store<W>(to + Tile::row(i) * Layout<Tile>::kPitch + Tile::col(j), Tile::elements(value));
    }
  }
}

// Runs body<Tile>() with the tile for the context's precision.
template <class T, class Body>
void with_tile(const Context& ctx, const Body& body) {
  if constexpr (sizeof(T) == sizeof(double)) {
    body.template operator()<TensorTile<Float64>>();
  } else if (ctx.precision == Precision::tf32) {
    body.template operator()<TensorTile<Tf32>>();
  } else if (ctx.precision == Precision::bfloat16) {
    body.template operator()<TensorTile<Bfloat16>>();
  } else {
    body.template operator()<PlainTile<T>>();
  }
}

}  // namespace
}  // namespace infl::cuda
