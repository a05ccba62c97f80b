// cross_entropy: softmax cross-entropy. Results that are not wanted are passed as null. Deterministic.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace infl {

// Softmax cross-entropy at each of `positions` places: z [N, K, positions], softmax over K. With a target distribution q (a class index, or
// probabilities; smoothed towards the uniform one and times the weight of its class) and its mass Q = Σ_k q_k:
//   ℓ = s Σ (Q logsumexp(z) − q·z),   ∇ℓ = s (Q p − q),   H = s Q (diag p − p pᵀ),   D(z, z_s) = s Σ Q KL(p_s ‖ p).
// p [N, K, positions] and mass = s Q [N, positions] are the Hessian's state. An index −1 has Q = 0: the place is ignored.
template <class T>
struct CrossEntropy {
  int64_t N = 0, K = 0, positions = 1;
  T s = 1, smoothing = 0;
  const T* z = nullptr;
  const int64_t* index = nullptr;   // [N, positions], or
  const T* target = nullptr;        // [N, K, positions]
  const T* class_weight = nullptr;  // [K] or absent
  T* value = nullptr;               // [N]
  T* gradient = nullptr;            // [N, K, positions]
  T* p = nullptr;
  T* mass = nullptr;
  const T* z_s = nullptr;  // for bregman
  T* bregman = nullptr;    // [N]
};

template <class T>
inline KernelStub<void(const Context&, const CrossEntropy<T>&)> cross_entropy_stub{"cross_entropy"};

}  // namespace infl
