// The gradients J_nᵀ g[v, n] of every example, for cotangents g [V, N, C] of a tape's outputs, and what is computed from them.
//
// Each quantity takes one cotangent sweep of its own: tile by tile where a tile's gradients are all that it needs (its factors never leave the
// cache), over all examples at once for the Gram matrix, which compares every example with every other.
#pragma once

#include <functional>

#include "per_example/factors.h"
#include "plan/tape.h"

namespace infl {

template <class T>
class ExampleGradients {
 public:
  // Tape and cotangents must outlive it.
  ExampleGradients(const Tape<T>& tape, int64_t V, const T* g) : tape_(tape), V_(V), g_(g) {}

  int64_t num_vectors() const { return V_; }
  int64_t num_examples() const { return tape_.num_examples(); }

  void materialise(const Context& ctx, T* out) const;                             // [V, N, P]
  void square_norms(const Context& ctx, T* out) const;                            // [V, N]
  void dots(const Context& ctx, int64_t W, const T* u, T* out) const;             // u [W, P] -> [V, W, N] inner products
  std::vector<int64_t> regions() const;                                           // where those begin that influence the output (common/slot.h)
  void square_norms(const Context& ctx, const std::vector<T*>& by_region) const;  // [V, N] each, of regions(); in one sweep
  void square_sum(const Context& ctx, T* out) const;                              // [P]: Σ over v and n of the squared entries
  void gram(const Context& ctx, const ExampleGradients& other, T* out) const;     // [V N, V' N'] inner products
  // The factors of every slot whose region has nothing but outer products of all of it, those of a convolution at each position: body(factor), for
  // all examples at once. They are gone when the call returns.
  void outer_products(const Context& ctx, const std::function<void(const Factor<T>&)>& body) const;

 private:
  struct Whole;  // factors of all examples, and their memory

  const Tape<T>& tape_;
  int64_t V_;
  const T* g_;
};

extern template class ExampleGradients<float>;
extern template class ExampleGradients<double>;

}  // namespace infl
