// output_hessian: multiply a loss Hessian H_n = w_n (s I | diag d_n | diag p_n − p_n p_nᵀ), or a factor S_n of it (S_n S_nᵀ = H_n), onto
// cotangents in place:
//
//   product          u[v, n] <- H_n u[v, n]
//   root             u[v, n] <- S_n u[v, n]
//   root_transposed  u[v, n] <- S_nᵀ u[v, n]
//
// Every loss whose Hessian has one of these shapes needs no code of its own here. Softmax: S = diag(√p) − p √pᵀ, for then
// S Sᵀ = diag p − p pᵀ because Σ p = 1. A softmax at each of several positions of an example is block-diagonal: u and state [.., K, positions]
// with C = K · positions, weights [n, positions]; or [.., positions, K] where classes are innermost. Otherwise: u [V, n, C] contiguous, state [n, C],
// weights [n] or absent. Deterministic.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace infl {

enum class HessianShape : int { scaled_identity = 0, diagonal = 1, softmax = 2 };
enum class HessianPart : int { product = 0, root = 1, root_transposed = 2 };

template <class T>
struct OutputHessian {
  HessianShape shape = HessianShape::scaled_identity;
  int64_t C = 0;
  T scale = 1;                 // multiplies H (not its root alone: the root takes the square root of it)
  const T* state = nullptr;    // d or p of the first example of the tile
  const T* weights = nullptr;  // w of the first example of the tile, all >= 0
  int64_t positions = 1;       // more than one for the softmax shape only
  bool classes_innermost = false;
  bool untransposed = false;  // of the value whose transposition the network's outputs are (plan.h), not of these

  // The same from example n0 on.
  OutputHessian from(int64_t n0) const {
    OutputHessian tile = *this;
    if (tile.state) tile.state += n0 * C;
    if (tile.weights) tile.weights += n0 * positions;
    return tile;
  }
  // The same with every position for an example, where classes are innermost.
  OutputHessian by_position() const {
    OutputHessian rows = *this;
    rows.C = C / positions;
    rows.positions = 1;
    rows.classes_innermost = false;
    return rows;
  }
};

template <class T>
inline KernelStub<void(const Context&, const OutputHessian<T>&, HessianPart part, int64_t V, int64_t n, T* u)> output_hessian_stub{"output_hessian"};

}  // namespace infl
