// mlp: products with the Jacobian J of a chain of dense layers y_l = φ_l(W_l y_{l−1} + b_l), l = 1..L, a tile of examples at a time through the
// whole chain, with one or two launches for all V right-hand sides. Of v, g and t_out, given are
//
//   v             out[v]   = Σ_n J_nᵀ H_n J_n v[v]     product with the Gauss-Newton matrix, H_n as in output_hessian.h
//   v, t_out      t_out[v] = J v[v]                    [V, N, C]
//   g             out[v]   = Σ_n J_nᵀ g[v, n]          g [V, N, C]
//
// v and out are flat vectors [V, P]; of `out` the places of parameters that the chain does not differentiate are left as they are. Deterministic.
// A device's alone: on the CPU a tile that stays in the cache is what the schedule "by example" is, with a call for each node.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/dispatch.h"
#include "kernels/output_hessian.h"

namespace infl {

inline constexpr int kMaxMlpDepth = 16;   // layers travel as a kernel's argument
inline constexpr int kMaxMlpWidth = 256;  // of every layer's outputs; inputs of the first are read from memory step by step, as many as there are

template <class T>
struct MlpLayer {
  int inputs = 0, outputs = 0;
  // W[o, i] at weight[o * out_stride + i * in_stride]; its tangent and gradient lie alike.
  const T* weight = nullptr;
  int out_stride = 0, in_stride = 0;
  int64_t weight_at = -1, bias_at = -1;  // where they begin in a flat vector, −1: not differentiated
  const T* x = nullptr;                  // [N, inputs] y_{l−1}, given if W is differentiated
  const T* scale = nullptr;              // [N, outputs] φ', or absent: 1
};

template <class T>
struct Mlp {
  int depth = 0;
  MlpLayer<T> layers[kMaxMlpDepth] = {};
  int64_t V = 0, N = 0, P = 0;
  const T *v = nullptr, *g = nullptr;
  OutputHessian<T> hessian = {};
  T *t_out = nullptr, *out = nullptr;
};

template <class T>
inline KernelStub<void(const Context&, const Mlp<T>&)> mlp_stub{"mlp"};
INFL_DEVICE_KERNEL(mlp_stub)

// ---- Sizes and costs, counted ------------------------------------------------------------------------------------------------------------------

struct MlpShape {
  int width = 0;            // the widest layer's outputs
  int64_t weights = 0;      // Σ inputs · outputs
  int64_t activations = 0;  // Σ inputs + outputs
  int depth = 0;
};

// How the examples of each right-hand side are dealt out: a block of threads takes one right-hand side and one of `slices` runs of tiles.
struct MlpTiling {
  int rows = 0;  // examples of a tile
  int64_t tiles = 0, slices = 0;
};

inline constexpr int64_t kMlpSharedBytes = 99 << 10;  // what a block may have on every device since compute capability 8.0
inline constexpr int64_t kMlpBlocks = 264;            // two for each processor of the largest device

// Shared memory of a block, at most: two tiles of activations with features down, one with features across, two steps of either factor.
template <class T>
int64_t mlp_shared_bytes(int rows, int width) {
  constexpr int64_t kStep = 64 / sizeof(T), kPad = 8, kCols = 128;
  const int64_t wide = (width + 31) / 32 * 32;
  return static_cast<int64_t>(sizeof(T)) * (2 * wide * (rows + kPad) + rows * (wide + kPad) + 2 * kStep * (kCols + kPad + rows + kPad));
}

// Large tiles read each weight for more examples; small ones where large ones would leave processors without work or not fit.
template <class T>
MlpTiling mlp_tiling(int64_t V, int64_t N, int width) {
  constexpr int kLarge = 128 / sizeof(T), kSmall = kLarge / 2;
  const auto tiles = [&](int rows) { return (N + rows - 1) / rows; };
  const bool large = V * tiles(kLarge) >= kMlpBlocks / 2 && mlp_shared_bytes<T>(kLarge, width) <= kMlpSharedBytes;
  MlpTiling tiling;
  tiling.rows = large ? kLarge : kSmall;
  tiling.tiles = tiles(tiling.rows);
  tiling.slices = std::clamp<int64_t>(kMlpBlocks / std::max<int64_t>(V, 1), 1, std::max<int64_t>(tiling.tiles, 1));
  return tiling;
}

// Bytes of a product beyond operands and result: the sums of the runs, added up at the end.
template <class T>
int64_t mlp_workspace(int64_t V, int64_t N, int64_t P, int width) {
  const int64_t slices = mlp_tiling<T>(V, N, width).slices;
  return slices > 1 ? V * slices * P * static_cast<int64_t>(sizeof(T)) : 0;
}

// Whether a Gauss-Newton product takes fewer bytes so than layer by layer, a launch counted as what memory moves in its time. Elements by right-hand
// side, every access counted whichever memory serves it:
//   fused             a tile: W twice, the tangent of W once, the gradient written and read; an example: x and φ' twice
//   layer by layer    an example: tangents are written, added to and scaled (5 outputs + 2 inputs of a layer), cotangents read three times, written
//                     and scaled (3 outputs + 4 inputs); the tangent of W read, its gradient written; two products, epilogue | gradient of W and b,
//                     product, epilogue
template <class T>
bool mlp_pays(const MlpShape& shape, int64_t V, int64_t N) {
  constexpr double kLaunchBytes = 8e6;  // 2.7 µs at 3 TB/s
  const MlpTiling tiling = mlp_tiling<T>(V, N, shape.width);
  const double size = sizeof(T), columns = static_cast<double>(V);
  const double fused = size * columns * (5.0 * tiling.tiles * shape.weights + 2.0 * N * shape.activations) + 2 * kLaunchBytes;
  const double by_layer = size * columns * (7.0 * N * shape.activations + 2.0 * shape.weights) + (7.0 * shape.depth + 2) * kLaunchBytes;
  return fused < by_layer;
}

}  // namespace infl
