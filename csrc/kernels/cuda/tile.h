// The part of a matrix product that a thread keeps in registers: a block of threads owns a tile of C [kRows, kCols], each thread kTileRows by
// kTileCols of it, and adds products of panels A [K, kRows] and B [K, kCols] that lie in shared memory with K on the slow axis. A thread's rows and
// columns come in groups of 16 bytes, so both panels are read in 16-byte words and without bank conflicts: a step in K costs kTileRows + kTileCols
// elements of shared memory for kTileRows · kTileCols multiplications.
#pragma once

#include "kernels/cuda/vector.h"

namespace infl::cuda {

template <class T, int kRows_, int kCols_, int kTileRows_, int kTileCols_>
struct RegisterTile {
  static constexpr int kRows = kRows_, kCols = kCols_, kTileRows = kTileRows_, kTileCols = kTileCols_;
  using Value = T;
  using Element = T;
  static constexpr int kWidth = kVectorWidth<T>, kColumnPad = 0;
  static constexpr int kAcross = kCols / kTileCols, kDown = kRows / kTileRows, kThreads = kDown * kAcross;
  static_assert(kTileRows % kWidth == 0 && kTileCols % kWidth == 0);

  T sum[kTileRows][kTileCols];

  // Of the tile, the running thread's i-th row and j-th column, and its number among those that share a column.
  __device__ static int row(int i) { return i / kWidth * (kRows / kTileRows * kWidth) + threadIdx.x / kAcross * kWidth + i % kWidth; }
  __device__ static int col(int j) { return j / kWidth * (kAcross * kWidth) + threadIdx.x % kAcross * kWidth + j % kWidth; }

  __device__ static int down() { return static_cast<int>(threadIdx.x) / kAcross; }

  __device__ static T element(T value) { return value; }
  template <int W>
  __device__ static Vector<T, W> elements(const Vector<T, W>& values) {
    return values;
  }

  __device__ void clear() {
    INFL_UNROLL(8)
    for (int i = 0; i < kTileRows; ++i) {
      INFL_UNROLL(8)
      for (int j = 0; j < kTileCols; ++j) sum[i][j] = T(0);
    }
  }

  // sum += Aᵀ B over K steps; rows of the panels lie lda and ldb elements apart, multiples of kWidth.
  template <int K>
  __device__ void add(const T* a, int lda, const T* b, int ldb) {
    a += threadIdx.x / kAcross * kWidth;
    b += threadIdx.x % kAcross * kWidth;
    INFL_UNROLL(16)
    for (int k = 0; k < K; ++k) {
      Vector<T, kWidth> left[kTileRows / kWidth], right[kTileCols / kWidth];
      INFL_UNROLL(8)
      for (int i = 0; i < kTileRows / kWidth; ++i) left[i] = load<kWidth>(a + k * lda + i * (kRows / kTileRows * kWidth));
      INFL_UNROLL(8)
      for (int j = 0; j < kTileCols / kWidth; ++j) right[j] = load<kWidth>(b + k * ldb + j * (kAcross * kWidth));
      INFL_UNROLL(8)
      for (int i = 0; i < kTileRows; ++i) {
        INFL_UNROLL(8)
        for (int j = 0; j < kTileCols; ++j) sum[i][j] += left[i / kWidth].v[i % kWidth] * right[j / kWidth].v[j % kWidth];
      }
    }
  }
};

}  // namespace infl::cuda
